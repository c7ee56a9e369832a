"""Drawn configurations of the split-phase ops against the definition, bit for bit."""

from __future__ import annotations

import definition
import drawn
import harness
import pytest
import split_phase_calls
import torch
from definition_checks import check_dispatch
from hypothesis import given
from hypothesis import strategies as st

FULL, PROCESS_FULL = 300, 20
HEADING = "Drawn configurations of split-phase dispatch and combine against the definition"


def configs(world_size=None):
    """Those of version 1 that have no tensor parallelism and few enough shared ranks."""
    layout = None if world_size is None else (world_size, 1)
    return drawn.configs(1, layout).filter(
        lambda config: (
            config.group.tp_world_size == 1
            and config.group.shared_ranks <= config.group.world_size // 2
        )
    )


def check(case: drawn.Case, results: list[dict]) -> None:
    group, config = case.config.group, case.config
    for rank, (expected, actual) in enumerate(zip(case.received, results, strict=True)):
        _, expand_idx, _ = actual["sent"]
        x, scales, assist, nums = actual["received"]
        counts = assist[: len(expected.ep_recv_counts)]
        no_more = torch.empty(0, dtype=torch.int32), torch.empty(expected.capacity)
        check_dispatch(
            group,
            expected,
            (x, scales, expand_idx, nums, counts, *no_more),
            rank=rank,
            token_nums_type=config.token_nums_type,
            weights_given=False,
        )
        definition.same_bits(actual["combined"], case.combined[rank], f"rank {rank} x")
        # Each row is the one that its source has in y.
        for row, (_, source, token, slot) in enumerate(expected.rows):
            batch, top_k = config.batches[source], group.top_k
            place = token * top_k + slot
            if slot >= top_k:
                place = batch * top_k + (slot - top_k) * batch + token
            y = results[source]["sent"][0]
            assert torch.equal(as_bytes(y[place, : group.hidden]), as_bytes(x[row]))


def as_bytes(row: torch.Tensor) -> torch.Tensor:
    return row.contiguous().view(torch.uint8)


def check_world(world: str, batch: list[drawn.Config]) -> None:
    """Several configurations, one after the other on one group."""
    cases = [drawn.build(config) for config in batch]
    by_rank = harness.run_world(
        world,
        len(batch[0].batches),
        lambda ctx: [split_phase_calls.round_trip(ctx, case.calls) for case in cases],
    )
    for i, case in enumerate(cases):
        check(case, [results[i] for results in by_rank])


@drawn.profile(30)
@given(configs())
def test_threads(config):
    check_world("local", [config])


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_processes(world):
    @drawn.profile(1)
    @given(st.lists(configs(3), min_size=3, max_size=3))
    def draw_and_check(batch):
        check_world(world, batch)

    draw_and_check()


@pytest.mark.full
@pytest.mark.parametrize("world", harness.WORLDS)
def test_many(world, record_evidence):
    tally = drawn.Tally()
    sizes, examples = ([None], FULL + FULL // 3) if world == "local" else ([2, 3, 4], 3)
    each = 1 if world == "local" else 4
    for size in sizes:

        @drawn.profile(examples)
        @given(st.lists(configs(size), min_size=each, max_size=each))
        def draw_and_check(batch):
            check_world(world, batch)
            for config in batch:
                tally.add(config)

        draw_and_check()
    assert len(tally.distinct) >= (FULL if world == "local" else PROCESS_FULL)
    record_evidence(HEADING, tally.summary(world))
