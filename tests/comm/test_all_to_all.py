"""all_to_all_v against its definition: rank r gets each rank's rows for it, in source order."""

from __future__ import annotations

import time

import harness
import numpy as np
import pytest
import torch
from harness import run_world
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moe_triton import (
    ArgumentMismatchError,
    ArgumentTypeError,
    ArgumentValueError,
    MoeError,
    PeerAbortError,
    ReceiveOverflowError,
    comm,
)
from moe_triton.comm import all_to_all, transport

worlds = pytest.mark.parametrize("world", harness.WORLDS)
WORLD = 3
AT_ONCE = 5.0  # seconds, far below the time-out of 30 s

DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def rows_of(rank: int, counts: list[int], columns: int, seed: int = 0) -> np.ndarray:
    """[N, columns] bytes that ``rank`` sends; every row is different."""
    rng = np.random.default_rng([seed, rank])
    return rng.integers(0, 256, (sum(counts), columns), dtype=np.uint8)


def expected(matrix: list[list[int]], rank: int, columns: int, seed: int = 0) -> np.ndarray:
    """The definition: for each source, the rows behind those for lower ranks."""
    parts = []
    for source, counts in enumerate(matrix):
        first = sum(counts[:rank])
        parts.append(rows_of(source, counts, columns, seed)[first : first + counts[rank]])
    return np.concatenate(parts)


def exchange(ctx, matrix: list[list[int]], columns: int = 4, seed: int = 0) -> bool:
    """One call with bytes; whether rows and counts are right."""
    mine = torch.from_numpy(rows_of(ctx.ep_rank, matrix[ctx.ep_rank], columns, seed))
    out, counts = comm.all_to_all_v(mine, matrix[ctx.ep_rank], group=ctx.ep_group, rank=ctx.ep_rank)
    return (
        np.array_equal(out.numpy(), expected(matrix, ctx.ep_rank, columns, seed))
        and out.shape[1:] == mine.shape[1:]
        and counts == [row[ctx.ep_rank] for row in matrix]
    )


MATRICES = {
    "equal": [[2, 2, 2]] * 3,
    "unequal": [[1, 2, 3], [0, 5, 1], [4, 0, 2]],
    "one sends": [[0, 0, 0], [3, 1, 2], [0, 0, 0]],
    "one receives": [[0, 4, 0], [0, 1, 0], [0, 2, 0]],
    "to itself": [[1, 0, 0], [0, 2, 0], [0, 0, 3]],
    "nothing": [[0, 0, 0]] * 3,
    "round the ring": [[0, 1, 0], [0, 0, 1], [1, 0, 0]],
}


@worlds
def test_counts(world):
    def fn(ctx):
        return [exchange(ctx, matrix) for matrix in MATRICES.values()]

    for actual in run_world(world, WORLD, fn):
        assert dict(zip(MATRICES, actual, strict=True)) == dict.fromkeys(MATRICES, True)


@worlds
def test_two_ranks(world):
    """Each has one peer; over gloo, messages of one sender and one receiver."""
    matrices = [[[1, 4], [0, 2]], [[0, 0], [3, 0]], [[0, 5], [5, 0]], [[0, 0], [0, 0]]]

    def fn(ctx):
        actual = [exchange(ctx, matrix, columns) for matrix in matrices for columns in (1, 4, 4099)]
        communicator = comm.default_communicator(comm.resolve("test", ctx.ep_group, ctx.ep_rank))
        return actual, communicator.transport_name

    name = "shm" if world == "symmetric" else world
    assert run_world(world, 2, fn) == [([True] * 12, name)] * 2


@worlds
def test_dtypes(world):
    """gloo moves only some of these dtypes."""
    matrix = MATRICES["unequal"]

    def fn(ctx):
        wrong = []
        for dtype in DTYPES:
            raw = rows_of(ctx.ep_rank, matrix[ctx.ep_rank], 3 * dtype.itemsize)
            if dtype == torch.bool:
                raw %= 2
            x = torch.from_numpy(raw).view(dtype).view(-1, 3, 1)
            out, _ = comm.all_to_all_v(x, matrix[ctx.ep_rank], group=ctx.ep_group, rank=ctx.ep_rank)
            bits = expected(matrix, ctx.ep_rank, 3 * dtype.itemsize)
            if dtype == torch.bool:
                bits %= 2
            ok = out.dtype == dtype and out.shape == (len(bits), 3, 1)
            if not ok or not np.array_equal(out.view(-1, 3).view(torch.uint8).numpy(), bits):
                wrong.append(dtype)
        return wrong

    assert run_world(world, WORLD, fn) == [[]] * WORLD


@worlds
def test_shapes_strides_and_kinds_of_counts(world):
    """Rows of any shape, from one element to a matrix, contiguous or strided."""
    counts = [1, 2, 1]

    def fn(ctx):
        def call(x, counts):
            out, received = comm.all_to_all_v(x, counts, group=ctx.ep_group, rank=ctx.ep_rank)
            assert received == [counts[ctx.ep_rank]] * WORLD
            return out

        base = torch.arange(8 * 6).view(8, 6) + 1000 * ctx.ep_rank
        mine = slice(sum(counts[: ctx.ep_rank]), sum(counts[: ctx.ep_rank + 1]))
        everyone = [base - 1000 * ctx.ep_rank + 1000 * rank for rank in range(WORLD)]
        for cut in (
            lambda t: t[:4, 0],
            lambda t: t[:4],
            lambda t: t[::2, 1::2],
            lambda t: t.T[:4],
            lambda t: t[:4].reshape(4, 1, 3, 2),
            lambda t: t[:4, :1].expand(4, 5),
        ):
            for kind in (list, tuple, torch.tensor, lambda c: np.array(c).tolist()):
                out = call(cut(base), kind(counts))
                assert torch.equal(out, torch.cat([cut(one)[mine] for one in everyone]))

    run_world(world, WORLD, fn)


@worlds
def test_later_calls_change_no_input_and_no_result(world):
    matrix = MATRICES["unequal"]

    def fn(ctx):
        results = []
        for seed in range(6):
            mine = torch.from_numpy(rows_of(ctx.ep_rank, matrix[ctx.ep_rank], 4, seed))
            before = mine.clone()
            out, _ = comm.all_to_all_v(
                mine, matrix[ctx.ep_rank], group=ctx.ep_group, rank=ctx.ep_rank
            )
            assert torch.equal(mine, before)
            mine.fill_(0)
            results.append(out)
        for seed, out in enumerate(results):
            assert np.array_equal(out.numpy(), expected(matrix, ctx.ep_rank, 4, seed))

    run_world(world, WORLD, fn)


@worlds
def test_sizes_that_grow_and_shrink(world):
    """Windows grow in steps and in one leap; small rows follow large ones."""
    columns = [1, 64, 1024, 5000, 1, 200_000, 7]

    def fn(ctx):
        matrix = MATRICES["unequal"]
        return [exchange(ctx, matrix, width, width) for width in columns]

    assert run_world(world, WORLD, fn) == [[True] * len(columns)] * WORLD


@worlds
def test_with_a_capacity(world):
    """Rows of odd and even sizes, counts of any kind, rows that stay here; exact bits."""

    def fn(ctx):
        for seed, columns in enumerate((1, 2, 3, 4, 6, 8, 24, 33)):
            for matrix in (MATRICES["unequal"], MATRICES["nothing"], MATRICES["one receives"]):
                mine = rows_of(ctx.ep_rank, matrix[ctx.ep_rank], columns, seed)
                x = torch.from_numpy(np.concatenate([mine, mine[:1]]))
                counts = matrix[ctx.ep_rank]
                rows, received = comm.all_to_all_v(
                    x,
                    torch.tensor(counts) if seed % 2 else counts,
                    capacity=10,
                    group=ctx.ep_group,
                    rank=ctx.ep_rank,
                )
                assert rows.shape == (10, columns)
                assert received.dtype == torch.int64
                assert received.tolist() == [row[ctx.ep_rank] for row in matrix]
                wanted = expected(matrix, ctx.ep_rank, columns, seed)
                assert np.array_equal(rows[: len(wanted)].numpy(), wanted)

    run_world(world, WORLD, fn)


@worlds
def test_dtypes_with_a_capacity(world):
    matrix = MATRICES["unequal"]

    def fn(ctx):
        for dtype in DTYPES:
            raw = rows_of(ctx.ep_rank, matrix[ctx.ep_rank], 3 * dtype.itemsize)
            x = torch.from_numpy(raw % 2).view(dtype).view(-1, 3, 1)
            out, counts = comm.all_to_all_v(
                x, matrix[ctx.ep_rank], capacity=8, group=ctx.ep_group, rank=ctx.ep_rank
            )
            assert (out.dtype, out.shape) == (dtype, (8, 3, 1))
            bits = expected(matrix, ctx.ep_rank, 3 * dtype.itemsize) % 2
            out = out[: int(counts.sum())].reshape(-1, 3)
            assert np.array_equal(out.view(torch.uint8).numpy(), bits), dtype

    run_world(world, WORLD, fn)


@worlds
def test_more_rows_than_the_capacity(world):
    """All ranks name the one that would receive them; the next call works."""
    matrix = [[0, 3, 0], [0, 0, 0], [0, 3, 0]]

    def fn(ctx):
        x = torch.zeros(4, 2)
        group = {"group": ctx.ep_group, "rank": ctx.ep_rank}
        with pytest.raises(ReceiveOverflowError) as caught:
            comm.all_to_all_v(x, matrix[ctx.ep_rank], capacity=4, **group)
        assert exchange(ctx, MATRICES["unequal"])
        _, counts = comm.all_to_all_v(x, [1, 1, 1], capacity=4, **group)
        assert counts.tolist() == [1, 1, 1]
        return str(caught.value)

    for text in run_world(world, WORLD, fn):
        assert "rank 1" in text
        assert "6" in text


def test_no_value_is_read_with_a_capacity(monkeypatch):
    """What a device would wait for; the ranks of a device take windows."""

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func), func
            assert "nonzero" not in str(func), func
            return func(*args, **(kwargs or {}))

    for module in (comm, transport):
        monkeypatch.setattr(module, "fixed_shapes", lambda _: True)

    def fn(ctx):
        x, counts = torch.arange(4).view(4, 1) + 10 * ctx.rank, torch.tensor([1, 2])
        options = {"capacity": 4, "group": ctx.ep_group, "rank": ctx.ep_rank}
        for _ in range(3):
            with NoReads():
                rows, received = comm.all_to_all_v(x, counts, **options)
        return rows.flatten().tolist()[:2], received.tolist()

    monkeypatch.setattr(all_to_all, "_check_counts", lambda x, counts, *_, **__: counts)
    assert run_world("local", 2, fn) == [([0, 10], [1, 1]), ([1, 2], [2, 2])]


def test_one_rank_alone():
    x = torch.arange(6).view(3, 2)
    out, counts = comm.all_to_all_v(x, [3])
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()
    assert counts == [3]
    out, counts = comm.all_to_all_v(x[:0], [0])
    assert out.shape == (0, 2)
    assert counts == [0]
    out, counts = comm.all_to_all_v(x, torch.tensor([2]), capacity=3)
    assert torch.equal(out[:2], x[:2])
    assert counts.tolist() == [2]


@st.composite
def calls(draw):
    """A world size, and a matrix of counts and a row size for each of some calls."""
    world_size = draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 5), min_size=world_size, max_size=world_size)
    matrix = st.lists(row, min_size=world_size, max_size=world_size)
    sizes = st.sampled_from([1, 3, 16, 700, 3000])
    return world_size, draw(st.lists(st.tuples(matrix, sizes), min_size=1, max_size=6))


@given(calls())
def test_any_calls(drawn):
    world_size, sequence = drawn

    def fn(ctx):
        return [
            exchange(ctx, matrix, columns, seed) for seed, (matrix, columns) in enumerate(sequence)
        ]

    assert run_world("local", world_size, fn) == [[True] * len(sequence)] * world_size


X = torch.zeros(6, 2)
BAD = {
    "x list": (([1], [2, 2, 2]), ArgumentTypeError, "x", "list"),
    "x None": ((None, [2, 2, 2]), ArgumentTypeError, "x", "NoneType"),
    "x 0-d": ((torch.tensor(1), [1, 0, 0]), ArgumentValueError, "x", "shape ()"),
    "x no columns": ((torch.zeros(6, 0), [2, 2, 2]), ArgumentValueError, "x", "(6, 0)"),
    "x device": ((X.to("meta"), [2, 2, 2]), ArgumentValueError, "x", "meta"),
    "few counts": ((X, [3, 3]), ArgumentValueError, "send_counts", "[3, 3]"),
    "no counts": ((X, []), ArgumentValueError, "send_counts", "[]"),
    "many counts": ((X, [2, 2, 2, 0]), ArgumentValueError, "send_counts", "[2, 2, 2, 0]"),
    "negative count": ((X, [7, -1, 0]), ArgumentValueError, "send_counts", "[7, -1, 0]"),
    "wrong sum": ((X, [2, 2, 1]), ArgumentValueError, "send_counts", "[2, 2, 1]"),
    "counts None": ((X, None), ArgumentTypeError, "send_counts", "None"),
    "counts text": ((X, ["2", "2", "2"]), ArgumentTypeError, "send_counts", "'2'"),
    "counts float": ((X, [2.0, 2.0, 2.0]), ArgumentTypeError, "send_counts", "2.0"),
    "counts of floats": ((X, torch.full((3,), 2.0)), ArgumentTypeError, "send_counts", "2."),
    "counts 2-d": ((X, torch.full((1, 3), 2)), ArgumentTypeError, "send_counts", "[[2, 2, 2]]"),
}


def error_of(ctx, x, counts) -> tuple[MoeError, float]:
    began = time.monotonic()
    with pytest.raises(MoeError) as caught:
        comm.all_to_all_v(x, counts, group=ctx.ep_group, rank=ctx.ep_rank)
    return caught.value, time.monotonic() - began


@worlds
@pytest.mark.parametrize("rounds", [0, 9], ids=["first call", "tenth call"])
def test_bad_arguments(world, rounds):
    """On one rank, whose peers get the reason; then on all. The next correct call works."""

    def fn(ctx):
        assert all(exchange(ctx, MATRICES["unequal"]) for _ in range(rounds))
        actual = {}
        for name, (arguments, *_) in BAD.items():
            actual[name] = [error_of(ctx, *(arguments if ctx.ep_rank == 1 else (X, [2, 2, 2])))]
            actual[name].append(error_of(ctx, *arguments))
            assert exchange(ctx, MATRICES["unequal"])
        return actual

    for rank, actual in enumerate(run_world(world, WORLD, fn)):
        for name, (_, kind, argument, got) in BAD.items():
            for everywhere, (error, seconds) in enumerate(actual[name]):
                assert seconds < AT_ONCE
                assert str(error).startswith("all_to_all_v: ")
                if rank == 1 or everywhere:
                    assert type(error) is kind, name
                    assert error.argument == argument
                    assert got in str(error)
                else:
                    assert type(error) is PeerAbortError, name
                    assert error.rank == 1
                    assert got in error.reason


WRONG = {
    "more rows": (4, [4, 1, 1], ArgumentValueError, "capacity"),
    "no rows": (0, [0, 0, 0], ArgumentValueError, "capacity"),
    "capacity text": ("8", [4, 1, 1], ArgumentTypeError, "capacity"),
    "capacity True": (True, [4, 1, 1], ArgumentTypeError, "capacity"),
    "wrong sum": (8, [4, 2, 1], ArgumentValueError, "send_counts"),
    "few counts": (8, torch.tensor([4, 2]), ArgumentValueError, "send_counts"),
}


@worlds
def test_bad_arguments_with_a_capacity(world):
    def fn(ctx):
        group = {"group": ctx.ep_group, "rank": ctx.ep_rank}
        for capacity, counts, kind, argument in WRONG.values():
            given = (counts, capacity) if ctx.ep_rank == 1 else ([2, 2, 2], 8)
            with pytest.raises(MoeError) as caught:
                comm.all_to_all_v(X, given[0], capacity=given[1], **group)
            if ctx.ep_rank == 1:
                assert type(caught.value) is kind
                assert caught.value.argument == argument
            else:
                assert type(caught.value) is PeerAbortError
        with pytest.raises(ArgumentMismatchError, match="capacity"):
            comm.all_to_all_v(X, [2, 2, 2], capacity=8 + ctx.ep_rank, **group)
        comm.all_to_all_v(X, [2, 2, 2], capacity=8, **group)

    run_world(world, WORLD, fn)


@worlds
def test_rows_of_different_sizes(world):
    def fn(ctx):
        actual = []
        for rounds in (0, 3):
            assert all(exchange(ctx, MATRICES["unequal"]) for _ in range(rounds))
            x = torch.zeros(3, 8 if ctx.ep_rank == 1 else 4)
            actual.append(error_of(ctx, x, [1, 1, 1])[0])
            assert exchange(ctx, MATRICES["equal"])
        return actual

    for rank, actual in enumerate(run_world(world, WORLD, fn)):
        for error in actual:
            assert type(error) is ArgumentMismatchError
            assert error.argument == "row_bytes"
            mine, theirs = (32, 16) if rank == 1 else (16, 32)
            assert f"got {mine} on this rank and {theirs} on rank" in str(error)
