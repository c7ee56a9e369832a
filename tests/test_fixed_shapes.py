"""What devices do, on the CPU: outputs of the worst size, one thread for all ranks, blindly.

On a device no size may follow from data, because nothing waits for it. Here the same steps are told
not to look either, and must come to what they come to when they may.
"""

from __future__ import annotations

from types import SimpleNamespace

import drawn
import harness
import pytest
import torch
from hypothesis import given
from torch.utils._python_dispatch import TorchDispatchMode

from moe_triton import ExpertParallel, backend, comm, testing
from moe_triton.comm import row_exchange, single, transport
from moe_triton.layout import NOWHERE
from moe_triton.ops import checks

E, K, H, MAX_TOKENS = 6, 2, 32, 7
# What cannot be answered without the data.
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


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


def experts(received) -> torch.Tensor:
    """Each row times the number of its expert; anything where there is no row."""
    rows = torch.arange(len(received.x))
    number = torch.searchsorted(received.offsets, rows, right=True)
    y = received.x.to(torch.bfloat16) * (number[:, None] + 1)
    return y.masked_fill_((rows >= received.offsets[-1])[:, None], float("nan"))


def make(ctx, **options) -> ExpertParallel:
    sizes = {"num_experts": E, "top_k": K, "hidden": H, "max_tokens": MAX_TOKENS}
    return ExpertParallel(ctx.ep_group, rank=ctx.ep_rank, **{**sizes, **options})


def drive(ranks: list[ExpertParallel], given) -> tuple[list, list]:
    """One layer on all ranks: dispatched rows and sums."""
    pending = [ep.dispatch_setup(*values) for ep, values in zip(ranks, given, strict=True)]
    received = [ep.dispatch_teardown(one) for ep, one in zip(ranks, pending, strict=True)]
    outputs = [
        ep.combine_setup(experts(one), one.handle) for ep, one in zip(ranks, received, strict=True)
    ]
    return received, [ep.combine_teardown(one) for ep, one in zip(ranks, outputs, strict=True)]


def exact(world: int, options: dict) -> list:
    """The same layer by ranks that look, each in its thread."""

    def fn(ctx):
        with make(ctx, **options, exact=True) as ep:
            found = []
            for seed in range(3):
                received = ep.dispatch(*inputs(ctx.rank, seed))
                found.append((received, ep.combine(experts(received), received.handle)))
            return found

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
                one, other = received[rank], expected[rank][seed][0]
                n = int(one.offsets[-1])
                assert n == len(other.x)
                assert len(one.x) == ep.capacity
                assert torch.equal(one.offsets, other.offsets)
                assert torch.equal(one.tokens_per_expert, other.tokens_per_expert)
                for name in ("x", "scales", "weights"):
                    found, wanted = getattr(one, name), getattr(other, name)
                    assert (found is None) == (wanted is None)
                    if found is not None:
                        assert torch.equal(bits(found[:n]), bits(wanted)), name
                assert torch.equal(sums[rank], expected[rank][seed][1])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_processes(world):
    """The way of NPUs, and of GPUs that cannot reach each other's memory."""

    def fn(ctx):
        with pytest.MonkeyPatch.context() as patch:
            fix_shapes(patch)
            with make(ctx, quant="int8", alignment=4) as ep:
                received = ep.dispatch(*inputs(ctx.rank))
                assert len(received.x) == ep.capacity
                return ep.combine(experts(received), received.handle)

    found = harness.run_world(world, 3, fn)
    for rank, rounds in enumerate(exact(3, {"quant": "int8", "alignment": 4})):
        assert torch.equal(found[rank], rounds[0][1])


def test_rows_that_did_not_come_are_left_as_they_are(monkeypatch):
    """A worst case has room for many times the rows that come: none of it may cost anything."""
    empty = torch.Tensor.new_empty

    def poisoned(tensor, *shape, **options):
        return empty(tensor, *shape, **options).fill_(77)

    with testing.lockstep(3, make) as ranks:
        monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
        received, _ = drive(ranks, [inputs(rank) for rank in range(3)])
    for one in received:
        assert bool((one.x[int(one.num_tokens) :] == 77).all())


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("world", [1, 3])
def test_rows_without_room_are_left_out(world, alignment, shared, monkeypatch):
    """In a graph nobody can say that there are too many: no row goes where there is no room."""
    if world == 1 and shared:
        pytest.skip("a rank of its own is needed for a shared expert")
    for module in (single, row_exchange):
        monkeypatch.setattr(module, "check_overflow", lambda *_: None)
    experts_of = E if world == 1 else E // (world - shared)
    limit = 5
    options = {"max_recv_tokens": limit, "alignment": alignment}
    options |= {"shared_experts": shared, "shared_ranks": shared}
    with testing.lockstep(world, lambda ctx: make(ctx, **options)) as ranks:
        given = [inputs(rank) for rank in range(world)]
        received, sums = drive(ranks, given)
        capacities = [ep.capacity for ep in ranks]
    room = [0] * world  # rows of each rank so far, padding included
    kept = set()
    for rank in range(world):
        for local in range(1 if rank < shared else experts_of):
            expert = (rank - shared) * experts_of + local
            for source, (_, ids, _) in enumerate(given):
                for token, slots in enumerate(ids.tolist()):
                    wanted = [K] if rank < shared else [k for k in range(K) if slots[k] == expert]
                    for slot in wanted:
                        if room[rank] < capacities[rank]:
                            kept.add((source, token, slot))
                        room[rank] += 1
            room[rank] = -(-room[rank] // alignment) * alignment
    assert any(rows > capacity for rows, capacity in zip(room, capacities, strict=True))
    for rank, (x, ids, weights) in enumerate(given):
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


class NoLooks(TorchDispatchMode):
    """Raises when an op asks for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in LOOKS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    backend.get_backend("cpu") != "interpret", reason="the definition looks at the data"
)
@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize("world", [1, 3])
def test_nothing_asks_for_a_value(world, quant, monkeypatch):
    """So that a graph can replay a layer; values are checked on the CPU alone."""
    with testing.lockstep(world, lambda ctx: make(ctx, quant=quant)) as ranks:
        given = [inputs(rank) for rank in range(world)]
        drive(ranks, given)
        monkeypatch.setattr(checks, "expert_ids", lambda *args, **options: None)
        with NoLooks():
            drive(ranks, given)


class Launches(TorchDispatchMode):
    """Lists the steps of a device and what PyTorch does beside them, views and memory left out."""

    IDLE = ("empty", "empty_like", "new_empty", "promote_types", "_record_function_enter_new")
    IDLE += ("_record_function_exit", "view", "slice", "select", "detach", "unbind", "unsqueeze")
    IDLE += ("fill_",)  # of memory that tests poison

    def __init__(self) -> None:
        super().__init__()
        self.found = []
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if not self.inside and name not in self.IDLE:
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    def step(self, name, run):
        def call(*args, **kwargs):
            self.found.append(name)
            self.inside = True
            try:
                return run(*args, **kwargs)
            finally:
                self.inside = False

        return call


def test_launches_of_a_rank_alone(monkeypatch):
    """Each costs more than a microsecond of a small batch, even in a graph."""
    listed = Launches()
    names = [name for name in vars(comm.DeviceSteps) if not name.startswith("_")]
    with testing.lockstep(1, make) as (ep,):
        steps = ep._exchange._steps
        counted = {name: listed.step(name, getattr(steps, name)) for name in names}
        ep._exchange._steps = SimpleNamespace(**counted)
        given = inputs(0)
        drive([ep], [given])  # what is made once
        monkeypatch.setattr(checks, "expert_ids", lambda *args, **options: None)
        listed.found.clear()
        with listed:
            received = ep.dispatch(*given)
        listed.found.remove("ne")  # a check of ids, on the CPU alone
        assert listed.found == ["routing_plan", "local_permutation", "gather_quant"]
        listed.found.clear()
        with listed:
            ep.combine(received.x, received.handle)
        assert listed.found == ["combine_row_index", "weighted_sum"]


def test_fewer_tokens_by_ids_that_go_nowhere():
    """What a captured batch does for a smaller one: the slots of the rest take no part."""
    with testing.lockstep(2, make) as ranks:
        given = [inputs(0), inputs(0, 1)]
        _, whole = drive(ranks, given)
        for _, ids, _ in given:
            ids[3:] = NOWHERE
        _, part = drive(ranks, given)
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[:3], other[:3])
        assert not other[3:].any()
