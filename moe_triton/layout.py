"""Data of the device steps: routing plan, row formats, dispatch headers, permutations.

Letters: T tokens of this rank, K experts per token, NS shared experts, H hidden size, E routed
experts, W ranks, L experts of one rank, C slots one source may send to one rank, n rows received.
A slot id is token * (K + NS) + slot, where slot K + j stands for shared expert j. Index tensors are
int32 unless an attribute says otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NOWHERE = -1  # as an expert id: the slot is not sent; as an index: the slot has no row


class Quant(NamedTuple):
    """Quantisation of dispatched tokens.

    Attributes:
        scheme: as in ``RowFormat``.
        dtype: of the payload.
        scale_dtype: of the scales, for the schemes that have scales.
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
    """Slots of one rank's tokens, counted and sorted by expert. Here a slot id is token * K + slot.

    Ids outside [0, E) are not sent: ``NOWHERE``, and zero-computation experts.

    Example: expert_ids [[0, 2], [2, 1], [0, 3]], E = 4:
        counts [2, 1, 2, 1], position_in_expert [0, 0, 1, 0, 1, 0],
        sorted_slot_ids [0, 4, 3, 1, 2, 5]

    Attributes:
        counts: [E] slots of each expert.
        position_in_expert: [T*K] earlier slots that chose the same expert, or ``NOWHERE``.
        sorted_slot_ids: [T*K] slot ids sorted by (expert, slot id), those not sent at the end.
    """

    counts: torch.Tensor
    position_in_expert: torch.Tensor
    sorted_slot_ids: torch.Tensor


class RoutingCopies(NamedTuple):
    """Copies of a call's routing, made by the launches of its plan.

    Attributes:
        expert_ids: [T, K] int32 output.
        weights: [T, K] to copy, or None.
        weights_copy: [T, K] output of the dtype of ``weights``; unused without ``weights``.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor | None = None
    weights_copy: torch.Tensor | None = None


class DispatchHeader(NamedTuple):
    """Metadata of the rows that a source sends to one rank; [W] in front when stacked over sources.

    Attributes:
        num_tokens: [1] active tokens of the source; a shared expert gets each of them.
        counts: [E] slots of the source for every expert, so that all ranks know all loads.
        slot_ids: [C] slot ids of the rows for this rank: in (expert, slot id) order, or in token
            order for a shared expert.
        weights: [C] routing weights of these slots, 1 for a shared expert, or None.
    """

    num_tokens: torch.Tensor
    counts: torch.Tensor
    slot_ids: torch.Tensor
    weights: torch.Tensor | None


class RowFormat(NamedTuple):
    """Layout of one token row in a window: H elements, then the scales that its scheme has.

    Attributes:
        dtype: of the payload.
        hidden: H.
        stride: bytes from row to row, a multiple of 16.
        scheme: quantisation of the payload: "none"; "static" with the caller's factors; "per_row",
            "group" and "mx" with scales made from the row; "per_row_div" as "per_row", but divides
            the row by its scale; "block8" divides too, for combine.
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
        """The format whose scales and next row begin at the next multiple of 16 bytes."""
        size = align(hidden * dtype.itemsize)
        if scheme in ("none", "static"):
            return cls(dtype, hidden, size, scheme)
        fmt = cls(dtype, hidden, 0, scheme, size, scale_dtype, block)
        return fmt._replace(stride=align(size + fmt.num_scales * scale_dtype.itemsize))

    @classmethod
    def quantized(cls, quant: str | None, dtype: torch.dtype, hidden: int) -> RowFormat:
        """The format of tokens of ``dtype`` after a quantisation of ``QUANTS``, or without one."""
        if quant is None:
            return cls.tight(dtype, hidden)
        scheme, payload, scale_dtype, block = QUANTS[quant]
        return cls.tight(payload, hidden, scheme, scale_dtype, block)

    @property
    def num_scales(self) -> int:
        """Scales of a row; MX scales come in pairs."""
        if not self.block:
            return 1
        scales = -(-self.hidden // self.block)
        return scales + scales % 2 if self.scheme == "mx" else scales

    def scale_shape(self, num_rows: int) -> tuple[int, ...]:
        """Shape of scales in a tensor of their own: one dimension where a row has one scale."""
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
    """Order of the received rows: by (local expert, source, slot id).

    With an alignment, the rows of each expert end with padding, whose source is ``NOWHERE``.

    Attributes:
        source: [n] int64 rank that sent the row.
        index_in_source: [n] int64 its index in that source's ``DispatchHeader.slot_ids``; 0 for
            rows past the last expert, unused for padding.
        recv_counts_cumsum: [L*W] inclusive prefix sums of the counts, without padding: Ascend's
            ep_recv_counts.
        offsets: [L] end of each local expert's rows, padding included.
        group_starts: [L, W + 1] first row of each (local expert, source), then of its padding.
    """

    source: torch.Tensor
    index_in_source: torch.Tensor
    recv_counts_cumsum: torch.Tensor
    offsets: torch.Tensor
    group_starts: torch.Tensor


class RecvRowIndex(NamedTuple):
    """Slot id, address and weight of each received row, in the order of ``RecvPermutation``.

    Attributes:
        recv_permutation: the order of the rows.
        slot_ids: [n] slot id of each row at its source, or ``NOWHERE`` for padding.
        row_index: [n] int64 address of each row in the windows, or ``NOWHERE``.
        weights: [n] routing weight of each row, 0 for padding; or None.
        totals: [L] rows of each local expert, without padding.
    """

    recv_permutation: RecvPermutation
    slot_ids: torch.Tensor
    row_index: torch.Tensor
    weights: torch.Tensor | None
    totals: torch.Tensor


class LocalPermutation(NamedTuple):
    """Permutation of a rank's tokens by its own experts.

    Attributes:
        recv_permutation: the order of the rows, all from rank 0.
        slot_ids: [n] slot id token * K + slot of each row, or ``NOWHERE`` for padding.
        row_index: [T, K] int64 row of each slot, or ``NOWHERE`` where it is not sent.
        weights: [n] routing weight of each row, 0 for padding; or None.
        totals: [E] rows of each expert, without padding.
    """

    recv_permutation: RecvPermutation
    slot_ids: torch.Tensor
    row_index: torch.Tensor
    weights: torch.Tensor | None
    totals: torch.Tensor


class Norm(NamedTuple):
    """Residual and RMSNorm that are fused into a combine.

    Attributes:
        residual: [T, H] of the dtype of the sum.
        gamma: [H] of that dtype.
        epsilon: added to the mean square.
        y: [T, H] output, the normalised sum.
        rstd: [T] fp32 output, the reciprocal root mean square of the sum.
    """

    residual: torch.Tensor
    gamma: torch.Tensor
    epsilon: float
    y: torch.Tensor
    rstd: torch.Tensor


class ZeroComputationExperts(NamedTuple):
    """Zero, copy and constant experts; their ids follow the E routed ones in this order.

    A zero expert adds nothing, a copy expert the token itself, and a constant expert c
    alpha_1[c] * token + alpha_2[c] * value[c].

    Attributes:
        expert_ids: [T, K] of the tokens.
        first_copy: id of the first copy expert.
        first_constant: id of the first constant expert.
        end: id after the last constant expert.
        tokens: [T, H] of the dtype of the rows; None without copy or constant experts.
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
