"""From a group to a connected transport, chosen at the first rendezvous.

"auto" takes the first of these that works: ``single`` for one rank; windows for ranks that can
read and write each other's memory; torch.distributed. All ranks decide from the same facts and so
choose alike. For calls known beforehand, enough memory for their windows is one of the facts. An
explicit choice that cannot work raises ``UnavailableError`` with the reason.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import (
    ArgumentMismatchError,
    BrokenGroupError,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    UnavailableError,
)
from . import atomics, collective
from .control_blocks import control_bytes
from .groups import Group
from .local import LocalMemory
from .memory import Block, Memory
from .message_exchange import MessageExchange
from .rendezvous import Rendezvous
from .ring_protocol import RingProtocol
from .shm import MemfdMemory, PosixMemory
from .single import SingleTransport
from .symm_mem import SymmetricMemory
from .symmetric import SymmetricTransport
from .transport import Call, Transport, outside_autograd

_LOG = logging.getLogger("moe_triton")


class Communicator:
    """One rank of a group, connected on its first use.

    Args:
        group: the group and this rank's number in it.
        tag: distinguishes the communicators of one group; equal on all ranks.
        transport: a name of ``TRANSPORTS``.
        in_flight: setups that may run ahead of teardowns.
        timeout: of any wait for peers, in seconds.
    """

    def __init__(
        self, group: Group, tag: str, *, transport: str, in_flight: int, timeout: float
    ) -> None:
        self.group = group
        self.choice = group.transport if transport == "auto" else transport
        self._in_flight = in_flight
        self._timeout = timeout
        self._rendezvous = Rendezvous(group, tag, timeout) if group.size > 1 else None
        self._connected: Transport | None = None
        if group.size == 1:
            self._connected = SingleTransport(group.name, in_flight)
            self._log_choice("single", "the group has one rank")
        self._process_group_used = False
        self._rendezvous_failure: str | None = None  # why the last rendezvous failed
        self._closed = False
        self._prepared: Sequence[tuple[Call, str]] = ()

    @property
    def transport_name(self) -> str | None:
        """One of "single", "local", "shm", "symm_mem", "collective"; None before the rendezvous."""
        return None if self._connected is None else self._connected.name

    def transport(self, op: str, call: Call | None = None, kind: str = "dispatch") -> Transport:
        """The transport; the first call connects all ranks.

        Args:
            op: for error messages.
            call: that the transport is for; its device decides between transports, as ``prepare``
                does.
            kind: of that operation.

        Raises:
            PeerTimeoutError: ranks did not come.
            PeerAbortError: a rank rejected its call.
            UnavailableError: the chosen transport cannot work between these ranks.
            BrokenGroupError: ranks did not come to an earlier call.
            MoeError: the communicator is closed.
        """
        self._raise_if_lost(op)
        if self._connected is None:
            if call is not None and call.device.type != "cpu" and not self._prepared:
                self._prepared = [(call, kind)]
            try:
                self._connected = self._connect(op)
            except PeerTimeoutError as error:
                self._rendezvous_failure = error.problem
                raise
        return self._connected

    def prepare(self, calls: Sequence[tuple[Call, str]]) -> None:
        """Connect all ranks, compare arguments and allocate windows.

        Must be the first call; ``recover()`` repeats it.

        Args:
            calls: future calls, each with its kind.

        Raises:
            ArgumentMismatchError: the ranks' arguments differ.
            MoeError: as for ``transport``.
        """
        self._prepared = calls
        self.transport(calls[0][0].op)

    def raise_if_broken(self, op: str) -> None:
        """Raise ``BrokenGroupError`` after a time-out; does not wait."""
        self._raise_if_lost(op)
        if self._connected is not None:
            self._connected.raise_if_broken(op)

    def _raise_if_lost(self, op: str) -> None:
        if self._closed:
            raise MoeError(op, f"this communicator of group {self.group.name!r} is closed")
        if self._rendezvous_failure is not None:
            raise BrokenGroupError(
                op,
                f"group {self.group.name!r} is broken since its rendezvous failed "
                f"({self._rendezvous_failure}); call recover() on all ranks",
            )

    @outside_autograd
    def abort_peers(self, kind: str, op: str, error: MoeError) -> None:
        """Abort the peers' call because this rank rejects its own, with the reason.

        On a broken group this returns without an error: its caller raises ``error``, which says
        more, and the next call finds the group broken.
        """
        if self._connected is not None:
            # A device may report now what broke the group, and has told the peers.
            with contextlib.suppress(PeerTimeoutError, BrokenGroupError, PeerAbortError):
                self._connected.abort_peers(kind, op, error)
        elif self._rendezvous is not None and self._rendezvous_failure is None and not self._closed:
            self._rendezvous.abort_peers(error.problem)

    @outside_autograd
    def recover(self, op: str) -> None:
        """Connect all ranks anew after a time-out; collective.

        Operations in flight are lost. A restarted rank takes part by its first call. When it
        fails, all ranks must call it again.
        """
        if self._rendezvous is None or self._closed:
            self._raise_if_lost(op)
            return
        if self._connected is not None:
            self._connected.close()
            self._connected = None
        # Also after a failed recover(): the ranks may have called it a different number of times,
        # and only in a new generation do their numbers of calls match.
        self._rendezvous.new_generation()
        self._rendezvous_failure = None
        try:
            self.transport(op)
        except MoeError as error:
            self._rendezvous_failure = error.problem
            raise

    def close(self) -> None:
        """Release the memory; the group itself belongs to the caller."""
        self._closed = True
        if self._connected is not None:
            self._connected.close()
            self._connected = None

    @outside_autograd
    def _connect(self, op: str) -> Transport:
        assert self._rendezvous is not None
        connected: Transport | None = None
        while connected is None:
            with self._rendezvous.catching_up():
                connected = self._connect_once(op)
        return connected

    def _log_choice(self, name: str, reason: str) -> None:
        group = self.group
        where = f"group {group.name!r}, rank {group.rank} of {group.size}"
        _LOG.info("%s: transport %s, because %s", where, name, reason)

    def _connect_once(self, op: str) -> Transport:
        assert self._rendezvous is not None
        peer_info = self._rendezvous.gather_peer_info(op, self._own_info())
        for name in ("transport", "in_flight"):
            own = peer_info[self.group.rank][name]
            for rank, theirs in enumerate(peer_info):
                if theirs[name] != own:
                    raise ArgumentMismatchError(op, name, own, theirs[name], rank=rank)
        self._rendezvous.check_generation(op)
        causes: list[str] = []
        if self.choice == "single":
            causes.append(f"group {self.group.name!r} has {self.group.size} ranks")
        elif self.choice != "collective":
            for memory in self._memory_providers(peer_info, causes):
                protocol = self._open(op, memory, peer_info, causes)
                if protocol is None:
                    continue
                symmetric = SymmetricTransport(protocol)
                with contextlib.ExitStack() as unless_used:
                    unless_used.callback(symmetric.close)
                    provider = self._device_provider() or memory.name
                    if self._prepare_windows(op, provider, symmetric, causes):
                        unless_used.pop_all()
                        ranks = "threads of one process"
                        if not self.group.in_process:
                            ranks = f"processes that share memory by {provider}"
                        reasons = [f"{self.choice!r} was asked for, the ranks are {ranks}", *causes]
                        self._log_choice(symmetric.name, "; ".join(reasons))
                        return symmetric
                if provider != memory.name:
                    break  # another control block would not change the device
        if self.choice not in ("auto", "collective") or self.group.process_group is None:
            cause = "; ".join(causes) or "the group has no torch process group"
            raise UnavailableError(op, f"transport {self.choice!r} cannot work here: {cause}")
        transport = self._connect_process_group(op)
        with contextlib.ExitStack() as unless_used:
            unless_used.callback(transport.close)
            self._prepare_on(transport)
            unless_used.pop_all()
        reasons = [f"{self.choice!r} was asked for", *causes]
        self._log_choice(transport.name, "; ".join(reasons))
        return transport

    def _connect_process_group(self, op: str) -> Transport:
        assert self._rendezvous is not None
        # Before recover() the group was used, so it is broken; and it needs all of its members.
        usable = not self._process_group_used and self.group.members is None
        device_group = collective.device_group(self.group) if usable else None
        self._process_group_used = True
        exchange = MessageExchange(
            op,
            self.group,
            self._rendezvous.private_store(),
            self._rendezvous.name,
            device_group,
            in_flight=self._in_flight,
            timeout=self._timeout,
        )
        return collective.CollectiveTransport(self.group, exchange)

    def _prepare_on(self, transport: Transport) -> None:
        for call, kind in self._prepared:
            transport.prepare(call, kind)

    def _prepare_windows(
        self, op: str, provider: str, transport: SymmetricTransport, causes: list[str]
    ) -> bool:
        """Allocate windows, or add to ``causes`` why a rank could not."""
        if not self._prepared:
            return True
        assert self._rendezvous is not None
        step = f"{provider} windows"
        try:
            self._prepare_on(transport)
        except (UnavailableError, PeerAbortError, ArgumentMismatchError) as error:
            # Exchange the failures: a peer's error arrives here as another class.
            record = {"failure": type(error).__name__, "cause": error.problem}
            records = self._rendezvous.exchange(op, step, record)
            failures = {record["failure"] for record in records}
            if "UnavailableError" not in failures or "ArgumentMismatchError" in failures:
                raise
        else:
            records = self._rendezvous.exchange(op, step, {"failure": "", "cause": ""})
        reasons = [r["cause"] for r in records if r["failure"] == "UnavailableError"]
        if reasons:
            causes.append(f"{provider}: {reasons[0]}")
        return not reasons

    def _own_info(self) -> dict[str, Any]:
        peer_info: dict[str, Any] = {"transport": self.choice, "in_flight": self._in_flight}
        if not self.group.in_process:
            peer_info |= {
                "pid": os.getpid(),
                "host": _read("/proc/sys/kernel/random/boot_id"),
                "pid_namespace": _link("/proc/self/ns/pid"),
                "shm": _device("/dev/shm"),
                "atomics": atomics.BETWEEN_PROCESSES,
            }
        return peer_info

    def _memory_providers(
        self, peer_info: list[dict[str, Any]], causes: list[str]
    ) -> Iterable[Memory]:
        """The memory providers that may work between these ranks, best first."""
        if self.choice == ("shm" if self.group.in_process else "local"):
            kind = "threads of one process" if self.group.in_process else "processes"
            causes.append(f"the ranks of group {self.group.name!r} are {kind}")
            return []
        if self.group.in_process:
            return [LocalMemory()]
        if not all(info["atomics"] for info in peer_info):
            causes.append("libstdc++, which orders memory between processes, is missing")
            return []
        if not peer_info[0]["host"] or not _same(peer_info, "host"):
            causes.append("the ranks are on different hosts")
            return []
        memories: list[Memory] = []
        if _same(peer_info, "pid_namespace"):
            memories.append(MemfdMemory())
        else:
            causes.append("memfd: the ranks are in different PID namespaces")
        if peer_info[0]["shm"] and _same(peer_info, "shm"):
            memories.append(PosixMemory())
        else:
            causes.append("posix: the ranks do not share /dev/shm")
        return memories

    def _open(
        self, op: str, memory: Memory, peer_info: list[dict[str, Any]], causes: list[str]
    ) -> RingProtocol | None:
        """Connect through ``memory``, or add to ``causes`` why a rank could not."""
        assert self._rendezvous is not None
        blocks, results = self._share_control_blocks(op, memory)
        failed = [(rank, record["cause"]) for rank, record in enumerate(results) if record["cause"]]
        if failed:
            rank, cause = failed[0]
            causes.append(f"{memory.name}: {cause} on rank {rank}")
            return None
        # In another PID namespace a peer's number may be that of another process.
        pids = None
        if not self.group.in_process and _same(peer_info, "pid_namespace"):
            pids = [info["pid"] for info in peer_info]
        return RingProtocol(
            self.group,
            self._rendezvous.name,
            memory,
            blocks,
            pids,
            in_flight=self._in_flight,
            timeout=self._timeout,
            device_memory=None if self.group.in_process else self._device_memory(),
        )

    def _device_provider(self) -> str | None:
        """The provider of the windows of calls known beforehand, if all ranks open them at once."""
        if self.group.in_process or not self._prepared:
            return None
        memory = self._device_memory()
        return memory.name if memory.serves(self._prepared[0][0].device) else None

    def _device_memory(self) -> SymmetricMemory:
        explicit = self.choice != "auto"
        return SymmetricMemory(self.group, explicit=explicit, timeout=self._timeout)

    def _share_control_blocks(
        self, op: str, memory: Memory
    ) -> tuple[list[Block], list[dict[str, Any]]]:
        """Allocate a control block, open those of the peers, and exchange the outcomes."""
        assert self._rendezvous is not None
        own: Block | None = None
        blocks: list[Block] = []
        cause = ""
        try:
            own = memory.allocate(control_bytes(self._in_flight))
        except OSError as error:
            cause = str(error)
        try:
            handle = None if own is None else own.handle
            handles = self._rendezvous.exchange(op, f"{memory.name} handle", {"handle": handle})
            try:
                for rank, record in enumerate(handles):
                    if rank == self.group.rank and own is not None:
                        blocks.append(own)
                    elif record["handle"] is not None:
                        blocks.append(memory.open(record["handle"]))
            except OSError as error:
                cause = str(error)
            results = self._rendezvous.exchange(op, f"{memory.name} opened", {"cause": cause})
        finally:
            # Also when a peer was lost on the way: its block must not stay behind.
            for block in (own, *blocks):
                if block is not None:
                    block.release()
        return blocks, results


def _same(peer_info: list[dict[str, Any]], name: str) -> bool:
    return all(info[name] == peer_info[0][name] for info in peer_info)


def _read(path: str) -> str:
    return Path(path).read_text().strip() if Path(path).exists() else ""


def _link(path: str) -> str:
    return str(Path(path).readlink()) if Path(path).exists() else ""


def _device(path: str) -> str:
    if not Path(path).is_dir():
        return ""
    status = Path(path).stat()
    return f"{status.st_dev}:{status.st_ino}"
