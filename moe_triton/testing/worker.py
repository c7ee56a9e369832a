"""A worker process: it joins a world, calls a function, answers, and waits for the next call.

Workers are forked from a server that has torch and this package loaded, which takes milliseconds
instead of seconds. The server computes nothing, so a fork loses no threads; a worker computes in
one thread.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import comm
from . import pickling
from .world import Failure, Layout, RankContext, WorkerDiedError

# Longest wait for a peer that computes, in torch.distributed's collectives too.
_GROUP_TIMEOUT = timedelta(minutes=10)
_LEAVE_SECONDS = 5.0  # seconds that a worker has to leave its world before it is killed
_HOST = "127.0.0.1"
_PRELOADED = ["torch", "torch.distributed", "moe_triton", __name__]

_context = multiprocessing.get_context("forkserver")
_start_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class World:
    """Facts by which the ranks of a world find each other.

    Attributes:
        name: unique among the worlds of the calling process.
        layout: its size and groups.
        store_port: of the world's store, which the calling process serves.
        bare: register a group with ``comm`` instead of torch process groups, which a restarted
            rank cannot join.
    """

    name: str
    layout: Layout
    store_port: int
    bare: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """A call for one rank.

    Attributes:
        world: the world to join; the worker leaves its previous one.
        rank: in the world.
        number: of the call in this world.
        call: function and arguments after the context, from ``pickling.dump_call``.
        transport: default transport of the world's groups.
        environment: environment variables of the calling process.
        path: ``sys.path`` of the calling process.
    """

    world: World
    rank: int
    number: int
    call: bytes
    transport: str
    environment: dict[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))
    path: list[str] = dataclasses.field(default_factory=lambda: list(sys.path))


@dataclasses.dataclass(frozen=True)
class _Reply:
    data: bytes  # pickled result or exception
    failed: bool
    when: float
    details: str
    world_intact: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a function on one rank.

    Attributes:
        value: the returned value.
        world_intact: the rank can serve another call in the same world.
    """

    value: Any
    world_intact: bool


class Worker:
    """Handle on a worker process in the process that started it."""

    def __init__(self) -> None:
        with _start_lock:
            _start_server()
            self.conn, theirs = _context.Pipe()
            self.process = _context.Process(target=_serve, args=(theirs,), daemon=True)
            with _hidden_main():
                self.process.start()
        theirs.close()
        _running.add(self)

    @property
    def pid(self) -> int:
        """Process id."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def events(self) -> list[Any]:
        """For ``multiprocessing.connection.wait``: ready on an answer or the end of the process."""
        return [self.conn, self.process.sentinel]

    def is_idle(self) -> bool:
        """Whether the process runs; the pipe of a dead worker is readable."""
        return self.process.exitcode is None and not self.conn.poll()

    def send(self, task: Task) -> None:
        """Send a task to the idle worker; ``receive`` reports one that has died."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.conn.send(task)

    def receive(self, rank: int) -> Result | Failure:
        """Wait for the answer to the task, or for the end of the process."""
        reply: _Reply | None = None
        multiprocessing.connection.wait(self.events)
        # A child of the worker may hold its end of the pipe open: then the pipe has no end of file.
        if self.conn.poll():
            with contextlib.suppress(EOFError, ConnectionResetError):
                reply = self.conn.recv()
        if reply is None:
            self.process.join()
            _running.discard(self)
            died = WorkerDiedError(rank, self.pid, self.process.exitcode)
            return Failure(rank, time.monotonic(), died)
        if reply.failed:
            error = pickling.load_error(reply.data)
            return Failure(rank, reply.when, error, reply.details)
        try:
            return Result(pickling.load(reply.data), reply.world_intact)
        except Exception as error:  # noqa: BLE001 (the result's own class may raise anything)
            return Failure(rank, reply.when, error)

    def retire(self) -> None:
        """Ask an idle worker to leave its world and end; ``reap`` makes sure of it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.conn.send(None)
        _retired[self] = time.monotonic()

    def kill(self) -> None:
        """Kill the process, also a stopped one, and wait for its end."""
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.conn.close()
        _running.discard(self)
        _retired.pop(self, None)


_running: set[Worker] = set()
_retired: dict[Worker, float] = {}  # since when


def reap(*, wait: bool = False) -> None:
    """Forget retired workers that have ended, and kill those that take too long.

    Args:
        wait: for all of them; else only check.
    """
    for worker, since in list(_retired.items()):
        left = max(0.0, since + _LEAVE_SECONDS - time.monotonic())
        worker.process.join(left if wait else 0)
        if worker.process.exitcode is not None or left == 0:
            worker.kill()


def kill_all() -> None:
    """End every worker of this process."""
    for worker in list(_running):
        worker.kill()


def _forget_all() -> None:
    _running.clear()
    _retired.clear()


# Before multiprocessing's own handler, which would wait for a stopped worker without end.
atexit.register(kill_all)
# A fork does not own the workers of its parent.
os.register_at_fork(after_in_child=_forget_all)


_server_lock = threading.Lock()
_world_numbers = itertools.count()


@functools.cache
def _store_server() -> dist.TCPStore:
    """The store of this process's worlds, on a port that the system chooses.

    A file store would not do: a rank that is stopped during an access holds the lock of the file.
    """
    with socket.socket() as listener:
        listener.bind((_HOST, 0))  # the default of TCPStore would be reachable from outside
        listener.listen(256)
        return dist.TCPStore(
            _HOST,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=_GROUP_TIMEOUT,
            master_listen_fd=listener.detach(),
        )


def new_world(layout: Layout, *, bare: bool = False) -> World:
    """Describe a world that no worker has joined yet."""
    with _server_lock:
        port = _store_server().port
    return World(f"world-{os.getpid()}-{next(_world_numbers)}", layout, port, bare)


def user_store(world: World, number: int, server: dist.Store | None = None) -> dist.Store:
    """``RankContext.store`` of call ``number``; by default in the process that made the world."""
    # The prefix keeps the keys of two calls in one world apart.
    return dist.PrefixStore(f"{world.name}/user{number}", server or _store_server())


def _start_server() -> None:
    """Start the fork server of this process with our modules loaded, if it does not run yet."""
    forkserver.set_forkserver_preload(_PRELOADED)
    # The server gets sys.path from newer Pythons only, and skips a module that it cannot find.
    root = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [before, root]))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep multiprocessing from running the main script again in the worker.

    Functions of the script travel by value, so the worker has no use for it; and a script without
    an ``if __name__ == "__main__"`` around its call to a launcher works.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(conn: multiprocessing.connection.Connection) -> None:
    """Body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers
    threading.Thread(target=_die_with_parent, daemon=True, name="die-with-parent").start()
    torch.set_num_threads(1)
    # Otherwise gloo looks up the address of the host name, which may be slow or wrong.
    defaults = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    member: _Member | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task: Task | None = conn.recv()
            if task is None:
                break
            _update_environment({**defaults, **task.environment})
            sys.path[:] = task.path
            try:
                if member is None or member.world != task.world:
                    if member is not None:
                        member.leave()
                        member = None
                    member = _Member(task.world, task.rank, task.transport)
                reply = _run(member, task)
            except BaseException as error:  # noqa: BLE001 (goes to the parent, like the next)
                reply = _failed(error, time.monotonic())
            sys.stdout.flush()
            sys.stderr.flush()
            conn.send(reply)
    if member is not None:
        member.leave()


def _run(member: _Member, task: Task) -> _Reply:
    # A call must not depend on the worker's earlier calls.
    torch.manual_seed(task.rank)
    member.set_transport(task.transport)
    fn, args = pickling.load(task.call)
    try:
        value = fn(member.context(task.number), *args)
    except BaseException as error:  # noqa: BLE001 (goes to the parent, SystemExit too)
        return _failed(error, time.monotonic())
    data = pickling.dump_result(value)
    return _Reply(data, False, time.monotonic(), "", member.intact())


def _failed(error: BaseException, when: float) -> _Reply:
    details = "".join(traceback.format_exception(error))
    return _Reply(pickling.dump_error(error), True, when, details.rstrip(), False)


class _Member:
    """This process's membership in a world."""

    def __init__(self, world: World, rank: int, transport: str) -> None:
        self.world = world
        layout = world.layout
        # One store object for the life of the member: each has a connection of its own.
        self._server = dist.TCPStore(
            _HOST, world.store_port, is_master=False, wait_for_workers=False, timeout=_GROUP_TIMEOUT
        )
        self._store = dist.PrefixStore(world.name, self._server)
        self._group: dist.ProcessGroup | None = None
        if world.bare:
            ep_group, tp_group = world.name, ""
            comm.register_group(
                ep_group, self._store, layout.world_size, rank=rank, transport=transport
            )
        else:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore("world", self._store),
                rank=rank,
                world_size=layout.world_size,
                timeout=_GROUP_TIMEOUT,
            )
            self._group = dist.group.WORLD
            assert self._group is not None
            ep_group, tp_group = self._group.group_name, ""
            if layout.tp_world_size > 1:
                ep_group = _new_group(layout.ep_ranks(rank))
                tp_group = _new_group(layout.tp_ranks(rank))
        self._rank, self._ep_group, self._tp_group = rank, ep_group, tp_group
        self._transport = ""
        self._num_groups = _num_groups()

    def context(self, call_number: int) -> RankContext:
        """The context of a call."""
        return RankContext.of(
            self.world.layout,
            self._rank,
            ep_group=self._ep_group,
            tp_group=self._tp_group,
            device=torch.device("cpu"),
            store=user_store(self.world, call_number, self._server),
        )

    def set_transport(self, transport: str) -> None:
        """Set the default transport of the world's process groups."""
        if self._group is None or transport == self._transport:
            return
        comm.close_all()  # communicators of the last call keep its transport
        for name in filter(None, (self._ep_group, self._tp_group)):
            comm.set_transport(name, transport)
        self._transport = transport

    def intact(self) -> bool:
        """Whether the process groups are still those of the world, and no others were left.

        Each group over gloo has a thread that wakes a hundred times a second.
        """
        return dist.group.WORLD is self._group and _num_groups() == self._num_groups

    def leave(self) -> None:
        """Close the library's communicators, then the process groups below them."""
        comm.close_all()
        if self.world.bare:
            comm.unregister_group(self.world.name)
        if dist.is_initialized():
            dist.destroy_process_group()


def _num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def _new_group(ranks: list[int]) -> str:
    # Only the members take part, so each rank creates just its own two groups.
    return dist.new_group(ranks, use_local_synchronization=True).group_name


def _update_environment(wanted: dict[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
