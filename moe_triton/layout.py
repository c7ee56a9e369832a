"""What the device steps hand to each other: the routing plan, row formats, windows, row numbers.

Letters: T tokens of this rank, K experts per token, H hidden size, E routed experts, W ranks,
L experts of one rank, C copies one source may send to one rank, n rows received. Index tensors are
int32 unless said otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NOWHERE = -1  # as an expert id: the token's slot takes no part; as an index: there is no such row


class Quant(NamedTuple):
    """How tokens are quantised on their way to the experts.

    Attributes:
        scheme: as in ``RowFormat``.
        dtype: of the payload.
        scale_dtype: of the scales, for the schemes that have such.
        block: elements that share a scale, or 0 where the whole row has one.
    """

    scheme: str
    dtype: torch.dtype
    scale_dtype: torch.dtype = torch.float32
    block: int = 0


# By the names that ``ExpertParallel`` takes. MX scales are e8m0, which travels as its bytes.
QUANTS = {
    "int8_static": Quant("static", torch.int8),
    "int8": Quant("per_row", torch.int8),
    "e4m3": Quant("per_row", torch.float8_e4m3fn),
    "e5m2": Quant("per_row", torch.float8_e5m2),
    "group_e4m3": Quant("group", torch.float8_e4m3fn, block=128),
    "group_e5m2": Quant("group", torch.float8_e5m2, block=128),
    "mx_e4m3": Quant("mx", torch.float8_e4m3fn, torch.uint8, 32),
    "mx_e5m2": Quant("mx", torch.float8_e5m2, torch.uint8, 32),
}


def align(num_bytes: int, to: int = 16) -> int:
    """``num_bytes`` rounded up to a multiple of ``to``."""
    return -(-num_bytes // to) * to


class RoutingPlan(NamedTuple):
    """Where the copies of one rank's tokens go; everything follows from counting.

    Ids outside [0, E) are not sent: ``NOWHERE``, and experts that have no network.

    Example: expert_ids [[0, 2], [2, 1], [0, 3]], E = 4:
        counts [2, 1, 2, 1], expand_idx [0, 0, 1, 0, 1, 0], sorted_slot_ids [0, 4, 3, 1, 2, 5]

    Attributes:
        counts: [E] copies for each expert.
        position_in_expert: [T*K] earlier flat positions that chose the same expert, or ``NOWHERE``.
        sorted_slot_ids: [T*K] flat positions sorted by (expert, flat position), those not sent at
            the end.
    """

    counts: torch.Tensor
    position_in_expert: torch.Tensor
    sorted_slot_ids: torch.Tensor


class RoutingCopies(NamedTuple):
    """Copies of a call's routing that are made as it is planned, in no launch of their own.

    Attributes:
        expert_ids: [T, K] int32 output.
        weights: [T, K] to copy, or None.
        weights_copy: [T, K] output of the dtype of ``weights``; not looked at without these.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor | None = None
    weights_copy: torch.Tensor | None = None


class DispatchHeader(NamedTuple):
    """What a source tells one rank about the rows for it; [W] in front when stacked over sources.

    Attributes:
        num_tokens: [1] tokens of the source that take part, each of which a shared expert gets.
        counts: [E] the source's copies for every expert, so that all ranks know all loads.
        slot_ids: [C] which copies are for this rank, as token * (K + NS) + slot, where slot K + j
            stands for shared expert j; in (expert, flat position) order, or in token order for a
            shared expert.
        weights: [C] routing weights of these copies, 1 for a shared expert, or None.
    """

    num_tokens: torch.Tensor
    counts: torch.Tensor
    slot_ids: torch.Tensor
    weights: torch.Tensor | None


class RowFormat(NamedTuple):
    """How one token row lies in a window: H elements, then scales where its scheme has such.

    Attributes:
        dtype: of the payload.
        hidden: H.
        stride: bytes from row to row, a multiple of 16.
        scheme: how the payload came about: "none" as it was; "static" with factors that the caller
            gave; "per_row", "group" and "mx" with scales made from the row; "per_row_div" as
            "per_row", but the row is divided by its scale; "block8" likewise, on the way back from
            an expert.
        scale_offset: byte offset of the first scale, a multiple of 16, or None.
        scale_dtype: of the scales.
        block: elements that share a scale, or 0 where the whole row has one.
    """

    dtype: torch.dtype
    hidden: int
    stride: int
    scheme: str = "none"
    scale_offset: int | None = None
    scale_dtype: torch.dtype = torch.float32
    block: int = 0

    @classmethod
    def tight(
        cls,
        dtype: torch.dtype,
        hidden: int,
        scheme: str = "none",
        scale_dtype: torch.dtype = torch.float32,
        block: int = 0,
    ) -> RowFormat:
        """The format of these whose rows and scales begin at the next multiple of 16 bytes."""
        size = align(hidden * dtype.itemsize)
        if scheme in ("none", "static"):
            return cls(dtype, hidden, size, scheme)
        fmt = cls(dtype, hidden, 0, scheme, size, scale_dtype, block)
        return fmt._replace(stride=align(size + fmt.num_scales * scale_dtype.itemsize))

    @classmethod
    def quantized(cls, quant: str | None, dtype: torch.dtype, hidden: int) -> RowFormat:
        """The format of tokens of ``dtype`` after a quantisation of ``QUANTS``, or after none."""
        if quant is None:
            return cls.tight(dtype, hidden)
        made = QUANTS[quant]
        return cls.tight(made.dtype, hidden, made.scheme, made.scale_dtype, made.block)

    @property
    def num_scales(self) -> int:
        """Scales of a row; MX scales come in pairs."""
        if not self.block:
            return 1
        scales = -(-self.hidden // self.block)
        return scales + scales % 2 if self.scheme == "mx" else scales

    def scale_shape(self, num_rows: int) -> tuple[int, ...]:
        """Of the scales of some rows apart from these: one dimension where a row has one scale."""
        return (num_rows, self.num_scales) if self.block else (num_rows,)

    def payload(self, rows: torch.Tensor) -> torch.Tensor:
        """[.., stride] uint8 -> [.., H] of ``dtype``, a view."""
        return rows.view(self.dtype)[..., : self.hidden]

    def scales(self, rows: torch.Tensor) -> torch.Tensor:
        """[.., stride] uint8 -> [.., num_scales] of ``scale_dtype``, a view."""
        assert self.scale_offset is not None
        first = self.scale_offset // self.scale_dtype.itemsize
        return rows.view(self.scale_dtype)[..., first : first + self.num_scales]


class RecvPermutation(NamedTuple):
    """Which copy of which source each received row is; rows in (local expert, source, flat) order.

    Where rows are aligned, each expert's end with padding rows, whose source is ``NOWHERE``.

    Attributes:
        source: [n] int64 rank that sent the row.
        copy: [n] int64 its place in that source's list of copies.
        recv_counts_cumsum: [L*W] inclusive prefix sums of the counts, without padding:
            ep_recv_counts.
        offsets: [L] the rows up to the end of each local expert's, padding included.
        group_starts: [L, W + 1] the first row of each (local expert, source), then of its padding.
    """

    source: torch.Tensor
    copy: torch.Tensor
    recv_counts_cumsum: torch.Tensor
    offsets: torch.Tensor
    group_starts: torch.Tensor


class RecvRowIndex(NamedTuple):
    """What a rank knows of each row that it receives, in the order of ``RecvPermutation``.

    Attributes:
        recv_permutation: the numbering of the rows.
        slot_ids: [n] which copy of its source each row is, token * (K + NS) + slot, or ``NOWHERE``
            for padding.
        row_index: [n] int64 where each row lies, or ``NOWHERE``.
        weights: [n] the routing weight that came with it, 0 for padding; or None.
        totals: [L] rows of each local expert, padding left out.
    """

    recv_permutation: RecvPermutation
    slot_ids: torch.Tensor
    row_index: torch.Tensor
    weights: torch.Tensor | None
    totals: torch.Tensor


class LocalPermutation(NamedTuple):
    """Where a rank's tokens go when their experts are its own.

    Attributes:
        recv_permutation: the numbering of the rows, all from rank 0.
        slot_ids: [n] which copy each row is, token * K + slot, or ``NOWHERE`` for padding.
        row_index: [T, K] int64 row of each slot, or ``NOWHERE`` where it is not sent.
        weights: [n] the routing weight of each row, 0 for padding; or None.
        totals: [E] rows of each expert, padding left out.
    """

    recv_permutation: RecvPermutation
    slot_ids: torch.Tensor
    row_index: torch.Tensor
    weights: torch.Tensor | None
    totals: torch.Tensor


class Norm(NamedTuple):
    """What follows a combine where residual and RMSNorm are fused into it.

    Attributes:
        residual: [T, H] of the dtype of the sum.
        gamma: [H] of that dtype.
        epsilon: added to the mean square.
        y: [T, H] output, the normalised sum.
        rstd: [T] fp32 output, its reciprocal root mean square.
    """

    residual: torch.Tensor
    gamma: torch.Tensor
    epsilon: float
    y: torch.Tensor
    rstd: torch.Tensor


class ZeroComputationExperts(NamedTuple):
    """Experts without a network; their ids follow the E routed ones in this order.

    A zero expert adds nothing, a copy expert the token itself, and a constant expert c
    alpha_1[c] * token + alpha_2[c] * value[c].

    Attributes:
        expert_ids: [T, K] of the tokens.
        first_copy: id of the first copy expert, after the zero experts.
        first_constant: id of the first constant expert.
        end: the id after the last one.
        tokens: [T, H] the tokens, of the dtype of the rows; None without copy or constant experts.
        alpha_1: [n] or [n, H] of that dtype, or None.
        alpha_2: as alpha_1.
        value: [n, H] of that dtype, or None.
    """

    expert_ids: torch.Tensor
    first_copy: int
    first_constant: int
    end: int
    tokens: torch.Tensor | None
    alpha_1: torch.Tensor | None
    alpha_2: torch.Tensor | None
    value: torch.Tensor | None
