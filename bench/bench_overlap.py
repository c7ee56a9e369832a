"""``moe-triton bench overlap`` of this checkout."""

import sys

from moe_triton.cli import main

sys.exit(main(["bench", "overlap", *sys.argv[1:]]))
