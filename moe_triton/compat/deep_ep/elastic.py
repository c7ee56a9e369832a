"""``ElasticBuffer``: the second version of the interface.

One dispatch serves training and serving: rows per (token, rank), or with ``do_expand`` per (token,
expert), sorted by expert. Letters: T tokens of this rank, K experts per token, W ranks, E experts,
L = E / W, M most tokens of a rank, H hidden size, R rows received from ranks, A expanded rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ...ops import checks
from .arguments import Tokens
from .config import NUM_SMS, TIMEOUT, low_latency_bytes, unavailable
from .elastic_calls import ElasticCalls
from .events import EventHandle, EventOverlap, wait_for
from .handle import EPHandle
from .received import OutputLayout
from .transfer import RowExchange


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
        self._calls = ElasticCalls(
            self._rows, num_max_tokens_per_rank, reduce_expanded=allow_multiple_reduction
        )
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
        layout = OutputLayout(
            do_expand,
            do_zero_padding,
            use_tma_aligned_col_major_sf,
            has_cpu_sync(do_cpu_sync, handle),
            expert_ids=False,
        )
        op = self._op("dispatch")
        epilogue = self._calls.dispatch(
            op,
            x,
            topk_idx,
            topk_weights,
            stats=cumulative_local_expert_recv_stats,
            num_experts=num_experts,
            max_tokens=num_max_tokens_per_rank,
            alignment=expert_alignment,
            num_sms=num_sms,
            previous_event=previous_event,
            handle=handle,
            copy_ids=do_handle_copy,
            cpu_sync=do_cpu_sync,
            layout=layout,
        )
        wait_for(op, "event", previous_event_before_epilogue)
        return *epilogue(), EventOverlap(self.capture())

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
        op = self._op("combine")
        epilogue = self._calls.combine(op, x, handle, topk_weights, bias, previous_event)
        wait_for(op, "event", previous_event_before_epilogue)
        return *epilogue(), EventOverlap(self.capture())

    @torch.no_grad()
    def _op(self, call: str) -> str:
        return f"deep_ep.{self._name}.{call}"


def has_cpu_sync(asked: bool | None, handle: EPHandle | None) -> bool:
    """Whether a dispatch returns as many rows as came: as asked, else without a handle."""
    return bool(asked) if asked is not None else handle is None


def _hint(world_size: int, max_tokens: int, hidden: int) -> int:
    return low_latency_bytes(max_tokens, hidden, world_size, world_size) if hidden > 0 else 0
