"""Compile and load each Triton kernel once, although several threads launch it.

Triton puts a kernel into its cache before the kernel's binary is loaded. A second thread that finds
it there meanwhile launches a null function. Here the cache shows a kernel only when it is loaded,
so that a launch of a loaded kernel needs no lock.
"""

from __future__ import annotations

import inspect
import sys
import threading
from typing import Any

_PARAMETERS = ["key", "signature", "device", "constexprs", "options", "attrs", "warmup"]
_lock = threading.RLock()


def compile_once(package: str) -> bool:
    """Let threads launch the kernels of ``package`` without a lock around each launch.

    Returns:
        False where this Triton compiles in another way than 3.7 does: each launch of a kernel needs
        a lock then.
    """
    # Triton is imported with the kernels.
    from triton.runtime.jit import JITFunction

    compiler = getattr(JITFunction, "_do_compile", None)
    if compiler is None or list(inspect.signature(compiler).parameters)[1:] != _PARAMETERS:
        return False
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        for value in vars(sys.modules[name]).values():
            if isinstance(value, JITFunction) and "_do_compile" not in vars(value):
                guard(value)
    return True


def guard(kernel: Any) -> None:
    """Serialise the compiles of one kernel, a ``JITFunction``."""
    compile_kernel = kernel._do_compile

    def compile_or_wait(key: Any, signature: Any, device: int, *more: Any) -> Any:
        with _lock:
            caches = kernel.device_caches[device]
            if key in caches[0]:
                return caches[0][key]
            # Other threads miss in an empty cache, and wait for the lock.
            kernel.device_caches[device] = ({}, *caches[1:])
            try:
                compiled = compile_kernel(key, signature, device, *more)
                warmup = more[-1]
                if compiled is not None and not warmup:
                    _ = compiled.run  # loads the binary
            finally:
                kernel.device_caches[device] = caches
            if compiled is not None:
                caches[0][key] = compiled
            return compiled

    kernel._do_compile = compile_or_wait
