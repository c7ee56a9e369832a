"""Drawn configurations of dispatch and combine against the definition, bit for bit.

A configuration is a handful of small numbers, so that a failure shrinks; the data follows from its
seed. Everything that must not be looked at is poisoned: NaN in rows and weights that take no part,
any number at inactive entries of the ids.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import cloudpickle
import definition
import harness
import numpy as np
import torch
from definition import Group, Received, Remaining, Tokens
from definition_checks import check_dispatch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HIDDEN = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 40, 100, 128, 129, 300]
COMM_ALGS = ["", "fullmesh", "fullmesh_v1", "fullmesh_v2", "hierarchy"]
SENSELESS_IDS = [-(2**31), -1, 10**6, 2**31 - 1]
WAITED_BEFORE = 7

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class Config:
    """One drawn configuration: agreed arguments, tokens per rank, and how the inputs look.

    Attributes:
        version: of the functions to call.
        group: the agreed arguments.
        batches: BS of every world rank.
        seed: of the data.
        smooth: whether dispatch gets ``scales``.
        weights_in_dispatch: whether it gets ``expert_scales``.
        token_nums_type: ``expert_token_nums_type``.
        skew: which experts are popular.
        mask: "none", or the dimensions of ``x_active_mask``.
        alphas: the dimensions of the alphas of constant experts.
        shared_x: "none", or the dimensions of ``shared_expert_x``.
        strides: of the inputs.
        more_rows: rows of ``expand_x`` of combine above the capacity.
        comm_alg: of version 2.
        senseless_elastic_info: whether ``elastic_info`` comes with a flag of 0 and arbitrary words.
        measured: whether there is a ``performance_info``.
    """

    version: int
    group: Group
    batches: tuple[int, ...]
    seed: int
    smooth: bool
    weights_in_dispatch: bool
    token_nums_type: int
    skew: str
    mask: str
    alphas: str
    shared_x: str
    strides: str
    more_rows: int
    comm_alg: str
    senseless_elastic_info: bool
    measured: bool

    @property
    def num_zero_computation(self) -> int:
        group = self.group
        return group.zero_experts + group.copy_experts + group.const_experts

    @property
    def num_routed(self) -> int:
        """Routed experts of the remaining ranks."""
        return (self.group.remaining or self.group).num_experts


@st.composite
def configs(draw, version: int, layout: tuple[int, int] | None = None):
    """Configurations of one version; on ``layout`` = (W, T), or on up to 8 ranks."""
    planes = layout[1] if layout else draw(st.sampled_from([1, 1, 1, 2]))
    world_size = layout[0] if layout else draw(st.integers(1, 6 if planes == 1 else 4))
    comm_alg = draw(st.sampled_from(COMM_ALGS)) if version == 2 else ""
    if comm_alg == "fullmesh_v2" and planes == 2:
        comm_alg = "fullmesh_v1"
    # The one that knows nothing else of what is new in version 2.
    plain = comm_alg == "fullmesh_v2"

    shared_ranks = draw(
        st.sampled_from(
            [n for n in range(world_size) if version == 2 or n == 0 or not world_size % n]
        )
    )
    divisors = [n for n in range(1, min(shared_ranks, 4) + 1) if shared_ranks % n == 0]
    shared_experts = draw(st.sampled_from(divisors or [1, 0]))
    experts_per_rank = 1 if planes == 2 else draw(st.integers(1, 5))
    num_experts = experts_per_rank * (world_size - shared_ranks)

    zero_computation = (0, 0, 0)
    if version == 2 and not plain and draw(st.booleans()):
        zero_computation = draw(st.tuples(*[st.integers(0, 2)] * 3))
    top_k = draw(st.integers(1, min(num_experts + sum(zero_computation), 8)))
    quant_mode = draw(st.sampled_from([0, 2]))
    smooth = quant_mode == 2 and draw(st.booleans())

    remaining = None
    elastic = version == 2 and planes == 1 and not plain
    if elastic and draw(st.sampled_from([True, False, False])):
        remaining = draw(remainders(world_size, shared_ranks, shared_experts, experts_per_rank))
        if smooth and shared_ranks and not remaining.shared_ranks:
            smooth = False
        if top_k > remaining.num_experts + sum(zero_computation):
            top_k = remaining.num_experts + sum(zero_computation)

    ranks = world_size * planes
    if not plain and draw(st.booleans()):
        batches = tuple(draw(st.integers(0, 6)) for _ in range(ranks))
        global_bs = (max(*batches, 1) + draw(st.sampled_from([0, 0, 3]))) * world_size
    else:
        batches = (draw(st.integers(0, 6)),) * ranks
        global_bs = draw(st.sampled_from([0, batches[0] * world_size]))
    mask = "none"
    if not plain and all(global_bs in (0, batch * world_size) for batch in batches):
        mask = draw(st.sampled_from(["none", "1-D", "2-D", "2-D"]))

    comm_quant_mode = draw(st.sampled_from([0, 2])) if planes == 1 else 0
    hidden = [n for n in HIDDEN if n % 8 == 0] if comm_quant_mode else HIDDEN
    return Config(
        version=version,
        group=Group(
            world_size=world_size,
            num_experts=num_experts,
            top_k=top_k,
            hidden=draw(st.sampled_from(hidden)),
            dtype=draw(st.sampled_from(sorted(definition.TORCH_DTYPES))),
            quant_mode=quant_mode,
            shared_ranks=shared_ranks,
            shared_experts=shared_experts,
            global_bs=global_bs,
            tp_world_size=planes,
            zero_experts=zero_computation[0],
            copy_experts=zero_computation[1],
            const_experts=zero_computation[2],
            comm_quant_mode=comm_quant_mode,
            remaining=remaining,
        ),
        batches=batches,
        seed=draw(st.integers(0, 2**31 - 1)),
        smooth=smooth,
        weights_in_dispatch=draw(st.booleans()),
        token_nums_type=draw(st.sampled_from([0, 1])),
        skew=draw(st.sampled_from(["uniform", "zipf", "hot"])),
        mask=mask,
        alphas=draw(st.sampled_from(["1-D", "2-D"])) if zero_computation[2] else "none",
        shared_x=draw(st.sampled_from(["none", "2-D", "3-D"])),
        strides=draw(st.sampled_from(harness.STRIDES)),
        more_rows=draw(st.sampled_from([0, 0, 5])),
        comm_alg=comm_alg,
        senseless_elastic_info=elastic and remaining is None and draw(st.booleans()),
        measured=version == 2 and draw(st.booleans()),
    )


@st.composite
def remainders(draw, world_size, shared_ranks, shared_experts, experts_per_rank):
    """Remaining ranks of a group: shared ranks stay shared, within their capacity."""
    moe = draw(st.lists(st.integers(shared_ranks, world_size - 1), min_size=1, unique=True))
    shared = draw(st.permutations(range(shared_ranks)))
    sources = shared_ranks and -(-world_size // (shared_ranks // shared_experts))
    possible = [
        copies
        for copies in range(1, shared_ranks // shared_experts + 1 if shared_ranks else 1)
        if -(-(len(moe) + copies * shared_experts) // copies) <= sources
    ]
    left = draw(st.sampled_from([0, *possible])) * shared_experts
    return Remaining((*shared[:left], *moe), left, experts_per_rank * len(moe))


def draw_mask(rng: np.random.Generator, config: Config, batch: int) -> np.ndarray | None:
    if config.mask == "none":
        return None
    if config.mask == "1-D":
        return np.arange(batch) < rng.integers(0, batch + 1)
    mask = rng.random((batch, config.group.top_k)) < 0.7
    mask[rng.random(batch) < 0.2] = False
    return mask


def draw_ids(rng: np.random.Generator, config: Config, batch: int) -> np.ndarray:
    """(BS, K) ids; those of routed experts are distinct in each row."""
    routed, zero_computation, top_k = (
        config.num_routed,
        config.num_zero_computation,
        config.group.top_k,
    )
    ids = np.zeros((batch, top_k), np.int32)
    popularity = np.full(routed, 1 / routed)
    if config.skew == "zipf":
        popularity = 1 / np.arange(1, routed + 1) ** 1.5
        popularity /= popularity.sum()
    for token in range(batch):
        fewest = max(top_k - routed, 0)
        count = int(rng.integers(fewest, top_k + 1)) if zero_computation else 0
        if config.skew == "hot":
            # Every token chooses the same experts, in another order.
            chosen = np.arange(top_k - count)
        else:
            chosen = rng.choice(routed, top_k - count, replace=False, p=popularity)
        others = rng.integers(routed, routed + zero_computation, count) if count else []
        ids[token] = rng.permutation([*chosen, *others])
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


def draw_bits(rng: np.random.Generator, config: Config, rows: int) -> np.ndarray:
    """(rows, H) bits of values as above."""
    values = draw_values(rng, (rows, config.group.hidden), coarse=bool(rng.integers(2)))
    return definition.encode(values, config.group.dtype)


def draw_weights(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """float32 routing weights; some are 0, some negative, some large."""
    weights = rng.normal(size=shape).astype(np.float32)
    weights[rng.random(shape) < 0.1] = 0.0
    weights[rng.random(shape) < 0.1] *= 1000
    return weights


def draw_tokens(rng: np.random.Generator, config: Config, batch: int) -> Tokens:
    """The inputs of one rank."""
    group = config.group
    mine = Tokens(
        x=draw_bits(rng, config, batch),
        ids=draw_ids(rng, config, batch),
        weights=draw_weights(rng, (batch, group.top_k)),
        mask=draw_mask(rng, config, batch),
    )
    if config.smooth:
        scales = rng.normal(size=(group.num_shared + group.num_experts, group.hidden))
        scales[rng.random(scales.shape) < 0.05] = 0.0
        mine.scales = scales.astype(np.float32)
    if group.copy_experts or group.const_experts:
        mine.ori_x = draw_bits(rng, config, batch)
    if group.const_experts:
        columns = slice(None) if config.alphas == "2-D" else 0
        mine.alpha_1 = draw_bits(rng, config, group.const_experts)[:, columns]
        mine.alpha_2 = draw_bits(rng, config, group.const_experts)[:, columns]
        mine.const_v = draw_bits(rng, config, group.const_experts)
    poison(rng, config, mine)
    return mine


def poison(rng: np.random.Generator, config: Config, mine: Tokens) -> None:
    """Overwrite all values that must be ignored."""
    group = config.group
    not_a_number = definition.encode(np.float32(np.nan), group.dtype)
    seen_by_experts = np.zeros(mine.batch, bool)
    for token in range(mine.batch):
        for slot in range(group.top_k):
            if not mine.is_active(token, slot):
                mine.ids[token, slot] = rng.choice([*SENSELESS_IDS, 0])
                mine.weights[token, slot] = np.nan
                continue
            left = group.scaled_down() if group.remaining else group
            kind, _ = left.kind(int(mine.ids[token, slot]))
            seen_by_experts[token] |= kind in ("copy", "const")
            if kind == "zero" and rng.random() < 0.3:
                mine.weights[token, slot] = np.nan
        if not mine.takes_part(token):
            mine.x[token] = not_a_number
    if mine.ori_x is not None:
        mine.ori_x[~seen_by_experts] = not_a_number


@dataclass
class Case:
    """A configuration with the inputs, arguments and expected outputs of every rank.

    The last three are what combine needs of the definition.
    """

    config: Config
    calls: list[dict | None]
    received: list[Received | None]
    combined: list[np.ndarray | None]
    tokens: list[Tokens]
    expert_rows: list[np.ndarray | None]
    shared_x: list[np.ndarray | None] | None


def build(config: Config) -> Case:
    """The data of a configuration."""
    rng = np.random.default_rng(config.seed)
    group = config.group
    tokens = [draw_tokens(rng, config, batch) for batch in config.batches]
    received = definition.dispatch(group, tokens)
    expert_rows = [
        None if mine is None else draw_bits(rng, config, len(mine.expand_x)) for mine in received
    ]
    shared_x = None
    if config.shared_x != "none":
        shared_x = [draw_bits(rng, config, mine.batch) for mine in tokens]
        for mine, rows in zip(tokens, shared_x, strict=True):
            silent = [token for token in range(mine.batch) if not mine.takes_part(token)]
            rows[silent] = definition.encode(np.float32(np.nan), group.dtype)
    combined = definition.combine(group, tokens, received, expert_rows, shared_x)
    calls = harness.make_calls(
        group,
        tokens,
        expert_rows,
        version=config.version,
        weights_in_dispatch=config.weights_in_dispatch,
        token_nums_type=config.token_nums_type,
        shared_x=shared_x,
        strides=config.strides,
        more_rows=config.more_rows,
        comm_alg=config.comm_alg,
    )
    for call in filter(None, calls):
        if config.shared_x == "3-D":
            rows = call["combine"]["shared_expert_x"]
            call["combine"]["shared_expert_x"] = split_in_three(rows)
        if config.senseless_elastic_info:
            words = rng.integers(-5, 100, 4 + 2 * group.world_size)
            words[0] = 0
            for arguments in call.values():
                arguments["elastic_info"] = torch.from_numpy(words.astype(np.int32))
    return Case(config, calls, received, combined, tokens, expert_rows, shared_x)


def split_in_three(rows: torch.Tensor) -> torch.Tensor:
    """(BS, H) as (a, b, H) with a > 1 where BS allows it."""
    batch, hidden = rows.shape
    first = next((a for a in (3, 2) if batch and batch % a == 0), 1)
    return rows.reshape(first, batch // first, hidden)


def run(ctx: Any, case: Case) -> tuple | None:
    """The outputs of dispatch and combine, and the waits that each added."""
    call, config = case.calls[ctx.rank], case.config
    if call is None:
        return None
    changes = {}
    waited = torch.full((config.group.world_size,), WAITED_BEFORE)
    if config.measured:
        changes["performance_info"] = waited
    version = config.version
    outputs = harness.call_dispatch(ctx, call, version=version, **changes)
    in_dispatch = waited - WAITED_BEFORE
    result = harness.call_combine(ctx, call, outputs, version=version, **changes)
    return outputs, result, [in_dispatch, waited - WAITED_BEFORE - in_dispatch]


def check(case: Case, results: list[tuple | None]) -> None:
    """Compare the outputs of every rank with the definition."""
    config = case.config
    group = config.group
    for rank, (expected, actual) in enumerate(zip(case.received, results, strict=True)):
        if expected is None:
            assert actual is None
            continue
        outputs, result, waits = actual
        check_dispatch(
            group,
            expected,
            outputs,
            rank=rank,
            version=config.version,
            token_nums_type=config.token_nums_type,
            weights_given=config.weights_in_dispatch,
        )
        definition.same_bits(result, case.combined[rank], f"rank {rank} x")
        for added in waits:
            left = len(group.remaining.ranks) if group.remaining else group.world_size
            assert (added >= 0).all()
            assert (added > 0).sum() == (left if config.measured else 0)


def check_in_threads(config: Config) -> None:
    """Run one configuration between threads."""
    case = build(config)
    planes = config.group.tp_world_size
    results = harness.run_world(
        "local", len(config.batches), lambda ctx: run(ctx, case), tp_world_size=planes
    )
    check(case, results)


def check_in_processes(world: str, batch: list[Config]) -> None:
    """Several configurations of one layout, one after the other on the same groups.

    All but the first meet windows and groups that others have used.
    """
    cases = [build(config) for config in batch]
    ranks, planes = len(batch[0].batches), batch[0].group.tp_world_size
    by_rank = harness.run_world(
        world, ranks, lambda ctx: [run(ctx, case) for case in cases], tp_world_size=planes
    )
    for i, case in enumerate(cases):
        check(case, [results[i] for results in by_rank])


def profile(examples: int) -> settings:
    """Settings for a number of examples."""
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def features(config: Config) -> list[str]:
    """The features that the evidence counts."""
    group = config.group
    actual = [
        f"W {group.world_size}" + (" x T 2" if group.tp_world_size == 2 else ""),
        f"quant_mode {group.quant_mode}" + (" with scales" if config.smooth else ""),
        f"comm_quant_mode {group.comm_quant_mode}",
        f"dtype {group.dtype}",
        f"routing {config.skew}",
        f"mask {config.mask}",
        f"strides {config.strides}",
        f"shared_expert_x {config.shared_x}",
    ]
    for name, there in (
        ("shared ranks", group.shared_ranks),
        ("shared ranks that do not divide W", group.world_size % max(group.shared_ranks, 1)),
        ("several shared experts", group.num_shared > 1),
        ("a rank without tokens", 0 in config.batches),
        ("batch differs between ranks", len(set(config.batches)) > 1),
        ("zero experts", group.zero_experts),
        ("copy experts", group.copy_experts),
        (f"constant experts, alphas {config.alphas}", group.const_experts),
        ("scaled down", group.remaining),
        ("elastic_info without its flag", config.senseless_elastic_info),
        (f"comm_alg {config.comm_alg}", config.comm_alg),
        ("performance_info", config.measured),
    ):
        if there:
            actual.append(name)
    return actual


class Tally:
    """Counts distinct configurations and their features."""

    def __init__(self) -> None:
        self.distinct: set[Config] = set()
        self._seen: Counter = Counter()

    def add(self, config: Config) -> None:
        if config not in self.distinct:
            self.distinct.add(config)
            self._seen.update(features(config))

    def summary(self, where: str) -> str:
        shares = ", ".join(f"{name} {self._seen[name]}" for name in sorted(self._seen))
        return f"- {where}: {len(self.distinct)} configurations, all equal bit for bit ({shares})"


def many_in_threads(version: int, examples: int) -> Tally:
    """Draw and check configurations between threads."""
    tally = Tally()

    @profile(examples)
    @given(configs(version))
    def draw_and_check(config):
        check_in_threads(config)
        tally.add(config)

    draw_and_check()
    return tally


def many_in_processes(
    version: int, world: str, layouts: list[tuple[int, int]], batches: int, each: int
) -> Tally:
    """Draw and check configurations between processes: so many batches of ``each`` per layout."""
    tally = Tally()
    for layout in layouts:

        @profile(batches)
        @given(st.lists(configs(version, layout), min_size=each, max_size=each, unique=True))
        def draw_and_check(batch):
            check_in_processes(world, batch)
            for config in batch:
                tally.add(config)

        draw_and_check()
    return tally
