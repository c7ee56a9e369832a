"""``moe-triton bench load`` of this checkout."""

import sys

from moe_triton.cli import main

sys.exit(main(["bench", "load", *sys.argv[1:]]))
