"""``python -m moe_triton.record SCRIPT``, also under torchrun and ``moe-triton npu-run -m``."""

from __future__ import annotations

import argparse

from .command import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m moe_triton.record", description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())
