"""``moe-triton bench vllm`` of this checkout."""

import sys

from moe_triton.cli import main

sys.exit(main(["bench", "vllm", *sys.argv[1:]]))
