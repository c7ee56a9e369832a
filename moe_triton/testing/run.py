"""Run one function on every rank of a world, in threads or in processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from .. import comm
from .pickling import dump_call
from .pool import borrowed_pool
from .world import Failure, Layout, RankContext, check_transport, raise_first

R = TypeVar("R")

# Seconds that the other ranks may take after the first failure. Threads cannot be ended; the
# library's own time-outs, 30 s by default, end the waits for the failed rank.
_GRACE = 120.0

_numbers = itertools.count()


def run_local(
    world_size: int,
    fn: Callable[[RankContext], R],
    *,
    tp_world_size: int = 1,
    device: str | torch.device = "cpu",
) -> list[R]:
    """Run ``fn(ctx)`` once per rank, each rank a thread of this process.

    The groups exist in this process only. Waits in the library time out by themselves; this
    function waits without limit for ranks that do not fail, and 120 s for the others after a
    failure.

    Args:
        world_size: ranks in all, EP x TP.
        fn: called with the :class:`RankContext` of each rank.
        tp_world_size: ranks of a tensor-parallel group; 0 and 1 mean none.
        device: of all ranks.

    Returns:
        The results in the order of the ranks.

    Raises:
        ValueError: ``tp_world_size`` does not divide ``world_size``.
        BaseException: the exception of the rank that failed first, with the attribute
            ``failed_rank`` and the rank at the end of its text, or in a note where the text is not
            the exception's one argument (from Python 3.11 on). An exception that explains the
            others goes before ``PeerAbortError``, ``PeerTimeoutError`` and ``BrokenGroupError``.
    """
    contexts = _local_contexts(Layout(world_size, tp_world_size), torch.device(device))
    return _in_threads(contexts, fn, keep_groups=False)


@contextlib.contextmanager
def lockstep(
    world_size: int,
    make: Callable[[RankContext], R],
    *,
    tp_world_size: int = 1,
    device: str | torch.device = "cpu",
) -> Iterator[list[R]]:
    """Let one thread drive all ranks, for a world on one device or in one CUDA graph.

    The thread issues the setups of all ranks and then their teardowns: a teardown waits for all
    setups. Calls in which ranks wait for each other, like the constructor of ``ExpertParallel``,
    belong into ``make``.

    Args:
        world_size: ranks in all, EP x TP.
        make: called with the :class:`RankContext` of each rank, each in a thread, as by
            :func:`run_local`.
        tp_world_size: ranks of a tensor-parallel group; 0 and 1 mean none.
        device: of all ranks.

    Yields:
        The results of ``make``, in the order of the ranks.

    Raises:
        As for :func:`run_local`.
    """
    contexts = _local_contexts(Layout(world_size, tp_world_size), torch.device(device))
    ranks = _in_threads(contexts, make, keep_groups=True)
    try:
        yield ranks
    finally:
        _forget_groups(contexts)


def _in_threads(
    contexts: list[RankContext], fn: Callable[[RankContext], R], *, keep_groups: bool
) -> list[R]:
    """Run ``fn`` on every rank; ``keep_groups`` keeps their groups after a success."""
    results: dict[int, R] = {}
    failures: list[Failure] = []
    changed = threading.Condition()

    def run(context: RankContext) -> None:
        try:
            device = context.device
            if device.index is not None:
                torch.get_device_module(device).set_device(device)
            comm.bind_rank(context.ep_group, context.ep_rank)
            if context.tp_group:
                comm.bind_rank(context.tp_group, context.tp_rank)
            value = fn(context)
        except BaseException as error:  # noqa: BLE001 (raised again by the caller's thread)
            with changed:
                failures.append(Failure(context.rank, time.monotonic(), error))
                changed.notify_all()
        else:
            with changed:
                results[context.rank] = value
                changed.notify_all()

    def answers() -> int:
        return len(results) + len(failures)

    world_size = len(contexts)
    for context in contexts:
        threading.Thread(
            target=run, args=(context,), daemon=True, name=f"rank {context.rank}"
        ).start()
    with changed:
        changed.wait_for(lambda: failures or answers() == world_size)
        changed.wait_for(lambda: answers() == world_size, timeout=_GRACE)
        unfinished = set(range(world_size)) - results.keys() - {f.rank for f in failures}
        failures = list(failures)
    # Threads that are still running use the groups.
    if not unfinished and (failures or not keep_groups):
        _forget_groups(contexts)
    if failures:
        raise_first(failures, sorted(unfinished))
    return [results[rank] for rank in range(world_size)]


def _forget_groups(contexts: list[RankContext]) -> None:
    for group in {c.ep_group for c in contexts} | {c.tp_group for c in contexts} - {""}:
        comm.unregister_group(group)


def _local_contexts(layout: Layout, device: torch.device) -> list[RankContext]:
    """Register the groups of an in-process world, and return each rank's context."""
    store = dist.HashStore()
    world = f"local-{os.getpid()}-{next(_numbers)}"
    ep_groups = [f"{world}-ep{plane}" for plane in range(layout.tp_world_size)]
    for group in ep_groups:
        comm.register_group(group, store, layout.ep_world_size, in_process=True)
    tp_groups = [""] * layout.ep_world_size
    if layout.tp_world_size > 1:
        tp_groups = [f"{world}-tp{pair}" for pair in range(layout.ep_world_size)]
        for group in tp_groups:
            comm.register_group(group, store, layout.tp_world_size, in_process=True)
    return [
        RankContext.of(
            layout,
            rank,
            ep_group=ep_groups[layout.tp_rank(rank)],
            tp_group=tp_groups[layout.ep_rank(rank)],
            device=device,
            store=store,
        )
        for rank in range(layout.world_size)
    ]


def run_processes(
    world_size: int,
    fn: Callable[[RankContext], R],
    *,
    tp_world_size: int = 1,
    transport: str = "auto",
) -> list[R]:
    """Run ``fn(ctx)`` once per rank, each rank a process of its own on this host.

    The processes and their process groups (gloo) stay for the next call with the same sizes; after
    a failure they are replaced. Each call gets the caller's environment variables and ``sys.path``,
    and torch's generator seeded with the rank; variables that are read when torch or triton is
    imported keep the values of the first call. ``fn`` and its result are pickled, by cloudpickle
    where it is installed: then ``fn`` may be a lambda, a closure or a function of the main script.
    A rank that does not fail has no time limit; gloo's own is 10 minutes.

    Args:
        world_size: ranks in all, EP x TP.
        fn: called with the :class:`RankContext` of each rank.
        tp_world_size: ranks of a tensor-parallel group; 0 and 1 mean none.
        transport: replaces "auto" for ops on these groups, a name of ``comm.TRANSPORTS``.

    Returns:
        The results in the order of the ranks.

    Raises:
        ValueError: ``tp_world_size`` does not divide ``world_size``, or the transport is unknown.
        TypeError: ``fn`` or a result cannot be pickled.
        WorkerDiedError: the process of a rank ended; names the rank and the exit code.
        BaseException: as for :func:`run_local`; its cause shows the traceback on that rank.
    """
    layout = Layout(world_size, tp_world_size)
    check_transport(transport)
    call = dump_call(fn, ())
    with borrowed_pool() as pool:
        return pool.run(layout, call, transport)
