"""New windows: their arguments compared, allocated and opened by all ranks, or used by none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable

import torch

from ..errors import (
    ArgumentMismatchError,
    PeerAbortError,
    PeerTimeoutError,
    SequenceError,
    UnavailableError,
)
from ..layout import Ring
from ..layout.windows import ABORT, DATA
from . import atomics
from .control_blocks import OPENED, ControlBlocks
from .groups import Group
from .memory import Block, CollectiveMemory, Handle, Memory
from .peer_wait import PeerWait
from .polling import Background


class WindowOpener:
    """One rank's side of comparing arguments and of opening windows.

    Args:
        group: the group.
        control: the control blocks.
        waits: for the peers.
        memory: allocates and opens blocks.
        device_memory: provides the windows on devices that it serves, or None.
    """

    def __init__(
        self,
        group: Group,
        control: ControlBlocks,
        waits: PeerWait,
        memory: Memory,
        device_memory: CollectiveMemory | None,
    ) -> None:
        self.rank, self.size = group.rank, group.size
        self.memory = memory
        self._control, self._waits = control, waits
        self._device_memory = device_memory

    def collective_memory(self, device: torch.device) -> CollectiveMemory | None:
        """The provider that opens all ranks' windows on ``device`` at once, if there is one."""
        memory = self._device_memory
        return memory if memory is not None and memory.serves(device) else None

    def allocate(self, kind: str, epoch: int, op: str, ring: Ring, device: torch.device) -> Block:
        """Allocate this rank's windows; their records hold the epoch before ``epoch``."""
        try:
            if collective := self.collective_memory(device):
                own = collective.allocate(ring.num_bytes, device)
            else:
                own = self.memory.allocate(ring.num_bytes, device)
        except (OSError, OverflowError, RuntimeError) as error:
            raise UnavailableError(
                op,
                f"the {kind} windows of rank {self.rank}, {ring.data_slots} slots of "
                f"{ring.data_bytes} bytes and {ring.slots} of {ring.control_bytes} bytes, "
                f"{ring.num_bytes} bytes in all, cannot be allocated: {error}",
            ) from error
        # Zero would be ahead of epochs that have wrapped to negative numbers.
        ring.clear(own.data, self.size, atomics.wrap(epoch - 1))
        if device.type != "cpu":
            # Peers may write as soon as they hear of the memory.
            torch.get_device_module(device).current_stream(device).synchronize()
        return own

    def compare_arguments(self, kind: str, epoch: int, op: str, own: str) -> dict[int, str]:
        """Wait for all handshakes of ``epoch`` and compare; returns their texts by rank."""
        missing = {
            rank: self._control.handshake_address(rank, kind, epoch) for rank in range(self.size)
        }
        texts: dict[int, str] = {}
        for _ in self._waits.polls(op, kind, epoch, missing):
            for rank in list(missing):
                message = self._control.handshake(rank, kind, epoch)
                if message is None:
                    continue
                del missing[rank]
                # A rank that posted arguments counts even if it failed afterwards: all ranks must
                # decide alike here, and its flag reports the failure.
                if not message.text:
                    raise PeerAbortError(op, rank, message.reason)
                error = mismatch(op, own, message.text, rank)
                if error is not None:
                    raise error
                texts[rank] = message.text
        return texts

    def open_all(self, kind: str, epoch: int, op: str, agreed: str, own: Block) -> list[Block]:
        """Open all ranks' new windows; return once every rank has opened them all.

        Args:
            kind: of operation.
            epoch: of the call.
            op: for error messages.
            agreed: text of the arguments that must be equal.
            own: this rank's block, released if it is not used.

        Raises:
            ArgumentMismatchError: the ranks' arguments differ.
            PeerAbortError: a peer rejected its call, or cannot open the windows.
            PeerTimeoutError: peers did not come.
            SequenceError: a peer needs no larger windows.
            UnavailableError: this rank cannot open the windows.
        """
        blocks = {self.rank: own}
        failure: UnavailableError | None = None
        try:
            texts = self.compare_arguments(kind, epoch, op, agreed)
            # After the comparison: a rank whose arguments differ has released its window.
            handles = [json.loads(texts[rank]).get("window") for rank in range(self.size)]
            if None in handles:
                self._raise_other_order(op, kind, handles.index(None))
            try:
                if collective := self.collective_memory(own.data.device):
                    opened = self._open_together(collective, kind, epoch, op, own, handles)
                    blocks |= enumerate(opened)
                else:
                    for rank, handle in enumerate(handles):
                        if rank != self.rank:
                            blocks[rank] = self._open(kind, op, rank, handle)
                self._control.post_handshake(kind, epoch, OPENED, "", "")
            except UnavailableError as error:
                self._control.post_handshake(kind, epoch, ABORT, "", error.problem)
                failure = error
            self._await_opened(kind, epoch, op, failure)
        except BaseException as error:
            # Release for the lost ranks too. The others release their own windows, once no peer
            # is about to open them.
            lost = error.ranks if isinstance(error, PeerTimeoutError) else ()
            release_blocks([own, *(blocks[rank] for rank in lost if rank in blocks)])
            raise
        return [blocks[rank] for rank in range(self.size)]

    def _raise_other_order(self, op: str, kind: str, rank: int) -> None:
        raise SequenceError(
            op,
            "all ranks must issue the same halves of operations in the same order, but rank "
            f"{rank} needs no larger {kind} windows where rank {self.rank} does",
        )

    def _open_together(
        self,
        memory: CollectiveMemory,
        kind: str,
        epoch: int,
        op: str,
        own: Block,
        handles: list[Handle],
    ) -> list[Block]:
        """``memory.open_all`` until it ends, a peer fails in it, or the time is up."""
        opening = Background(lambda: memory.open_all(own, handles), f"{kind} windows")
        ranks = [rank for rank in range(self.size) if rank != self.rank]
        missing = {
            rank: self._control.handshake_address(rank, kind, epoch) + 4 for rank in ranks
        }  # status
        for _ in self._waits.polls(op, kind, epoch, missing):
            if opening.done():
                break
            for rank in list(missing):
                message = self._control.handshake(rank, kind, epoch)
                assert message is not None
                if message.status & OPENED:
                    del missing[rank]
                elif message.status & ABORT:
                    raise UnavailableError(op, f"rank {rank} failed: {message.reason}")
        problem = f"the {kind} windows of all ranks cannot be opened by rank {self.rank}: "
        if not opening.done(self._waits.timeout):
            raise UnavailableError(op, f"{problem}not within {self._waits.timeout:g} s")
        try:
            return opening.result()
        except (OSError, ValueError, RuntimeError) as error:
            raise UnavailableError(op, f"{problem}{error}") from error

    def _open(self, kind: str, op: str, rank: int, handle: dict[str, int | str]) -> Block:
        try:
            return self.memory.open(handle)
        except (OSError, ValueError, RuntimeError) as error:
            raise UnavailableError(
                op,
                f"the {kind} windows of rank {rank}, {handle.get('bytes', 'some')} bytes, cannot "
                f"be opened by rank {self.rank}: {error}",
            ) from error

    def _await_opened(
        self, kind: str, epoch: int, op: str, failure: UnavailableError | None
    ) -> None:
        """Wait until all ranks have tried to open the windows of ``epoch``.

        Raises:
            UnavailableError: ``failure``, if this rank could not.
            PeerAbortError: another one could not.
        """
        failed: dict[int, str] = {}
        ranks = range(self.size)
        missing = {
            rank: self._control.handshake_address(rank, kind, epoch) + 4 for rank in ranks
        }  # status
        for _ in self._waits.polls(op, kind, epoch, missing):
            for rank in list(missing):
                message = self._control.handshake(rank, kind, epoch)
                assert message is not None
                if message.status == DATA:
                    continue
                del missing[rank]
                # A rank that has opened them may fail afterwards; its flag reports that.
                if not message.status & OPENED:
                    failed[rank] = message.reason
        if failure is not None:
            raise failure
        if failed:
            raise PeerAbortError(op, *min(failed.items()))


def mismatch(op: str, own_text: str, peer_text: str, rank: int) -> ArgumentMismatchError | None:
    """The error for the first argument that differs between two handshakes, if one does."""
    own, peers = json.loads(own_text)["arguments"], json.loads(peer_text)["arguments"]
    for name in own | peers:
        if own.get(name) != peers.get(name):
            return ArgumentMismatchError(op, name, own.get(name), peers.get(name), rank=rank)
    return None


def release_blocks(blocks: Iterable[Block]) -> None:
    """Release all blocks, also when one of them fails."""
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.callback(block.release)
