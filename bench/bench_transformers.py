"""``moe-triton bench transformers`` of this checkout."""

import sys

from moe_triton.cli import main

sys.exit(main(["bench", "transformers", *sys.argv[1:]]))
