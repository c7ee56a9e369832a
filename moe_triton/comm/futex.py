"""Sleeping until another thread or process changes a 32-bit word: Linux's futex system call.

The kernel compares the word with the value that the waiter last saw and puts it to sleep only if
they are equal, so a change between the look and the wait is never missed. Words may lie in memory
shared between processes: the calls leave out the flag for private futexes.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys

_NUMBERS = {"x86_64": 202, "aarch64": 98}  # of the system call, for 64-bit programs
_WAIT, _WAKE = 0, 1
_EVERY_WAITER = 2**31 - 1
_COMPLETED = (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


def _number() -> int | None:
    """The system call's number, or None where it is unknown."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    return _NUMBERS.get(platform.machine())


_FUTEX = _number()
if _FUTEX is not None:
    # Waiting gives the interpreter lock away; waking keeps it, being shorter than the hand-over.
    _wait = ctypes.CDLL(None, use_errno=True).syscall
    _wake = ctypes.PyDLL(None).syscall
    _wait.argtypes = _wake.argtypes = (
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.POINTER(_Timespec),
    )
    _wait.restype = _wake.restype = ctypes.c_long


def wait(address: int, seen: int, seconds: float) -> bool:
    """Sleep while the word at ``address`` is ``seen``, until a wake-up, for at most ``seconds``.

    Returns:
        Whether the kernel served the call; False on another system or processor, or in a sandbox
        that forbids it (EPERM, ENOSYS): then the caller has to sleep by itself.
    """
    if _FUTEX is None:
        return False
    whole = int(seconds)
    limit = _Timespec(whole, int((seconds - whole) * 1e9))
    if _wait(_FUTEX, address, _WAIT, seen, limit) == 0:
        return True
    return ctypes.get_errno() in _COMPLETED


def wake(address: int) -> None:
    """Wake every thread and process that waits on the word at ``address``, after changing it."""
    if _FUTEX is not None:
        _wake(_FUTEX, address, _WAKE, _EVERY_WAITER, None)
