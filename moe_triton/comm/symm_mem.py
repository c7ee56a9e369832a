"""Memory of devices that several processes map: torch's symmetric memory.

Written against ``torch.distributed._symmetric_memory`` of PyTorch 2.11 to 2.14, which calls itself
alpha. Of it this uses the allocation, the rendezvous and the addresses of the peers' blocks; flags
lie in our own memory, so torch's signal pads and barriers, which end a time-out with a trap, stay
unused. Memory comes from ``empty_strided_p2p``: that of ``symm_mem.empty`` may lie inside an
allocation, whose offset has a name only from PyTorch 2.14 on.

The rendezvous is collective, and a rank that fails in it leaves its peers waiting. Everything that
can be known before therefore travels in the handles, and all ranks decide alike before they begin;
``RingProtocol`` limits what is left in time. A mapping stays valid when its peer dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .groups import Group
from .memory import Block, Handle

#: Lets ranks share a device, for tests; torch reads it at each rendezvous.
OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
_FIRST_TORCH = (2, 11)


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """What decides whether ranks can map each other's memory.

    Attributes:
        uuid: of the device.
        backend: of torch's symmetric memory: CUDA, NVSHMEM, NCCL.
        out_of_reach: UUIDs of visible devices that this one cannot access.
    """

    uuid: str
    backend: str
    out_of_reach: tuple[str, ...]


def unavailable_because(group: Group | None = None, *, explicit: bool = False) -> str | None:
    """Why symmetric memory cannot be used, or None.

    Args:
        group: of the ranks, or None for any.
        explicit: the caller asks for windows; else only devices that have been proved are used.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < _FIRST_TORCH:
        return f"PyTorch 2.11 or later is needed, got {torch.__version__}"
    if not _finds_device():
        return "this PyTorch finds no CUDA or ROCm device"
    if torch.version.hip is not None and not explicit:
        return "not proved on ROCm; ask for it with transport='symmetric'"
    if group is not None and (group.process_group is None or group.members is not None):
        return "the ranks have no torch process group of their own"
    return None


class SymmetricMemory:
    """Blocks of device memory that the ranks of a torch process group map.

    Args:
        group: of the ranks.
        explicit: the caller asked for windows.
        timeout: of a wait for the peers, in seconds.
    """

    name = "symm_mem"

    def __init__(self, group: Group, *, explicit: bool, timeout: float) -> None:
        self._group = group
        self._explicit = explicit
        self._timeout = timeout

    def serves(self, device: torch.device) -> bool:
        """Whether windows on ``device`` come from here; ``allocate`` says why they cannot."""
        return device.type == "cuda"  # ROCm devices, too

    def allocate(self, num_bytes: int, device: torch.device) -> Block:
        """A zeroed block of this rank."""
        cause = unavailable_because(self._group, explicit=self._explicit)
        if cause is not None:
            raise OSError(f"no symmetric memory: {cause}")
        facts = _device_facts(device)
        try:
            data = _torch_class().empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
        except RuntimeError as error:
            raise OSError(f"torch cannot allocate symmetric memory: {error}") from error
        data.zero_()  # torch zeroes the signal pad alone
        if device.type != "cpu":
            torch.get_device_module(device).current_stream(device).synchronize()
        handle: Handle = {
            "bytes": num_bytes,
            "torch": torch.__version__,
            "uuid": facts.uuid,
            "index": device.index or 0,
            "backend": facts.backend,
            "out_of_reach": " ".join(facts.out_of_reach),
            "overlap": int(os.environ.get(OVERLAP) == "1"),
        }
        return Block(data, handle)

    def open_all(self, own: Block, handles: Sequence[Handle]) -> list[Block]:
        """The blocks of all ranks; blocks the host until all ranks call it.

        Raises:
            OSError: the ranks cannot map each other's memory.
        """
        _check_handles(handles)
        process_group = self._group.process_group
        assert process_group is not None
        # Half of it, so that a rank that has failed still waits when its peers give up.
        with _masked_devices(handles), _store_timeout(process_group, self._timeout / 2):
            try:
                memory = _torch_class().rendezvous(own.data, process_group.group_name)
            except RuntimeError as error:
                raise OSError(f"torch's rendezvous failed: {error}") from error
        if memory is None:
            raise OSError("torch does not know this block as symmetric memory")
        pointers = list(memory.buffer_ptrs)
        if memory.rank != self._group.rank or len(pointers) != self._group.size:
            raise OSError(
                f"torch numbers the ranks otherwise: {memory.rank} of {len(pointers)} is "
                f"{self._group.rank} of {self._group.size} here"
            )
        if far := [rank for rank, pointer in enumerate(pointers) if not pointer]:
            raise OSError(f"ranks {far} are reached over a network, not by loads and stores")
        if pointers[memory.rank] != own.data.data_ptr():
            raise OSError("the block does not begin where its allocation does")
        blocks = []
        for rank, handle in enumerate(handles):
            # The own tensor keeps its memory for callers that hold rows of it; buffers of torch's
            # handle live as long as the handle does.
            data = own.data
            if rank != memory.rank:
                data = memory.get_buffer(rank, (int(handle["bytes"]),), torch.uint8)
            blocks.append(Block(data, handle, mapping=memory))
        return blocks


def _torch_class() -> Any:
    """The class of torch, which has no public name for what is used here."""
    from torch._C._distributed_c10d import _SymmetricMemory

    return _SymmetricMemory


def _finds_device() -> bool:
    return torch.cuda.is_available()


def _device_facts(device: torch.device) -> DeviceFacts:
    if device.type != "cuda":
        raise OSError(f"symmetric memory is memory of CUDA or ROCm devices, got {device}")
    own, uuids = device.index or 0, _visible_uuids()
    far = [
        uuid
        for index, uuid in enumerate(uuids)
        if index != own and not torch.cuda.can_device_access_peer(own, index)
    ]
    return DeviceFacts(uuids[own], str(_torch_class().get_backend(device)), tuple(far))


def _visible_uuids() -> list[str]:
    count = torch.cuda.device_count()
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]


def _check_handles(handles: Sequence[Handle]) -> None:
    """Raise OSError, on all ranks alike, where the rendezvous would fail on some."""
    for name, meaning in (("torch", "versions of PyTorch"), ("backend", "back ends")):
        values = sorted({str(handle[name]) for handle in handles})
        if len(values) > 1:
            raise OSError(f"the ranks have different {meaning}: {' and '.join(values)}")
    for rank, handle in enumerate(handles):
        for peer, other in enumerate(handles):
            if other["uuid"] in str(handle["out_of_reach"]).split():
                raise OSError(f"the device of rank {rank} cannot access that of rank {peer}")
    uuid, ranks = Counter(handle["uuid"] for handle in handles).most_common(1)[0]
    if ranks > 1 and not all(handle["overlap"] for handle in handles):
        raise OSError(f"{ranks} ranks share the device {uuid}, which needs {OVERLAP}=1 on all")


@contextlib.contextmanager
def _store_timeout(process_group: dist.ProcessGroup, seconds: float) -> Iterator[None]:
    """Limit torch's waits on the store of the group, which block all other accesses to it."""
    store = dist.distributed_c10d._get_process_group_store(process_group)
    before = store.timeout  # type: ignore[attr-defined]
    store.set_timeout(dt.timedelta(seconds=seconds))
    try:
        yield
    finally:
        store.set_timeout(before)


@contextlib.contextmanager
def _masked_devices(handles: Sequence[Handle]) -> Iterator[None]:
    """Let torch accept different devices of equal index.

    It compares indices, and ranks that see one device each all have index 0. Its only other effect,
    no multicast, does not matter here.
    """
    before = os.environ.get(OVERLAP)
    if len({handle["index"] for handle in handles}) < len(handles):
        os.environ[OVERLAP] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(OVERLAP, None)
        else:
            os.environ[OVERLAP] = before
