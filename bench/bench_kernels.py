"""``moe-triton bench kernels`` of this checkout."""

import sys

from moe_triton.cli import main

sys.exit(main(["bench", "kernels", *sys.argv[1:]]))
