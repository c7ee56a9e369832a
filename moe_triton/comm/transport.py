"""What every transport does, and what goes in and out of it.

A transport moves tokens between the ranks of one group. It gets its device steps as a table, either
``ref``'s or the Triton ones, so that this package knows neither. Each operation is a setup, which
sends, and a teardown, which waits and consumes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch

from ..errors import MoeError
from ..layout import (
    LocalPermutation,
    Norm,
    RecvPermutation,
    RecvRowIndex,
    RoutingPlan,
    ZeroComputationExperts,
)
from .window import MoeConfig

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class DeviceSteps:
    """The steps that run on the device; ``ref`` defines each.

    ``gather_rows`` and ``reduce`` gather from one tensor by index. That tensor spans the windows of
    all ranks, which one address space must hold.

    Attributes:
        fixed_shapes: nothing waits for the device: outputs have room for the most rows that there
            can be, the values of tensors are not checked, and a graph can replay the calls.
    """

    fixed_shapes: bool
    routing_plan: Callable[..., RoutingPlan]
    dispatch_send: Callable[..., None]
    recv_permutation: Callable[..., RecvPermutation]
    recv_row_index: Callable[..., RecvRowIndex]
    local_permutation: Callable[..., LocalPermutation]
    combine_row_index: Callable[..., torch.Tensor]
    gather_quant: Callable[..., None]
    zero_padding: Callable[..., None]
    gather_rows: Callable[..., None]
    encode: Callable[..., None]
    add_rows: Callable[..., None]
    weighted_sum: Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Call:
    """What every operation needs to know.

    Attributes:
        op: the public op, for error messages.
        config: sizes and formats.
        arguments: names and printable values that must be equal on all ranks.
        steps: the device steps.
        device: where the tensors are.
    """

    op: str
    config: MoeConfig
    arguments: Mapping[str, Any]
    steps: DeviceSteps
    device: torch.device


@dataclasses.dataclass(frozen=True)
class DispatchInput:
    """The input of a dispatch.

    Attributes:
        x: [T, H].
        expert_ids: [T, K] int32; those outside [0, E) are not sent.
        weights: [T, K] to send along, of the configuration's ``weight_dtype``, or None.
        smooth_scales: fp32 factors of the quantisation: [1] or [H] for all copies, [NS + E, H] for
            those of each expert; or None.
        num_rows: rows to allocate for what arrives, or None for exactly as many as do.
        load: [L] int64 to add the rows that arrive for each local expert to, or None.
        totals_dtype: int32 or int64, of ``Received.totals``.
        given: [T, K] int32 or int64 ids and weights, or None: what ``expert_ids`` and ``weights``
            are copied from when the tokens are planned. None where they hold their values.
    """

    x: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor | None = None
    smooth_scales: torch.Tensor | None = None
    num_rows: int | None = None
    load: torch.Tensor | None = None
    totals_dtype: torch.dtype = torch.int64
    given: tuple[torch.Tensor, torch.Tensor | None] | None = None


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a dispatch asks of the wires between ranks, the one to the rank itself included.

    Over windows in host memory nothing is sent: a row is written once, and read for each copy.

    Attributes:
        rows_sent: one for each token and rank that wants it; with scales per expert, one per copy.
        rows_saved: further rows that one per copy would have taken.
        bytes_sent: of the rows sent.
        bytes_saved: of the rows saved.
    """

    rows_sent: int
    rows_saved: int
    bytes_sent: int
    bytes_saved: int


@dataclasses.dataclass(frozen=True)
class Received:
    """The output of a dispatch.

    Attributes:
        x: [num_rows, H] rows in (local expert, source, flat position) order; padding rows are zero.
        scales: [num_rows], or [num_rows, C] where a row has several, of the format's dtype; or
            None.
        weights: [num_rows], or None.
        counts: [L, W] int32 rows for each local expert from each source.
        recv_permutation: the numbering of the n rows.
        slot_ids: [n] int32 which copy each row is, token * (K + NS) + slot of its source.
        totals: [L] rows of each local expert, padding left out.
        plan: of this rank's own tokens.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    weights: torch.Tensor | None
    counts: torch.Tensor
    recv_permutation: RecvPermutation
    slot_ids: torch.Tensor
    totals: torch.Tensor
    plan: RoutingPlan


@dataclasses.dataclass(frozen=True)
class CombineInput:
    """The input of a combine.

    Attributes:
        y: [A, H] expert outputs in the order of dispatch.
        recv_permutation: dispatch's numbering of the rows.
        expert_ids: [T, K] int32 of this rank's tokens.
        plan: their plan.
        weights: [T, K] of the configuration's ``weight_dtype``, or None for all 1.
        borrowed: y may be what ``output_rows`` gave since the last combine.
    """

    y: torch.Tensor
    recv_permutation: RecvPermutation
    expert_ids: torch.Tensor
    plan: RoutingPlan
    weights: torch.Tensor | None
    borrowed: bool = False


@dataclasses.dataclass(frozen=True)
class CombineEpilogue:
    """What a combine does with the rows that came back.

    Attributes:
        special: the experts without a network, or None.
        addend: [T, H] to add with weight 1, or None.
        norm: a residual to add to the sum, and what to make of it, or None.
        apart: return [T, K + NS, H], the row of each slot by itself and zeros where there is none,
            instead of their sum.
    """

    special: ZeroComputationExperts | None = None
    addend: torch.Tensor | None = None
    norm: Norm | None = None
    apart: bool = False


@dataclasses.dataclass
class Pending:
    """An operation between setup and teardown.

    Attributes:
        owner: the transport that set it up, and that only can tear it down.
        call: of the setup.
        data: its input.
        epoch: its number.
        state: the transport's own.
        waited: seconds that the teardown waited for each rank; empty before it.
    """

    owner: Transport
    call: Call
    data: Any
    epoch: int
    state: Any = None
    waited: list[float] = dataclasses.field(default_factory=list)


def outside_autograd(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a transport's method without autograd, whatever mode the caller is in.

    Windows outlive the call, so that views of them must not be inference tensors either.
    """

    @functools.wraps(method)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

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
            transport, what = cast("tuple[Transport, Call | Pending]", args[:2])
            call = what.call if isinstance(what, Pending) else what
            with profiled(call.op, name, transport.group_name):
                return inner(*args, **kwargs)

        return wrapped

    return decorate


def profiled(op: str, name: str, group: str) -> torch.profiler.record_function:
    """A range named like ``op/name [group]`` in the traces of torch.profiler."""
    return torch.profiler.record_function(f"{op}/{name} [{group}]")


class Transport(Protocol):
    """One rank's end of a group. Every rank issues the same sequence of operations."""

    name: str
    group_name: str

    def prepare(self, call: Call, kind: str, slot_bytes: int) -> None:
        """Compare the arguments and allocate what ``kind`` needs, on all ranks together."""
        ...

    def dispatch_send(self, call: Call, tokens: DispatchInput) -> Pending:
        """Send this rank's tokens."""
        ...

    def dispatch_recv(self, pending: Pending) -> Received:
        """Wait for all ranks' tokens and pack those for this rank."""
        ...

    def combine_send(self, call: Call, outputs: CombineInput) -> Pending:
        """Send the experts' rows back."""
        ...

    def combine_recv(self, pending: Pending, finish: CombineEpilogue) -> torch.Tensor:
        """Wait for all ranks' rows and sum those of each token."""
        ...

    def all_gather_send(self, call: Call, parts: Sequence[torch.Tensor], num_bytes: int) -> Pending:
        """Show ``parts``, one after the other, to all ranks; ``num_bytes`` is the most of any."""
        ...

    def all_gather_recv(self, pending: Pending, consume: Callable[[list[torch.Tensor]], _T]) -> _T:
        """Wait for all ranks; ``consume`` gets each one's uint8, with garbage after the end."""
        ...

    def output_rows(self, config: MoeConfig, num_rows: int) -> torch.Tensor | None:
        """[num_rows, H] memory from which the next combine need not copy, if there is such."""
        ...

    def all_to_all_v(self, op: str, x: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Send consecutive rows of [N, B] uint8 ``x``; return what each rank sent here."""
        ...

    def window_bytes(self, kind: str) -> int:
        """Memory that this rank has set aside for ``kind``."""
        ...

    def abort_peers(self, kind: str, op: str, error: MoeError) -> None:
        """Take part in the next operation only to tell the peers that this rank cannot."""
        ...

    def raise_if_broken(self, op: str) -> None:
        """Raise ``BrokenGroupError`` after a timeout."""
        ...

    def close(self) -> None:
        """Give up memory."""
        ...
