"""Drawn configurations of every quantisation of dispatch against the definition, bit for bit.

The short profile is part of the ordinary run; the test marked ``full`` draws 100 of each mode.
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
from drawn import draw_values, draw_weights, profile
from hypothesis import given
from hypothesis import strategies as st

FULL = 100
HEADING = "Drawn configurations of every quantisation of dispatch against the definition"
HIDDEN = [1, 2, 31, 32, 33, 64, 65, 127, 128, 129, 257, 300]
# quant_mode and the format of the rows; "given" tokens come quantised.
MODES = {
    "static": (1, "int8"),
    "int8": (2, "int8"),
    "e4m3": (2, "e4m3"),
    "e5m2": (2, "e5m2"),
    "group e4m3": (3, "e4m3"),
    "group e5m2": (3, "e5m2"),
    "MX e4m3": (4, "e4m3"),
    "MX e5m2": (4, "e5m2"),
    "given e4m3": (0, "e4m3"),
    "given e5m2": (0, "e5m2"),
}


@dataclass(frozen=True)
class Config:
    """One drawn configuration.

    Attributes:
        factors: "none", "one", "row" or "experts"; of given codes "0-D", "1-D" or "e8m0" scales.
    """

    group: Group
    version: int
    batches: tuple[int, ...]
    seed: int
    factors: str
    strides: str


@st.composite
def configs(draw, name):
    mode, rows = MODES[name]
    given = rows if mode == 0 else None
    planes = draw(st.sampled_from([1, 1, 2]))
    world_size = draw(st.integers(1, 3 if planes == 2 else 4))
    shared = draw(st.sampled_from([0, 1])) if world_size in (2, 4) and planes == 1 else 0
    local = 1 if planes == 2 else draw(st.integers(1, 4))
    num_experts = local * (world_size - shared)
    # Only version 2 has names for dtypes that are not the usual ones of a mode.
    usual = given is not None or rows == ("int8" if mode < 3 else "e4m3")
    factors = {"static": ["one", "row", "experts"]}.get(name, ["none", "experts"])
    if mode == 4:
        factors = ["none"]
    elif given:
        factors = ["0-D", "1-D", "e8m0"]
    batch = draw(st.integers(1, 5))
    unequal = draw(st.booleans())
    count = world_size * planes
    batches = tuple(draw(st.integers(0, batch)) if unequal else batch for _ in range(count))
    group = Group(
        world_size=world_size,
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(num_experts, 4))),
        hidden=draw(st.sampled_from(HIDDEN)),
        dtype=draw(st.sampled_from(sorted(definition.TORCH_DTYPES))),
        quant_mode=mode,
        rows=rows,
        given=given,
        shared_ranks=shared,
        global_bs=batch * world_size if unequal else 0,
        tp_world_size=planes,
    )
    return Config(
        group=group,
        version=draw(st.sampled_from([1, 2] if usual else [2])),
        batches=batches,
        seed=draw(st.integers(0, 2**31 - 1)),
        factors=draw(st.sampled_from(factors)),
        strides=draw(st.sampled_from(harness.STRIDES)),
    )


def draw_factors(rng: np.random.Generator, config: Config, batch: int, count: int):
    """``scales`` of a rank; ``count`` is how many a given row has, equal on all ranks."""
    group = config.group
    experts = (group.num_shared + group.num_experts, group.hidden)
    shapes = {"one": (1,), "row": (group.hidden,), "experts": experts}
    if config.factors in shapes:
        return (rng.normal(size=shapes[config.factors]) * 20).astype(np.float32)
    if config.factors == "none":
        return None
    if config.factors == "e8m0":
        return rng.integers(0, 255, (batch, count)).astype(np.uint8)
    shape = (batch,) if config.factors == "0-D" else (batch, count)
    return rng.normal(size=shape).astype(np.float32)


def check(config: Config) -> None:
    rng = np.random.default_rng(config.seed)
    group, tokens = config.group, []
    count = int(rng.integers(1, group.hidden + 1))
    for batch in config.batches:
        x = definition.encode(
            draw_values(rng, (batch, group.hidden), coarse=bool(rng.integers(2))), group.dtype
        )
        if group.given:
            x = rng.integers(0, 256, (batch, group.hidden)).astype(np.uint8)
        tokens.append(
            Tokens(
                x=x,
                ids=np.array(
                    [rng.permutation(group.num_experts)[: group.top_k] for _ in range(batch)],
                    np.int32,
                ).reshape(batch, group.top_k),
                weights=draw_weights(rng, (batch, group.top_k)),
                scales=draw_factors(rng, config, batch, count),
            )
        )
    received = definition.dispatch(group, tokens)
    nothing = [np.zeros((0, group.hidden), np.uint16)] * len(tokens)
    calls = harness.make_calls(
        group, tokens, nothing, version=config.version, strides=config.strides
    )
    results = harness.run_world(
        "local",
        len(tokens),
        lambda ctx: harness.call_dispatch(ctx, calls[ctx.rank], version=config.version),
        tp_world_size=group.tp_world_size,
    )
    for rank, outputs in enumerate(results):
        check_dispatch(group, received[rank], outputs, rank=rank, version=config.version)


@pytest.mark.parametrize("name", MODES)
def test_a_mode(name):
    @profile(8)
    @given(configs(name))
    def run(config):
        check(config)

    run()


@pytest.mark.full
@pytest.mark.parametrize("name", MODES)
def test_a_mode_often(name, record_evidence):
    distinct = set()
    seen: Counter = Counter()

    @profile(FULL + FULL // 5)
    @given(configs(name))
    def run(config):
        check(config)
        if config not in distinct:
            distinct.add(config)
            seen.update([f"v{config.version}", f"factors {config.factors}"])

    run()
    assert len(distinct) >= FULL
    shares = ", ".join(f"{what} {seen[what]}" for what in sorted(seen))
    text = f"- {name}: {len(distinct)} configurations, all equal bit for bit ({shares})"
    record_evidence(HEADING, text)
