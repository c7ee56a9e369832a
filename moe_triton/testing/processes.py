"""Ranks as processes that a test can stop, kill and restart."""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, final

import torch.distributed as dist

from .pickling import dump_call
from .worker import Result, Task, Worker, new_world, reap, user_store
from .world import Failure, Layout, check_transport, raise_first


def start_processes(
    world_size: int,
    fn: Callable[..., Any],
    *,
    args: tuple[Any, ...] = (),
    transport: str = "auto",
) -> Processes:
    """Start ``fn(ctx, *args)`` on every rank of a world, and return while it runs.

    Unlike in ``run_processes`` the processes are new, and they share a store but no torch process
    group: ``ctx.ep_group`` names a group registered with ``comm``, which a killed rank can join
    again.

    Args:
        world_size: ranks; there is no tensor parallelism.
        fn: called with the ``RankContext`` of each rank and ``args``.
        args: further arguments.
        transport: replaces "auto" for ops on the group, a name of ``comm.TRANSPORTS``.

    Returns:
        A handle, to be closed or used in a ``with`` statement.

    Raises:
        ValueError: the size is not positive, or the transport is unknown.
        TypeError: the call cannot be pickled.
    """
    check_transport(transport)
    return Processes(Layout(world_size), fn, args, transport)


@final
class Processes:
    """Handle on the processes of ``start_processes``.

    Attributes:
        world_size: number of ranks.
        store: the ``RankContext.store`` of the ranks, for example to time a fault.
    """

    def __init__(
        self, layout: Layout, fn: Callable[..., Any], args: tuple[Any, ...], transport: str
    ) -> None:
        self.world_size = layout.world_size
        self._fn, self._args, self._transport = fn, args, transport
        self._world = new_world(layout, bare=True)
        self.store: dist.Store = user_store(self._world, 0)
        self._workers: dict[int, Worker] = {}
        self._outcomes: dict[int, Result | Failure] = {}
        call = dump_call(fn, args)
        try:
            for rank in range(self.world_size):
                self._start(rank, call)
        except BaseException:
            self.close()
            raise

    def pid(self, rank: int) -> int:
        """Process id of a rank."""
        return self._workers[rank].pid

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process of a rank; after SIGKILL, wait until it is gone."""
        worker = self._workers[rank]
        os.kill(worker.pid, number)
        if number == signal.SIGKILL:
            worker.process.join()

    def result(self, rank: int, timeout: float = 60.0) -> Any:
        """Wait for the result of a rank, whose process then stays until ``close``.

        Args:
            rank: the rank.
            timeout: in seconds.

        Raises:
            TimeoutError: the time is up.
            WorkerDiedError: the process ended.
            BaseException: the exception of the function, as in ``run_processes``.
        """
        if rank not in self._outcomes:
            worker = self._workers[rank]
            if not multiprocessing.connection.wait(worker.events, timeout):
                raise TimeoutError(f"rank {rank} (pid {worker.pid}): no result after {timeout} s")
            self._outcomes[rank] = worker.receive(rank)
        outcome = self._outcomes[rank]
        if isinstance(outcome, Failure):
            raise_first([outcome])
        return outcome.value

    def results(self, timeout: float = 60.0) -> list[Any]:
        """The results of all ranks in their order, each as in :meth:`result`, in ``timeout`` s."""
        end = time.monotonic() + timeout
        return [
            self.result(rank, max(0.0, end - time.monotonic())) for rank in range(self.world_size)
        ]

    def restart(
        self,
        rank: int,
        fn: Callable[..., Any] | None = None,
        *,
        args: tuple[Any, ...] | None = None,
    ) -> None:
        """Start a rank in a new process, after killing the old one if it still runs.

        Args:
            rank: the rank.
            fn: function to run; by default the same.
            args: its further arguments; by default the same.
        """
        call = dump_call(fn or self._fn, self._args if args is None else args)
        self._workers.pop(rank).kill()
        self._outcomes.pop(rank, None)
        self._start(rank, call)

    def close(self) -> None:
        """End all processes: idle ones close their groups, the others are killed."""
        for rank, worker in self._workers.items():
            if isinstance(self._outcomes.get(rank), Result):
                worker.retire()
            else:
                worker.kill()
        self._workers.clear()
        reap(wait=True)

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, rank: int, call: bytes) -> None:
        self._workers[rank] = Worker()
        self._workers[rank].send(Task(self._world, rank, 0, call, self._transport))
