"""The calls of version 2: check, send, and lay out or add up what has arrived.

The last step is a function of its own, which version 2.5 may defer. Letters as in ``elastic``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import ArgumentValueError
from ...layout import NOWHERE
from ...ops import checks
from . import routing
from .arguments import Tokens, biases, check_num_experts, check_rows, check_topk, split_tokens
from .config import NUM_SMS
from .events import EventHandle, EventOverlap, wait_for
from .handle import EPHandle, check_handle, check_same
from .received import OutputLayout, lay_out, make_handle
from .transfer import RowExchange, gather_or_zero, gather_rows, ordered_sum, take

Dispatched = tuple[Tokens, torch.Tensor | None, torch.Tensor | None, EPHandle]
Combined = tuple[torch.Tensor, torch.Tensor | None]


class ElasticCalls:
    """Dispatch and combine between the ranks of a buffer; all ranks issue the same calls.

    Args:
        rows: the connection to the ranks.
        max_tokens: M of dispatches that do not say it.
        reduce_expanded: the rank of the experts adds up a token's expanded rows, and rounds, before
            it returns them.
    """

    def __init__(self, rows: RowExchange, max_tokens: int, *, reduce_expanded: bool) -> None:
        self._rows = rows
        self._max_tokens = max_tokens
        self._reduce_expanded = reduce_expanded

    @torch.no_grad()
    def dispatch(
        self,
        op: str,
        x: Tokens,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        *,
        stats: torch.Tensor | None,
        num_experts: int | None,
        max_tokens: int | None,
        alignment: int | None,
        num_sms: int,
        previous_event: EventOverlap | EventHandle | None,
        handle: EPHandle | None,
        copy_ids: bool,
        cpu_sync: bool | None,
        layout: OutputLayout,
    ) -> Callable[[], Dispatched]:
        """Send; the arguments are those of ``ElasticBuffer.dispatch``.

        Returns:
            The step that lays out the received rows.
        """
        rows, world = self._rows, self._rows.size
        with rows.abort_peers_on_error(op):
            tokens, scales = split_tokens(op, x)
            if handle is not None:
                given = topk_idx is not None or bool(cpu_sync)
                contract = "come without topk_idx and do_cpu_sync"
                checks.value(op, "handle", not given, contract, "both")
                check_handle(op, handle, world, layout.expand)
                check_same(op, handle, num_experts, max_tokens, alignment)
                topk_idx, num_experts = handle.topk_idx, handle.num_experts
                max_tokens, alignment = handle.num_max_tokens_per_rank, handle.expert_alignment
            else:
                max_tokens = self._max_tokens if max_tokens is None else max_tokens
                alignment = 1 if alignment is None else alignment
            check_num_experts(op, num_experts, world)
            assert num_experts is not None
            num_local = num_experts // world
            checks.integers(op, num_max_tokens_per_rank=max_tokens, expert_alignment=alignment)
            check_topk(op, topk_idx, topk_weights, len(tokens), num_experts, tokens.device)
            assert topk_idx is not None
            fits = len(tokens) <= max_tokens
            contract = f"have at most num_max_tokens_per_rank = {max_tokens} rows"
            checks.value(op, "x", fits, contract, f"shape {tuple(tokens.shape)}")
            checks.value(op, "expert_alignment", alignment >= 1, "be positive", alignment)
            _check_layout(op, layout, cached=handle is not None)
            name = "cumulative_local_expert_recv_stats"
            checks.dtype(op, name, stats, (torch.int32,))
            checks.shape(op, name, stats, (num_local,), "(L,)", tokens.device)
            wait_for(op, "previous_event", previous_event)
        ranks = routing.owners(topk_idx, num_local)
        order = routing.send_order(routing.tokens_in_ranks(ranks, world))
        columns = [tokens] if scales is None else [tokens, scales]
        if topk_weights is not None:
            columns.append(topk_weights)
        if handle is None:
            self._agree(op, num_experts, max_tokens, topk_idx.shape[1])
        columns = [*take([*columns, topk_idx], order), order.tokens.int()[:, None]]
        received, per_source = rows.exchange(op, columns, order.counts)
        *received, ids, source_tokens = received
        weights = received.pop() if topk_weights is not None else None

        @torch.no_grad()
        def epilogue() -> Dispatched:
            first = torch.tensor(rows.rank * num_local, device=ids.device)
            local = routing.local_experts(ids, first, num_local)
            used = handle
            if used is None:
                used = make_handle(
                    local,
                    source_tokens,
                    per_source,
                    topk_idx.clone() if copy_ids else topk_idx,
                    layout,
                    num_experts=num_experts,
                    expert_alignment=alignment,
                    num_max_tokens_per_rank=max_tokens,
                    num_sms=num_sms or NUM_SMS,
                    dst_buffer_slot_idx=_sent_rows(ranks, order),
                )
            if stats is not None:
                stats.add_(routing.expert_counts(local, num_local).int())
            return *lay_out(received, weights, local, ids.dtype, used, layout), used

        return epilogue

    def _agree(self, op: str, *sizes: int) -> None:
        """Compare sizes that must be equal on all ranks."""
        own = torch.tensor(sizes, dtype=torch.int64).expand(self._rows.size, -1)
        (theirs,), _ = self._rows.exchange(op, [own], [1] * self._rows.size)
        names = ("num_experts", "num_max_tokens_per_rank", "num_topk")
        for rank, row in enumerate(theirs.tolist()):
            for name, mine, other in zip(names, sizes, row, strict=True):
                if mine != other:
                    contract = f"be equal on all ranks, as {other} on rank {rank}"
                    raise ArgumentValueError(op, name, contract, mine)

    @torch.no_grad()
    def combine(
        self,
        op: str,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None,
        bias: Any,
        previous_event: EventOverlap | EventHandle | None,
    ) -> Callable[[], Combined]:
        """Send the rows back; the arguments are those of ``ElasticBuffer.combine``.

        Returns:
            The step that adds up the returned rows.
        """
        rows, world = self._rows, self._rows.size
        with rows.abort_peers_on_error(op):
            check_handle(op, handle, world, handle.do_expand if handle is not None else False)
            expanded, apart = handle.do_expand, handle.do_expand and not self._reduce_expanded
            per_source = handle.rows_per_source()
            num_rows = sum(per_source)
            slots = handle.expanded_rows(num_rows)
            most = int(slots.max()) + 1 if expanded and slots.numel() else 0
            check_rows(op, x, most if expanded else num_rows, exact=False)
            num_tokens, top_k = handle.topk_idx.shape
            addends = biases(op, bias, x, num_tokens)
            checks.dtype(op, "topk_weights", topk_weights, (torch.float32, torch.float64))
            expected = (len(x),) if expanded else (len(x), top_k)
            meaning = "(A,)" if expanded else "(R, K)"
            checks.shape(op, "topk_weights", topk_weights, expected, meaning, x.device)
            contract = "be None for expanded rows without allow_multiple_reduction"
            fits = not apart or topk_weights is None
            checks.value(op, "topk_weights", fits, contract, "a tensor")
            wait_for(op, "previous_event", previous_event)
        ranks = routing.owners(handle.topk_idx, handle.num_experts // world)
        x = x.detach()
        if apart:
            valid = slots >= 0
            columns = [gather_rows(x, slots[valid])]
            counts = [int(part.sum()) for part in valid.split(per_source)]
            index = row_of = routing.number_copies(ranks, world)
        else:
            if expanded:
                x = ordered_sum(x, slots)
            columns, counts = [x[:num_rows]], per_source
            row_of = routing.send_order(routing.tokens_in_ranks(ranks, world)).row_of
            index = routing.partial_sums(ranks, row_of)
        if topk_weights is not None:
            weights = topk_weights.detach()
            if expanded:
                weights = gather_or_zero(weights, slots)
            columns.append(weights[:num_rows])
        (returned, *back), _ = rows.exchange(op, columns, counts)

        @torch.no_grad()
        def epilogue() -> Combined:
            combined_weights = None
            if back:
                # Each slot's weight comes from the rank of its expert.
                owner_rows = row_of.gather(1, ranks.clamp(min=0)).masked_fill_(ranks < 0, NOWHERE)
                found = gather_or_zero(back[0], owner_rows)
                combined_weights = found.diagonal(dim1=1, dim2=2).contiguous()
            return ordered_sum(returned, index, addends), combined_weights

        return epilogue


def _check_layout(op: str, layout: OutputLayout, *, cached: bool) -> None:
    contract = "be False without do_expand"
    holds = layout.expand or not layout.zero_padding
    checks.value(op, "do_zero_padding", holds, contract, layout.zero_padding)
    contract = "be False without do_expand or with a handle"
    holds = (layout.expand and not cached) or not layout.expert_ids
    checks.value(op, "emit_expert_ids", holds, contract, layout.expert_ids)


def _sent_rows(ranks: torch.Tensor, order: routing.SendOrder) -> torch.Tensor:
    """[T, K] int32 number of the row sent for each slot, or ``NOWHERE``."""
    rows = order.row_of.gather(1, ranks.clamp(min=0))
    return rows.masked_fill_(ranks < 0, NOWHERE).int()
