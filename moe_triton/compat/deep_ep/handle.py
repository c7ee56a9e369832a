"""``EPHandle``: what a dispatch of version 2 leaves for the calls that follow.

Letters as in ``elastic``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from ...errors import ArgumentTypeError
from ...ops import checks

SOURCE_COLUMNS = 2  # of recv_src_metadata, before the expanded rows


@dataclasses.dataclass(eq=False, kw_only=True)
class EPHandle:
    """What a dispatch leaves for combine and for cached dispatches.

    Attributes:
        do_expand: whether rows were expanded.
        num_experts: E.
        expert_alignment: of the rows of each local expert.
        num_max_tokens_per_rank: M.
        num_sms: as given to dispatch.
        topk_idx: [T, K] the ids of dispatch.
        num_recv_tokens: R; W * M without CPU synchronisation.
        num_expanded_tokens: A; its largest value without CPU synchronisation.
        num_recv_tokens_per_expert_list: [L] rows of each local expert, padding included; empty
            without CPU synchronisation.
        psum_num_recv_tokens_per_scaleup_rank: [W] int32 sums of R over the sources up to each.
        psum_num_recv_tokens_per_expert: [L] int32: sums of the padded rows up to each local expert;
            with ``do_expand`` the end of its rows, before their padding.
        num_unaligned_recv_tokens_per_expert: [L] int32 rows of each local expert, without padding.
        recv_src_metadata: [R, 2 + K] int32: the token's number source * M + token; source * K plus
            the last slot of the token on this rank; the expanded row of each slot, or -1.
        dst_buffer_slot_idx: [T, K] int32 number of the row sent for each slot, or -1.
        token_metadata_at_forward: None; of the original's path between hosts.
        channel_linked_list: None, likewise.
        recv_expert_ids: [A] int32 local expert of each expanded row, -1 for padding; None unless
            asked for.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: torch.Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
    psum_num_recv_tokens_per_expert: torch.Tensor
    num_unaligned_recv_tokens_per_expert: torch.Tensor
    recv_src_metadata: torch.Tensor
    dst_buffer_slot_idx: torch.Tensor
    recv_expert_ids: torch.Tensor | None = None
    token_metadata_at_forward: ClassVar[None] = None
    channel_linked_list: ClassVar[None] = None

    def rows_per_source(self) -> list[int]:
        """[W] rows received from each rank."""
        ends = self.psum_num_recv_tokens_per_scaleup_rank
        return ends.diff(prepend=ends.new_zeros(1)).tolist()

    def expanded_rows(self, num_rows: int) -> torch.Tensor:
        """[R, K] int64 expanded row of each slot of the received rows, or ``NOWHERE``."""
        return self.recv_src_metadata[:num_rows, SOURCE_COLUMNS:].long()


def check_handle(op: str, handle: Any, world_size: int, expand: bool) -> None:
    """It comes from a dispatch between as many ranks, with or without ``do_expand``."""
    checks.required(op, handle=handle)
    if not isinstance(handle, EPHandle):
        raise ArgumentTypeError(op, "handle", "be that of a dispatch", type(handle).__name__)
    ranks = len(handle.psum_num_recv_tokens_per_scaleup_rank)
    contract = f"come from a dispatch between {world_size} ranks"
    checks.value(op, "handle", ranks == world_size, contract, f"one between {ranks}")
    contract = f"come from a dispatch with do_expand={expand}"
    checks.value(op, "handle", handle.do_expand == expand, contract, handle.do_expand)


def check_same(
    op: str,
    handle: EPHandle,
    num_experts: int | None,
    max_tokens: int | None,
    alignment: int | None,
) -> None:
    """Arguments beside a handle are None or what it says."""
    for name, value in (
        ("num_experts", num_experts),
        ("num_max_tokens_per_rank", max_tokens),
        ("expert_alignment", alignment),
    ):
        own = getattr(handle, name)
        checks.value(op, name, value in (None, own), f"be {own}, as in the handle", value)
