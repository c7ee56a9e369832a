"""Which code runs the device steps: detection, override, and the reason why one cannot.

The choice follows the tensors' device unless ``MOE_TRITON_BACKEND`` or ``set_backend`` says
otherwise. An explicit choice that cannot work is an error, never a silent fallback.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

from .errors import UnavailableError

BACKENDS = ("cpu", "interpret", "cuda", "rocm", "xpu", "npu")
ENVIRONMENT = "MOE_TRITON_BACKEND"
INTERPRETER = "TRITON_INTERPRET"  # Triton reads it once, when it is imported

_override: str | None = None


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
        wanted = "ROCm" if name == "rocm" else "CUDA"
        built = torch.version.hip if name == "rocm" else torch.version.cuda
        if not built:
            return f"this PyTorch was built without {wanted}"
        if not torch.cuda.is_available():
            return f"PyTorch sees no {wanted} device"
    elif name == "npu" and not hasattr(torch, "npu"):
        return "torch_npu is not imported, so there is no NPU"
    elif name == "xpu":
        return "this version does not support it"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _is_interpreter():
        return f"Triton was imported as its interpreter, which {INTERPRETER}=1 asked for"
    return None


def _no_interpreter_because() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _is_interpreter() is False:
        return f"Triton was imported before {INTERPRETER}=1 was set; set it when the process starts"
    return None


def _is_interpreter() -> bool | None:
    """Which of both Triton was imported as, or None before that."""
    language = sys.modules.get("triton.language")
    if language is None:
        return None
    # Its own library of device functions shows it.
    return type(language.cdiv).__name__ == "InterpretedFunction"


def enable_interpreter() -> None:
    """Let Triton, if it is not imported yet, be imported as its interpreter."""
    os.environ[INTERPRETER] = "1"


def set_backend(name: str | None) -> None:
    """Choose the back end of all following calls; None goes back to choosing by device.

    "interpret" runs the Triton kernels on the CPU, one program after the other. It must be chosen,
    or ``TRITON_INTERPRET=1`` be set, before anything imports Triton.

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
    chosen = _override or os.environ.get(ENVIRONMENT)
    name = _check_name("get_backend", chosen or by_device)
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
    return name
