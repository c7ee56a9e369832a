"""Connections between all ranks of a group, over which the calling thread sends and receives.

gloo hands each collective to a worker thread, and what comes in to another: where ranks share
cores, these switches take longer than small messages do. Here a message goes into the socket at
once, and is read by whoever waits for it; a thread only finishes what a socket did not take.

A message begins with two int64 words, its key and its bytes. Messages of different keys may come in
any order: those that nobody expects yet are kept.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from ..layout import align
from .polling import Backoff, bounded

_FRAME = struct.Struct("2q")
_HELLO = struct.Struct("<16si")  # the listener's token, the rank that connects
_READY = b"+"
_SLOWEST_POLL = 10e-3  # seconds
_BUFFER = 1 << 16  # bytes of a read in which messages begin
# Linux tells of a closed connection before its last bytes are read.
_CLOSED = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


class Incoming:
    """The messages of one key from all other ranks, and the memory that they come into.

    Args:
        memory: uint8 in the host's memory; a larger one replaces it where they do not fit.
        kept: bytes at its start that stay.
        size: number of ranks.

    Attributes:
        memory: as above.
        bytes: the same for numpy.
        starts: [W] first byte of each message, a multiple of 16; 0 before it comes.
        missing: messages that have not come.
        unsent: own messages of the same key that have not gone.
    """

    def __init__(self, memory: torch.Tensor, kept: int, size: int) -> None:
        self.memory = memory
        self.bytes: np.ndarray = memory.numpy()
        self.starts = [0] * size
        self.missing = size - 1
        self.unsent = 0
        self._end = align(kept)

    def place(self, rank: int, num_bytes: int) -> int:
        """Find room for the message of a rank."""
        start = self.starts[rank] = self._end
        self._end = align(start + num_bytes)
        if self._end > len(self.bytes):
            memory = torch.empty(align(self._end + self._end // 2), dtype=torch.uint8)
            memory.numpy()[:start] = self.bytes[:start]
            self.memory, self.bytes = memory, memory.numpy()
        return start


class _Peer:
    """One connection: what is being read, and what is still to be sent."""

    def __init__(self, rank: int, connection: socket.socket) -> None:
        self.rank, self.socket = rank, connection
        self.buffer = memoryview(bytearray(_BUFFER))
        self.begin = self.end = 0
        # Message that is being read: where it goes, its first byte there, bytes still to come.
        self.target: Incoming | None = None
        self.at = self.left = 0
        self.key = 0
        self.early: dict[int, Incoming] = {}
        self.unsent: collections.deque[tuple[memoryview, Incoming]] = collections.deque()


class Mesh:
    """One rank's connections to all others.

    Args:
        store: with keys that only the ranks of this mesh use.
        rank: this rank.
        size: number of ranks.
        timeout: seconds to wait for all of them.

    Raises:
        OSError, RuntimeError, TimeoutError: a rank did not come, or the store is gone.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self._peers: dict[int, _Peer] = {}
        self._expected: dict[int, Incoming] = {}
        self._by_file: dict[int, _Peer] = {}
        self._gone: set[_Peer] = set()  # closed at the other end
        self._behind: set[_Peer] = set()  # with something unsent
        self._watched: set[_Peer] = set()  # of these, those that a waiting thread serves
        self._poll = select.poll()
        self._state = threading.Condition()
        self._reading = False
        self._finishing = False  # a thread sends
        self._timeout = timeout
        self._open = True
        with contextlib.ExitStack() as unless_connected:
            unless_connected.callback(self._shut)
            self._connect(store, rank, size, timeout)
            unless_connected.pop_all()

    def _connect(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        token, deadline = secrets.token_bytes(16), time.monotonic() + timeout

        def addresses() -> list[str]:
            keys, backoff = [f"address/{peer}" for peer in range(rank)], Backoff(timeout)
            # Waiting in the store would lock out other threads.
            while keys and not store.check(keys):
                if backoff.expired:
                    raise TimeoutError("a rank did not come")
                backoff.pause(_SLOWEST_POLL)
            return [store.get(key).decode() for key in keys]

        with _listener() as listener:
            host, port = listener.getsockname()[:2]
            text = json.dumps([host, port, token.hex()])
            bounded(lambda: store.set(f"address/{rank}", text), deadline - time.monotonic())
            lower = bounded(addresses, deadline - time.monotonic())
            for peer, address in enumerate(lower):
                host, port, theirs = json.loads(address)
                left = max(deadline - time.monotonic(), 1e-3)
                connection = socket.create_connection((host, port), left)
                self._add(peer, connection)
                connection.sendall(_HELLO.pack(bytes.fromhex(theirs), rank))
            while len(self._peers) < size - 1:
                listener.settimeout(max(deadline - time.monotonic(), 1e-3))
                connection, _ = listener.accept()
                with contextlib.ExitStack() as unless_known:
                    unless_known.callback(connection.close)
                    connection.settimeout(max(deadline - time.monotonic(), 1e-3))
                    hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
                    if len(hello) == _HELLO.size and hello[:16] == token:
                        self._add(_HELLO.unpack(hello)[1], connection)
                        unless_known.pop_all()
        # A rank that could not connect to all leaves, and then nobody may be content.
        for one in self._peers.values():
            one.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.socket.sendall(_READY)
        for one in self._peers.values():
            one.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            if one.socket.recv(len(_READY)) != _READY:
                raise ConnectionError(f"rank {one.rank} left while the ranks connected")
            one.socket.setblocking(False)
            self._poll.register(one.socket, select.POLLIN)
            self._by_file[one.socket.fileno()] = one

    def _add(self, rank: int, connection: socket.socket) -> None:
        self._peers[rank] = _Peer(rank, connection)

    # Sending.

    def exchange(self, key: int, messages: Sequence[memoryview], incoming: Incoming) -> None:
        """Send a message to each other rank, and expect one of the same key; does not wait.

        Args:
            key: of the messages.
            messages: [W] for each rank; ignored for this one. Their memory must not change while
                ``incoming.unsent``.
            incoming: takes what comes.
        """
        with self._state:
            self._expected[key] = incoming
            for rank, peer in self._peers.items():
                early = peer.early.pop(key, None)
                if early is not None:
                    start = incoming.place(rank, len(early.bytes))
                    incoming.bytes[start : start + len(early.bytes)] = early.bytes
                    if peer.target is early:  # its end is still to come
                        peer.target, peer.at = incoming, start + peer.at
                    else:
                        self._complete(key, incoming)
                incoming.unsent += 1
                peer.unsent.append((messages[rank], incoming))
                if len(peer.unsent) == 1:
                    self._send(peer)
            if self._behind and not self._finishing:
                self._finishing = True
                # No daemon: what has been sent arrives, though this process may end.
                threading.Thread(target=self._finish, name="moe_triton sender").start()

    def _complete(self, key: int, incoming: Incoming) -> None:
        incoming.missing -= 1
        if not incoming.missing:
            self._expected.pop(key, None)

    def _send(self, peer: _Peer) -> None:
        """Send what the socket takes; drop what nobody reads any more."""
        while peer.unsent:
            message, incoming = peer.unsent[0]
            try:
                sent = len(message) if peer in self._gone else peer.socket.send(message)
            except BlockingIOError:
                sent = 0
            except OSError:
                sent = len(message)  # whoever waits for this peer finds out
            if sent < len(message):
                peer.unsent[0] = message[sent:], incoming
                self._behind.add(peer)
                return
            peer.unsent.popleft()
            incoming.unsent -= 1
        self._behind.discard(peer)

    def _finish(self) -> None:
        """Send what sockets did not take at once, while nobody waits who does so."""
        last = time.monotonic()
        with self._state:
            while self._behind and time.monotonic() < last + self._timeout:
                behind = self._behind - self._watched
                if not behind:
                    last = time.monotonic()
                    self._state.wait(_SLOWEST_POLL)
                    continue
                poll = select.poll()
                for peer in behind:
                    poll.register(peer.socket, select.POLLOUT)
                self._state.release()
                try:
                    ready = poll.poll(100)
                finally:
                    self._state.acquire()
                for file, _ in ready:
                    if (peer := self._by_file[file]) in self._behind - self._watched:
                        self._send(peer)
                        last = time.monotonic()
            self._finishing = False
            if not self._open:
                self._shut()

    # Receiving.

    def wait(self, incoming: Incoming, until: float) -> bool:
        """Whether all messages have come before ``until``.

        Raises:
            ConnectionError: a rank whose message is missing has closed its connection.
        """
        with self._state:
            while incoming.missing:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                if self._reading:
                    self._state.wait(left)
                    continue
                for peer in self._gone:
                    if not self._has_come(peer, incoming):
                        raise ConnectionError(f"rank {peer.rank} closed its connection")
                self._reading, self._watched = True, self._behind - self._gone
                for peer in self._watched:
                    self._poll.register(peer.socket, select.POLLIN | select.POLLOUT)
                self._state.release()
                try:
                    ready = self._poll.poll(left * 1e3)
                finally:
                    self._state.acquire()
                    for peer in self._watched:
                        self._poll.register(peer.socket, select.POLLIN)
                    self._reading, self._watched = False, set()
                for file, event in ready:
                    if event & select.POLLOUT:
                        self._send(self._by_file[file])
                    if event & ~select.POLLOUT:
                        self._read(self._by_file[file])
                self._state.notify_all()
        return True

    def _has_come(self, peer: _Peer, incoming: Incoming) -> bool:
        return incoming.starts[peer.rank] > 0 and peer.target is not incoming

    def _read(self, peer: _Peer) -> None:
        """Read once from a socket that has something."""
        try:
            if peer.target is not None:
                view = peer.target.bytes[peer.at : peer.at + peer.left].data
                count = peer.socket.recv_into(view)
                peer.at, peer.left = peer.at + count, peer.left - count
                if count and not peer.left:
                    self._arrived(peer)
            else:
                count = peer.socket.recv_into(peer.buffer[peer.end :])
                peer.end += count
                self._parse(peer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self._gone.add(peer)
            self._poll.unregister(peer.socket)
            self._send(peer)

    def _parse(self, peer: _Peer) -> None:
        """Move messages out of the buffer; the last one may be a part."""
        while peer.end - peer.begin >= _FRAME.size:
            peer.key, total = _FRAME.unpack_from(peer.buffer, peer.begin)
            target = self._expected.get(peer.key)
            if target is None:
                target = Incoming(torch.empty(total, dtype=torch.uint8), 0, 1)
                peer.early[peer.key] = target
                peer.at = 0
            else:
                peer.at = target.place(peer.rank, total)
            count = min(total, peer.end - peer.begin)
            part = peer.buffer[peer.begin : peer.begin + count]
            target.bytes[peer.at : peer.at + count] = part
            peer.begin += count
            peer.target, peer.at, peer.left = target, peer.at + count, total - count
            if peer.left:
                break
            self._arrived(peer)
        rest = peer.end - peer.begin
        if rest:
            peer.buffer[:rest] = bytes(peer.buffer[peer.begin : peer.end])
        peer.begin, peer.end = 0, rest

    def _arrived(self, peer: _Peer) -> None:
        target, peer.target = peer.target, None
        if target is not None and peer.early.get(peer.key) is not target:
            self._complete(peer.key, target)

    # Ends.

    def closed(self) -> set[int]:
        """The ranks whose connections are closed."""
        with self._state:
            poll = select.poll()
            for peer in self._peers.values():
                poll.register(peer.socket, _CLOSED)
            return {self._by_file[file].rank for file, event in poll.poll(0) if event & _CLOSED}

    def close(self, *, at_once: bool = False) -> None:
        """Close all connections, ``at_once`` or when what has been sent has gone."""
        with self._state:
            self._open = False
            if at_once:
                self._behind.clear()
            if not self._behind:
                self._shut()

    def _shut(self) -> None:
        for peer in self._peers.values():
            # What is unread when a socket closes makes it drop what is unsent.
            with contextlib.suppress(OSError):
                peer.socket.setblocking(False)
                while peer.socket.recv_into(peer.buffer):
                    pass
            peer.socket.close()
        self._peers.clear()


def _listener() -> socket.socket:
    """A socket that listens where gloo would: on its interface, or under the host's name."""
    for host in (_interface_address(), socket.gethostname()):
        with contextlib.suppress(OSError):
            if host:
                found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
                family, *_, address = found[0]
                return socket.create_server(address[:2], family=family, backlog=1024)
    return socket.create_server(("127.0.0.1", 0), backlog=1024)


def _interface_address() -> str | None:
    """The IPv4 address of the interface that ``GLOO_SOCKET_IFNAME`` names first."""
    name, *_ = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    if not name:
        return None
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", name.encode()[:15])
            found = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
    except (ImportError, OSError):
        return None
    return socket.inet_ntoa(found[20:24])
