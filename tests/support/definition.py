"""The definition of dispatch and combine, v1 and v2, written out for all ranks at once.

Plain loops: token by token, slot by slot, row by row. Nothing here counts, sorts or prefix-sums to
find a place; rows are appended in the order the contract names, and every other output is read off
that list. The ops are compared with this, so it shares no code with the package.

From the inside out: ``exchange`` and ``combine_group`` are one expert-parallel group in which all
ranks take part; ``dispatch`` and ``combine`` add tensor-parallel pairs, and groups with lost ranks.
How numbers are rounded is in ``definition_numbers``, and the checks of the ops' outputs in
``definition_checks``.

Shape letters: W ranks of an expert-parallel group, T of a tensor-parallel one, E routed experts, K
experts a token, H hidden size, BS tokens of one rank, L experts of one rank, A row capacity of one
rank, n rows that really arrived. A list "of every rank" goes by world rank ep_rank * T + tp_rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from definition_numbers import (
    GROUP,
    MX_BLOCK,
    TORCH_DTYPES,
    decode,
    encode,
    quantise,
    quantise_int8,
    same_bits,
    through_int8_blocks,
    to_bits,
    to_tensor,
)

__all__ = [
    "TORCH_DTYPES",
    "Group",
    "Norm",
    "Received",
    "Remaining",
    "Tokens",
    "combine",
    "decode",
    "dispatch",
    "encode",
    "quantise_int8",
    "same_bits",
    "through_int8_blocks",
    "to_bits",
    "to_tensor",
]


@dataclass(frozen=True)
class Remaining:
    """The remaining ranks of a group, as in ``elastic_info``.

    Attributes:
        ranks: the old rank of each new rank.
        shared_ranks: how many of the new ranks, the first, are shared.
        num_experts: routed experts.
    """

    ranks: tuple[int, ...]
    shared_ranks: int
    num_experts: int


@dataclass(frozen=True)
class Group:
    """The arguments on which all ranks agree.

    ``shared_experts`` is the argument; it counts for nothing while ``shared_ranks`` is 0. With
    ``remaining`` the other fields still describe the group as it was made. ``rows`` is what
    ``quant_mode`` produces, a name of ``ROW_DTYPES``; with ``given`` the tokens come quantised
    already, and ``dtype`` is that of combine.
    """

    world_size: int
    num_experts: int
    top_k: int
    hidden: int
    dtype: str = "bfloat16"
    quant_mode: int = 0
    shared_ranks: int = 0
    shared_experts: int = 1
    global_bs: int = 0
    tp_world_size: int = 1
    zero_experts: int = 0
    copy_experts: int = 0
    const_experts: int = 0
    comm_quant_mode: int = 0
    remaining: Remaining | None = None
    rows: str = "int8"
    given: str | None = None

    @property
    def num_shared(self) -> int:
        """Shared experts that exist."""
        return self.shared_experts if self.shared_ranks else 0

    @property
    def row_type(self) -> type:
        """numpy's type of the rows of dispatch."""
        if self.given or (self.quant_mode and self.rows != "int8"):
            return np.uint8
        return np.int8 if self.quant_mode else np.uint16

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """Shape of the scales of one row; () also for given ones; None without scales."""
        groups, blocks = -(-self.hidden // GROUP), -(-self.hidden // MX_BLOCK)
        if self.given:
            return ()
        return {2: (), 3: (groups,), 4: (blocks + blocks % 2,)}.get(self.quant_mode)

    @property
    def copies(self) -> int:
        """Ranks that hold the same shared expert."""
        return self.shared_ranks // self.num_shared

    @property
    def experts_per_rank(self) -> int:
        """Routed experts of a rank that is not shared."""
        return self.num_experts // (self.world_size - self.shared_ranks)

    def num_local(self, rank: int) -> int:
        """Experts on EP rank ``rank``."""
        return 1 if rank < self.shared_ranks else self.experts_per_rank

    def kind(self, expert: int) -> tuple[str, int]:
        """The kind of an id, "routed", "zero", "copy" or "const", and its number there."""
        number = expert
        for kind, count in (
            ("routed", self.num_experts),
            ("zero", self.zero_experts),
            ("copy", self.copy_experts),
            ("const", self.const_experts),
        ):
            if 0 <= number < count:
                return kind, number
            number -= count
        raise AssertionError(f"there is no expert {expert}")

    def home(self, expert: int) -> tuple[int, int]:
        """EP rank and local index of a routed expert."""
        return (
            self.shared_ranks + expert // self.experts_per_rank,
            expert % self.experts_per_rank,
        )

    def shared_home(self, shared_expert: int, source: int) -> int:
        """EP rank whose copy of a shared expert serves the tokens of ``source``."""
        return shared_expert * self.copies + source % self.copies

    def capacity(self, rank: int, batch: int) -> int:
        """A on EP rank ``rank``; ``batch`` is BS, equal everywhere if global_bs is 0."""
        total = self.global_bs if self.global_bs else batch * self.world_size
        if rank >= self.shared_ranks:
            return total * min(self.experts_per_rank, self.top_k)
        largest = total // self.world_size
        sources = -(-self.world_size // self.copies)
        return largest * sources

    def scaled_down(self) -> Group:
        """The group of the remaining ranks, as if no other had ever been."""
        return replace(
            self,
            world_size=len(self.remaining.ranks),
            shared_ranks=self.remaining.shared_ranks,
            num_experts=self.remaining.num_experts,
            remaining=None,
        )


@dataclass
class Tokens:
    """The inputs of one rank.

    Attributes:
        x: (BS, H) uint16, bits of the group's dtype; or uint8 codes that are given.
        ids: (BS, K) integers; what stands at inactive entries means nothing.
        weights: (BS, K) float32, the routing weights of combine.
        scales: float32 factors of this source before it quantises, (NS + E, H), or (H,) or (1,)
            where they are static; or of given codes the scales, (BS,) or (BS, d), float32 or e8m0
            as uint8; or None.
        mask: (BS,) or (BS, K) bool, who takes part; None for all.
        ori_x: (BS, H) bits, the tokens that copy and constant experts see, for combine.
        alpha_1: (n,) or (n, H) bits, of the n constant experts; likewise ``alpha_2``.
        const_v: (n, H) bits.
    """

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    scales: np.ndarray | None = None
    mask: np.ndarray | None = None
    ori_x: np.ndarray | None = None
    alpha_1: np.ndarray | None = None
    alpha_2: np.ndarray | None = None
    const_v: np.ndarray | None = None

    @property
    def batch(self) -> int:
        return len(self.ids)

    def is_active(self, token: int, slot: int) -> bool:
        """Whether one slot is active."""
        if self.mask is None:
            return True
        return bool(self.mask[token] if self.mask.ndim == 1 else self.mask[token, slot])

    def takes_part(self, token: int) -> bool:
        """Whether any slot of the token is active."""
        return any(self.is_active(token, slot) for slot in range(self.ids.shape[1]))


@dataclass
class Received:
    """The outputs of dispatch on one rank; lists and arrays hold valid rows only.

    With T = 2 the rows of the peer follow the own ones in ``expand_x`` and ``dynamic_scales``, its
    counts the own ones in ``ep_recv_counts``, and both are summed in ``token_nums``.

    Attributes:
        rows: (local expert, source rank, token, slot) of each own row; slot K + j for shared expert
            j. Sources have their new rank where a group was scaled down.
        expand_x: (n, H), uint16 bits, int8 codes or uint8 codes of an 8-bit float.
        dynamic_scales: (n,) or (n, C), float32 or e8m0 as uint8; None when dispatch
            computes none, and returns (T * A,) float32 without meaning.
        expand_idx: (BS*K,) of this rank's own tokens, -1 where an entry is inactive.
        token_nums: (L,) rows of each local expert.
        token_nums_running: (L,) rows up to and including each local expert.
        ep_recv_counts: (T*L*W,) rows up to and including each (local expert, source).
        tp_recv_counts: [T] own rows of each rank of the pair; None without one, when dispatch
            returns tp_world_size words without meaning.
        expand_scales: (own n,) float32 routing weight of each own row, 1 on a shared rank.
        capacity: A.
    """

    rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    expand_x: np.ndarray | None = None
    dynamic_scales: np.ndarray | None = None
    expand_idx: list[int] = field(default_factory=list)
    token_nums: list[int] = field(default_factory=list)
    token_nums_running: list[int] = field(default_factory=list)
    ep_recv_counts: list[int] = field(default_factory=list)
    tp_recv_counts: list[int] | None = None
    expand_scales: np.ndarray | None = None
    capacity: int = 0


@dataclass
class Norm:
    """The inputs of residual and RMSNorm of one rank.

    Attributes:
        residual: (BS, H) bits.
        gamma: (H,) bits.
        epsilon: of all ranks.
    """

    residual: np.ndarray
    gamma: np.ndarray
    epsilon: float


def normalise(total: np.ndarray, token: int, norm: Norm, dtype: str) -> tuple[np.ndarray, ...]:
    """y, rstd and x of one token, from its sum before that is rounded."""
    total = total + decode(norm.residual[token], dtype)
    mean = np.mean(total.astype(np.float64) ** 2)
    rstd = np.float32(1 / np.sqrt(mean + norm.epsilon))
    scaled = decode(encode(total * rstd, dtype), dtype)
    return encode(scaled * decode(norm.gamma, dtype), dtype), rstd, encode(total, dtype)


def rows_of(group: Group, tokens: list[Tokens], rank: int) -> list[tuple[int, int, int, int]]:
    """(local expert, source, token, slot) of every row ``rank`` receives, in order."""
    rows = []
    for local in range(group.num_local(rank)):
        for source, sender in enumerate(tokens):
            for token in range(sender.batch):
                if rank < group.shared_ranks:
                    for j in range(group.num_shared):
                        if sender.takes_part(token) and group.shared_home(j, source) == rank:
                            rows.append((0, source, token, group.top_k + j))
                    continue
                for slot in range(group.top_k):
                    if not sender.is_active(token, slot):
                        continue
                    kind, expert = group.kind(int(sender.ids[token, slot]))
                    if kind == "routed" and group.home(expert) == (rank, local):
                        rows.append((local, source, token, slot))
    return rows


def exchange(group: Group, tokens: list[Tokens]) -> list[Received]:
    """The rows that every rank of one expert-parallel group receives."""
    results = []
    for rank in range(group.world_size):
        mine = Received(rows=rows_of(group, tokens, rank))
        mine.capacity = group.capacity(rank, tokens[rank].batch)

        payload, factors, weights = [], [], []
        for _, source, token, slot in mine.rows:
            sender = tokens[source]
            bits = sender.x[token]
            if slot >= group.top_k:
                smooth_row = slot - group.top_k
                weights.append(np.float32(1))
            else:
                smooth_row = group.num_shared + int(sender.ids[token, slot])
                weights.append(sender.weights[token, slot])
            if group.given:
                factors.append(sender.scales[token])
            elif group.quant_mode:
                smooth = sender.scales
                if smooth is not None and smooth.ndim == 2:
                    smooth = smooth[smooth_row]
                row = decode(bits, group.dtype)
                bits, factor = quantise(row, smooth, group.quant_mode, group.rows)
                factors.append(factor)
            payload.append(bits)
        mine.expand_x = np.array(payload, group.row_type).reshape(len(mine.rows), group.hidden)
        mine.expand_scales = np.array(weights, np.float32)
        if group.scale_shape is not None:
            if group.given:
                like = tokens[rank].scales
                shape, kind = like.shape[1:], like.dtype
            else:
                shape, kind = group.scale_shape, np.uint8 if group.quant_mode == 4 else np.float32
            mine.dynamic_scales = np.array(factors, kind).reshape(len(mine.rows), *shape)

        chosen_before: dict[int, int] = {}
        for token in range(tokens[rank].batch):
            for slot in range(group.top_k):
                if not tokens[rank].is_active(token, slot):
                    mine.expand_idx.append(-1)
                    continue
                expert = int(tokens[rank].ids[token, slot])
                mine.expand_idx.append(chosen_before.get(expert, 0))
                chosen_before[expert] = chosen_before.get(expert, 0) + 1

        running = 0
        for local in range(group.num_local(rank)):
            before = running
            for source in range(group.world_size):
                running += sum(row[:2] == (local, source) for row in mine.rows)
                mine.ep_recv_counts.append(running)
            mine.token_nums.append(running - before)
            mine.token_nums_running.append(running)
        results.append(mine)
    return results


def share(mine: Received, peer: Received, tp_rank: int) -> Received:
    """``mine`` after the two ranks of a tensor-parallel pair have exchanged their rows."""
    total = len(mine.rows) + len(peer.rows)
    return replace(
        mine,
        expand_x=np.concatenate([mine.expand_x, peer.expand_x]),
        dynamic_scales=None
        if mine.dynamic_scales is None
        else np.concatenate([mine.dynamic_scales, peer.dynamic_scales]),
        token_nums=[total],
        token_nums_running=[total],
        ep_recv_counts=mine.ep_recv_counts + peer.ep_recv_counts,
        tp_recv_counts=[len((mine, peer)[tp_rank].rows), len((peer, mine)[tp_rank].rows)],
    )


def dispatch(group: Group, tokens: list[Tokens]) -> list[Received | None]:
    """The outputs of dispatch on every rank, from the inputs of every rank.

    A rank that a group was scaled down by has no part in it, and None.
    """
    if group.remaining is not None:
        left = group.remaining.ranks
        results: list[Received | None] = [None] * group.world_size
        received = dispatch(group.scaled_down(), [tokens[old] for old in left])
        for old, mine in zip(left, received, strict=True):
            mine.capacity = group.capacity(old, tokens[old].batch)
            entries = group.num_local(old) * group.world_size
            mine.ep_recv_counts += mine.ep_recv_counts[-1:] * (entries - len(mine.ep_recv_counts))
            results[old] = mine
        return results

    planes = group.tp_world_size
    received = [Received()] * len(tokens)
    for plane in range(planes):
        received[plane::planes] = exchange(group, tokens[plane::planes])
    if planes == 1:
        return received
    return [share(mine, received[rank ^ 1], rank % 2) for rank, mine in enumerate(received)]


def combine_group(
    group: Group,
    tokens: list[Tokens],
    received: list[Received],
    expert_rows: list[np.ndarray],
    shared_x: list[np.ndarray | None],
    norms: list[Norm | None],
) -> list[np.ndarray | tuple[np.ndarray, ...]]:
    """The output of combine on every rank of one expert-parallel group."""
    returned = {}
    for mine, outputs in zip(received, expert_rows, strict=True):
        for (_, source, token, slot), bits in zip(mine.rows, outputs, strict=True):
            quantised = group.comm_quant_mode == 2
            arrived = through_int8_blocks(bits, group.dtype) if quantised else bits
            returned[source, token, slot] = decode(arrived, group.dtype)

    results = []
    for rank, mine in enumerate(tokens):
        out, y = np.zeros((2, mine.batch, group.hidden), np.uint16)
        rstd, norm = np.zeros(mine.batch, np.float32), norms[rank]
        for token in range(mine.batch):
            if not mine.takes_part(token):
                continue
            total = np.zeros(group.hidden, np.float32)
            for slot in range(group.top_k):
                if not mine.is_active(token, slot):
                    continue
                kind, number = group.kind(int(mine.ids[token, slot]))
                if kind == "routed":
                    value = returned[rank, token, slot]
                elif kind == "copy":
                    value = decode(mine.ori_x[token], group.dtype)
                elif kind == "const":
                    kept = decode(mine.alpha_1[number], group.dtype) * decode(
                        mine.ori_x[token], group.dtype
                    )
                    added = decode(mine.alpha_2[number], group.dtype) * decode(
                        mine.const_v[number], group.dtype
                    )
                    value = kept + added
                else:
                    continue
                product = mine.weights[token, slot] * value
                total = total + product
            for j in range(group.num_shared):
                total = total + returned[rank, token, group.top_k + j]
            if shared_x[rank] is not None:
                total = total + decode(shared_x[rank][token], group.dtype)
            assert total.dtype == np.float32
            if norm is None:
                out[token] = encode(total, group.dtype)
            else:
                y[token], rstd[token], out[token] = normalise(total, token, norm, group.dtype)
        results.append(out if norm is None else (y, rstd, out))
    return results


def combine(
    group: Group,
    tokens: list[Tokens],
    received: list[Received | None],
    expert_rows: list[np.ndarray | None],
    shared_x: list[np.ndarray | None] | None = None,
    norms: list[Norm | None] | None = None,
) -> list:
    """The output of combine on every rank.

    Args:
        group: agreed arguments.
        tokens: what every rank brought; x and scales are not used.
        received: result of :func:`dispatch`, for the origin of each row.
        expert_rows: of every rank (n, H) uint16 bits, the expert outputs in the row order of
            dispatch.
        shared_x: of every rank (BS, H) uint16 bits of an already computed shared expert, or None.
        norms: of every rank, for combine with RMSNorm, or None.

    Returns:
        Of every rank (BS, H) uint16 bits; None of a rank that a group was scaled down by. With
        ``norms`` y, the (BS,) float32 rstd, and those.
    """
    shared_x = [None] * len(tokens) if shared_x is None else shared_x
    norms = [None] * len(tokens) if norms is None else norms
    inputs = (tokens, received, expert_rows, shared_x, norms)
    if group.remaining is not None:
        left = group.remaining.ranks
        results: list[np.ndarray | None] = [None] * group.world_size
        parts = [[of[old] for old in left] for of in inputs]
        for old, mine in zip(left, combine(group.scaled_down(), *parts), strict=True):
            results[old] = mine
        return results

    planes = group.tp_world_size
    if planes == 2:
        expert_rows = [
            sum_of_pair(
                group.dtype,
                expert_rows[rank][: len(mine.rows)],
                expert_rows[rank ^ 1][len(received[rank ^ 1].rows) :],
            )
            for rank, mine in enumerate(received)
        ]
    results = [None] * len(tokens)
    for plane in range(planes):
        parts = [of[plane::planes] for of in (tokens, received, expert_rows, shared_x, norms)]
        results[plane::planes] = combine_group(group, *parts)
    return results


def sum_of_pair(dtype: str, own: np.ndarray, peers: np.ndarray) -> np.ndarray:
    """(n, H) bits of the rows of one rank, computed in two parts by the ranks of its pair."""
    return encode(decode(own, dtype) + decode(peers, dtype), dtype)
