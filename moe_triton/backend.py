"""Back ends of the device steps: detection, explicit choice, and the cause where one cannot run.

The tensors' device decides unless ``MOE_TRITON_BACKEND`` or ``set_backend`` does. An explicit
choice that cannot run is an error, never a silent fallback.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys

import torch

from .errors import UnavailableError

BACKENDS = ("cpu", "interpret", "cuda", "rocm", "xpu", "npu")
ENVIRONMENT = "MOE_TRITON_BACKEND"
INTERPRETER = "TRITON_INTERPRET"  # Triton reads it once, when it is imported

_LOG = logging.getLogger("moe_triton")
_override: str | None = None


@functools.cache  # each choice once, and not with every call
def _log_choice(name: str, kind: str, reason: str) -> None:
    _LOG.info("back end %s for tensors of %s, because %s", name, kind, reason)


def _check_name(op: str, name: str) -> str:
    if name not in BACKENDS:
        raise UnavailableError(
            op, f"backend must be one of {[*BACKENDS]}, got {name!r}", argument="backend"
        )
    return name


def unavailable_because(name: str) -> str | None:
    """Why back end ``name`` cannot run here, or None when it can."""
    if name == "cpu":
        return None
    if name == "interpret":
        return _no_interpreter_because()
    if name in ("cuda", "rocm"):
        platform = "ROCm" if name == "rocm" else "CUDA"
        version = torch.version.hip if name == "rocm" else torch.version.cuda
        if not version:
            return f"this PyTorch was built without {platform}"
        if not torch.cuda.is_available():
            return f"PyTorch sees no {platform} device"
    elif name == "npu" and not hasattr(torch, "npu"):
        return "torch_npu is not imported, so there is no NPU"
    elif name == "xpu":
        return "this version does not support it"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _is_interpreter():
        return f"Triton was imported as its interpreter, because {INTERPRETER}=1 was set"
    return None


def _no_interpreter_because() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _is_interpreter() is False:
        return f"Triton was imported before {INTERPRETER}=1 was set; set it when the process starts"
    return None


def _is_interpreter() -> bool | None:
    """Whether Triton was imported as its interpreter, or None before its import."""
    language = sys.modules.get("triton.language")
    if language is None:
        return None
    # Triton's own device functions have the type of all kernels of the process.
    return type(language.cdiv).__name__ == "InterpretedFunction"


def enable_interpreter() -> None:
    """Make a later import of Triton that of its interpreter."""
    os.environ[INTERPRETER] = "1"


def set_backend(name: str | None) -> None:
    """Choose the back end of all following calls.

    Args:
        name: a name of ``BACKENDS``; None chooses by device. "interpret" runs the Triton kernels
            on the CPU, one program after the other. It must be chosen, or ``TRITON_INTERPRET=1`` be
            set, before anything imports Triton.

    Raises:
        UnavailableError: an unknown name, or a back end that cannot run here, with the cause.
    """
    global _override
    if name is not None:
        cause = unavailable_because(_check_name("set_backend", name))
        if cause is not None:
            raise UnavailableError("set_backend", f"backend {name!r} cannot run here: {cause}")
    if name == "interpret":
        enable_interpreter()
    _override = name


def get_backend(device: torch.device | str = "cpu") -> str:
    """The back end for tensors on ``device``.

    Raises:
        UnavailableError: it cannot run here, or does not serve that device, with the cause.
    """
    kind = torch.device(device).type
    by_device = "rocm" if kind == "cuda" and torch.version.hip else kind
    by_environment = os.environ.get(ENVIRONMENT)
    name = _check_name("get_backend", _override or by_environment or by_device)
    if kind == "cpu" and name not in ("cpu", "interpret"):
        raise UnavailableError(
            "get_backend", f"backend {name!r} needs tensors on its device, got tensors on the cpu"
        )
    if kind != "cpu" and name != by_device:
        raise UnavailableError("get_backend", f"backend {name!r} cannot serve tensors on {device}")
    cause = unavailable_because(name)
    if cause is not None:
        raise UnavailableError("get_backend", f"backend {name!r} cannot run here: {cause}")
    if name == "interpret":
        enable_interpreter()
    reason = "of their device"
    if _override:
        reason = "set_backend() chose it"
    elif by_environment:
        reason = f"{ENVIRONMENT} is set"
    _log_choice(name, kind, reason)
    return name
