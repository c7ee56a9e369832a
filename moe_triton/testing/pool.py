"""A pool of workers that stay between calls, and their world."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import time
from collections.abc import Collection, Iterator
from typing import Any

from .worker import Result, Task, Worker, World, new_world, reap
from .world import Failure, Layout, raise_first

# Seconds until the other ranks are killed after a failure: short where they can only add to the
# report, longer where one of them may be the cause.
_GRACE = 1.0
_GRACE_FOR_CAUSE = 5.0

_idle: list[Pool] = []


@contextlib.contextmanager
def borrowed_pool() -> Iterator[Pool]:
    """A pool for this call alone: calls may come from several threads at once."""
    try:
        pool = _idle.pop()
    except IndexError:
        pool = Pool()
    try:
        yield pool
    finally:
        _idle.append(pool)


def pool_pids() -> list[int]:
    """Process ids of the idle workers."""
    return [worker.pid for pool in _idle for worker in pool.workers]


def close_pool() -> None:
    """End the idle workers, for a program that needs their memory.

    They end with the calling process in any case.
    """
    while _idle:
        _idle.pop().dismiss()
    reap(wait=True)


class Pool:
    """Workers for one call at a time, as many as the largest world so far.

    Attributes:
        workers: the first of them are the ranks of the current world.
    """

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self._world: World | None = None
        self._calls = 0

    def run(self, layout: Layout, call: bytes, transport: str) -> list[Any]:
        """Run a pickled call on every rank of a world of this layout.

        Args:
            layout: the sizes of the world.
            call: from ``pickling.dump_call``.
            transport: default transport of the world's groups.

        Returns:
            The results in the order of the ranks.

        Raises:
            BaseException: see ``run_processes``.
        """
        reap()
        self._calls += 1
        outcomes: dict[int, Result | Failure] = {}
        try:
            world = self._enter(layout)
            for rank in range(layout.world_size):
                self.workers[rank].send(Task(world, rank, self._calls, call, transport))
            self._collect(layout.world_size, outcomes)
        except BaseException:
            # For example Ctrl-C: the caller no longer waits for the workers.
            self.dismiss(outcomes)
            raise
        failures = [o for o in outcomes.values() if isinstance(o, Failure)]
        if failures:
            # A failed call may leave broken groups, unfinished collectives or threads behind. New
            # workers are cheap.
            self.dismiss(outcomes)
            raise_first(failures, sorted(set(range(layout.world_size)) - outcomes.keys()))
        results = [o for _, o in sorted(outcomes.items()) if isinstance(o, Result)]
        if not all(result.world_intact for result in results):
            self._world = None
        return [result.value for result in results]

    def dismiss(self, answered: Collection[int] | None = None) -> None:
        """End all workers.

        Args:
            answered: idle ranks of the current world, which close their groups; the others are
                killed. None if all are idle.
        """
        size = self._world.layout.world_size if self._world is not None else 0
        for rank, worker in enumerate(self.workers):
            if answered is None or rank in answered or rank >= size:
                worker.retire()
            else:
                worker.kill()
        self.workers.clear()
        self._world = None

    def _enter(self, layout: Layout) -> World:
        """Start missing workers, and return a world of this layout for them."""
        alive = [worker for worker in self.workers if worker.is_idle()]
        if len(alive) < len(self.workers):
            for worker in self.workers:
                if worker not in alive:
                    worker.kill()
            self.workers = alive
            self._world = None
        while len(self.workers) < layout.world_size:
            self.workers.append(Worker())
        if self._world is None or self._world.layout != layout:
            self._world = new_world(layout)
        return self._world

    def _collect(self, world_size: int, outcomes: dict[int, Result | Failure]) -> None:
        """Fill in ``outcomes`` until all ranks answered, or until some time after a failure."""
        deadline = float("inf")
        while len(outcomes) < world_size and (now := time.monotonic()) < deadline:
            waiting = [rank for rank in range(world_size) if rank not in outcomes]
            ready = multiprocessing.connection.wait(
                [event for rank in waiting for event in self.workers[rank].events],
                None if deadline == float("inf") else deadline - now,
            )
            for rank in waiting:
                if any(event in ready for event in self.workers[rank].events):
                    outcomes[rank] = outcome = self.workers[rank].receive(rank)
                    if isinstance(outcome, Failure):
                        grace = _GRACE_FOR_CAUSE if outcome.is_consequence() else _GRACE
                        deadline = min(deadline, time.monotonic() + grace)
