"""What the steps exchange: routing plans, permutations, and the parts of a combine.

Letters: T tokens of this rank, K experts per token, NS shared experts, H hidden size, E routed
experts, W ranks, L experts of one rank, C slots one source may send to one rank, n rows received.
A slot id is token * (K + NS) + slot, where slot K + j stands for shared expert j. Index tensors are
int32 unless an attribute says otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NOWHERE = -1  # as an expert id: the slot is not sent; as an index: the slot has no row


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


class RecvPermutation(NamedTuple):
    """Order of the received rows: by (local expert, source, slot id).

    With an alignment, the rows of each expert end with padding, whose source is ``NOWHERE``.

    Attributes:
        source: [n] int64 rank that sent the row.
        index_in_source: [n] int64 its index among that source's slot ids for this rank; 0 for rows
            past the last expert, unused for padding; None where the rows are known without it:
            those through windows, and of a rank that sends to itself alone.
        recv_counts_cumsum: [L*W] inclusive prefix sums of the counts, without padding: Ascend's
            ep_recv_counts.
        offsets: [L] end of each local expert's rows, padding included.
        group_starts: [L, W + 1] first row of each (local expert, source), then of its padding.
    """

    source: torch.Tensor
    index_in_source: torch.Tensor | None
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
    """Plan and permutation of a rank's tokens by its own experts.

    Attributes:
        counts: [E] slots of each expert.
        position_in_expert: as in ``RoutingPlan``.
        recv_permutation: the order of the rows, all from rank 0.
        slot_ids: [n] slot id token * K + slot of each row, or ``NOWHERE`` for padding.
        row_index: [T, K] int64 row of each slot, or ``NOWHERE`` where it is not sent.
        weights: [n] routing weight of each row, 0 for padding; or None.
        totals: [E] ``counts`` in the dtype that the caller wants.
    """

    counts: torch.Tensor
    position_in_expert: torch.Tensor
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
