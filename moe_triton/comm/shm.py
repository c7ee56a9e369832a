"""Memory shared between the processes of one host.

``MemfdMemory`` uses anonymous files: they leave no names behind, and the size of /dev/shm does not
limit them. Peers open them through /proc, which needs the same user and PID namespace.
``PosixMemory`` serves hosts that forbid this: named files in /dev/shm, unlinked once all peers have
opened them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from pathlib import Path

import torch

from .memory import HOST, Block, Handle

_SHM = Path("/dev/shm")


def _map(fd: int, num_bytes: int) -> torch.Tensor:
    mapping = mmap.mmap(fd, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Only a hint: kernels without huge pages, and some sandboxes, refuse it.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _check_host(device: torch.device) -> None:
    if device.type != "cpu":
        raise OSError(f"windows between processes must be in host memory, got {device}")


class MemfdMemory:
    """Anonymous shared memory, opened by peers as /proc/<pid>/fd/<fd>."""

    name = "memfd"

    def allocate(self, num_bytes: int, device: torch.device = HOST) -> Block:
        """A zeroed block; pages are committed when they are first written."""
        _check_host(device)
        label = f"moe_triton-{secrets.token_hex(8)}"
        fd = os.memfd_create(label, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, num_bytes)
            data = _map(fd, num_bytes)
        except BaseException:
            os.close(fd)
            raise
        handle: Handle = {"pid": os.getpid(), "fd": fd, "label": label}
        return Block(data, handle | {"bytes": num_bytes}, hide=lambda: os.close(fd))

    def open(self, handle: Handle) -> Block:
        """Map a peer's block; its label proves that the descriptor is still the same file."""
        path = f"/proc/{handle['pid']}/fd/{handle['fd']}"
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if str(handle["label"]) not in str(Path(f"/proc/self/fd/{fd}").readlink()):
                raise FileNotFoundError(f"{path} is no longer the block {handle['label']}")
            return Block(_map(fd, int(handle["bytes"])), handle)
        finally:
            os.close(fd)


class PosixMemory:
    """Named shared memory in /dev/shm."""

    name = "posix"

    def allocate(self, num_bytes: int, device: torch.device = HOST) -> Block:
        """A zeroed block with a unique name, which ``release`` removes."""
        _check_host(device)
        path = _SHM / f"moe_triton-{secrets.token_hex(8)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # fallocate reports a full /dev/shm here; truncate would cause a SIGBUS later.
            os.posix_fallocate(fd, 0, num_bytes)
            data = _map(fd, num_bytes)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)
        handle: Handle = {"path": str(path), "bytes": num_bytes}
        return Block(data, handle, hide=lambda: path.unlink(missing_ok=True))

    def open(self, handle: Handle) -> Block:
        """Map a peer's block; its release removes the name too, in case the peer has died."""
        path = Path(str(handle["path"]))
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            data = _map(fd, int(handle["bytes"]))
        finally:
            os.close(fd)
        return Block(data, handle, hide=lambda: path.unlink(missing_ok=True))
