"""A stand-in for torchair, where there is none: see ``moe-triton npu-run``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

# torch.compile takes a second to import. A parent does it here once for all ranks that it forks.
import torch._dynamo

from moe_triton.emulate import settings, torch_npu_ops

from .configs.compiler_config import CompilerConfig

settings.check_started_by_npu_run(__name__)

__all__ = ["CompilerConfig", "get_npu_backend", "patch_for_hcom"]


def get_npu_backend(
    *,
    compiler_config: CompilerConfig | None = None,  # noqa: ARG001 - the signature of torchair
    custom_decompositions: dict[Any, Any] | None = None,  # noqa: ARG001 - likewise
) -> Callable[..., Any]:
    """The back end for ``torch.compile``: aot_eager.

    It captures the graph and makes it functional with the operators' shape functions, where a
    script can be wrong, and then runs operator by operator. Inductor would spend seconds in every
    rank on code that is not what an NPU runs.
    """
    return torch._dynamo.lookup_backend("aot_eager")


def patch_for_hcom() -> None:
    """Nothing: collectives need no patch."""


def __getattr__(name: str) -> NoReturn:
    torch_npu_ops.not_emulated("torchair", name)
