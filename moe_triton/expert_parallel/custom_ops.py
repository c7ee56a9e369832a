"""The operations of ``ExpertParallel`` as custom ops, for compiled code and for gradients.

A custom op takes tensors, numbers and strings only: an exchange comes as its name, and an operation
in flight as the number that its setup returned.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TypeVar

import torch
from torch import Tensor

from ..comm import Pending
from ..errors import MoeError, SequenceError, UnavailableError
from ..ops.custom_op import Operator
from .exchange import COMBINE, DISPATCH, OP, Exchange
from .results import Handle

_Input = TypeVar("_Input")

_numbers = itertools.count()
_exchanges: weakref.WeakValueDictionary[str, Exchange] = weakref.WeakValueDictionary()


def register(exchange: Exchange) -> None:
    """Let custom ops find ``exchange`` by its name for as long as it lives."""
    _exchanges[exchange.name] = exchange


def _find(name: str) -> Exchange:
    if name not in _exchanges:
        raise MoeError(OP, f"{name!r} must be alive, got one that was deleted")
    return _exchanges[name]


def _keep(operations: dict[int, Pending[_Input]], pending: Pending[_Input]) -> Tensor:
    number = next(_numbers)
    operations[number] = pending
    return torch.tensor(number, device="cpu")


def _in_flight(operations: dict[int, Pending[_Input]], op: str, number: Tensor) -> Pending[_Input]:
    if int(number) not in operations:
        raise SequenceError(op, "pending must be torn down once, and not after recover()")
    return operations[int(number)]


def _dispatch_setup(
    *, x: Tensor, topk_ids: Tensor, topk_weights: Tensor | None, scales: Tensor | None, name: str
) -> Tensor:
    exchange = _find(name)
    if exchange.exact:
        error = UnavailableError(
            DISPATCH, "exact=True cannot be compiled: its shapes depend on data"
        )
        exchange.communicator.abort_peers("dispatch", DISPATCH, error)
        raise error
    pending = exchange.dispatch_send(x, topk_ids, topk_weights, scales)
    return _keep(exchange.dispatches, pending)


def _dispatch_teardown(
    *, number: Tensor, with_gradients: bool, name: str
) -> tuple[Tensor | None, ...]:
    exchange = _find(name)
    pending = _in_flight(exchange.dispatches, DISPATCH, number)
    received = exchange.dispatch_recv(pending, with_gradients=with_gradients)
    del exchange.dispatches[int(number)]
    return (
        received.x,
        received.scales,
        received.weights,
        received.totals,
        received.recv_permutation.offsets,
        received.recv_permutation.recv_counts_cumsum,
    )


def _dispatch_teardown_outputs(*, name: str, **_: object) -> tuple[Tensor | None, ...]:
    exchange = _find(name)
    config, device = exchange.config, exchange.device
    rows = config.capacity(exchange.rank)
    local = config.topology.num_local_experts(exchange.rank)
    fmt, scales = config.row_format, None
    if fmt.scale_offset is not None:
        scales = torch.empty(fmt.scale_shape(rows), dtype=fmt.scale_dtype, device=device)
    return (
        torch.empty((rows, config.hidden), dtype=fmt.dtype, device=device),
        scales,
        torch.empty(rows, dtype=config.weight_dtype, device=device),
        torch.empty(local, dtype=exchange.counts_dtype, device=device),
        torch.empty(local, dtype=torch.int32, device=device),
        torch.empty(local * config.topology.world_size, dtype=torch.int32, device=device),
    )


def _combine_setup(
    *,
    y: Tensor,
    expert_ids: Tensor,
    weights: Tensor | None,
    row_weights: Tensor,
    recv_counts_cumsum: Tensor,
    addend: Tensor | None,
    owner: str,
    name: str,
) -> Tensor:
    exchange = _find(name)
    handle = Handle(expert_ids, weights, row_weights, recv_counts_cumsum, None, owner)
    pending, _ = exchange.combine_send(y, handle, addend)
    return _keep(exchange.combines, pending)


def _combine_teardown(
    *,
    number: Tensor,
    y: Tensor,  # noqa: ARG001 (keeps its memory alive until here)
    expert_ids: Tensor,
    addend: Tensor | None,
    name: str,
) -> Tensor:
    exchange = _find(name)
    pending = _in_flight(exchange.combines, COMBINE, number)
    exchange.check_addend(addend, len(expert_ids))
    out = exchange.combine_recv(pending, addend)
    del exchange.combines[int(number)]
    return out


def _send_gradients(*, gradient: Tensor, expert_ids: Tensor, num_rows: int, name: str) -> Tensor:
    return _find(name).send_gradients(gradient, expert_ids, num_rows)


def _return_gradients(
    *,
    rows: Tensor,
    row_weights: Tensor,
    expert_ids: Tensor,
    recv_counts_cumsum: Tensor,
    to_quantised_tokens: bool,
    name: str,
) -> tuple[Tensor | None, Tensor]:
    return _find(name).return_gradients(
        rows, row_weights, expert_ids, recv_counts_cumsum, to_quantised_tokens
    )


def _return_gradients_outputs(
    *, rows: Tensor, row_weights: Tensor, expert_ids: Tensor, name: str, **_: object
) -> tuple[Tensor | None, Tensor]:
    x = None
    if _find(name).tokens_have_gradients:
        x = rows.new_empty((len(expert_ids), rows.shape[1]))
    return x, row_weights.new_empty(expert_ids.shape)


dispatch_setup = Operator(
    "expert_parallel_dispatch_setup",
    "Tensor x, Tensor topk_ids, Tensor? topk_weights, Tensor? scales, str name",
    "Tensor",
    run=_dispatch_setup,
    outputs=lambda **_: torch.empty((), dtype=torch.int64, device="cpu"),
)

dispatch_teardown = Operator(
    "expert_parallel_dispatch_teardown",
    "Tensor number, bool with_gradients, str name",
    "(Tensor x, Tensor scales, Tensor row_weights, Tensor tokens_per_expert, Tensor offsets, "
    "Tensor recv_counts_cumsum)",
    run=_dispatch_teardown,
    outputs=_dispatch_teardown_outputs,
)

combine_setup = Operator(
    "expert_parallel_combine_setup",
    "Tensor y, Tensor expert_ids, Tensor? weights, Tensor row_weights, Tensor recv_counts_cumsum, "
    "Tensor? addend, str owner, str name",
    "Tensor",
    run=_combine_setup,
    outputs=lambda **_: torch.empty((), dtype=torch.int64, device="cpu"),
)

combine_teardown = Operator(
    "expert_parallel_combine_teardown",
    "Tensor number, Tensor y, Tensor expert_ids, Tensor? addend, str name",
    "Tensor",
    run=_combine_teardown,
    outputs=lambda *, y, expert_ids, **_: y.new_empty((len(expert_ids), y.shape[1])),
)

send_gradients = Operator(
    "expert_parallel_send_gradients",
    "Tensor gradient, Tensor expert_ids, SymInt num_rows, str name",
    "Tensor",
    run=_send_gradients,
    outputs=lambda *, gradient, num_rows, **_: gradient.new_empty((num_rows, gradient.shape[1])),
)

return_gradients = Operator(
    "expert_parallel_return_gradients",
    "Tensor rows, Tensor row_weights, Tensor expert_ids, Tensor recv_counts_cumsum, "
    "bool to_quantised_tokens, str name",
    "(Tensor x, Tensor weights)",
    run=_return_gradients,
    outputs=_return_gradients_outputs,
)
