"""Stand-in for torchair under ``moe-triton npu-run``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Import the compiler here, so that a parent does it once for all ranks that it forks.
import torch._dynamo

from moe_triton.emulate import missing, settings

from .configs.compiler_config import CompilerConfig

settings.check_started_by("npu-run", __name__)

__all__ = ["CompilerConfig", "get_npu_backend", "patch_for_hcom"]


def get_npu_backend(
    *,
    compiler_config: CompilerConfig | None = None,  # noqa: ARG001 - the signature of torchair
    custom_decompositions: dict[Any, Any] | None = None,  # noqa: ARG001 - likewise
) -> Callable[..., Any]:
    """The back end for ``torch.compile``: aot_eager.

    It captures and functionalises the graph with the operators' fake implementations, which finds a
    script's mistakes, and runs it operator by operator. Inductor would spend seconds on each rank
    for code that no NPU runs.
    """
    return torch._dynamo.lookup_backend("aot_eager")


def patch_for_hcom() -> None:
    """Do nothing: collectives need no patch."""


__getattr__ = missing.module_getattr("torchair")
