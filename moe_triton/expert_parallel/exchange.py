"""The operations of one ``ExpertParallel``: checked, then run by its transport.

This module computes values; ``gradients`` and ``custom_ops`` add autograd and compilers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch

from .. import comm
from ..comm import (
    Call,
    CombineEpilogue,
    CombineInput,
    DeviceSteps,
    DispatchInput,
    MoeConfig,
    Pending,
    Received,
    Transport,
)
from ..errors import (
    ArgumentTypeError,
    ArgumentValueError,
    MoeError,
    PeerAbortError,
    SequenceError,
    UnavailableError,
)
from ..layout import NOWHERE, RecvPermutation, RoutingPlan
from ..ops import checks, quantization
from ..signatures import once_per_signature
from .results import Handle

OP = "ExpertParallel"
DISPATCH = f"{OP}.dispatch"
COMBINE = f"{OP}.combine"

_numbers = itertools.count()


class Exchange:
    """State and operations of one ``ExpertParallel``.

    Args:
        communicator: of the group.
        config: sizes and formats.
        arguments: names and values that must be equal on all ranks.
        steps: the device steps.
        device: of all tensors.
        exact: allocate exactly as many rows as arrive.
        counts_dtype: of the rows per expert.
        count_load: keep ``load``.
        quant_gradient: None, or "straight_through".

    Attributes:
        name: unique in this process; handles and compiled code refer to it.
        last: configuration and tokens of the last dispatch, or None.
        borrowed: zero-copy combine buffers since the last combine, by the id of the dispatch's
            expert ids, which its handles share.
        dispatches: dispatches of compiled code between setup and teardown, by number.
        combines: combines of compiled code, likewise.
        load: [L] int64 rows that dispatches have delivered for each local expert, or None.
    """

    def __init__(
        self,
        communicator: comm.Communicator,
        config: MoeConfig,
        arguments: dict[str, object],
        steps: DeviceSteps,
        device: torch.device,
        *,
        exact: bool,
        counts_dtype: torch.dtype,
        count_load: bool,
        quant_gradient: str | None,
    ) -> None:
        self.name = f"{OP}{next(_numbers)}"
        self.communicator, self.config = communicator, config
        self.rank = communicator.group.rank
        self.exact, self.counts_dtype = exact, counts_dtype
        self._quant_gradient = quant_gradient
        self.last: tuple[MoeConfig, DispatchInput] | None = None
        self.borrowed: dict[int, tuple[Handle, torch.Tensor]] = {}
        self.dispatches: dict[int, Pending[DispatchInput]] = {}
        self.combines: dict[int, Pending[CombineInput]] = {}
        self._arguments = arguments
        self._calls: dict[str, Call] = {}
        # Of the parts: of methods they would keep the object alive.
        self._check_tokens = once_per_signature(
            functools.partial(_check_tokens, config, device, quant_gradient)
        )
        self._check_rows = once_per_signature(functools.partial(_check_rows, config, device))
        self._steps, self.device = steps, device
        self.load: torch.Tensor | None = None
        if count_load:
            num_local = config.topology.num_local_experts(self.rank)
            with torch.inference_mode(False):  # transports add to it outside inference mode
                self.load = torch.zeros(num_local, dtype=torch.int64, device=device)

    @property
    def tokens_have_gradients(self) -> bool:
        """Whether a backward pass returns gradients of the tokens."""
        return self.config.quant is None or self._quant_gradient is not None

    def open(self) -> None:
        """Rendezvous: compare the ranks' arguments and allocate the windows."""
        call = self._call(OP)
        self.communicator.prepare([(call, "dispatch"), (call, "combine")])

    def forget_pending(self) -> None:
        """Drop all operations in flight and all borrowed buffers."""
        self.borrowed.clear()
        self.dispatches.clear()
        self.combines.clear()

    # Dispatch.

    def dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
    ) -> Pending[DispatchInput]:
        """Send each token to the ranks of its experts; arguments as in ``ExpertParallel``."""
        op, config, call = DISPATCH, self.config, self._call(DISPATCH)
        try:
            self._check_tokens(x, topk_ids, topk_weights, scales)
            num_experts, none = config.topology.num_experts, " or -1 for none"
            checks.expert_ids(op, "topk_ids", topk_ids, num_experts, absent=NOWHERE, otherwise=none)
        except MoeError as error:
            self.communicator.abort_peers("dispatch", op, error)
            raise
        # Windows hold weights on every rank, so that ranks may differ in giving some.
        if topk_weights is None:
            weights = x.new_ones(topk_ids.shape, dtype=config.weight_dtype)
        else:
            weights = topk_weights.detach()
        if scales is not None and scales.dim() == 2:
            # Each slot is a row of its own, which takes larger windows from the first such call on.
            config = dataclasses.replace(config, per_expert=True)
            call = self._call(op, config, scales="given")
        tokens = DispatchInput(
            x,
            topk_ids,
            weights,
            scales,
            num_rows=None if self.exact else config.capacity(self.rank),
            load=self.load,
            totals_dtype=self.counts_dtype,
            copy_routing=True,  # combine needs it, and the next layer refills routing buffers
        )
        return self.communicator.transport(op).dispatch_send(call, tokens)

    def dispatch_recv(self, pending: Pending[DispatchInput], *, with_gradients: bool) -> Received:
        """Wait for all ranks' tokens.

        ``with_gradients``, outside inference mode, zeros the rows after the last one, with their
        scales and weights: garbage there times a zero gradient would make the experts' weight
        gradients NaN.
        """
        received = self._transport_of(DISPATCH, pending.owner).dispatch_recv(pending)
        self.last = (pending.call.config, pending.data)
        if with_gradients and not self.exact and not torch.is_inference_mode_enabled():
            # Negative from the row after the last one; the count stays on the device.
            index = received.recv_permutation.offsets[-1] - torch.arange(
                1, len(received.x) + 1, dtype=torch.int32, device=self.device
            )
            for rows in (received.x, received.scales, received.weights):
                if rows is not None:
                    self._steps.zero_padding(rows[:, None] if rows.dim() == 1 else rows, index)
        return received

    def gather_load(self) -> torch.Tensor:
        """[E] int64 ``load`` of all ranks, in the order of the routed experts."""
        op, topology = f"{OP}.gather_load", self.config.topology
        if self.load is None:
            error = ArgumentValueError(op, "count_load", "be True to gather a load", False)
            self.communicator.abort_peers("exchange", op, error)
            raise error
        own = self.load
        if topology.is_shared_rank(self.rank):
            # all_to_all_v needs rows of one length; those of shared ranks are dropped below.
            own = own.new_zeros(topology.experts_per_rank)
        rows = own.view(torch.uint8).repeat(topology.world_size, 1)
        counts = [1] * topology.world_size
        loads = self.communicator.transport(op).all_to_all_v(self._call(op), rows, counts)
        return torch.cat(loads[topology.num_shared_ranks :]).view(torch.int64).flatten()

    # Combine.

    def numbering(
        self, expert_ids: torch.Tensor, recv_counts_cumsum: torch.Tensor
    ) -> tuple[RoutingPlan, RecvPermutation]:
        """The plan and the permutation of a dispatch, recomputed from its handle's tensors.

        Args:
            expert_ids: [T, K] int32.
            recv_counts_cumsum: [L * W] int32.
        """
        config, topology = self.config, self.config.topology
        counts = recv_counts_cumsum.diff(prepend=recv_counts_cumsum.new_zeros(1)).view(
            -1, topology.world_size
        )
        fixed = comm.fixed_shapes(self.device) and not self.exact
        capacity = config.capacity(self.rank) if fixed else None
        return (
            self._steps.routing_plan(expert_ids, topology.num_experts),
            self._steps.recv_permutation(counts, config.alignment, capacity),
        )

    def combine_send(
        self, y: torch.Tensor, handle: Handle, addend: torch.Tensor | None = None
    ) -> tuple[Pending[CombineInput], torch.Tensor | None]:
        """Send the rows back.

        Args:
            y: [A, H] or [n, H], rows as dispatch delivered them.
            handle: of that dispatch.
            addend: of the later ``combine_recv``, checked here before anything is sent.

        Returns:
            The operation, and the buffer of ``output_rows`` if it was for this combine.
        """
        op = COMBINE
        try:
            self._check_handle(op, handle)
            ids = handle.expert_ids
            plan, permutation = handle.numbering or self.numbering(ids, handle.recv_counts_cumsum)
            self._check_rows(y, permutation.source.shape[0], addend, ids.shape[0])
        except MoeError as error:
            self.communicator.abort_peers("combine", op, error)
            raise
        _, borrowed = self.borrowed.get(id(ids), (None, None))
        rows = CombineInput(y, permutation, ids, plan, handle.weights, borrowed is not None)
        transport = self.communicator.transport(op)
        try:
            pending = transport.combine_send(self._call(op), rows)
        except PeerAbortError:
            raise  # the buffers stay valid for another try
        except BaseException:
            self.borrowed.clear()
            raise
        self.borrowed.clear()
        return pending, borrowed

    def combine_recv(
        self, pending: Pending[CombineInput], addend: torch.Tensor | None
    ) -> torch.Tensor:
        """Wait for all rows, and sum those of each token; [T, H].

        ``addend`` has passed ``check_addend``.
        """
        transport = self._transport_of(COMBINE, pending.owner)
        return transport.combine_recv(pending, CombineEpilogue(addend=addend))

    def output_rows(self, handle: Handle) -> torch.Tensor:
        """The zero-copy combine buffer of the next combine, or other memory where it has none."""
        op = f"{OP}.output_rows"
        self._check_handle(op, handle)
        key = id(handle.expert_ids)
        if key in self.borrowed:
            return self.borrowed[key][1]
        num_rows = handle.row_weights.shape[0]  # those of Dispatched.x
        transport = self.communicator.transport(op)
        rows = None if self.borrowed else transport.output_rows(self.config, num_rows)
        if rows is None:
            hidden, dtype = self.config.hidden, self.config.dtype
            return torch.empty(num_rows, hidden, dtype=dtype, device=self.device)
        # Autograd forbids experts to write to a view of the window, but not to a detached one.
        rows = rows.detach()
        self.borrowed[key] = (handle, rows)
        return rows

    # Gradients, which travel the other way.

    def send_gradients(
        self, gradient: torch.Tensor, expert_ids: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        """Dispatch [T, H], a gradient of combine's output, to [num_rows, H] of the experts' rows.

        Rows come as in the dispatch of the same ids; those after the last one are zeros.
        """
        op = f"{COMBINE}, backward"
        config = dataclasses.replace(self.config, quant=None, with_weights=False)
        transport = self.communicator.transport(op)
        tokens = DispatchInput(gradient, expert_ids, num_rows=num_rows)
        call = self._call(op, config, gradient="of the sums")
        received = transport.dispatch_recv(transport.dispatch_send(call, tokens))
        source = received.recv_permutation.source
        received.x[len(source) :] = 0
        self._steps.zero_padding(received.x, source)
        return received.x

    def return_gradients(
        self,
        rows: torch.Tensor,
        row_weights: torch.Tensor,
        expert_ids: torch.Tensor,
        recv_counts_cumsum: torch.Tensor,
        to_quantised_tokens: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Combine the gradients of dispatch's outputs into those of its inputs.

        Every rank issues both combines, whichever gradients it needs: sequences must agree.

        Args:
            rows: [A, H] gradient of the rows, dequantised where they were sent quantised.
            row_weights: [A] gradient of their weights.
            expert_ids: [T, K] int32.
            recv_counts_cumsum: [L * W] int32.
            to_quantised_tokens: whether tokens that were sent quantised require gradients.

        Returns:
            x: [T, H], or None without ``tokens_have_gradients``.
            weights: [T, K].

        Raises:
            UnavailableError: the tokens require gradients that quantised rows do not have.
        """
        op = f"{DISPATCH}, backward"
        if to_quantised_tokens and not self.tokens_have_gradients:
            error = UnavailableError(
                op,
                "x must require no gradient where rows are quantised, got one that does with "
                f"quant={self.config.quant!r}; dispatch x.detach(), or construct the object with "
                'quant_gradient="straight_through"',
            )
            self.communicator.abort_peers("combine", op, error)
            raise error
        plan, permutation = self.numbering(expert_ids, recv_counts_cumsum)
        transport = self.communicator.transport(op)
        self.borrowed.clear()

        def combine(call: Call, y: torch.Tensor, epilogue: CombineEpilogue) -> torch.Tensor:
            inputs = CombineInput(y, permutation, expert_ids, plan, None)
            return transport.combine_recv(transport.combine_send(call, inputs), epilogue)

        x = None
        if self.tokens_have_gradients:
            x = combine(self._call(op, gradient="of the tokens"), rows, CombineEpilogue())
        scalars = dataclasses.replace(self.config, hidden=1, dtype=self.config.weight_dtype)
        call = self._call(op, scalars, gradient="of the weights")
        weights = combine(call, row_weights[:, None], CombineEpilogue(apart=True))
        return x, weights[:, : self.config.top_k, 0].contiguous()

    def _call(self, op: str, config: MoeConfig | None = None, **more: object) -> Call:
        if config is not None or more:
            return Call(op, config or self.config, self._arguments | more, self._steps, self.device)
        if op not in self._calls:
            self._calls[op] = Call(op, self.config, self._arguments, self._steps, self.device)
        return self._calls[op]

    def _transport_of(self, op: str, owner: Transport) -> Transport:
        """The transport, if it is the one that sent an operation."""
        transport = self.communicator.transport(op)
        if owner is not transport:
            raise SequenceError(
                op, "pending must come from this object's setup since recover(), got another's"
            )
        return transport

    # Checks.

    def check_addend(self, addend: torch.Tensor | None, num_tokens: int) -> None:
        """``addend`` is None or [T, H] of the object's dtype."""
        _check_addend(self.config, self.device, addend, num_tokens)

    def _check_handle(self, op: str, handle: Handle) -> None:
        if not isinstance(handle, Handle):
            checks.required(op, handle=handle)
            raise ArgumentTypeError(op, "handle", "be that of a dispatch", type(handle).__name__)
        if handle.owner != self.name:
            contract = f"come from a dispatch of this object, {self.name}"
            raise ArgumentValueError(op, "handle", contract, f"that of {handle.owner}")


def _check_tokens(
    config: MoeConfig,
    device: torch.device,
    quant_gradient: str | None,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> None:
    """Check all but the values of a dispatch's arguments."""
    op = DISPATCH
    checks.required(op, x=x, topk_ids=topk_ids)
    checks.dtype(op, "x", x, (config.dtype,))
    checks.dtype(op, "topk_ids", topk_ids, (torch.int32, torch.int64))
    checks.dtype(op, "topk_weights", topk_weights, (config.weight_dtype,))
    checks.dtype(op, "scales", scales, (torch.float32,))
    checks.shape(op, "x", x, (None, config.hidden), "(T, H)", device)
    contract = f"have at most max_tokens = {config.max_tokens} rows"
    checks.value(op, "x", len(x) <= config.max_tokens, contract, f"shape {tuple(x.shape)}")
    expected = (len(x), config.top_k)
    checks.shape(op, "topk_ids", topk_ids, expected, "(T, K)", device)
    checks.shape(op, "topk_weights", topk_weights, expected, "(T, K)", device)
    quantization.check_factors(op, scales, config.quant, config.topology, config.hidden, device)
    if quant_gradient is not None:
        contract = f"be None with quant_gradient={quant_gradient!r}"
        checks.value(op, "scales", scales is None, contract, "factors")


def _check_rows(
    config: MoeConfig,
    device: torch.device,
    y: torch.Tensor,
    num_rows: int,
    addend: torch.Tensor | None,
    num_tokens: int,
) -> None:
    """Check the arguments of a combine of the ``num_rows`` rows of a dispatch."""
    op = COMBINE
    checks.required(op, y=y)
    checks.dtype(op, "y", y, (config.dtype,))
    checks.shape(op, "y", y, (None, config.hidden), "(rows, H)", device)
    contract = f"have at least the {num_rows} rows of dispatch"
    checks.value(op, "y", len(y) >= num_rows, contract, f"shape {tuple(y.shape)}")
    _check_addend(config, device, addend, num_tokens)


def _check_addend(
    config: MoeConfig, device: torch.device, addend: torch.Tensor | None, num_tokens: int
) -> None:
    name, expected = "shared_expert_x", (num_tokens, config.hidden)
    checks.dtype(COMBINE, name, addend, (config.dtype,))
    checks.shape(COMBINE, name, addend, expected, "(T, H)", device)
