"""Blocks shared between processes: opening, errors, and no files left behind."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import mmap
import os
import secrets
import time
from pathlib import Path

import harness
import pytest
import shm_names
import torch

from moe_triton.comm.shm import MemfdMemory, PosixMemory

MEMORIES = {"memfd": MemfdMemory, "posix": PosixMemory}
memories = pytest.mark.parametrize("memory", [make() for make in MEMORIES.values()], ids=MEMORIES)


def open_files() -> list[str]:
    """Our blocks among this process's descriptors; a mapping holds one of its own."""
    gc.collect()
    actual = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            actual.append(str(link.readlink()))
    return [name for name in actual if "moe_triton-" in name]


def mappings() -> int:
    """Mappings of our blocks in this process."""
    gc.collect()
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("moe_triton-")


@pytest.fixture(autouse=True)
def nothing_is_left():
    names, before = shm_names.names(), (open_files(), mappings())
    yield
    assert (open_files(), mappings()) == before
    assert not shm_names.left(names)


@memories
@pytest.mark.parametrize("num_bytes", [1, 4096, 4097, 3 * 2**20])
def test_a_block_is_zero_and_shared(memory, num_bytes):
    block = memory.allocate(num_bytes)
    assert block.data.dtype == torch.uint8
    assert block.data.shape == (num_bytes,)
    assert not block.data.any()
    peer = memory.open(block.handle)
    peer.data[-1] = 7
    assert block.data[-1] == 7
    block.data[0] = 9
    assert peer.data[0] == 9
    block.release()
    peer.data[-1] = 11
    assert block.data[-1] == 11  # both mappings stay


@memories
def test_a_released_block_cannot_be_opened(memory):
    block = memory.allocate(4096)
    block.release()
    block.release()  # may be called again
    with pytest.raises(OSError, match="No such file"):
        memory.open(block.handle)


@memories
def test_a_block_outlives_its_release_and_its_peers(memory):
    block = memory.allocate(4096)
    peer = memory.open(block.handle)
    block.release()
    view = block.data[8:16].view(torch.int32)
    del block, peer
    view.fill_(5)
    assert view.tolist() == [5, 5]
    assert mappings() == 1


def test_a_memfd_has_no_name():
    before = shm_names.names()
    block = MemfdMemory().allocate(4096)
    assert not shm_names.left(before)
    peer = MemfdMemory().open(block.handle)
    assert len(open_files()) == 3  # the handle's, and one for each mapping
    block.release()
    assert len(open_files()) == 2
    del peer


def test_a_posix_block_has_a_name_for_its_user_only():
    before = shm_names.names()
    block = PosixMemory().allocate(4096)
    name = Path(block.handle["path"]).name
    assert name in shm_names.names()
    assert Path("/dev/shm", name).stat().st_mode & 0o777 == 0o600
    block.release()
    assert not shm_names.left(before)


def test_peers_remove_the_name_of_a_dead_rank():
    before = shm_names.names()
    block = PosixMemory().allocate(4096)
    peers = [PosixMemory().open(block.handle) for _ in range(2)]
    for peer in peers:
        peer.release()
    assert not shm_names.left(before)


def test_a_descriptor_number_that_was_used_again_is_refused():
    """A peer's handle must not open another file with the same descriptor number."""
    block = MemfdMemory().allocate(4096)
    stale = dict(block.handle)
    block.release()
    fd = os.memfd_create("another")
    try:
        assert fd == stale["fd"]
        os.ftruncate(fd, 4096)
        with pytest.raises(FileNotFoundError, match="is no longer the block"):
            MemfdMemory().open(stale)
    finally:
        os.close(fd)


def test_a_full_dev_shm_is_an_error_at_once():
    """Instead of a SIGBUS when the block is written."""
    status = os.statvfs("/dev/shm")
    # More than it could ever hold, so that the system need not try.
    size = status.f_blocks * status.f_frsize
    with pytest.raises(OSError, match="No space left") as caught:
        PosixMemory().allocate(size + 2**20)
    assert caught.value.errno == errno.ENOSPC


@memories
@pytest.mark.parametrize("num_bytes", [2**62, 2**70])
def test_a_size_beyond_all_memory_leaves_nothing(memory, num_bytes):
    with pytest.raises((OSError, OverflowError)):
        memory.allocate(num_bytes)


@memories
def test_a_mapping_that_fails_leaves_nothing(memory, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match="Cannot allocate"):
        memory.allocate(4096)


@memories
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM])
def test_a_system_without_huge_pages(memory, code, monkeypatch):
    class Mapping(mmap.mmap):
        def madvise(self, *args):
            raise OSError(code, "refused")

    monkeypatch.setattr(mmap, "mmap", Mapping)
    block = memory.allocate(4096)
    peer = memory.open(block.handle)
    peer.data[0] = 7
    assert block.data[0] == 7
    block.release()


@memories
def test_names_differ(memory, monkeypatch):
    """Two ranks that draw the same number still get different blocks."""
    drawn = secrets.token_hex(8)
    monkeypatch.setattr(secrets, "token_hex", lambda count: drawn)
    first = memory.allocate(4096)
    try:
        second = memory.allocate(4096)
    except FileExistsError:
        second = None
    if second is not None:
        second.data[0] = 1
        assert memory.open(first.handle).data[0] == 0
        second.release()
    first.release()


@pytest.mark.parametrize("name", MEMORIES)
def test_processes_share_a_block(name):
    """Each rank writes into the block of the next rank, which has released it already."""

    def fn(ctx):
        memory = MEMORIES[name]()
        block = memory.allocate(2**16)
        ctx.store.set(f"{name} {ctx.rank}", json.dumps(block.handle))
        peer = (ctx.rank + 1) % ctx.world_size
        opened = memory.open(json.loads(ctx.store.get(f"{name} {peer}")))
        ctx.store.add(f"{name} opened", 1)
        while ctx.store.add(f"{name} opened", 0) < ctx.world_size:
            time.sleep(1e-3)
        block.release()
        opened.data.fill_(ctx.rank + 1)
        ctx.store.add(f"{name} written", 1)
        while ctx.store.add(f"{name} written", 0) < ctx.world_size:
            time.sleep(1e-3)
        values = sorted(set(block.data.tolist()))
        del block, opened
        return values, shm_names.names(), open_files()

    before = shm_names.names()
    results = harness.run_world("shm", 3, fn)
    assert [values for values, _, _ in results] == [[3], [1], [2]]
    for _, names, files in results:
        assert not names & shm_names.left(before)
        assert files == []
