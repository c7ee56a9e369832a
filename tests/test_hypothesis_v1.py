"""Drawn configurations of v1 dispatch and combine against the definition, bit for bit.

A configuration is a handful of small numbers, so that a failure shrinks; the data follows from its
seed. The short profile is part of the ordinary run; the tests marked ``full`` draw enough to mean
something.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import definition
import harness
import numpy as np
import pytest
from definition import Group, Tokens
from definition_checks import check_dispatch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HIDDEN = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 40, 100, 128, 129, 300]
LOCAL_FULL, PROCESS_FULL = 1000, 200
HEADING = "Drawn configurations of v1 dispatch and combine against the definition"


@dataclass(frozen=True)
class Config:
    """One drawn configuration: agreed arguments, tokens per rank, and how the inputs look."""

    group: Group
    batches: tuple[int, ...]
    seed: int
    smooth: bool
    weights_in_dispatch: bool
    token_nums_type: int
    skew: str
    strides: str
    more_rows: int
    shared_x: str


@st.composite
def configs(draw, world_size=None):
    if world_size is None:
        world_size = draw(st.integers(1, 6))
    divisors = [n for n in range(1, world_size) if world_size % n == 0]
    shared_ranks = draw(st.sampled_from([0, *divisors]))
    if shared_ranks:
        divisors = [n for n in range(1, shared_ranks + 1) if shared_ranks % n == 0]
        shared_experts = draw(st.sampled_from(divisors))
    else:
        shared_experts = draw(st.sampled_from([1, 0]))
    num_experts = draw(st.integers(1, 5)) * (world_size - shared_ranks)
    unequal = draw(st.booleans())
    if unequal:
        batches = tuple(draw(st.integers(0, 6)) for _ in range(world_size))
        largest = max(*batches, 1) + draw(st.sampled_from([0, 0, 3]))
        global_bs = largest * world_size
    else:
        batches = (draw(st.integers(1, 6)),) * world_size
        global_bs = draw(st.sampled_from([0, batches[0] * world_size]))
    group = Group(
        world_size=world_size,
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(num_experts, 8))),
        hidden=draw(st.sampled_from(HIDDEN)),
        dtype=draw(st.sampled_from(sorted(definition.TORCH_DTYPES))),
        quant_mode=draw(st.sampled_from([0, 2])),
        shared_ranks=shared_ranks,
        shared_experts=shared_experts,
        global_bs=global_bs,
    )
    return Config(
        group=group,
        batches=batches,
        seed=draw(st.integers(0, 2**31 - 1)),
        smooth=group.quant_mode == 2 and draw(st.booleans()),
        weights_in_dispatch=draw(st.booleans()),
        token_nums_type=draw(st.sampled_from([0, 1])),
        skew=draw(st.sampled_from(["uniform", "zipf", "hot"])),
        strides=draw(st.sampled_from(harness.STRIDES)),
        more_rows=draw(st.sampled_from([0, 0, 5])),
        shared_x=draw(st.sampled_from(["none", "2-D", "3-D"])),
    )


def draw_ids(rng: np.random.Generator, config: Config, batch: int) -> np.ndarray:
    """(BS, K) ids, distinct in each row."""
    experts = config.group.num_experts
    ids = np.zeros((batch, config.group.top_k), np.int32)
    popularity = np.full(experts, 1 / experts)
    if config.skew == "zipf":
        popularity = 1 / np.arange(1, experts + 1) ** 1.5
        popularity /= popularity.sum()
    for token in range(batch):
        if config.skew == "hot":
            # Every token chooses the same experts, in another order.
            ids[token] = rng.permutation(config.group.top_k)
        else:
            ids[token] = rng.choice(experts, config.group.top_k, replace=False, p=popularity)
    return ids


def draw_values(rng: np.random.Generator, shape: tuple[int, int], *, coarse: bool) -> np.ndarray:
    """float32 values with rows of zeros, negative zeros and, if coarse, many ties when rounded."""
    if coarse:
        values = rng.integers(-16, 17, shape) * np.float32(0.25)
    else:
        values = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3, (shape[0], 1))
    values = values.astype(np.float32)
    values[rng.random(shape) < 0.05] = -0.0
    values[rng.random(shape[0]) < 0.1] = 0.0
    return values


def draw_weights(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """float32 routing weights; some are 0, some negative, some large."""
    weights = rng.normal(size=shape).astype(np.float32)
    weights[rng.random(shape) < 0.1] = 0.0
    weights[rng.random(shape) < 0.1] *= 1000
    return weights


def build(config: Config) -> tuple[list[dict], list, list]:
    """Calls of every rank, and what dispatch and combine must return."""
    rng = np.random.default_rng(config.seed)
    group = config.group
    tokens = []
    for batch in config.batches:
        scales = None
        if config.smooth:
            scales = rng.normal(size=(group.num_shared + group.num_experts, group.hidden))
            scales[rng.random(scales.shape) < 0.05] = 0.0
            scales = scales.astype(np.float32)
        values = draw_values(rng, (batch, group.hidden), coarse=bool(rng.integers(2)))
        tokens.append(
            Tokens(
                x=definition.encode(values, group.dtype),
                ids=draw_ids(rng, config, batch),
                weights=draw_weights(rng, (batch, group.top_k)),
                scales=scales,
            )
        )
    received = definition.dispatch(group, tokens)
    expert_rows = [
        definition.encode(
            draw_values(rng, (len(mine.rows), group.hidden), coarse=bool(rng.integers(2))),
            group.dtype,
        )
        for mine in received
    ]
    shared_x = None
    if config.shared_x != "none":
        shared_x = [
            definition.encode(draw_values(rng, (batch, group.hidden), coarse=False), group.dtype)
            for batch in config.batches
        ]
    combined = definition.combine(group, tokens, received, expert_rows, shared_x)
    calls = harness.make_calls(
        group,
        tokens,
        expert_rows,
        weights_in_dispatch=config.weights_in_dispatch,
        token_nums_type=config.token_nums_type,
        shared_x=shared_x,
        strides=config.strides,
        more_rows=config.more_rows,
    )
    if config.shared_x == "3-D":
        for call in calls:
            args = call["combine"]
            args["shared_expert_x"] = split_in_three(args["shared_expert_x"])
    return calls, received, combined


def split_in_three(rows):
    """(BS, H) as (a, b, H) with a > 1 where BS allows it."""
    batch, hidden = rows.shape
    first = next((a for a in (3, 2) if batch and batch % a == 0), 1)
    return rows.reshape(first, batch // first, hidden)


def check(config: Config, results: list[tuple], received: list, combined: list) -> None:
    for rank, (outputs, result) in enumerate(results):
        check_dispatch(
            config.group,
            received[rank],
            outputs,
            rank=rank,
            token_nums_type=config.token_nums_type,
            weights_given=config.weights_in_dispatch,
        )
        definition.same_bits(result, combined[rank], f"rank {rank} x")


def check_local(config: Config) -> None:
    calls, received, combined = build(config)
    world_size = config.group.world_size
    results = harness.run_world("local", world_size, lambda ctx: harness.round_trip(ctx, calls))
    check(config, results, received, combined)


def check_processes(world: str, batch: list[Config]) -> None:
    """Several configurations of one world size, one after the other on the same group."""
    built = [build(config) for config in batch]
    all_calls = [calls for calls, _, _ in built]

    def fn(ctx):
        return [harness.round_trip(ctx, calls) for calls in all_calls]

    by_rank = harness.run_world(world, batch[0].group.world_size, fn)
    for i, (config, (_, received, combined)) in enumerate(zip(batch, built, strict=True)):
        check(config, [results[i] for results in by_rank], received, combined)


def profile(examples: int):
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@profile(25)
@given(configs())
def test_threads(config):
    check_local(config)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes(world, world_size):
    # Two drawn together: the second meets windows and groups that the first has used.
    @profile(1)
    @given(st.lists(configs(world_size), min_size=2, max_size=2))
    def run(batch):
        check_processes(world, batch)

    run()


def summary(where: str, count: int, seen: Counter) -> str:
    shares = ", ".join(f"{name} {seen[name]}" for name in sorted(seen))
    return f"- {where}: {count} configurations, all equal bit for bit ({shares})"


def features(config: Config) -> list[str]:
    group = config.group
    return [
        f"W {group.world_size}",
        f"quant_mode {group.quant_mode}" + (" with scales" if config.smooth else ""),
        f"dtype {group.dtype}",
        "shared ranks" if group.shared_ranks else "no shared ranks",
        *(["several shared experts"] if group.num_shared > 1 else []),
        *(["a rank without tokens"] if 0 in config.batches else []),
        *(["batch differs between ranks"] if len(set(config.batches)) > 1 else []),
        f"routing {config.skew}",
        f"strides {config.strides}",
        f"shared_expert_x {config.shared_x}",
    ]


@pytest.mark.full
def test_many_in_threads(record_evidence):
    seen: Counter = Counter()
    distinct = set()

    @profile(LOCAL_FULL + LOCAL_FULL // 10)
    @given(configs())
    def run(config):
        check_local(config)
        if config not in distinct:
            distinct.add(config)
            seen.update(features(config))

    run()
    assert len(distinct) >= LOCAL_FULL
    record_evidence(HEADING, summary("threads", len(distinct), seen))


@pytest.mark.full
@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_many_in_processes(world, record_evidence):
    seen: Counter = Counter()
    distinct = set()
    each = 4
    sizes = [1, 2, 3, 4, 5, 6]

    for world_size in sizes:

        @profile(10)
        @given(st.lists(configs(world_size), min_size=each, max_size=each, unique=True))
        def run(batch):
            check_processes(world, batch)
            for config in batch:
                if config not in distinct:
                    distinct.add(config)
                    seen.update(features(config))

        run()
    assert len(distinct) >= PROCESS_FULL
    record_evidence(HEADING, summary(f"processes, {world}", len(distinct), seen))
