"""``ElasticBuffer`` and ``EPBuffer``: the second version of the interface.

One dispatch serves training and serving: rows per (token, rank), or with ``do_expand`` per (token,
expert), sorted by expert. Letters: T tokens of this rank, K experts per token, W ranks, E experts,
L = E / W, M most tokens of a rank, H hidden size, R rows received from ranks, A expanded rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ...errors import ArgumentTypeError, ArgumentValueError
from ...layout import NOWHERE
from ...ops import checks
from . import routing
from .arguments import Tokens, biases, check_num_experts, check_rows, check_topk, split_tokens
from .config import NUM_SMS, TIMEOUT, low_latency_bytes, unavailable
from .events import EventHandle, EventOverlap, wait_for
from .transfer import RowExchange, as_bytes, gather_or_zero, gather_rows, ordered_sum, take

_METADATA = 2  # columns of recv_src_metadata before the expanded rows
_SCALE_ALIGNMENT = 16  # bytes, of a column of scales


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

    token_metadata_at_forward: None = None
    channel_linked_list: None = None

    def __init__(
        self,
        *,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: torch.Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: torch.Tensor,
        psum_num_recv_tokens_per_expert: torch.Tensor,
        num_unaligned_recv_tokens_per_expert: torch.Tensor,
        recv_src_metadata: torch.Tensor,
        dst_buffer_slot_idx: torch.Tensor,
        recv_expert_ids: torch.Tensor | None = None,
    ) -> None:
        self.do_expand = do_expand
        self.num_experts = num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.topk_idx = topk_idx
        self.num_recv_tokens = num_recv_tokens
        self.num_expanded_tokens = num_expanded_tokens
        self.num_recv_tokens_per_expert_list = num_recv_tokens_per_expert_list
        self.psum_num_recv_tokens_per_scaleup_rank = psum_num_recv_tokens_per_scaleup_rank
        self.psum_num_recv_tokens_per_expert = psum_num_recv_tokens_per_expert
        self.num_unaligned_recv_tokens_per_expert = num_unaligned_recv_tokens_per_expert
        self.recv_src_metadata = recv_src_metadata
        self.dst_buffer_slot_idx = dst_buffer_slot_idx
        self.recv_expert_ids = recv_expert_ids


class _Layout(NamedTuple):
    """Options of the output of a dispatch."""

    expand: bool
    zero_padding: bool
    column_major_scales: bool
    cpu_sync: bool
    expert_ids: bool


class ElasticBuffer:
    """Dispatch and combine between the ranks of a group; all of them construct it together.

    Args:
        group: a process group, or a name that ``moe_triton.comm`` knows.
        num_bytes: kept for the client; windows have the size that calls need, and grow.
        num_cpu_bytes: of the original's other primitives; must be 0.
        num_max_tokens_per_rank: M, the default of calls.
        hidden: kept for the client.
        num_topk: kept for the client.
        use_fp8_dispatch: kept for the client.
        deterministic: ignored: rows always arrive by (source, token).
        allow_hybrid_mode: ignored: there is one path.
        allow_multiple_reduction: whether the rank of the experts adds up a token's expanded rows,
            and rounds, before it returns them.
        prefer_overlap_with_compute: ignored.
        sl_idx: of the original's network cards, ignored.
        num_allocated_qps: likewise; kept for the client.
        num_cpu_timeout_secs: ignored: the limit below holds for all waits.
        num_gpu_timeout_secs: seconds any wait for peers may take.
        explicitly_destroy: kept for the client; ``destroy`` works either way.

    Attributes:
        group: as given.
        rank_idx: this rank.
        num_ranks: W.
        num_bytes: as given, or the bytes of the windows for the given sizes.
        num_max_tokens_per_rank: M.
        num_scaleout_ranks: 1; all ranks are one domain.
        num_scaleup_ranks: W.
        num_rdma_ranks: 1.
        num_nvlink_ranks: W.
    """

    _name = "ElasticBuffer"

    def __init__(
        self,
        group: dist.ProcessGroup | str | None,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,  # noqa: ARG002
        use_fp8_dispatch: bool = False,  # noqa: ARG002
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int | None = None,  # noqa: ARG002
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,  # noqa: ARG002
        num_gpu_timeout_secs: float = TIMEOUT,
        explicitly_destroy: bool = False,
    ) -> None:
        op = f"deep_ep.{self._name}"
        if num_cpu_bytes:
            problem = "num_cpu_bytes must be 0: remote memory (Engram) is not available here"
            raise unavailable(self._name, problem)
        checks.required(op, group=group)
        checks.integers(op, num_max_tokens_per_rank=num_max_tokens_per_rank)
        self._rows = RowExchange(op, group, float(num_gpu_timeout_secs))
        self.group = group
        self.rank_idx, self.num_ranks = self._rows.rank, self._rows.size
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        if num_bytes is None:
            num_bytes = _hint(self.num_ranks, num_max_tokens_per_rank, hidden)
        self.num_bytes = num_bytes
        self.deterministic = deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.num_allocated_qps = num_allocated_qps or NUM_SMS
        self.explicitly_destroy = explicitly_destroy
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()

    def destroy(self) -> None:
        """Release the windows; the buffer cannot be used any more."""
        self._rows.close()

    # What clients ask before they call.

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,  # noqa: ARG004
        use_fp8_dispatch: bool = False,  # noqa: ARG004
        allow_hybrid_mode: bool = True,  # noqa: ARG004
        allow_multiple_reduction: bool = True,  # noqa: ARG004
    ) -> int:
        """Bytes of a rank's windows for one expert per rank, in bfloat16."""
        return _hint(group.size(), num_max_tokens_per_rank, hidden)

    @staticmethod
    def capture() -> EventHandle:
        """An event of the current stream."""
        return EventHandle()

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(1, W): all ranks are one domain, on whatever hosts."""
        return 1, self.num_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(1, W)."""
        return 1, self.num_ranks

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int, **model: Any) -> int:  # noqa: ARG002
        """A number for the client to pass on; calls ignore it."""
        return NUM_SMS

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """A number for the client to pass on; calls ignore it."""
        return min(num_sms, self.num_allocated_qps)

    def get_comm_stream(self) -> Any:
        """The current stream, on which all work runs.

        Raises:
            UnavailableError: there is no accelerator.
        """
        if not torch.accelerator.is_available():
            name = f"{self._name}.get_comm_stream"
            raise unavailable(name, "needs an accelerator; the CPU has no stream")
        return torch.accelerator.current_stream()

    def barrier(
        self,
        use_comm_stream: bool = True,  # noqa: ARG002
        with_cpu_sync: bool = False,  # noqa: ARG002
        sequential: bool = True,  # noqa: ARG002
    ) -> None:
        """Wait on the host until all ranks have called it."""
        self._rows.barrier(f"deep_ep.{self._name}.barrier")

    def __getattr__(self, name: str) -> Any:
        """Name what is not available: Engram, pipeline and all-gather primitives."""
        if name.startswith(("engram_", "pp_", "agrs_", "lb_", "get_engram", "get_pp", "get_agrs")):
            problem = "only expert-parallel dispatch and combine are available here"
            raise unavailable(f"{self._name}.{name}", problem)
        if name in ("create_agrs_session", "destroy_agrs_session", "all_gather"):
            problem = "only expert-parallel dispatch and combine are available here"
            raise unavailable(f"{self._name}.{name}", problem)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # Dispatch.

    def dispatch(
        self,
        x: Tokens,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,  # noqa: ARG002
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,  # noqa: ARG002
        allocate_on_comm_stream: bool = False,  # noqa: ARG002
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Tokens, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]:
        """Send each token once to every rank that has one of its experts.

        Args:
            x: [T, H] bf16, fp16, fp32 or fp64; or (float8 [T, H], scales [T, C] of any dtype).
            topk_idx: [T, K] int64 or int32 in [0, E), distinct within a row; -1 for none. None with
                a handle.
            topk_weights: [T, K] float32 to send along, or None.
            cumulative_local_expert_recv_stats: [L] int32 to add the received rows to, or None.
            num_experts: E; of the handle by default.
            num_max_tokens_per_rank: M, equal on all ranks; of the handle or the buffer by default.
            expert_alignment: of the rows of each local expert; of the handle or 1 by default.
            num_sms: kept in the handle.
            num_qps: ignored.
            previous_event: to wait for.
            previous_event_before_epilogue: to wait for.
            async_with_compute_stream: the results are ready on the current stream either way.
            allocate_on_comm_stream: ignored.
            handle: of an earlier dispatch, in place of the routing.
            do_handle_copy: keep a copy of ``topk_idx`` in the handle.
            do_cpu_sync: return as many rows as came; False returns W * M rows, or as many expanded
                rows as can come, those after the last one unwritten. True by default, and False
                with a handle.
            do_expand: one row per expert, sorted by expert.
            do_zero_padding: zero the padding between the experts' rows, with ``do_expand``.
            use_tma_aligned_col_major_sf: return column-major scales, whose columns begin at a
                multiple of 16 bytes.

        Returns:
            recv_x: [R, H], or [A, H] expanded; with scales a pair.
            recv_topk_idx: [R, K] local expert ids, -1 for experts of other ranks; None expanded.
            recv_topk_weights: [R, K], or [A] expanded; None without ``topk_weights``.
            handle: the given one, or a new one.
            event: an event.

        Raises:
            MoeError: a wrong argument, on this rank or a peer; nothing is lost.
        """
        layout = _Layout(
            do_expand,
            do_zero_padding,
            use_tma_aligned_col_major_sf,
            _cpu_sync(do_cpu_sync, handle),
            expert_ids=False,
        )
        epilogue = self._dispatch(
            x, topk_idx, topk_weights, cumulative_local_expert_recv_stats, num_experts,
            num_max_tokens_per_rank, expert_alignment, num_sms, previous_event, handle,
            do_handle_copy, do_cpu_sync, layout,
        )  # fmt: skip
        wait_for(self._op("dispatch"), "event", previous_event_before_epilogue)
        return *epilogue(), EventOverlap(self.capture())

    def _op(self, call: str) -> str:
        return f"deep_ep.{self._name}.{call}"

    @torch.no_grad()
    def _dispatch(
        self,
        x: Tokens,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        stats: torch.Tensor | None,
        num_experts: int | None,
        max_tokens: int | None,
        alignment: int | None,
        num_sms: int,
        previous_event: EventHandle | None,
        handle: EPHandle | None,
        copy_ids: bool,
        cpu_sync: bool | None,
        layout: _Layout,
    ) -> Callable[[], tuple[Tokens, torch.Tensor | None, torch.Tensor | None, EPHandle]]:
        """Check and send; returns the step that lays out the received rows."""
        op, rows, world = self._op("dispatch"), self._rows, self.num_ranks
        with rows.abort_peers_on_error(op):
            tokens, scales = split_tokens(op, x)
            if handle is not None:
                given = topk_idx is not None or bool(cpu_sync)
                contract = "come without topk_idx and do_cpu_sync"
                checks.value(op, "handle", not given, contract, "both")
                _check_handle(op, handle, world, layout.expand)
                _check_same(op, handle, num_experts, max_tokens, alignment)
                topk_idx, num_experts = handle.topk_idx, handle.num_experts
                max_tokens, alignment = handle.num_max_tokens_per_rank, handle.expert_alignment
            else:
                max_tokens = self.num_max_tokens_per_rank if max_tokens is None else max_tokens
                alignment = 1 if alignment is None else alignment
            check_num_experts(op, num_experts, world)
            checks.integers(op, num_max_tokens_per_rank=max_tokens, expert_alignment=alignment)
            assert num_experts is not None
            check_topk(op, topk_idx, topk_weights, len(tokens), num_experts, tokens.device)
            fits = len(tokens) <= max_tokens
            contract = f"have at most num_max_tokens_per_rank = {max_tokens} rows"
            checks.value(op, "x", fits, contract, f"shape {tuple(tokens.shape)}")
            checks.value(op, "expert_alignment", alignment >= 1, "be positive", alignment)
            contract = "be False without do_expand"
            holds = layout.expand or not layout.zero_padding
            checks.value(op, "do_zero_padding", holds, contract, layout.zero_padding)
            holds = (layout.expand and handle is None) or not layout.expert_ids
            contract = "be False without do_expand or with a handle"
            checks.value(op, "emit_expert_ids", holds, contract, layout.expert_ids)
            num_local = num_experts // world
            name = "cumulative_local_expert_recv_stats"
            checks.dtype(op, name, stats, (torch.int32,))
            checks.shape(op, name, stats, (num_local,), "(L,)", tokens.device)
            wait_for(op, "previous_event", previous_event)
        assert topk_idx is not None
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
        def epilogue() -> tuple[Tokens, torch.Tensor | None, torch.Tensor | None, EPHandle]:
            first = torch.tensor(self.rank_idx * num_local, device=ids.device)
            local = routing.local_experts(ids, first, num_local)
            used = handle
            if used is None:
                kept = topk_idx.clone() if copy_ids else topk_idx
                used = _made_handle(
                    local, source_tokens, per_source, kept, num_local, layout,
                    num_experts=num_experts, expert_alignment=alignment,
                    num_max_tokens_per_rank=max_tokens, num_sms=num_sms or NUM_SMS,
                    dst_buffer_slot_idx=_sent_rows(ranks, order),
                )  # fmt: skip
            if stats is not None:
                stats.add_(routing.expert_counts(local, num_local).int())
            result = _laid_out(received, weights, local, ids.dtype, used, layout)
            return *result, used

        return epilogue

    def _agree(self, op: str, *sizes: int) -> None:
        """Compare sizes that must be equal on all ranks."""
        own = torch.tensor(sizes, dtype=torch.int64).expand(self.num_ranks, -1)
        (theirs,), _ = self._rows.exchange(op, [own], [1] * self.num_ranks)
        names = ("num_experts", "num_max_tokens_per_rank", "num_topk")
        for rank, row in enumerate(theirs.tolist()):
            for name, mine, other in zip(names, sizes, row, strict=True):
                if mine != other:
                    contract = f"be equal on all ranks, as {other} on rank {rank}"
                    raise ArgumentValueError(op, name, contract, mine)

    # Combine.

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        num_sms: int = 0,  # noqa: ARG002
        num_qps: int = 0,  # noqa: ARG002
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,  # noqa: ARG002
        allocate_on_comm_stream: bool = False,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring the rows back and add up those of each token, without weights.

        Sums run in float32 over the bias, then over the slots of the token in ascending order, and
        are rounded once. A rank's row stands at the token's last slot on that rank. Of expanded
        rows, the rank adds up those of a token in the order of its slots and rounds, unless the
        buffer was constructed with ``allow_multiple_reduction=False``.

        Args:
            x: [R, H], or [A, H] expanded: rows as dispatch returned them.
            handle: of that dispatch.
            topk_weights: [R, K], or [A] expanded, float32 to bring back; or None.
            bias: None, or one or two tensors [T, H].
            num_sms: ignored.
            num_qps: ignored.
            previous_event: to wait for.
            previous_event_before_epilogue: to wait for.
            async_with_compute_stream: the results are ready on the current stream either way.
            allocate_on_comm_stream: ignored.

        Returns:
            combined_x [T, H]; the weights [T, K], 0 where an id is -1, or None; an event.

        Raises:
            MoeError: a wrong argument, on this rank or a peer; nothing is lost.
        """
        epilogue = self._combine(x, handle, topk_weights, bias, previous_event)
        wait_for(self._op("combine"), "event", previous_event_before_epilogue)
        return *epilogue(), EventOverlap(self.capture())

    @torch.no_grad()
    def _combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
        previous_event: EventHandle | None,
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        """Check and send; returns the step that adds up the returned rows."""
        op, rows, world = self._op("combine"), self._rows, self.num_ranks
        with rows.abort_peers_on_error(op):
            _check_handle(op, handle, world, handle.do_expand if handle is not None else False)
            ends = handle.psum_num_recv_tokens_per_scaleup_rank
            per_source = ends.diff(prepend=ends.new_zeros(1)).tolist()
            num_rows = sum(per_source)
            slots = handle.recv_src_metadata[:num_rows, _METADATA:].long()
            most = int(slots.max()) + 1 if handle.do_expand and slots.numel() else 0
            check_rows(op, x, most if handle.do_expand else num_rows, exact=False)
            num_tokens, top_k = handle.topk_idx.shape
            addends = biases(op, bias, x, num_tokens)
            checks.dtype(op, "topk_weights", topk_weights, (torch.float32, torch.float64))
            expected = (len(x),) if handle.do_expand else (len(x), top_k)
            meaning = "(A,)" if handle.do_expand else "(R, K)"
            checks.shape(op, "topk_weights", topk_weights, expected, meaning, x.device)
            contract = "be None for expanded rows without allow_multiple_reduction"
            apart = handle.do_expand and not self.allow_multiple_reduction
            checks.value(
                op, "topk_weights", not apart or topk_weights is None, contract, "a tensor"
            )
            wait_for(op, "previous_event", previous_event)
        ranks = routing.owners(handle.topk_idx, handle.num_experts // world)
        x = x.detach()
        if apart:
            valid = slots >= 0
            columns = [gather_rows(x, slots[valid])]
            counts = [int(part.sum()) for part in valid.split(per_source)]
            index = routing.number_copies(ranks, world)
            row_of = index
        else:
            if handle.do_expand:
                x = ordered_sum(x, slots)
            columns, counts = [x[:num_rows]], per_source
            row_of = routing.send_order(routing.tokens_in_ranks(ranks, world)).row_of
            index = routing.partial_sums(ranks, row_of)
        if topk_weights is not None:
            weights = topk_weights.detach()
            if handle.do_expand:
                weights = gather_or_zero(weights, slots)
            columns.append(weights[:num_rows])
        (returned, *back), _ = rows.exchange(op, columns, counts)

        @torch.no_grad()
        def epilogue() -> tuple[torch.Tensor, torch.Tensor | None]:
            combined_weights = None
            if back:
                # Each slot's weight comes from the rank of its expert.
                owner_rows = row_of.gather(1, ranks.clamp(min=0)).masked_fill_(ranks < 0, NOWHERE)
                found = gather_or_zero(back[0], owner_rows)
                combined_weights = found.diagonal(dim1=1, dim2=2).contiguous()
            return ordered_sum(returned, index, addends), combined_weights

        return epilogue


class EPBuffer(ElasticBuffer):
    """``ElasticBuffer`` with the names and defaults of the original's version 2.5.

    Arguments as for ``ElasticBuffer``, and ``lb_allocation_plan_or_num_bytes``, which must be 0.
    """

    _name = "EPBuffer"

    def __init__(
        self,
        group: dist.ProcessGroup | str | None,
        num_bytes: int | None = None,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        lb_allocation_plan_or_num_bytes: Any = 0,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int | None = None,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,
        num_gpu_timeout_secs: float = TIMEOUT,
        explicitly_destroy: bool = False,
    ) -> None:
        if lb_allocation_plan_or_num_bytes != 0:
            problem = "lb_allocation_plan_or_num_bytes must be 0: there is no load-balance memory"
            raise unavailable(self._name, problem)
        super().__init__(
            group,
            num_bytes,
            0,
            num_max_tokens_per_rank,
            hidden,
            num_topk,
            use_fp8_dispatch,
            deterministic,
            allow_hybrid_mode,
            allow_multiple_reduction,
            prefer_overlap_with_compute,
            sl_idx,
            num_allocated_qps,
            num_cpu_timeout_secs,
            num_gpu_timeout_secs,
            explicitly_destroy,
        )

    def dispatch(  # type: ignore[override]
        self,
        x: Tokens,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,  # noqa: ARG002
        previous_event: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,  # noqa: ARG002
        handle: EPHandle | None = None,
        do_handle_copy: bool = False,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        emit_expert_ids: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
        defer_epilogue: bool = False,
    ) -> Any:
        """``ElasticBuffer.dispatch``, with two more options.

        ``topk_idx`` is kept in the handle by reference and must not change; ``do_handle_copy`` must
        be False. ``emit_expert_ids`` sets ``recv_expert_ids`` of the handle; it needs ``do_expand``
        and no ``handle``. ``defer_epilogue`` lays out the rows in ``event.current_stream_wait()``,
        which returns (recv_x, recv_topk_idx, recv_topk_weights, handle), and dispatch returns the
        event alone; it needs ``async_with_compute_stream``.

        Raises:
            MoeError: a wrong argument, on this rank or a peer; nothing is lost.
        """
        op = self._op("dispatch")
        with self._rows.abort_peers_on_error(op):
            contract = "be False; the handle refers to topk_idx"
            checks.value(op, "do_handle_copy", not do_handle_copy, contract, do_handle_copy)
            self._check_deferred(op, defer_epilogue, async_with_compute_stream)
        layout = _Layout(
            do_expand,
            do_zero_padding,
            use_tma_aligned_col_major_sf,
            _cpu_sync(do_cpu_sync, handle),
            expert_ids=emit_expert_ids,
        )
        epilogue = self._dispatch(
            x, topk_idx, topk_weights, cumulative_local_expert_recv_stats, num_experts,
            num_max_tokens_per_rank, expert_alignment, num_sms, previous_event, handle, False,
            do_cpu_sync, layout,
        )  # fmt: skip
        event = EventOverlap(self.capture())
        if defer_epilogue:
            event.register_hook_after_wait(epilogue)
            return event
        return *epilogue(), event

    def combine(  # type: ignore[override]
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        num_sms: int = 0,  # noqa: ARG002
        num_qps: int = 0,  # noqa: ARG002
        previous_event: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,  # noqa: ARG002
        defer_epilogue: bool = False,
    ) -> Any:
        """``ElasticBuffer.combine``, with one more option.

        ``defer_epilogue`` adds up the rows in ``event.current_stream_wait()``, which returns
        (combined_x, combined_topk_weights), and combine returns the event alone; it needs
        ``async_with_compute_stream``.

        Raises:
            MoeError: a wrong argument, on this rank or a peer; nothing is lost.
        """
        op = self._op("combine")
        with self._rows.abort_peers_on_error(op):
            self._check_deferred(op, defer_epilogue, async_with_compute_stream)
        epilogue = self._combine(x, handle, topk_weights, bias, previous_event)
        event = EventOverlap(self.capture())
        if defer_epilogue:
            event.register_hook_after_wait(epilogue)
            return event
        return *epilogue(), event

    @staticmethod
    def _check_deferred(op: str, deferred: bool, asynchronous: bool) -> None:
        contract = "be False without async_with_compute_stream"
        checks.value(op, "defer_epilogue", asynchronous or not deferred, contract, deferred)


def _hint(world_size: int, max_tokens: int, hidden: int) -> int:
    return low_latency_bytes(max_tokens, hidden, world_size, world_size) if hidden > 0 else 0


def _cpu_sync(asked: bool | None, handle: EPHandle | None) -> bool:
    return bool(asked) if asked is not None else handle is None


def _check_handle(op: str, handle: Any, world_size: int, expand: bool) -> None:
    checks.required(op, handle=handle)
    if not isinstance(handle, EPHandle):
        raise ArgumentTypeError(op, "handle", "be that of a dispatch", type(handle).__name__)
    ranks = len(handle.psum_num_recv_tokens_per_scaleup_rank)
    contract = f"come from a dispatch between {world_size} ranks"
    checks.value(op, "handle", ranks == world_size, contract, f"one between {ranks}")
    contract = f"come from a dispatch with do_expand={expand}"
    checks.value(op, "handle", handle.do_expand == expand, contract, handle.do_expand)


def _check_same(
    op: str,
    handle: EPHandle,
    num_experts: int | None,
    max_tokens: int | None,
    alignment: int | None,
) -> None:
    for name, value in (
        ("num_experts", num_experts),
        ("num_max_tokens_per_rank", max_tokens),
        ("expert_alignment", alignment),
    ):
        own = getattr(handle, name)
        checks.value(op, name, value in (None, own), f"be {own}, as in the handle", value)


def _sent_rows(ranks: torch.Tensor, order: routing.SendOrder) -> torch.Tensor:
    rows = order.row_of.gather(1, ranks.clamp(min=0))
    return rows.masked_fill_(ranks < 0, NOWHERE).int()


def _made_handle(
    local: torch.Tensor,
    source_tokens: torch.Tensor,
    per_source: list[int],
    topk_idx: torch.Tensor,
    num_local: int,
    layout: _Layout,
    *,
    num_experts: int,
    expert_alignment: int,
    num_max_tokens_per_rank: int,
    num_sms: int,
    dst_buffer_slot_idx: torch.Tensor,
) -> EPHandle:
    device, (num_rows, top_k) = local.device, local.shape
    world = len(per_source)
    counts_of_sources = torch.tensor(per_source, device=device)
    sources = torch.repeat_interleave(
        torch.arange(world, device=device), counts_of_sources, output_size=num_rows
    )
    slots_in_token = torch.arange(top_k, device=device)
    last = torch.where(local >= 0, slots_in_token, NOWHERE).amax(1)
    expanded = routing.expand(local, num_local, expert_alignment)
    padded = routing.align(expanded.counts, expert_alignment)
    psum = expanded.ends if layout.expand else padded.cumsum(0)
    metadata = torch.cat(
        [
            (sources * num_max_tokens_per_rank + source_tokens.flatten())[:, None],
            (sources * top_k + last)[:, None],
            expanded.slots if layout.expand else torch.full_like(local, NOWHERE),
        ],
        1,
    ).int()
    num_expanded = int(padded.sum())
    per_expert: list[int] = padded.tolist()
    if not layout.cpu_sync:
        most = world * num_max_tokens_per_rank
        metadata = torch.nn.functional.pad(metadata, (0, 0, 0, most - num_rows), value=NOWHERE)
        num_rows, per_expert = most, []
        most = most * min(top_k, num_local) + (expert_alignment - 1) * num_local
        num_expanded = -(-most // expert_alignment) * expert_alignment
    expert_ids = None
    if layout.expert_ids:
        expert_ids = torch.full((num_expanded,), NOWHERE, dtype=torch.int32, device=device)
        valid = expanded.slots >= 0
        expert_ids[expanded.slots[valid]] = local[valid].int()
    return EPHandle(
        do_expand=layout.expand,
        num_experts=num_experts,
        expert_alignment=expert_alignment,
        num_max_tokens_per_rank=num_max_tokens_per_rank,
        num_sms=num_sms,
        topk_idx=topk_idx,
        num_recv_tokens=num_rows,
        num_expanded_tokens=num_expanded,
        num_recv_tokens_per_expert_list=per_expert,
        psum_num_recv_tokens_per_scaleup_rank=counts_of_sources.cumsum(0).int(),
        psum_num_recv_tokens_per_expert=psum.int(),
        num_unaligned_recv_tokens_per_expert=expanded.counts.int(),
        recv_src_metadata=metadata,
        dst_buffer_slot_idx=dst_buffer_slot_idx,
        recv_expert_ids=expert_ids,
    )


def _laid_out(
    columns: list[torch.Tensor],
    weights: torch.Tensor | None,
    local: torch.Tensor,
    id_dtype: torch.dtype,
    handle: EPHandle,
    layout: _Layout,
) -> tuple[Tokens, torch.Tensor | None, torch.Tensor | None]:
    """The received rows in the layout that was asked for."""
    num_rows = len(local)
    if layout.expand:
        slots = handle.recv_src_metadata[:num_rows, _METADATA:].long()
        valid = slots >= 0
        index, source = slots[valid], valid.nonzero()[:, 0]
        size, zero = handle.num_expanded_tokens, layout.zero_padding
        placed = [_placed(column, source, index, size, zero=zero) for column in columns]
        if weights is not None:
            copies = torch.arange(len(index), device=index.device)
            weights = _placed(weights[valid], copies, index, size, zero=zero)
        ids = None
    else:
        index = source = torch.arange(num_rows, device=local.device)
        size = handle.num_recv_tokens
        placed = columns
        ids = local.to(id_dtype)
        if size > num_rows:
            placed = [_placed(column, source, index, size) for column in columns]
            ids = torch.nn.functional.pad(ids, (0, 0, 0, size - num_rows), value=NOWHERE)
            if weights is not None:
                weights = _placed(weights, source, index, size)
    if len(placed) == 1:
        return placed[0], ids, weights
    tokens, scales = placed
    if layout.column_major_scales and scales.dim() == 2:
        per_column = _SCALE_ALIGNMENT // scales.itemsize
        height = -(-len(scales) // per_column) * per_column
        columns_first = scales.new_empty_strided(tuple(scales.shape), (1, height))
        scales = columns_first.copy_(scales)
    return (tokens, scales), ids, weights


def _placed(
    rows: torch.Tensor, source: torch.Tensor, index: torch.Tensor, size: int, *, zero: bool = False
) -> torch.Tensor:
    """``size`` rows with ``rows[source]`` at ``index``; the others zero or unwritten."""
    shape = (size, *rows.shape[1:])
    out = rows.new_zeros(shape) if zero else rows.new_empty(shape)
    # torch cannot index every float8: use its bytes.
    as_bytes(out)[index] = as_bytes(rows.contiguous())[source]
    return out
