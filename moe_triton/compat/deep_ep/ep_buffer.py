"""``EPBuffer``: version 2.5 of the interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ...ops import checks
from .arguments import Tokens
from .config import TIMEOUT, unavailable
from .elastic import ElasticBuffer, has_cpu_sync
from .events import EventHandle, EventOverlap
from .handle import EPHandle
from .received import OutputLayout


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
        layout = OutputLayout(
            do_expand,
            do_zero_padding,
            use_tma_aligned_col_major_sf,
            has_cpu_sync(do_cpu_sync, handle),
            expert_ids=emit_expert_ids,
        )
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
            copy_ids=False,
            cpu_sync=do_cpu_sync,
            layout=layout,
        )
        return self._finish(epilogue, defer_epilogue)

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
        epilogue = self._calls.combine(op, x, handle, topk_weights, bias, previous_event)
        return self._finish(epilogue, defer_epilogue)

    def _finish(self, epilogue: Callable[[], tuple[Any, ...]], deferred: bool) -> Any:
        """The results and an event, or an event that leads to the results."""
        event = EventOverlap(self.capture())
        if deferred:
            event.register_hook_after_wait(epilogue)
            return event
        return *epilogue(), event

    @staticmethod
    def _check_deferred(op: str, deferred: bool, asynchronous: bool) -> None:
        contract = "be False without async_with_compute_stream"
        checks.value(op, "defer_epilogue", asynchronous or not deferred, contract, deferred)
