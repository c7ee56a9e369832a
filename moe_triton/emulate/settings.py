"""What ``npu-run`` tells the processes below it, through their environment."""

from __future__ import annotations

import os

HOST = "MOE_TRITON_NPU_HOST"  # the device that stands for the NPUs: cpu or cuda
DEVICES = "MOE_TRITON_NPU_DEVICES"  # how many NPUs there are
FAILURES = "MOE_TRITON_NPU_FAILURES"  # file in which processes name children that failed


def check_started_by_npu_run(package: str) -> None:
    """Refuse to stand in for a package in a process that was not started for it.

    Raises:
        ImportError: this process is not below ``moe-triton npu-run``.
    """
    if FAILURES not in os.environ:
        raise ImportError(
            f"this {package} is a stand-in for machines without NPUs; it works only in scripts "
            "started by `moe-triton npu-run`",
            name=package,
        )
