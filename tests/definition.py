"""What dispatch and combine mean, written out for all ranks at once.

Plain loops: token by token, slot by slot, row by row. Nothing here counts, sorts or prefix-sums to
find a place; rows are appended in the order the contract names, and every other output is read off
that list. The ops are compared with this, so it shares no code with the package.

16-bit floats travel as their bits (uint16 arrays), so that a comparison also sees the sign of a
zero and the payload of a NaN; arithmetic happens in numpy float32, one rounding per operation.

Shape letters: W ranks, E routed experts, K experts a token, H hidden size, BS tokens of one rank, L
experts of one rank, A row capacity of one rank, n rows that really arrived.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Bits (uint16) of float32 values rounded to ``dtype``, half to even."""
    values = np.asarray(values, dtype=np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    wide = values.view(np.uint32).astype(np.uint64)
    kept_is_odd = (wide >> 16) & 1
    bits = ((wide + 0x7FFF + kept_is_odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), bits)


def decode(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values behind the bits; exact."""
    bits = np.ascontiguousarray(bits, dtype=np.uint16)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    """Bits (uint16) of a bf16 or fp16 tensor of any strides."""
    return tensor.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def to_tensor(bits: np.ndarray, dtype: str) -> torch.Tensor:
    """A fresh bf16 or fp16 tensor with these bits."""
    owned = np.array(bits, dtype=np.uint16, order="C")
    return torch.from_numpy(owned.view(np.int16)).view(TORCH_DTYPES[dtype])


@dataclass(frozen=True)
class Group:
    """The arguments on which all ranks agree.

    ``shared_experts`` is the argument; it counts for nothing while ``shared_ranks`` is 0.
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

    @property
    def num_shared(self) -> int:
        """Shared experts that exist."""
        return self.shared_experts if self.shared_ranks else 0

    @property
    def copies(self) -> int:
        """Ranks that hold the same shared expert."""
        return self.shared_ranks // self.num_shared

    @property
    def experts_per_rank(self) -> int:
        """Routed experts of a rank that is not shared."""
        return self.num_experts // (self.world_size - self.shared_ranks)

    def num_local(self, rank: int) -> int:
        """Experts on ``rank``."""
        return 1 if rank < self.shared_ranks else self.experts_per_rank

    def home(self, expert: int) -> tuple[int, int]:
        """Rank and local index of a routed expert."""
        return (
            self.shared_ranks + expert // self.experts_per_rank,
            expert % self.experts_per_rank,
        )

    def shared_home(self, shared_expert: int, source: int) -> int:
        """Rank whose copy of a shared expert serves the tokens of ``source``."""
        return shared_expert * self.copies + source % self.copies

    def capacity(self, rank: int, batch: int) -> int:
        """Rows of ``expand_x`` on ``rank``; ``batch`` is BS, equal everywhere if global_bs is 0."""
        total = self.global_bs if self.global_bs else batch * self.world_size
        if rank >= self.shared_ranks:
            return total * min(self.experts_per_rank, self.top_k)
        largest = total // self.world_size
        sources = -(-self.world_size // self.copies)
        return largest * sources


@dataclass
class Tokens:
    """What one rank brings to dispatch.

    Attributes:
        x: (BS, H) uint16, bits of the group's dtype.
        ids: (BS, K) integers.
        weights: (BS, K) float32, the routing weights of combine.
        scales: (NS + E, H) float32 smooth factors of this source, or None.
    """

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    scales: np.ndarray | None = None

    @property
    def batch(self) -> int:
        return len(self.ids)


@dataclass
class Received:
    """What one rank has after dispatch; lists and arrays hold valid rows only.

    Attributes:
        rows: (local expert, source rank, token, slot) of each row; slot K + j for shared expert j.
        expand_x: (n, H), uint16 bits or int8 codes.
        dynamic_scales: (n,) float32, or None when nothing is quantised.
        expand_idx: (BS*K,) of this rank's own tokens.
        token_nums: (L,) rows of each local expert.
        token_nums_running: (L,) rows up to and including each local expert.
        ep_recv_counts: (L*W,) rows up to and including each (local expert, source).
        expand_scales: (n,) float32 routing weight of each row, 1 on a shared rank.
        capacity: A.
    """

    rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    expand_x: np.ndarray | None = None
    dynamic_scales: np.ndarray | None = None
    expand_idx: list[int] = field(default_factory=list)
    token_nums: list[int] = field(default_factory=list)
    token_nums_running: list[int] = field(default_factory=list)
    ep_recv_counts: list[int] = field(default_factory=list)
    expand_scales: np.ndarray | None = None
    capacity: int = 0


def quantise_int8(row: np.ndarray, smooth: np.ndarray | None) -> tuple[np.ndarray, np.float32]:
    """int8 codes and dequantisation factor of one row of float32 values."""
    scaled = row if smooth is None else row * smooth
    largest = np.max(np.abs(scaled))
    if largest == 0:
        return np.zeros(len(row), np.int8), np.float32(0)
    factor = np.float32(127) / largest
    codes = np.rint(scaled * factor).astype(np.int8)
    return codes, np.float32(1) / factor


def rows_of(group: Group, tokens: list[Tokens], rank: int) -> list[tuple[int, int, int, int]]:
    """(local expert, source, token, slot) of every row ``rank`` receives, in order."""
    rows = []
    for local in range(group.num_local(rank)):
        for source in range(group.world_size):
            for token in range(tokens[source].batch):
                if rank < group.shared_ranks:
                    for j in range(group.num_shared):
                        if group.shared_home(j, source) == rank:
                            rows.append((0, source, token, group.top_k + j))
                    continue
                for slot in range(group.top_k):
                    if group.home(int(tokens[source].ids[token, slot])) == (rank, local):
                        rows.append((local, source, token, slot))
    return rows


def dispatch(group: Group, tokens: list[Tokens]) -> list[Received]:
    """The outputs of dispatch on every rank, from the inputs of every rank."""
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
            if group.quant_mode == 2:
                smooth = None if sender.scales is None else sender.scales[smooth_row]
                bits, factor = quantise_int8(decode(bits, group.dtype), smooth)
                factors.append(factor)
            payload.append(bits)
        payload_dtype = np.int8 if group.quant_mode == 2 else np.uint16
        mine.expand_x = np.array(payload, payload_dtype).reshape(len(mine.rows), group.hidden)
        mine.expand_scales = np.array(weights, np.float32)
        if group.quant_mode == 2:
            mine.dynamic_scales = np.array(factors, np.float32)

        chosen_before: dict[int, int] = {}
        for expert in tokens[rank].ids.reshape(-1).tolist():
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


def combine(
    group: Group,
    tokens: list[Tokens],
    received: list[Received],
    expert_rows: list[np.ndarray],
    shared_x: list[np.ndarray | None] | None = None,
) -> list[np.ndarray]:
    """The output of combine on every rank.

    Args:
        group: agreed arguments.
        tokens: what every rank brought; ids and weights are used.
        received: result of :func:`dispatch`, for the origin of each row.
        expert_rows: per rank (n, H) uint16 bits, the expert outputs in the row order of dispatch.
        shared_x: per rank (BS, H) uint16 bits of an already computed shared expert, or None.

    Returns:
        Per rank (BS, H) uint16 bits.
    """
    returned = {}
    for mine, outputs in zip(received, expert_rows, strict=True):
        for (_, source, token, slot), bits in zip(mine.rows, outputs, strict=True):
            returned[source, token, slot] = decode(bits, group.dtype)

    results = []
    for rank, mine in enumerate(tokens):
        out = np.zeros((mine.batch, group.hidden), np.uint16)
        for token in range(mine.batch):
            total = np.zeros(group.hidden, np.float32)
            for slot in range(group.top_k):
                product = mine.weights[token, slot] * returned[rank, token, slot]
                total = total + product
            for j in range(group.num_shared):
                total = total + returned[rank, token, group.top_k + j]
            if shared_x is not None and shared_x[rank] is not None:
                total = total + decode(shared_x[rank][token], group.dtype)
            assert total.dtype == np.float32
            out[token] = encode(total, group.dtype)
        results.append(out)
    return results


def same_bits(actual: torch.Tensor, expected: np.ndarray, what: str) -> None:
    """Assert equality bit for bit; ``expected`` is uint16 bits for a 16-bit float tensor."""
    if actual.dtype in TORCH_DTYPES.values():
        found, wanted = to_bits(actual), expected
    else:
        found, wanted = actual.detach().cpu().contiguous().numpy(), np.asarray(expected)
        if found.dtype == np.float32:
            wanted = wanted.astype(np.float32)
            found, wanted = found.view(np.uint32), wanted.view(np.uint32)
    assert found.shape == wanted.shape, f"{what}: shape {found.shape}, expected {wanted.shape}"
    if not np.array_equal(found, wanted):
        place = tuple(int(axis[0]) for axis in np.nonzero(found != wanted))
        raise AssertionError(
            f"{what} differs first at {place}: got {found[place]}, expected {wanted[place]}\n"
            f"got      {found.tolist()}\nexpected {wanted.tolist()}"
        )


def check_dispatch(
    group: Group,
    expected: Received,
    outputs: tuple[torch.Tensor | None, ...],
    *,
    rank: int,
    token_nums_type: int = 1,
    weights_given: bool = True,
) -> None:
    """Assert that the seven outputs of v1 dispatch on ``rank`` are what they must be.

    Shapes and dtypes are checked in full, contents on the valid rows.
    """
    x, factors, idx, nums, counts, tp_counts, weights = outputs
    n = len(expected.rows)
    quantised = group.quant_mode == 2
    assert tuple(x.shape) == (expected.capacity, group.hidden)
    assert x.dtype == (torch.int8 if quantised else TORCH_DTYPES[group.dtype])
    same_bits(x[:n], expected.expand_x, f"rank {rank} expand_x")

    if quantised:
        assert tuple(factors.shape) == (expected.capacity,) and factors.dtype == torch.float32
        same_bits(factors[:n], expected.dynamic_scales, f"rank {rank} dynamic_scales")
    else:
        assert factors is None

    assert idx.dtype == torch.int32 and idx.ndim == 1
    same_bits(idx, np.array(expected.expand_idx, np.int32), f"rank {rank} expand_idx")

    assert nums.dtype == torch.int64 and nums.ndim == 1
    wanted = expected.token_nums if token_nums_type == 1 else expected.token_nums_running
    same_bits(nums, np.array(wanted, np.int64), f"rank {rank} expert_token_nums")

    assert counts.dtype == torch.int32 and counts.ndim == 1
    same_bits(counts, np.array(expected.ep_recv_counts, np.int32), f"rank {rank} ep_recv_counts")

    assert tp_counts is None

    if weights_given:
        assert tuple(weights.shape) == (expected.capacity,) and weights.dtype == torch.float32
        same_bits(weights[:n], expected.expand_scales, f"rank {rank} expand_scales")
    else:
        assert weights is None
