"""Workers and worlds stay between calls, are replaced after failures, and never outlive us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_triton import testing


@pytest.fixture(autouse=True)
def pool():
    testing.close_pool()


def identify(ctx):
    return os.getpid(), id(dist.group.WORLD)


def pids(world_size):
    return [pid for pid, _ in testing.run_processes(world_size, identify)]


def gone(pid):
    """Whether a process has ended, reaped or not: its threads, too, which hold its pipes open."""
    process = Path(f"/proc/{pid}")
    try:
        ended = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return ended and len([*(process / "task").iterdir()]) <= 1
    except (FileNotFoundError, ProcessLookupError):
        return True


def eventually(condition, limit=10.0):
    end = time.monotonic() + limit
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_processes_and_their_world_are_used_again():
    first = testing.run_processes(3, identify)
    assert len({pid for pid, _ in first}) == 3
    assert testing.run_processes(3, identify) == first
    assert testing.pool_pids() == [pid for pid, _ in first]


def test_the_pool_grows_and_serves_smaller_worlds():
    two = pids(2)
    four = pids(4)
    assert four[:2] == two
    assert pids(3) == four[:3]
    assert pids(4) == four


def test_closing_the_pool_ends_its_processes():
    before = pids(2)
    testing.close_pool()
    assert testing.pool_pids() == []
    assert all(map(gone, before))


def test_a_world_that_a_function_destroyed_is_made_again():
    def destroy(ctx):
        dist.destroy_process_group()
        return os.getpid()

    before = testing.run_processes(2, destroy)

    def add(ctx):
        ones = torch.ones(1)
        dist.all_reduce(ones)
        return os.getpid(), ones.item()

    assert testing.run_processes(2, add) == [(pid, 2.0) for pid in before]


def test_groups_that_a_function_left_are_gone():
    def leave(ctx):
        return dist.new_group().group_name

    name, _ = testing.run_processes(2, leave)

    def kept(ctx):
        return name in dist.distributed_c10d._world.pg_names.values()

    assert testing.run_processes(2, kept) == [False, False]


def test_a_failed_call_leaves_nothing_behind():
    before = pids(2)

    def fail(ctx):
        dist.all_reduce(torch.ones(1), async_op=ctx.rank == 0)
        if ctx.rank == 1:
            raise KeyError(1)
        dist.barrier()  # nobody else comes

    start = time.monotonic()
    with pytest.raises(KeyError):
        testing.run_processes(2, fail)
    assert time.monotonic() - start < 10
    assert not set(pids(2)) & set(before)
    assert eventually(lambda: all(map(gone, before)))


@pytest.mark.parametrize(
    "die, how",
    [
        pytest.param(lambda: os._exit(3), "exit code 3", id="exit"),
        pytest.param(
            lambda: os.kill(os.getpid(), signal.SIGKILL), r"exit code -9 \(SIGKILL\)", id="kill"
        ),
    ],
)
def test_a_death_is_reported_at_once(die, how):
    before = pids(3)

    def fn(ctx):
        if ctx.rank == 1:
            die()
        time.sleep(100)

    start = time.monotonic()
    with pytest.raises(testing.WorkerDiedError, match=rf"rank 1 \(pid {before[1]}\).*{how}") as e:
        testing.run_processes(3, fn)
    assert time.monotonic() - start < 10
    assert isinstance(e.value, RuntimeError)
    assert e.value.failed_rank == e.value.rank == 1
    assert all(map(gone, before))
    assert len(pids(3)) == 3


def test_a_death_goes_before_the_connections_that_it_closed():
    def fn(ctx):
        if ctx.rank == 1:
            os._exit(3)
        dist.barrier()

    with pytest.raises(testing.WorkerDiedError, match="rank 1"):
        testing.run_processes(4, fn)


def test_a_worker_that_died_between_calls_is_replaced():
    before = pids(3)
    os.kill(before[1], signal.SIGKILL)
    assert eventually(lambda: gone(before[1]))
    after = pids(3)
    assert before[1] not in after
    assert {before[0], before[2]} < set(after)


def test_every_call_finds_the_callers_surroundings(monkeypatch):
    def surroundings(ctx):
        return os.environ.get("MOE_TRITON_TEST_WORD"), sys.path[0], torch.rand(1).item()

    monkeypatch.setenv("MOE_TRITON_TEST_WORD", "blue")
    monkeypatch.syspath_prepend("/nowhere")
    first = testing.run_processes(2, surroundings)
    assert [(word, path) for word, path, _ in first] == [("blue", "/nowhere")] * 2
    assert len({number for *_, number in first}) == 2
    assert testing.run_processes(2, surroundings) == first
    monkeypatch.delenv("MOE_TRITON_TEST_WORD")
    assert [word for word, *_ in testing.run_processes(2, surroundings)] == [None, None]


def test_workers_compute_with_one_thread():
    assert testing.run_processes(2, lambda ctx: torch.get_num_threads()) == [1, 1]


def test_results_that_cannot_travel_are_an_error_of_their_rank():
    with pytest.raises(TypeError, match="must be picklable") as caught:
        testing.run_processes(2, lambda ctx: (x for x in ()) if ctx.rank == 1 else None)
    assert caught.value.failed_rank == 1


def test_large_results_and_arguments_pass():
    data = torch.arange(4_000_000, dtype=torch.int32)
    first, second = testing.run_processes(2, lambda ctx: data + ctx.rank)
    assert torch.equal(first, data)
    assert torch.equal(second, data + 1)


_SCRIPT = """
import os, signal, time
from moe_triton import testing

# What a shell runs in the background ignores interrupts, and so would this.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Thing:
    def __init__(self, rank):
        self.rank = rank

def fn(ctx):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece, beside those of the other
    time.sleep({seconds})
    return Thing(ctx.rank)

things = testing.run_processes(2, fn)  # no guard against being imported by the workers
assert [thing.rank for thing in things] == [0, 1]
assert all(type(thing) is Thing for thing in things)
print("done")
"""


@pytest.fixture
def script(tmp_path):
    """Start a script that calls the launcher; gives the process and the ids of its workers."""
    processes = []

    def start(seconds):
        path = tmp_path / "script.py"
        path.write_text(_SCRIPT.format(seconds=seconds))
        process = subprocess.Popen(
            [sys.executable, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
        )
        processes.append(process)
        return process, [int(process.stdout.readline()) for _ in range(2)]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_script_without_a_guard_works_and_leaves_no_process(script):
    process, workers = script(0)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "done\n"), err
    assert eventually(lambda: all(map(gone, workers)))


@pytest.mark.parametrize("group", [False, True], ids=["to the caller", "from the terminal"])
def test_an_interrupt_leaves_no_process(script, group):
    process, workers = script(100)
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert eventually(lambda: all(map(gone, workers)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_the_death_of_the_caller_leaves_no_process(script, number):
    process, workers = script(100)
    os.kill(process.pid, number)
    assert eventually(lambda: all(map(gone, workers)))
