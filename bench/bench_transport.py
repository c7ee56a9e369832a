"""``moe-triton bench transport`` of this checkout."""

import sys

from moe_triton.cli import main

sys.exit(main(["bench", "transport", *sys.argv[1:]]))
