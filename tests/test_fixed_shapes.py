"""Fixed shapes as on devices, on the CPU: outputs of the worst size, one thread for all ranks.

On a device no size may follow from data, because reading it would wait. Here the same steps run
without reading any, and give the same results as with exact sizes.
"""

from __future__ import annotations

from types import SimpleNamespace

import drawn
import harness
import pytest
import torch
from hypothesis import given
from lockstep_layer import bits, drive, experts
from torch.utils._python_dispatch import TorchDispatchMode

from moe_triton import ExpertParallel, backend, comm, testing
from moe_triton.comm import single, symmetric, transport
from moe_triton.layout import NOWHERE
from moe_triton.ops import checks

E, K, H, MAX_TOKENS = 6, 2, 32, 7
# Ops that read data.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


@pytest.fixture(autouse=True)
def fixed_shapes(monkeypatch):
    fix_shapes(monkeypatch)


def fix_shapes(patch: pytest.MonkeyPatch) -> None:
    for module in (comm, transport):
        patch.setattr(module, "fixed_shapes", lambda _: True)


@pytest.mark.parametrize("version", [1, 2])
def test_drawn_configurations(version):
    @drawn.profile(15)
    @given(drawn.configs(version))
    def check(config):
        drawn.check_in_threads(config)

    check()


def inputs(rank: int, seed: int = 0):
    count, seed = (MAX_TOKENS, 0, 4)[rank % 3], 10 * seed + rank
    ids = testing.routing_zipf(count, E, K, seed=seed)
    weights = testing.weights(count, K, seed=seed)
    return testing.tokens(count, H, torch.bfloat16, seed=seed), ids, weights


def make(ctx, **options) -> ExpertParallel:
    sizes = {"num_experts": E, "top_k": K, "hidden": H, "max_tokens": MAX_TOKENS}
    return ExpertParallel(ctx.ep_group, rank=ctx.ep_rank, **{**sizes, **options})


def exact(world: int, options: dict) -> list:
    """Rows and sums of the same layer with exact sizes, each rank in its thread."""

    def fn(ctx):
        with make(ctx, **options, exact=True) as ep:
            rounds = []
            for seed in range(3):
                received = ep.dispatch(*inputs(ctx.rank, seed))
                rounds.append((received, ep.combine(experts(received), received.handle)))
            return rounds

    return testing.run_local(world, fn)


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("quant", [None, "int8", "group_e4m3"])
@pytest.mark.parametrize("world", [1, 3])
def test_one_thread_drives_all_ranks(world, quant, alignment):
    options = {"quant": quant, "alignment": alignment}
    expected = exact(world, options)
    with testing.lockstep(world, lambda ctx: make(ctx, **options)) as ranks:
        for seed in range(3):
            received, sums = drive(ranks, [inputs(rank, seed) for rank in range(world)])
            for rank, ep in enumerate(ranks):
                fixed, exact_rows = received[rank], expected[rank][seed][0]
                n = int(fixed.offsets[-1])
                assert n == len(exact_rows.x)
                assert len(fixed.x) == ep.capacity
                assert torch.equal(fixed.offsets, exact_rows.offsets)
                assert torch.equal(fixed.tokens_per_expert, exact_rows.tokens_per_expert)
                for name in ("x", "scales", "weights"):
                    got, wanted = getattr(fixed, name), getattr(exact_rows, name)
                    assert (got is None) == (wanted is None)
                    if got is not None:
                        assert torch.equal(bits(got[:n]), bits(wanted)), name
                assert torch.equal(sums[rank], expected[rank][seed][1])


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_processes(world):
    """As on NPUs, and on GPUs without access to each other's memory."""

    def fn(ctx):
        with pytest.MonkeyPatch.context() as patch:
            fix_shapes(patch)
            with make(ctx, quant="int8", alignment=4) as ep:
                received = ep.dispatch(*inputs(ctx.rank))
                assert len(received.x) == ep.capacity
                return ep.combine(experts(received), received.handle)

    sums = harness.run_world(world, 3, fn)
    for rank, rounds in enumerate(exact(3, {"quant": "int8", "alignment": 4})):
        assert torch.equal(sums[rank], rounds[0][1])


@torch.no_grad()
def test_rows_after_the_last_one_are_not_written(monkeypatch):
    """Outputs hold the worst case, many times the received rows: the rest must cost nothing."""
    empty = torch.empty

    def poisoned(*shape, **options):
        return empty(*shape, **options).fill_(77)

    with testing.lockstep(3, make) as ranks:
        monkeypatch.setattr(torch, "empty", poisoned)
        received, _ = drive(ranks, [inputs(rank) for rank in range(3)])
    for rank in received:
        assert bool((rank.x[int(rank.num_tokens) :] == 77).all())


@pytest.mark.parametrize("quant", [None, "int8", "mx_e4m3"])
def test_rows_after_the_last_one_are_zeros_where_gradients_are_enabled(quant, monkeypatch):
    empty = torch.empty

    def poisoned(*shape, **options):
        out = empty(*shape, **options)
        return out if out.dtype.itemsize > 4 else (out.view(torch.uint8).fill_(77), out)[1]

    with testing.lockstep(3, lambda ctx: make(ctx, quant=quant)) as ranks:
        batches = [inputs(rank) for rank in range(3)]
        monkeypatch.setattr(torch, "empty", poisoned)
        pending = [ep.dispatch_setup(*values) for ep, values in zip(ranks, batches, strict=True)]
        received = [ep.dispatch_teardown(sent) for ep, sent in zip(ranks, pending, strict=True)]
    for rank in received:
        for tensor in (rank.x, rank.scales, rank.weights):
            if tensor is not None:
                rows = tensor.reshape(len(tensor), -1).view(torch.uint8)
                assert rows[: int(rank.offsets[-1])].any()
                assert not rows[int(rank.offsets[-1]) :].any()


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("world", [1, 3])
def test_rows_beyond_the_limit_are_left_out(world, alignment, shared, monkeypatch):
    """A graph cannot raise: rows beyond ``max_recv_tokens`` are neither written nor summed."""
    if world == 1 and shared:
        pytest.skip("a shared expert needs a rank of its own")
    monkeypatch.setattr(single, "check_overflow", lambda *_: None)
    monkeypatch.setattr(symmetric, "check_overflow", lambda *_: None)
    experts_of = E if world == 1 else E // (world - shared)
    limit = 5
    options = {"max_recv_tokens": limit, "alignment": alignment}
    options |= {"shared_experts": shared, "shared_ranks": shared}
    with testing.lockstep(world, lambda ctx: make(ctx, **options)) as ranks:
        batches = [inputs(rank) for rank in range(world)]
        received, sums = drive(ranks, batches)
        capacities = [ep.capacity for ep in ranks]
    room = [0] * world  # rows of each rank so far, padding included
    kept = set()
    for rank in range(world):
        for local in range(1 if rank < shared else experts_of):
            expert = (rank - shared) * experts_of + local
            for source, (_, ids, _) in enumerate(batches):
                for token, slots in enumerate(ids.tolist()):
                    wanted = [K] if rank < shared else [k for k in range(K) if slots[k] == expert]
                    for slot in wanted:
                        if room[rank] < capacities[rank]:
                            kept.add((source, token, slot))
                        room[rank] += 1
            room[rank] = -(-room[rank] // alignment) * alignment
    assert any(rows > capacity for rows, capacity in zip(room, capacities, strict=True))
    for rank, (x, ids, weights) in enumerate(batches):
        assert len(received[rank].x) == capacities[rank]
        assert int(received[rank].offsets[-1]) == min(room[rank], capacities[rank])
        total = torch.zeros(x.shape)
        for token in range(len(x)):
            for slot in range(K):
                if (rank, token, slot) in kept:
                    number = int(ids[token, slot]) % experts_of + 1
                    total[token] += (x[token] * number).float() * weights[token, slot]
            if (rank, token, K) in kept:
                total[token] += x[token].float()
        assert torch.equal(sums[rank], total.to(torch.bfloat16))


class NoReads(TorchDispatchMode):
    """Raises when an op reads a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in READS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    backend.get_backend("cpu") != "interpret", reason="the definition reads the data"
)
@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize("world", [1, 3])
def test_no_op_reads_a_value(world, quant, monkeypatch):
    """So that a graph can replay a layer; values are checked on the CPU alone."""
    with testing.lockstep(world, lambda ctx: make(ctx, quant=quant)) as ranks:
        batches = [inputs(rank) for rank in range(world)]
        drive(ranks, batches)
        monkeypatch.setattr(checks, "expert_ids", lambda *args, **options: None)
        with NoReads():
            drive(ranks, batches)


class Launches(TorchDispatchMode):
    """Lists device steps and PyTorch's ops outside them, without views and allocations."""

    IDLE = ("empty", "empty_like", "new_empty", "promote_types", "_record_function_enter_new")
    IDLE += ("_record_function_exit", "view", "slice", "select", "detach", "unbind", "unsqueeze")
    IDLE += ("fill_",)  # poisons memory

    def __init__(self) -> None:
        super().__init__()
        self.launched = []
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if not self.inside and name not in self.IDLE:
            self.launched.append(name)
        return func(*args, **(kwargs or {}))

    def step(self, name, run):
        def call(*args, **kwargs):
            self.launched.append(name)
            self.inside = True
            try:
                return run(*args, **kwargs)
            finally:
                self.inside = False

        return call


@torch.no_grad()
def test_launches_of_a_rank_alone(monkeypatch):
    """Each launch costs more than a microsecond of a small batch, even in a graph."""
    listed = Launches()
    names = [name for name in vars(comm.DeviceSteps) if not name.startswith("_")]
    with testing.lockstep(1, make) as (ep,):
        steps = ep._exchange._steps
        counted = {name: listed.step(name, getattr(steps, name)) for name in names}
        ep._exchange._steps = SimpleNamespace(**counted)
        batch = inputs(0)
        drive([ep], [batch])  # allocates tables that are made once
        monkeypatch.setattr(checks, "expert_ids", lambda *args, **options: None)
        listed.launched.clear()
        with listed:
            received = ep.dispatch(*batch)
        assert listed.launched == ["local_permutation", "gather_quant"]
        listed.launched.clear()
        with listed:
            ep.combine(received.x, received.handle)
        assert listed.launched == ["weighted_sum"]


def test_smaller_batches_by_ids_of_minus_one():
    """How a captured batch serves a smaller one: slots of the other tokens take no part."""
    with testing.lockstep(2, make) as ranks:
        batches = [inputs(0), inputs(0, 1)]
        _, whole = drive(ranks, batches)
        for _, ids, _ in batches:
            ids[3:] = NOWHERE
        _, part = drive(ranks, batches)
    for full, small in zip(whole, part, strict=True):
        assert torch.equal(full[:3], small[:3])
        assert not small[3:].any()
