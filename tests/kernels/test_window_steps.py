"""The four steps of dispatch and combine over windows, all ranks in one process."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from lockstep_windows import Case, Group

from moe_triton import kernels, ref
from moe_triton.layout import QUANTS

CASES = [
    pytest.param(Case(), id="usual"),
    pytest.param(Case(world_size=1), id="one rank"),
    pytest.param(Case(alignment=4, seed=1), id="padding"),
    pytest.param(Case(max_rows=5, seed=2), id="rows without room"),
    pytest.param(Case(max_rows=5, alignment=4, seed=2), id="padding without room"),
    pytest.param(
        Case(world_size=5, num_shared_experts=1, num_shared_ranks=2), id="replicas of a shared one"
    ),
    pytest.param(
        Case(world_size=6, num_shared_experts=2, num_shared_ranks=4, alignment=2, seed=3),
        id="two shared experts",
    ),
    pytest.param(Case(num_copy=1, num_constant=2, seed=4), id="zero-computation experts"),
    pytest.param(Case(quant="int8", per_expert=True, seed=4), id="factors for each expert"),
    pytest.param(
        Case(world_size=4, quant="int8", per_expert=True, num_shared_experts=1, num_shared_ranks=1),
        id="factors for each expert, shared ones too",
    ),
    pytest.param(Case(quant_return=True, seed=2), id="quantised rows back"),
    pytest.param(Case(dtype=torch.float64, seed=1), id="float64"),
    pytest.param(Case(hidden=33, with_weights=False, seed=1), id="odd"),
    *(pytest.param(Case(quant=quant, hidden=64), id=quant) for quant in QUANTS),
]


@pytest.mark.parametrize("case", CASES)
def test_rounds(case, steps, device):
    group = Group(case, device, slots=2)
    for number in range(2):
        group.round(steps, number, in_place=number == 1 and not case.quant_return)


def test_epochs_wrap(steps, device):
    group = Group(Case(), device, slots=4, data_slots=2, epoch=2**31 - 3)
    for number in range(5):
        group.round(steps, number)


@st.composite
def cases(draw):
    shared = draw(st.integers(0, 2))
    replicas = draw(st.integers(1, 2))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    case = Case(
        world_size=shared * replicas + draw(st.integers(1, 4)),
        experts_per_rank=draw(st.integers(1, 4)),
        top_k=draw(st.integers(1, 6)),
        max_tokens=draw(st.integers(1, 20)),
        hidden=8 * draw(st.integers(1, 9)),
        num_shared_experts=shared,
        num_shared_ranks=shared * replicas,
        dtype=dtype,
        quant=draw(st.sampled_from([None, *QUANTS])),
        with_weights=draw(st.booleans()),
        alignment=draw(st.sampled_from([1, 1, 2, 8])),
        max_rows=draw(st.none() | st.integers(1, 30)),
        quant_return=dtype != torch.float32 and draw(st.booleans()),
        num_copy=draw(st.integers(0, 1)),
        num_constant=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**16)),
    )
    factors = case.quant in ("int8", "e4m3", "e5m2", "group_e4m3", "group_e5m2")
    return dataclasses.replace(case, per_expert=factors and draw(st.booleans()))


@pytest.mark.parametrize("steps", [ref, kernels], ids=["ref", "kernels"])
@hypothesis.given(case=cases(), slots=st.sampled_from([2, 4]))
def test_any_case(steps, case, slots, device):
    group = Group(case, device, slots=slots, data_slots=slots // 2)
    for number in range(2):
        group.round(steps, number)
