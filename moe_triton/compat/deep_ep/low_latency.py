"""Low-latency dispatch and combine: one row per token and expert, over the transport's windows.

The two phases of each operation are those of ``moe_triton.comm``: send, then wait and consume, so
that a client can compute between them. Letters: T tokens of this rank, K experts per token, W
ranks, E experts, L = E / W, M most tokens of a rank, H hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from ... import comm
from ...comm import Call, CombineEpilogue, CombineInput, DispatchInput, MoeConfig, Received
from ...errors import ArgumentTypeError, MoeError, PeerTimeoutError
from ...layout import NOWHERE, RecvPermutation
from ...ops import checks, layer_config, steps_on
from .arguments import check_num_experts, check_topk
from .config import unavailable

_DISPATCH = "deep_ep.Buffer.low_latency_dispatch"
_COMBINE = "deep_ep.Buffer.low_latency_combine"
_MASK = "deep_ep.Buffer.low_latency_update_mask_buffer"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_IN_FLIGHT = 2  # operations that a client may have sent and not finished, as in the original
_GROUP = 128  # elements that share a scale
_COUNT_BITS = 32  # of an entry of layout_range; the first row is above them

_Result = TypeVar("_Result")


class LowLatencyHandle(NamedTuple):
    """What a dispatch leaves for combine.

    Attributes:
        src_info: [L, M * W] int32 token of each received row in its source.
        layout_range: [L, W] int64: the first row of each source shifted left by 32, plus its rows.
        num_max_dispatch_tokens_per_rank: M.
        hidden: H.
        num_experts: E.
    """

    src_info: torch.Tensor
    layout_range: torch.Tensor
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int


@dataclasses.dataclass(frozen=True)
class DispatchCall:
    """A dispatch that was sent; ``finish`` waits for the rows and writes the tensors.

    Attributes:
        x: [L, M * W, H].
        scales: of ``x``, or None.
        counts: [L] int32.
        handle: for combine.
        finish: to be called once.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor
    handle: LowLatencyHandle
    finish: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class CombineCall:
    """A combine that was sent; ``finish`` waits for the rows and writes ``out``.

    Attributes:
        out: [T, H].
        finish: to be called once.
    """

    out: torch.Tensor
    finish: Callable[[], None]


class LowLatency:
    """The low-latency calls of one buffer; all ranks that are not masked issue the same ones.

    Ranks that remain after others are masked form a group of their own. With ``shrink``, a rank
    that is lost is masked and the call repeated without it; otherwise its loss is an error.

    Args:
        group: a process group, or a name that ``moe_triton.comm`` knows.
        timeout: seconds any wait for peers may take.
        shrink: go on without ranks that are lost.
    """

    def __init__(
        self, group: dist.ProcessGroup | str | None, timeout: float, *, shrink: bool
    ) -> None:
        self._group = comm.resolve("deep_ep.Buffer", group)
        self._timeout, self._shrink = timeout, shrink
        self._members = tuple(range(self._group.size))
        self._communicators = {self._members: self._open()}
        self._combine_buffer: torch.Tensor | None = None

    @property
    def _communicator(self) -> comm.Communicator:
        """That of the ranks that are not masked."""
        if self._members not in self._communicators:
            self._communicators[self._members] = self._open()
        return self._communicators[self._members]

    def _open(self) -> comm.Communicator:
        group = comm.subgroup(self._group, self._members)
        return comm.open_communicator(
            group, transport="auto", in_flight=_IN_FLIGHT, timeout=self._timeout
        )

    def close(self) -> None:
        """Release the windows."""
        for communicator in self._communicators.values():
            comm.close_communicator(communicator)

    # Masks.

    def mask(self, rank: int, masked: bool) -> None:
        """Leave a rank out of the calls that follow, or take it in again."""
        checks.integers(_MASK, rank_to_mask=rank)
        others = 0 <= rank < self._group.size and rank != self._group.rank
        contract = f"be another of {self._group.size} ranks"
        checks.value(_MASK, "rank_to_mask", others, contract, rank)
        members = set(self._members) - {rank} | (set() if masked else {rank})
        self._members = tuple(sorted(members))

    def clean_mask(self) -> None:
        """Mask no rank."""
        self._members = tuple(range(self._group.size))

    def query_mask(self, status: torch.Tensor) -> None:
        """Write 1 for masked ranks and 0 for others."""
        op = "deep_ep.Buffer.low_latency_query_mask_buffer"
        checks.required(op, mask_status=status)
        checks.dtype(op, "mask_status", status, (torch.int32,))
        checks.shape(op, "mask_status", status, (self._group.size,), "(W,)", status.device)
        masks = [int(rank not in self._members) for rank in range(self._group.size)]
        status.copy_(torch.tensor(masks, dtype=status.dtype))

    def _without_lost_ranks(self, attempt: Callable[[], _Result]) -> _Result:
        """The result of an operation, repeated without the ranks that are lost in it."""
        while True:
            try:
                return attempt()
            except PeerTimeoutError as error:
                if not self._shrink or not error.ranks:
                    raise
                lost = {self._members[rank] for rank in error.ranks}
                self._members = tuple(rank for rank in self._members if rank not in lost)

    def _ids(self, topk_idx: torch.Tensor, experts_per_rank: int) -> torch.Tensor:
        """Expert ids counted over the ranks that are not masked, -1 for experts of others."""
        if len(self._members) == self._group.size:
            return topk_idx
        first = torch.full((self._group.size + 1,), NOWHERE, device=topk_idx.device)
        for number, rank in enumerate(self._members):
            first[rank] = number * experts_per_rank
        ids = topk_idx.long()
        start = first[ids.div(experts_per_rank, rounding_mode="floor")]  # of -1 the last entry
        return torch.where(start < 0, NOWHERE, start + ids % experts_per_rank)

    @contextlib.contextmanager
    def _abort_peers_on_error(self, op: str, kind: str) -> Iterator[None]:
        try:
            yield
        except MoeError as error:
            self._communicator.abort_peers(kind, op, error)
            raise

    def _config(
        self, op: str, x: torch.Tensor, top_k: int, max_tokens: int, num_experts: int, quant: Any
    ) -> MoeConfig:
        experts_per_rank = num_experts // self._group.size
        return layer_config(
            op,
            len(self._members),
            num_experts=experts_per_rank * len(self._members),
            top_k=min(top_k, experts_per_rank * len(self._members)),
            hidden=x.shape[-1],
            max_tokens=max_tokens,
            dtype=x.dtype,
            quant=quant,
            shared_experts=0,
            shared_ranks=0,
            max_recv_tokens=None,
            alignment=1,
        )

    # Dispatch.

    @torch.no_grad()
    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        max_tokens: int,
        num_experts: int,
        stats: torch.Tensor | None,
        wait_stats: torch.Tensor | None,
        *,
        use_fp8: bool,
        round_scale: bool,
        use_ue8m0: bool,
    ) -> DispatchCall:
        """Send the tokens; arguments as in ``Buffer.low_latency_dispatch``."""
        op, world = _DISPATCH, self._group.size
        with self._abort_peers_on_error(op, "dispatch"):
            checks.required(op, x=x)
            checks.dtype(op, "x", x, _FLOATS)
            checks.shape(op, "x", x, (None, None), "(T, H)", x.device)
            name = "num_max_dispatch_tokens_per_rank"
            checks.integers(op, **{name: max_tokens})
            contract = f"have at most {name} = {max_tokens} rows"
            checks.value(op, "x", len(x) <= max_tokens, contract, f"shape {tuple(x.shape)}")
            check_num_experts(op, num_experts, world)
            check_topk(op, topk_idx, None, len(x), num_experts, x.device)
            rounds = not use_ue8m0 or (use_fp8 and round_scale)
            contract = "be False without use_fp8 and round_scale"
            checks.value(op, "use_ue8m0", rounds, contract, use_ue8m0)
            num_local = num_experts // world
            _check_stats(op, "cumulative_local_expert_recv_stats", stats, num_local, torch.int32)
            _check_stats(op, "dispatch_wait_recv_cost_stats", wait_stats, world, torch.int64)
            quant = None
            if use_fp8:
                quant = "pow2_e4m3" if round_scale else "group_e4m3"
            self._config(op, x, topk_idx.shape[1], max_tokens, num_experts, quant)
        x, topk_idx = x.detach().contiguous(), topk_idx.clone()

        def send() -> comm.Pending[DispatchInput]:
            ids = self._ids(topk_idx, num_local).to(torch.int32)
            config = self._config(op, x, ids.shape[1], max_tokens, num_experts, quant)
            call = _call(op, config, x.device, quant=str(quant), ue8m0=use_ue8m0)
            rows = config.capacity(0) if call.fixed_shapes else None
            tokens = DispatchInput(x, ids, x.new_ones(ids.shape, dtype=torch.float32), None, rows)
            return self._communicator.transport(op, call).dispatch_send(call, tokens)

        pending = self._without_lost_ranks(send)
        rows_per_expert, hidden = max_tokens * world, x.shape[1]
        dtype = torch.float8_e4m3fn if use_fp8 else x.dtype
        packed = x.new_empty((num_local, rows_per_expert, hidden), dtype=dtype)
        scales = None
        if use_fp8:
            groups = -(-hidden // _GROUP)
            words = -(-groups // 4) if use_ue8m0 else groups
            word = torch.int32 if use_ue8m0 else torch.float32
            scales = x.new_empty((num_local, words, rows_per_expert), dtype=word).transpose(1, 2)
        counts = x.new_empty(num_local, dtype=torch.int32)
        handle = LowLatencyHandle(
            x.new_empty((num_local, rows_per_expert), dtype=torch.int32),
            torch.zeros((num_local, world), dtype=torch.int64, device=x.device),
            max_tokens,
            hidden,
            num_experts,
        )

        @torch.no_grad()
        def finish() -> None:
            nonlocal pending

            def receive() -> Received:
                nonlocal pending
                if pending.owner is not self._communicator.transport(op):
                    pending = send()  # a rank was lost since
                return pending.owner.dispatch_recv(pending)

            received = self._without_lost_ranks(receive)
            self._unpack(received, pending.call.config, packed, scales, counts, handle)
            if stats is not None:
                stats.add_(counts)
            self._add_waits(wait_stats, pending.waited)

        return DispatchCall(packed, scales, counts, handle, finish)

    def _unpack(
        self,
        received: Received,
        config: MoeConfig,
        packed: torch.Tensor,
        scales: torch.Tensor | None,
        counts: torch.Tensor,
        handle: LowLatencyHandle,
    ) -> None:
        """Write the received rows, which lie one expert after another, to their fixed places."""
        per_source, permutation = received.counts, received.recv_permutation
        counts.copy_(per_source.sum(1))
        begins = per_source.cumsum(1) - per_source
        members = torch.tensor(self._members, device=counts.device)
        handle.layout_range.zero_()
        handle.layout_range[:, members] = (begins.long() << _COUNT_BITS) | per_source.long()
        starts = permutation.offsets - counts
        valid = torch.arange(packed.shape[1], device=counts.device) < counts[:, None]
        # torch cannot index every float8: use its bytes.
        _write(packed.view(torch.uint8), valid, starts, received.x.view(torch.uint8))
        sources = config.row_of(received.slot_ids).to(torch.int32)
        _write(handle.src_info, valid, starts, sources)
        if scales is None:
            return
        assert received.scales is not None
        words = received.scales
        if scales.dtype == torch.int32:
            # The exponents of the scales, which are powers of two.
            exponents = (words.view(torch.int32) >> 23).to(torch.uint8)
            missing = 4 * scales.shape[2] - words.shape[1]
            words = torch.nn.functional.pad(exponents, (0, missing)).view(torch.int32)
        _write(scales, valid, starts, words)

    def _add_waits(self, stats: torch.Tensor | None, waited: list[float]) -> None:
        if stats is not None:
            for rank, seconds in zip(self._members, waited, strict=True):
                stats[rank] += int(seconds * 1e9)

    # Combine.

    def combine_buffer(self, handle: Any) -> torch.Tensor:
        """[L, M * W, H] bf16 memory for the next combine; one buffer, which it reuses."""
        op = "deep_ep.Buffer.get_next_low_latency_combine_buffer"
        parts = self._checked_handle(op, handle)
        shape = (*parts.src_info.shape, parts.hidden)
        buffer = self._combine_buffer
        if buffer is None or buffer.shape != shape or buffer.device != parts.src_info.device:
            buffer = parts.src_info.new_empty(shape, dtype=torch.bfloat16)
            self._combine_buffer = buffer
        return buffer

    def _checked_handle(self, op: str, handle: Any) -> LowLatencyHandle:
        checks.required(op, handle=handle)
        if not isinstance(handle, (tuple, list)) or len(handle) != len(LowLatencyHandle._fields):
            contract = "be that of a low-latency dispatch"
            raise ArgumentTypeError(op, "handle", contract, type(handle).__name__)
        parts = LowLatencyHandle(*handle)
        expected = (parts.num_experts // self._group.size, self._group.size)
        device = parts.src_info.device
        checks.shape(op, "handle.layout_range", parts.layout_range, expected, "(L, W)", device)
        return parts

    @torch.no_grad()
    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Any,
        out: torch.Tensor | None,
        wait_stats: torch.Tensor | None,
        *,
        zero_copy: bool,
    ) -> CombineCall:
        """Send the rows back; arguments as in ``Buffer.low_latency_combine``."""
        op, world = _COMBINE, self._group.size
        with self._abort_peers_on_error(op, "combine"):
            parts = self._checked_handle(op, handle)
            if zero_copy:
                if self._combine_buffer is None:
                    problem = "zero_copy needs get_next_low_latency_combine_buffer before it"
                    raise unavailable("Buffer.low_latency_combine", problem)
                x = self._combine_buffer
            checks.required(op, x=x, topk_weights=topk_weights)
            checks.dtype(op, "x", x, _FLOATS)
            expected = (*parts.src_info.shape, parts.hidden)
            checks.shape(op, "x", x, expected, "(L, M * W, H)", parts.src_info.device)
            num_experts, max_tokens = parts.num_experts, parts.num_max_dispatch_tokens_per_rank
            check_topk(op, topk_idx, topk_weights, None, num_experts, x.device)
            num_tokens, top_k = topk_idx.shape
            fits = num_tokens <= max_tokens
            contract = f"have at most {max_tokens} rows"
            checks.value(op, "topk_idx", fits, contract, f"shape {tuple(topk_idx.shape)}")
            shape = (num_tokens, parts.hidden)
            checks.dtype(op, "out", out, (x.dtype,))
            checks.shape(op, "out", out, shape, "(T, H)", x.device)
            _check_stats(op, "combine_wait_recv_cost_stats", wait_stats, world, torch.int64)
        result = x.new_empty(shape) if out is None else out
        x, weights = x.detach(), topk_weights.float().clone()
        topk_idx, layout_range = topk_idx.clone(), parts.layout_range.clone()

        def send() -> comm.Pending[CombineInput]:
            num_local = num_experts // world
            config = self._config(op, x, top_k, max_tokens, num_experts, None)
            call = _call(op, config, x.device)
            ids = self._ids(topk_idx, num_local).to(torch.int32)
            members = torch.tensor(self._members, device=x.device)
            ranges = layout_range[:, members]
            counts = (ranges & ((1 << _COUNT_BITS) - 1)).to(torch.int32)
            capacity = config.capacity(0) if call.fixed_shapes else None
            permutation = call.steps.recv_permutation(counts, 1, capacity)
            places = _packed_places(permutation, ranges >> _COUNT_BITS, x.shape[1])
            rows = x.flatten(0, 1).index_select(0, places)
            plan = call.steps.routing_plan(ids, config.topology.num_experts)
            inputs = CombineInput(rows, permutation, ids, plan, weights)
            return self._communicator.transport(op, call, "combine").combine_send(call, inputs)

        pending = self._without_lost_ranks(send)

        @torch.no_grad()
        def finish() -> None:
            nonlocal pending

            def receive() -> torch.Tensor:
                nonlocal pending
                if pending.owner is not self._communicator.transport(op):
                    pending = send()  # a rank was lost since
                return pending.owner.combine_recv(pending, CombineEpilogue())

            result.copy_(self._without_lost_ranks(receive))
            self._add_waits(wait_stats, pending.waited)

        return CombineCall(result, finish)


def _call(op: str, config: MoeConfig, device: torch.device, **more: object) -> Call:
    topology = config.topology
    arguments = {
        "num_experts": topology.num_experts,
        "top_k": config.top_k,
        "hidden": config.hidden,
        "num_max_dispatch_tokens_per_rank": config.max_tokens,
        "dtype": str(config.dtype),
        **more,
    }
    return Call(op, config, arguments, steps_on(device), device)


def _check_stats(
    op: str, name: str, stats: torch.Tensor | None, size: int, dtype: torch.dtype
) -> None:
    checks.dtype(op, name, stats, (dtype,))
    if stats is not None:
        checks.shape(op, name, stats, (size,), "(L,) or (W,)", stats.device)


def _packed_places(
    permutation: RecvPermutation, begins: torch.Tensor, rows_per_expert: int
) -> torch.Tensor:
    """[n] place of each row in [L * rows_per_expert]; 0 for rows after the last one.

    Args:
        permutation: of the rows.
        begins: [L, W] first row of each source among those of an expert.
        rows_per_expert: M * W.
    """
    offsets, source = permutation.offsets, permutation.source
    row = torch.arange(len(source), dtype=offsets.dtype, device=offsets.device)
    expert = torch.searchsorted(offsets, row, right=True).clamp_(max=len(offsets) - 1)
    first = permutation.group_starts[expert, source.clamp(min=0)]
    place = expert * rows_per_expert + begins[expert, source.clamp(min=0)] + (row - first)
    return torch.where(row < offsets[-1], place, 0).clamp_(0, len(offsets) * rows_per_expert - 1)


def _write(
    out: torch.Tensor, valid: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
) -> None:
    """Write rows that are sorted by expert to the valid places of [L, rows_per_expert, ...].

    On devices all places are written, as no size may depend on data; the others with garbage.

    Args:
        out: [L, rows_per_expert, ...] output.
        valid: [L, rows_per_expert] bool, of the first places of each expert.
        starts: [L] first row of each expert.
        rows: [n, ...], or more on devices.
    """
    if comm.fixed_shapes(out.device):
        index = starts[:, None] + torch.arange(out.shape[1], device=out.device)
        out.copy_(rows[index.clamp_(max=len(rows) - 1)])
    else:
        out[valid] = rows
