"""Environment variables that ``npu-run`` and ``deep-ep-run`` set for their child processes."""

from __future__ import annotations

import os

HOST = "MOE_TRITON_NPU_HOST"  # the device that replaces the NPUs: cpu or cuda
DEVICES = "MOE_TRITON_NPU_DEVICES"  # number of NPUs
MISSING = "MOE_TRITON_NPU_MISSING"  # file to which processes append names that are missing
FAILURES = "MOE_TRITON_RUN_FAILURES"  # file to which processes append failed children


def check_started_by(command: str, package: str) -> None:
    """Refuse to import a stand-in outside the command that puts it on the path.

    Raises:
        ImportError: no ancestor of this process is ``moe-triton`` with such a command.
    """
    if FAILURES not in os.environ:
        raise ImportError(
            f"this {package} is a stand-in; it works only in scripts started by "
            f"`moe-triton {command}`",
            name=package,
        )
