"""``Buffer``: the first version of the interface, high-throughput and low-latency calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist

from ...errors import ArgumentTypeError, ArgumentValueError
from ...layout import NOWHERE
from ...ops import checks
from . import routing
from .arguments import Tokens, biases, check_num_experts, check_rows, check_topk, split_tokens
from .config import NUM_SMS, TIMEOUT, Config, low_latency_bytes, unavailable
from .events import EventHandle, EventOverlap, wait_for
from .low_latency import LowLatency, LowLatencyHandle
from .transfer import RowExchange, as_bytes, ordered_sum, take

_DISPATCH = "deep_ep.Buffer.dispatch"
_COMBINE = "deep_ep.Buffer.combine"


class DispatchHandle(NamedTuple):
    """What a high-throughput dispatch leaves for combine and for cached dispatches.

    Attributes:
        rank_prefix_matrix: [W, W] int32 rows to each rank (column), summed over the sources up to
            each row.
        channel_prefix_matrix: [W, 1] int32 rows sent to each rank; there is one channel.
        recv_channel_prefix_matrix: [W, 1] int32 zeros: where the one channel of each source begins.
        recv_src_idx: [R] int32 token of each received row in its source.
        is_token_in_rank: [T, W] bool.
        send_head: [T, W] int32 position of a token among the rows for a rank, or -1.
    """

    rank_prefix_matrix: torch.Tensor
    channel_prefix_matrix: torch.Tensor
    recv_channel_prefix_matrix: torch.Tensor
    recv_src_idx: torch.Tensor
    is_token_in_rank: torch.Tensor
    send_head: torch.Tensor


class Buffer:
    """Dispatch and combine between the ranks of a group; all of them construct it together.

    Args:
        group: a process group, or a name that ``moe_triton.comm`` knows.
        num_nvl_bytes: kept for the client; windows have the size that calls need, and grow.
        num_rdma_bytes: likewise.
        low_latency_mode: kept for the client; both kinds of calls always work.
        num_qps_per_rank: of the original's network cards, ignored.
        allow_nvlink_for_low_latency_mode: ignored.
        allow_mnnvl: ignored.
        explicitly_destroy: kept for the client; ``destroy`` works either way.
        enable_shrink: low-latency calls go on without ranks that are lost; see ``LowLatency``.
        comm: an mpi4py communicator, which is not supported.
        use_fabric: ignored.

    Attributes:
        num_sms: kept for the client.
        timeout_secs: limit of waits for peers, of the buffers constructed after it is set.
        rank: this rank.
        group: as given.
        group_size: W.
    """

    num_sms: ClassVar[int] = NUM_SMS
    timeout_secs: ClassVar[float] = TIMEOUT

    def __init__(
        self,
        group: dist.ProcessGroup | str | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,  # noqa: ARG002
        allow_nvlink_for_low_latency_mode: bool = True,  # noqa: ARG002
        allow_mnnvl: bool = False,  # noqa: ARG002
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: object = None,
        use_fabric: bool = False,  # noqa: ARG002
    ) -> None:
        if comm is not None:
            raise unavailable("Buffer", "comm must be None, got an mpi4py communicator; pass group")
        checks.required("deep_ep.Buffer", group=group)
        self._rows = RowExchange("deep_ep.Buffer", group, self.timeout_secs)
        self._low_latency = LowLatency(group, self.timeout_secs, shrink=enable_shrink)
        self.group = group
        self.rank, self.group_size = self._rows.rank, self._rows.size
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink

    def destroy(self) -> None:
        """Release the windows; the buffer cannot be used any more."""
        self._rows.close()
        self._low_latency.close()

    # What clients ask before they call.

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: float8 tokens can be dispatched everywhere."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Keep the number of SMs, which is even.

        Raises:
            ArgumentValueError: it is odd.
        """
        op = "deep_ep.Buffer.set_num_sms"
        checks.integers(op, new_num_sms=new_num_sms)
        checks.value(op, "new_num_sms", new_num_sms % 2 == 0, "be even", new_num_sms)
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event of the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:  # noqa: ARG004
        """A configuration for any number of ranks."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:  # noqa: ARG004
        """A configuration for any number of ranks."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of the windows of low-latency calls; see ``low_latency_bytes``."""
        return low_latency_bytes(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    def get_comm_stream(self) -> Any:
        """The current stream, on which all work runs.

        Raises:
            UnavailableError: there is no accelerator.
        """
        if not torch.accelerator.is_available():
            raise unavailable(
                "Buffer.get_comm_stream", "needs an accelerator; the CPU has no stream"
            )
        return torch.accelerator.current_stream()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,  # noqa: ARG002
        size: torch.Size | None = None,  # noqa: ARG002
        offset: int = 0,  # noqa: ARG002
        use_rdma_buffer: bool = False,  # noqa: ARG002
    ) -> torch.Tensor:
        """Not available.

        Raises:
            UnavailableError: always.
        """
        problem = "windows are not one block of bytes; use the tensors that calls return"
        raise unavailable("Buffer.get_local_buffer_tensor", problem)

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,  # noqa: ARG002
        allocate_on_comm_stream: bool = False,  # noqa: ARG002
    ) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count the rows that dispatch will send; no communication.

        Args:
            topk_idx: [T, K] int64 or int32 in [0, E); -1 for a slot that goes nowhere.
            num_experts: E.
            previous_event: to wait for.
            async_finish: the results are ready on the current stream either way.
            allocate_on_comm_stream: ignored.

        Returns:
            num_tokens_per_rank [W] int32; None; num_tokens_per_expert [E] int32; is_token_in_rank
            [T, W] bool; an event.

        Raises:
            ArgumentTypeError, ArgumentValueError: an argument breaks its contract.
        """
        op = "deep_ep.Buffer.get_dispatch_layout"
        check_num_experts(op, num_experts, self.group_size)
        checks.required(op, topk_idx=topk_idx)
        check_topk(op, topk_idx, None, None, num_experts, topk_idx.device)
        wait_for(op, "previous_event", previous_event)
        ranks = routing.owners(topk_idx, num_experts // self.group_size)
        in_rank = routing.tokens_in_ranks(ranks, self.group_size)
        per_expert = routing.expert_counts(topk_idx.long(), num_experts)
        return in_rank.sum(0, dtype=torch.int32), None, per_expert.int(), in_rank, self.capture()

    # High throughput: one row per token and rank.

    @torch.no_grad()
    def dispatch(
        self,
        x: Tokens,
        handle: DispatchHandle | tuple[torch.Tensor, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,  # noqa: ARG002
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,  # noqa: ARG002
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,  # noqa: ARG002
        allocate_on_comm_stream: bool = False,  # noqa: ARG002
    ) -> tuple[
        Tokens,
        torch.Tensor | None,
        torch.Tensor | None,
        list[int] | None,
        DispatchHandle | None,
        EventOverlap,
    ]:
        """Send each token once to every rank that has one of its experts.

        Rows arrive by (source, token). With a ``handle`` the routing is that of the call that
        returned it, and only ``x`` travels.

        Args:
            x: [T, H] bf16, fp16, fp32 or fp64; or (float8 [T, H], scales [T, C]).
            handle: of an earlier dispatch, in place of the routing.
            num_tokens_per_rank: [W] int32, of ``get_dispatch_layout``.
            num_tokens_per_rdma_rank: ignored.
            is_token_in_rank: [T, W] bool.
            num_tokens_per_expert: [E] int32.
            topk_idx: [T, K] int64 or int32, or None; -1 for a slot that goes nowhere.
            topk_weights: [T, K] float32, with ``topk_idx``.
            expert_alignment: multiple to which the counts of the list are rounded up.
            num_worst_tokens: rows to return if positive, unwritten after the received ones, with
                ids -1; it must hold them.
            config: ignored.
            previous_event: to wait for.
            async_finish: the results are ready on the current stream either way.
            allocate_on_comm_stream: ignored.

        Returns:
            recv_x: [R, H], and scales [R, C] if given.
            recv_topk_idx: [R, K] local expert ids, -1 for experts of other ranks; or None.
            recv_topk_weights: [R, K], 0 for experts of other ranks; or None.
            num_recv_tokens_per_expert_list: [L] rows of each local expert; empty with
                ``num_worst_tokens``, None with ``handle``.
            handle: None with ``handle``.
            event: an event.

        Raises:
            MoeError: a wrong argument, on this rank or a peer; nothing is lost.
        """
        op, rows = _DISPATCH, self._rows
        with rows.abort_peers_on_error(op):
            tokens, scales = split_tokens(op, x)
            columns = [tokens] if scales is None else [tokens, scales]
            wait_for(op, "previous_event", previous_event)
            if handle is not None:
                handle = _checked_handle(op, handle, self.group_size, len(tokens))
                given = topk_idx is not None or topk_weights is not None
                contract = "be None with a handle"
                checks.value(op, "topk_idx", not given, contract, "a tensor")
            else:
                self._check_layout(
                    op, tokens, num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert
                )
                assert num_tokens_per_expert is not None
                num_experts = len(num_tokens_per_expert)
                if topk_idx is not None:
                    check_topk(op, topk_idx, topk_weights, len(tokens), num_experts, tokens.device)
                    checks.required(op, topk_weights=topk_weights)
                checks.integers(op, expert_alignment=expert_alignment)
                checks.integers(op, num_worst_tokens=num_worst_tokens)
                contract = "be positive"
                checks.value(
                    op, "expert_alignment", expert_alignment > 0, contract, expert_alignment
                )
                contract = "not be negative"
                checks.value(
                    op, "num_worst_tokens", num_worst_tokens >= 0, contract, num_worst_tokens
                )
        if handle is not None:
            order = routing.send_order(handle.is_token_in_rank)
            received, _ = rows.exchange(op, take(columns, order), order.counts)
            return _tokens(received, scales), None, None, None, None, self.capture()
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        order = routing.send_order(is_token_in_rank)
        experts_per_rank = len(num_tokens_per_expert) // self.group_size
        prefix, per_expert = self._exchange_counts(
            op, order, num_tokens_per_expert, num_worst_tokens
        )
        token = order.tokens.int()[:, None]
        columns = [*take(columns, order), token]
        if topk_idx is not None:
            assert topk_weights is not None
            columns += take([topk_idx, topk_weights], order)
        received, _ = rows.exchange(op, columns, order.counts)
        recv_topk_idx = recv_topk_weights = None
        if topk_idx is not None:
            *received, ids, weights = received
            first = torch.tensor(self.rank * experts_per_rank, device=ids.device)
            local = routing.local_experts(ids, first, experts_per_rank)
            recv_topk_idx = local.to(ids.dtype)
            recv_topk_weights = weights.masked_fill(local == NOWHERE, 0)
        *received, source_tokens = received
        counts: list[int] = routing.align(per_expert, expert_alignment).tolist()
        if num_worst_tokens:
            counts = []
            received = [_extended(part, num_worst_tokens) for part in received]
            if recv_topk_idx is not None and recv_topk_weights is not None:
                recv_topk_idx = _extended(recv_topk_idx, num_worst_tokens, NOWHERE)
                recv_topk_weights = _extended(recv_topk_weights, num_worst_tokens, 0)
        sent = torch.tensor(order.counts, dtype=torch.int32, device=tokens.device)[:, None]
        starts = (sent.cumsum(0) - sent).flatten()
        made = DispatchHandle(
            prefix,
            sent,
            torch.zeros_like(sent),
            source_tokens.flatten(),
            is_token_in_rank.clone(),
            torch.where(order.row_of < 0, NOWHERE, order.row_of - starts).int(),
        )
        result = _tokens(received, scales)
        return result, recv_topk_idx, recv_topk_weights, counts, made, self.capture()

    def _check_layout(
        self,
        op: str,
        tokens: torch.Tensor,
        num_tokens_per_rank: torch.Tensor | None,
        is_token_in_rank: torch.Tensor | None,
        num_tokens_per_expert: torch.Tensor | None,
    ) -> None:
        layout = {
            "num_tokens_per_rank": num_tokens_per_rank,
            "is_token_in_rank": is_token_in_rank,
            "num_tokens_per_expert": num_tokens_per_expert,
        }
        checks.required(op, **layout)
        checks.dtype(op, "num_tokens_per_rank", num_tokens_per_rank, (torch.int32,))
        checks.dtype(op, "is_token_in_rank", is_token_in_rank, (torch.bool,))
        checks.dtype(op, "num_tokens_per_expert", num_tokens_per_expert, (torch.int32,))
        world, device = self.group_size, tokens.device
        checks.shape(op, "num_tokens_per_rank", num_tokens_per_rank, (world,), "(W,)", device)
        expected = (len(tokens), world)
        checks.shape(op, "is_token_in_rank", is_token_in_rank, expected, "(T, W)", device)
        checks.shape(op, "num_tokens_per_expert", num_tokens_per_expert, (None,), "(E,)", device)
        assert num_tokens_per_expert is not None
        num_experts = len(num_tokens_per_expert)
        fits = num_experts > 0 and num_experts % world == 0
        contract = f"count the experts of {world} ranks"
        checks.value(op, "num_tokens_per_expert", fits, contract, f"{num_experts} experts")

    def _exchange_counts(
        self, op: str, order: routing.SendOrder, per_expert: torch.Tensor, num_worst_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tell all ranks how many rows come, before the rows.

        Returns:
            rank_prefix_matrix [W, W] int32, and the rows [L] int64 of each local expert.
        """
        world, device = self.group_size, per_expert.device
        sent = torch.tensor([*order.counts, num_worst_tokens], dtype=torch.int64, device=device)
        header = torch.cat([sent.expand(world, -1), per_expert.long().view(world, -1)], 1)
        (headers,), _ = self._rows.exchange(op, [header], [1] * world)
        matrix, limits = headers[:, :world], headers[:, world].tolist()
        for rank, (total, limit) in enumerate(zip(matrix.sum(0).tolist(), limits, strict=True)):
            if 0 < limit < total:
                contract = f"hold the {total} rows for rank {rank}"
                raise ArgumentValueError(op, "num_worst_tokens", contract, limit)
        return matrix.cumsum(0).int(), headers[:, world + 1 :].sum(0)

    @torch.no_grad()
    def combine(
        self,
        x: torch.Tensor,
        handle: DispatchHandle | tuple[torch.Tensor, ...],
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,  # noqa: ARG002
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,  # noqa: ARG002
        allocate_on_comm_stream: bool = False,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring the rows back and add up those of each token, without weights.

        Sums run in float32 over the bias, then over the ranks in ascending order, and are rounded
        once.

        Args:
            x: [R, H] rows as dispatch returned them.
            handle: of that dispatch.
            topk_weights: [R, K] float32 to add up likewise, or None.
            bias: None, or one or two tensors [T, H].
            config: ignored.
            previous_event: to wait for.
            async_finish: the results are ready on the current stream either way.
            allocate_on_comm_stream: ignored.

        Returns:
            combined_x [T, H], combined_topk_weights [T, K] or None, an event.

        Raises:
            MoeError: a wrong argument, on this rank or a peer; nothing is lost.
        """
        op, rows = _COMBINE, self._rows
        with rows.abort_peers_on_error(op):
            handle = _checked_handle(op, handle, self.group_size, None)
            num_rows = len(handle.recv_src_idx)
            check_rows(op, x, num_rows, exact=False)
            num_tokens = len(handle.is_token_in_rank)
            addends = biases(op, bias, x, num_tokens)
            checks.dtype(op, "topk_weights", topk_weights, (torch.float32, torch.float64))
            expected = (len(x), None)
            checks.shape(op, "topk_weights", topk_weights, expected, "(R, K)", x.device)
            wait_for(op, "previous_event", previous_event)
        columns = [x[:num_rows]]
        if topk_weights is not None:
            columns.append(topk_weights[:num_rows])
        ends = handle.rank_prefix_matrix[:, self.rank]
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
        (returned, *weights), _ = rows.exchange(op, columns, counts)
        row_of = routing.send_order(handle.is_token_in_rank).row_of
        out = ordered_sum(returned, row_of, addends)
        combined_weights = None
        if weights:
            combined_weights = ordered_sum(weights[0], row_of)
        return out, combined_weights, self.capture()

    # Low latency: one row per token and expert, in a fixed shape.

    def clean_low_latency_buffer(
        self,
        num_max_dispatch_tokens_per_rank: int,
        hidden: int,
        num_experts: int,
    ) -> None:
        """Nothing: high-throughput and low-latency calls share no memory."""

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,  # noqa: ARG002
        return_recv_hook: bool = False,
    ) -> tuple[Tokens, torch.Tensor, LowLatencyHandle, EventOverlap, Callable[[], None] | None]:
        """Send each token to its experts.

        Rows of an expert arrive by (source, token); those after the last one are unwritten. On
        devices no size depends on data, so that graphs can replay the call.

        Args:
            x: [T, H] bf16, fp16 or fp32, T at most ``num_max_dispatch_tokens_per_rank``.
            topk_idx: [T, K] int64 or int32 in [0, E), distinct within a row; -1 for none.
            num_max_dispatch_tokens_per_rank: M, equal on all ranks.
            num_experts: E.
            cumulative_local_expert_recv_stats: [L] int32 to add the received rows to, or None.
            dispatch_wait_recv_cost_stats: [W] int64 to add the nanoseconds to that this rank waited
                for each rank, or None.
            use_fp8: send float8_e4m3fn with a scale for every 128 elements.
            round_scale: round the scales up to powers of two.
            use_ue8m0: return the rounded scales as their exponents, four in an int32.
            async_finish: the results are ready on the current stream either way.
            return_recv_hook: only send; the results are written when the hook is called.

        Returns:
            recv_x: [L, M * W, H]; with ``use_fp8`` a pair of float8_e4m3fn and its scales, which
                are column-major: [L, M * W, ceil(H / 128)] float32, or [.., ceil(H / 512)] int32.
            recv_count: [L] int32.
            handle: for combine.
            event: an event.
            hook: what to call with ``return_recv_hook``, else None.

        Raises:
            MoeError: a wrong argument, on this rank or a peer; nothing is lost.
        """
        call = self._low_latency.dispatch(
            x,
            topk_idx,
            num_max_dispatch_tokens_per_rank,
            num_experts,
            cumulative_local_expert_recv_stats,
            dispatch_wait_recv_cost_stats,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
        )
        if not return_recv_hook:
            call.finish()
        tokens = call.x if call.scales is None else (call.x, call.scales)
        hook = call.finish if return_recv_hook else None
        return tokens, call.counts, call.handle, self.capture(), hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle | tuple[Any, ...],
        use_logfmt: bool = False,  # noqa: ARG002
        zero_copy: bool = False,
        async_finish: bool = False,  # noqa: ARG002
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None] | None]:
        """Bring the rows back and add up those of each token with its weights.

        Sums run in float32 in the order of ``topk_idx`` and are rounded once.

        Args:
            x: [L, M * W, H] rows as dispatch returned them.
            topk_idx: [T, K] as in dispatch.
            topk_weights: [T, K] float32.
            handle: of that dispatch.
            use_logfmt: ignored: rows travel in the dtype of ``x``, which loses nothing.
            zero_copy: the rows are in the tensor of ``get_next_low_latency_combine_buffer``.
            async_finish: the results are ready on the current stream either way.
            return_recv_hook: only send; the result is written when the hook is called.
            out: [T, H] of the dtype of ``x`` to write to, or None.
            combine_wait_recv_cost_stats: [W] int64, as in dispatch.

        Returns:
            combined_x [T, H], an event, and the hook with ``return_recv_hook``, else None.

        Raises:
            MoeError: a wrong argument, on this rank or a peer; nothing is lost.
        """
        call = self._low_latency.combine(
            x,
            topk_idx,
            topk_weights,
            handle,
            out,
            combine_wait_recv_cost_stats,
            zero_copy=zero_copy,
        )
        if not return_recv_hook:
            call.finish()
        return call.out, self.capture(), call.finish if return_recv_hook else None

    def get_next_low_latency_combine_buffer(
        self, handle: LowLatencyHandle | tuple[Any, ...]
    ) -> torch.Tensor:
        """[L, M * W, H] memory for the next ``low_latency_combine`` with ``zero_copy``."""
        return self._low_latency.combine_buffer(handle)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of the low-latency calls that follow, or take it in again.

        All ranks that remain mask the same ranks, and those that are masked do not call.

        Args:
            rank_to_mask: the rank, not this one.
            mask: True to leave it out.
        """
        self._low_latency.mask(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 to ``mask_status``, [W] int32, for each masked rank, and 0 for the others."""
        self._low_latency.query_mask(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Mask no rank."""
        self._low_latency.clean_mask()

    def internode_dispatch(self, *args: Any, **kwargs: Any) -> Any:
        """``dispatch``: ranks on other hosts take the same path."""
        return self.dispatch(*args, **kwargs)

    def internode_combine(self, *args: Any, **kwargs: Any) -> Any:
        """``combine``: ranks on other hosts take the same path."""
        return self.combine(*args, **kwargs)


def _checked_handle(
    op: str, handle: Any, world_size: int, num_tokens: int | None
) -> DispatchHandle:
    """The handle of a dispatch of this group."""
    checks.required(op, handle=handle)
    if not isinstance(handle, (tuple, list)) or len(handle) != len(DispatchHandle._fields):
        raise ArgumentTypeError(op, "handle", "be that of a dispatch", type(handle).__name__)
    parts = DispatchHandle(*handle)
    device = parts.is_token_in_rank.device
    name, meaning = "handle.is_token_in_rank", "(T, W)"
    expected = (num_tokens, world_size)
    checks.shape(op, name, parts.is_token_in_rank, expected, meaning, device)
    name, expected = "handle.rank_prefix_matrix", (world_size, world_size)
    checks.shape(op, name, parts.rank_prefix_matrix, expected, "(W, W)", device)
    return parts


def _tokens(columns: list[torch.Tensor], scales: torch.Tensor | None) -> Tokens:
    return columns[0] if scales is None else (columns[0], columns[1])


def _extended(rows: torch.Tensor, num_rows: int, value: float | None = None) -> torch.Tensor:
    """``rows`` with more after them, unwritten or of one value."""
    longer = rows.new_empty((num_rows, *rows.shape[1:]))
    as_bytes(longer)[: len(rows)] = as_bytes(rows)
    if value is not None:
        longer[len(rows) :] = value
    return longer
