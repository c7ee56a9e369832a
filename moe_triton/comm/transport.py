"""The transport interface: its operations, their inputs and results, and the device steps they use.

A transport moves rows between the ranks of one group. Its device steps come with each call, so that
this package imports neither ``ref`` nor ``kernels``. Each operation has two phases: send, which
returns a ``Pending``, and recv, which waits for the peers and consumes their rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from ..errors import MoeError
from ..layout import (
    ExchangeLayout,
    LocalPermutation,
    Norm,
    ReceivedRows,
    RecvPermutation,
    RecvRowIndex,
    RoutingCopies,
    RoutingPlan,
    RowFormat,
    SlotPositions,
    Windows,
    ZeroComputationExperts,
)
from .window import MoeConfig

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Input = TypeVar("_Input")

#: What combine needs of a dispatch: each has counts and positions.
Plan: TypeAlias = RoutingPlan | SlotPositions | LocalPermutation


class WindowSteps(Protocol):
    """The device steps of windows; ``moe_triton.ref`` defines what each computes."""

    def dispatch_send(
        self,
        windows: Windows,
        layout: ExchangeLayout,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor | None,
        smooth_scales: Tensor | None,
        copies: RoutingCopies | None,
        /,
        *,
        digest: int,
    ) -> SlotPositions:
        """Write this rank's tokens into its window, and its record to every rank."""

    def dispatch_totals(
        self, windows: Windows, layout: ExchangeLayout, /, *, digest: int, timeout: float
    ) -> Tensor:
        """Wait for all ranks' records; count the rows that each rank receives."""

    def dispatch_recv(
        self,
        windows: Windows,
        layout: ExchangeLayout,
        num_rows: int | None,
        load: Tensor | None,
        /,
        *,
        totals_dtype: torch.dtype,
        digest: int,
        timeout: float,
    ) -> ReceivedRows:
        """Wait for all ranks' records and gather the rows for this rank."""

    def combine_send(
        self,
        windows: Windows,
        layout: ExchangeLayout,
        y: Tensor | None,
        group_starts: Tensor,
        count: Tensor | None,
        /,
        *,
        digest: int,
    ) -> None:
        """Write the experts' rows into this rank's window, and its record to every rank."""

    def combine_recv(
        self,
        windows: Windows,
        layout: ExchangeLayout,
        expert_ids: Tensor,
        positions: SlotPositions,
        weights: Tensor | None,
        zero_computation: ZeroComputationExperts | None,
        addend: Tensor | None,
        out: Tensor,
        norm: Norm | None,
        /,
        *,
        digest: int,
        timeout: float,
    ) -> None:
        """Wait for all ranks' records and sum the rows of each token from the windows."""

    def send_record(self, windows: Windows, /, *, digest: int, status: int, extra: int = 0) -> None:
        """Write this rank's record to every rank, without data."""

    def recv_records(
        self, windows: Windows, /, *, digest: int, timeout: float, peek: bool = False
    ) -> None:
        """Wait for all ranks' records."""


class DeviceSteps(WindowSteps, Protocol):
    """The device steps of a transport; ``moe_triton.ref`` defines what each computes.

    ``gather_rows`` and ``weighted_sum`` gather from one tensor by index. That tensor spans the
    windows of all ranks, which one address space must hold.
    """

    def routing_plan(
        self, expert_ids: Tensor, num_experts: int, copies: RoutingCopies | None = None, /
    ) -> RoutingPlan:
        """Count the routed slots of each expert and sort them by expert."""

    def recv_permutation(
        self, counts: Tensor, /, alignment: int = 1, capacity: int | None = None
    ) -> RecvPermutation:
        """Number the received rows by (local expert, source)."""

    def recv_row_index(
        self,
        counts: Tensor,
        slot_ids: Tensor,
        weights: Tensor | None,
        /,
        *,
        table: Tensor,
        slots_per_row: int,
        alignment: int = 1,
        capacity: int | None = None,
        load: Tensor | None = None,
        totals_dtype: torch.dtype = torch.int64,
    ) -> RecvRowIndex:
        """Index the rows that the sources hold for this rank."""

    def local_permutation(
        self,
        expert_ids: Tensor,
        num_experts: int,
        weights: Tensor | None,
        copies: RoutingCopies | None = None,
        /,
        *,
        alignment: int = 1,
        capacity: int | None = None,
        load: Tensor | None = None,
        totals_dtype: torch.dtype = torch.int64,
    ) -> LocalPermutation:
        """Plan the tokens of a rank that sends to itself alone, and number their rows."""

    def combine_row_index(
        self,
        group_starts: Tensor,
        plan: RoutingPlan,
        expert_ids: Tensor,
        /,
        *,
        capacity: int | None = None,
    ) -> Tensor:
        """Index the expert row of every slot of a rank that sends to itself alone."""

    def gather_quant(
        self,
        x: Tensor,
        index: Tensor,
        fmt: RowFormat,
        smooth_scales: Tensor | None,
        expert_ids: Tensor | None,
        out: Tensor,
        scales: Tensor | None = None,
        /,
    ) -> None:
        """Quantise each token and write it to the rows of its slots."""

    def zero_padding(self, x: Tensor, index: Tensor, count: Tensor | None = None, /) -> None:
        """Zero the rows whose index is ``NOWHERE``."""

    def gather_rows(
        self,
        rows: Tensor,
        index: Tensor,
        fmt: RowFormat,
        x: Tensor,
        scales: Tensor | None = None,
        count: Tensor | None = None,
        /,
    ) -> None:
        """Gather window rows by index into payload and scales."""

    def encode(
        self,
        x: Tensor,
        fmt: RowFormat,
        rows: Tensor,
        smooth_scales: Tensor | None = None,
        /,
        count: Tensor | None = None,
    ) -> None:
        """Write rows in a window's format."""

    def add_rows(self, own: Tensor, peer: Tensor, out: Tensor, /) -> None:
        """Add two halves of a row that two ranks hold."""

    def weighted_sum(
        self,
        rows: Tensor,
        index: Tensor,
        fmt: RowFormat,
        weights: Tensor | None,
        special: ZeroComputationExperts | None,
        addend: Tensor | None,
        out: Tensor,
        norm: Norm | None = None,
        /,
    ) -> None:
        """Sum the rows of each token with its weights."""


def fixed_shapes(device: torch.device) -> bool:
    """Whether output shapes on ``device`` depend on sizes alone, never on data.

    Reading a count would wait for a device: there outputs hold the most rows that can come, tensor
    values are not checked, and a graph can replay the calls. On the CPU reading a count is free.
    """
    return device.type != "cpu"


def capturing(device: torch.device) -> bool:
    """Whether a graph captures the calls, which the host then cannot ask for counts."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@dataclasses.dataclass(frozen=True)
class Call:
    """Name, sizes and device steps of one operation.

    Attributes:
        op: the public op, for error messages.
        config: sizes and formats.
        arguments: names and printable values that must be equal on all ranks.
        steps: the device steps.
        device: of all tensors.
    """

    op: str
    config: MoeConfig
    arguments: Mapping[str, object]
    steps: DeviceSteps
    device: torch.device

    @functools.cached_property
    def derived(self) -> dict[object, Any]:
        """What transports have made of it, by keys of their own; many calls are repeated."""
        return {}

    @property
    def fixed_shapes(self) -> bool:
        """``fixed_shapes`` of the call's device."""
        return fixed_shapes(self.device)


class DispatchInput(NamedTuple):
    """The input of a dispatch.

    Attributes:
        x: [T, H].
        expert_ids: [T, K] int32, or int64 with ``copy_routing``; ids outside [0, E) are not sent.
        weights: [T, K] to send along, of the configuration's ``weight_dtype``, or None.
        smooth_scales: fp32 factors of the quantisation: [1] or [H] for all slots, [NS + E, H] for
            those of each expert; or None.
        num_rows: rows to allocate for the received tokens; None allocates exactly as many as come.
        load: [L] int64 to add the rows received for each local expert to, or None.
        totals_dtype: int32 or int64, of ``Received.totals``.
        copy_routing: the caller may overwrite ids and weights before the operation ends, so that
            the transport copies them as it plans; ``Pending.data`` holds the copies, ids in int32.
    """

    x: Tensor
    expert_ids: Tensor
    weights: Tensor | None = None
    smooth_scales: Tensor | None = None
    num_rows: int | None = None
    load: Tensor | None = None
    totals_dtype: torch.dtype = torch.int64
    copy_routing: bool = False


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Rows and bytes that a dispatch sends to all ranks, the rank itself included.

    Windows in host memory send nothing: a row is written once, and read for each slot.

    Attributes:
        rows_sent: one for each token and rank that wants it; with scales per expert, one per slot.
        rows_saved: further rows that one per slot would have taken.
        bytes_sent: of the rows sent.
        bytes_saved: of the rows saved.
    """

    rows_sent: int
    rows_saved: int
    bytes_sent: int
    bytes_saved: int


class Received(NamedTuple):
    """The output of a dispatch.

    Attributes:
        x: [num_rows, H] rows in (local expert, source, flat position) order; padding rows are zero.
        scales: [num_rows], or [num_rows, C] for C scales a row, of the format's dtype; or None.
        weights: [num_rows], or None.
        counts: [L, W] int32 rows for each local expert from each source.
        recv_permutation: the numbering of the n rows.
        slot_ids: [n] int32 slot of each row in its source, token * (K + NS) + slot.
        totals: [L] rows of each local expert, without padding.
        plan: of this rank's own tokens, or their positions alone.
    """

    x: Tensor
    scales: Tensor | None
    weights: Tensor | None
    counts: Tensor
    recv_permutation: RecvPermutation
    slot_ids: Tensor
    totals: Tensor
    plan: Plan


class CombineInput(NamedTuple):
    """The input of a combine.

    Attributes:
        y: [A, H] expert outputs in the order of dispatch.
        recv_permutation: dispatch's numbering of the rows.
        expert_ids: [T, K] int32 of this rank's tokens.
        plan: their plan, or their positions alone.
        weights: [T, K] of the configuration's ``weight_dtype``, or None for all 1.
        borrowed: y may be the zero-copy combine buffer, which ``output_rows`` returned since the
            last combine.
    """

    y: Tensor
    recv_permutation: RecvPermutation
    expert_ids: Tensor
    plan: Plan
    weights: Tensor | None
    borrowed: bool = False


class CombineEpilogue(NamedTuple):
    """Work on the returned rows of a combine.

    Attributes:
        special: the zero-computation experts, or None.
        addend: [T, H] to add with weight 1, or None.
        norm: a residual to add to the sum, and its RMSNorm, or None.
        apart: return [T, K + NS, H], one row per slot and zeros for slots without one, in place of
            their sum.
    """

    special: ZeroComputationExperts | None = None
    addend: Tensor | None = None
    norm: Norm | None = None
    apart: bool = False


@dataclasses.dataclass
class Pending(Generic[_Input]):
    """An operation between its send and its recv phase.

    Attributes:
        owner: the transport that sent it, the only one that can receive it.
        call: of the send phase.
        data: its input.
        epoch: its number.
        state: the transport's own, which only ``owner`` reads.
        waited: seconds that the recv phase waited for each rank; empty before it.
    """

    owner: Transport
    call: Call
    data: _Input
    epoch: int
    state: object = None
    waited: list[float] = dataclasses.field(default_factory=list)


def outside_autograd(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a transport's method without autograd and outside inference mode.

    Windows outlive the call, so that views of them must not be inference tensors.
    """

    @functools.wraps(method)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        # As torch's contexts do, without their Python.
        if torch.is_inference_mode_enabled():
            with torch._C._InferenceMode(False):  # restores the mode of gradients, too
                torch._C._set_grad_enabled(False)
                return method(*args, **kwargs)
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        torch._C._set_grad_enabled(False)
        try:
            return method(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    return wrapped


def phase(name: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Run one phase of an operation outside autograd, as a range that torch.profiler shows.

    Args:
        name: of the phase; that of the op and of the group are added.
    """

    def decorate(method: Callable[_P, _T]) -> Callable[_P, _T]:
        inner = outside_autograd(method)

        @functools.wraps(method)
        def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if not torch.autograd._profiler_enabled():
                return inner(*args, **kwargs)
            transport, subject = cast("tuple[Transport, Call | Pending[object]]", args[:2])
            call = subject.call if isinstance(subject, Pending) else subject
            with profiled(call.op, name, transport.group_name):
                return inner(*args, **kwargs)

        return wrapped

    return decorate


def profiled(op: str, name: str, group: str) -> contextlib.AbstractContextManager[object]:
    """A range named like ``op/name [group]`` in the traces of torch.profiler, where one runs."""
    if not torch.autograd._profiler_enabled():
        return contextlib.nullcontext()  # a range costs 10 us also without a profiler
    return torch.profiler.record_function(f"{op}/{name} [{group}]")


class Transport(Protocol):
    """One rank's end of a group. Every rank issues the same sequence of operations."""

    group_name: str

    @property
    def name(self) -> str:
        """Of the transport, as in logs."""
        ...

    def prepare(self, call: Call, kind: str, /) -> None:
        """Compare the arguments and allocate the windows of ``kind``, on all ranks together."""

    def dispatch_send(self, call: Call, tokens: DispatchInput, /) -> Pending[DispatchInput]:
        """Send this rank's tokens."""

    def dispatch_recv(self, pending: Pending[DispatchInput], /) -> Received:
        """Wait for all ranks' tokens and gather those for this rank."""

    def combine_send(self, call: Call, inputs: CombineInput, /) -> Pending[CombineInput]:
        """Send the experts' rows back."""

    def combine_recv(self, pending: Pending[CombineInput], epilogue: CombineEpilogue, /) -> Tensor:
        """Wait for all ranks' rows and sum those of each token."""

    def all_gather_send(
        self, call: Call, parts: Sequence[Tensor], num_bytes: int, /
    ) -> Pending[None]:
        """Send ``parts``, packed in order, to all ranks; no rank sends above ``num_bytes``."""

    def all_gather_recv(
        self, pending: Pending[None], consume: Callable[[list[Tensor]], _T], /
    ) -> _T:
        """Wait for all ranks; ``consume`` gets each one's uint8, with garbage after the end."""

    def output_rows(self, config: MoeConfig, num_rows: int, /) -> Tensor | None:
        """The zero-copy combine buffer: [num_rows, H] that the next combine sends without a copy.

        None where the transport has none.
        """

    def all_to_all_v(self, call: Call, x: Tensor, counts: list[int], /) -> list[Tensor]:
        """Send consecutive rows of [N, B] uint8 ``x``; return the rows from each rank."""

    def window_bytes(self, kind: str, /) -> int:
        """Bytes that this rank has allocated for the windows of ``kind``."""

    def abort_peers(self, kind: str, op: str, error: MoeError, /) -> None:
        """Take part in the next operation with ``error`` in place of data, which aborts it."""

    def raise_if_broken(self, op: str, /) -> None:
        """Raise ``BrokenGroupError`` after a time-out."""

    def close(self) -> None:
        """Release the memory."""
