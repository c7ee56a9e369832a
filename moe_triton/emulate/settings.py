"""Environment variables that ``npu-run`` sets for its child processes."""

from __future__ import annotations

import os

HOST = "MOE_TRITON_NPU_HOST"  # the device that replaces the NPUs: cpu or cuda
DEVICES = "MOE_TRITON_NPU_DEVICES"  # number of NPUs
FAILURES = "MOE_TRITON_NPU_FAILURES"  # file to which processes append failed children


def check_started_by_npu_run(package: str) -> None:
    """Refuse to import a stand-in outside npu-run.

    Raises:
        ImportError: no ancestor of this process is ``moe-triton npu-run``.
    """
    if FAILURES not in os.environ:
        raise ImportError(
            f"this {package} is a stand-in for machines without NPUs; it works only in scripts "
            "started by `moe-triton npu-run`",
            name=package,
        )
