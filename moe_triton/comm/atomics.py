"""Acquire and release on 32-bit words shared between threads or processes.

Python and PyTorch have no acquire and release, and the processor decides whether plain stores keep
their order: x86 keeps it, 64-bit Arm does not. Every flag is therefore written and confirmed by a
fetch-add with acquire-release order (C++ memory model), for which libstdc++ exports
``__exchange_and_add``; PyTorch links that library on Linux. It compiles to ``lock xadd`` on x86-64
and to ``ldaddal`` or an ``ldaxr``/``stlxr`` pair on Arm:

    writer:  plain stores of the data;  fetch_add(flag, new - old)     releases the data
    reader:  plain loads of the flag until it has the value;  fetch_add(flag, 0)   acquires the data

Where the library is missing, a lock orders the threads of one process, and memory shared between
processes is refused.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable

_WORD = 2**32


def wrap(value: int) -> int:
    """``value`` modulo 2**32, as a signed 32-bit integer."""
    return (value + _WORD // 2) % _WORD - _WORD // 2


def _load_fetch_add() -> Callable[[int, int], int] | None:
    try:
        # PyDLL keeps the interpreter lock: the call is shorter than handing the lock over.
        function = ctypes.PyDLL("libstdc++.so.6")._ZN9__gnu_cxx18__exchange_and_addEPVii
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_int32)
    function.restype = ctypes.c_int32
    return function


_native = _load_fetch_add()
_lock = threading.RLock()  # reentrant: a finaliser may write a word while it is held


def _locked_fetch_add(address: int, value: int) -> int:
    with _lock:
        word = ctypes.c_int32.from_address(address)
        old = word.value
        word.value = wrap(old + value)
        return old


#: fetch_add(address, value) -> old value; acquire-release, not sequentially consistent: readers may
#: see the flags of different writers in different orders.
fetch_add = _native or _locked_fetch_add

#: Whether the processor lets no load pass an earlier one, so that every load acquires.
LOADS_ACQUIRE = platform.machine() in ("x86_64", "AMD64")

#: Whether ``fetch_add`` orders memory between processes too.
BETWEEN_PROCESSES = _native is not None


def load_relaxed(address: int) -> int:
    """The word at ``address``, unordered: for polling."""
    return ctypes.c_int32.from_address(address).value


def load_acquire(address: int) -> int:
    """The word at ``address``; what its writer stored before is visible afterwards."""
    return fetch_add(address, 0)


def store_release(address: int, value: int) -> None:
    """Write the word at ``address``; the caller must be its only writer."""
    fetch_add(address, wrap(value - load_relaxed(address)))
