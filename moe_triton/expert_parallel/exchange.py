"""The operations of one ``ExpertParallel``: checked, then run by its transport.

Values in, values out: gradients and compilers are the business of the modules beside this one.
"""

from __future__ import annotations

import dataclasses

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
from ..errors import ArgumentTypeError, ArgumentValueError, MoeError, PeerAbortError, SequenceError
from ..layout import NOWHERE, RecvPermutation, RoutingPlan
from ..ops import checks, quantization
from .results import Handle

OP = "ExpertParallel"
DISPATCH = f"{OP}.dispatch"
COMBINE = f"{OP}.combine"


class Exchange:
    """What the calls of one ``ExpertParallel`` have in common.

    Args:
        communicator: of the group.
        config: sizes and formats.
        arguments: what must be equal on all ranks.
        steps: the device steps.
        device: where the tensors are.
        exact: allocate exactly as many rows as arrive.
        counts_dtype: of the rows per expert.
        count_load: keep ``load``.

    Attributes:
        last: configuration and tokens of the last dispatch, or None.
        borrowed: memory that ``output_rows`` gave since the last combine, by the handle it is for.
        in_flight: operations of compiled code between setup and teardown, by number.
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
    ) -> None:
        self.communicator, self.config = communicator, config
        self.rank = communicator.group.rank
        self.exact, self.counts_dtype = exact, counts_dtype
        self.last: tuple[MoeConfig, DispatchInput] | None = None
        self.borrowed: dict[int, tuple[Handle, torch.Tensor]] = {}
        self.in_flight: dict[int, Pending] = {}
        self._arguments = arguments
        self._steps, self.device = steps, device
        self.load: torch.Tensor | None = None
        if count_load:
            num_local = config.topology.num_local_experts(self.rank)
            with torch.inference_mode(False):  # each dispatch adds to it outside that mode
                self.load = torch.zeros(num_local, dtype=torch.int64, device=device)

    def open(self) -> None:
        """Meet the ranks, compare arguments and allocate the windows."""
        call = self._call(OP)
        self.communicator.prepare(
            [
                (call, "dispatch", self.config.dispatch.num_bytes),
                (call, "combine", self.config.combine.num_bytes),
            ]
        )

    # Dispatch.

    def start_dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
    ) -> Pending:
        """Send each token to the ranks of its experts; arguments as in ``ExpertParallel``."""
        op, config = DISPATCH, self.config
        try:
            self._check_dispatch(op, x, topk_ids, topk_weights, scales)
        except MoeError as error:
            self.communicator.abort_peers("dispatch", op, error)
            raise
        # Copies: they are needed to the end, and routing buffers are refilled for the next layer.
        # Weights have room in the window whether they come or not, so that ranks may differ.
        # They are written outside inference mode, where inference tensors cannot be.
        with torch.inference_mode(False):
            ids = torch.empty(topk_ids.shape, dtype=torch.int32, device=x.device)
            weights = torch.empty(topk_ids.shape, dtype=config.weight_dtype, device=x.device)
        if topk_weights is None:
            weights.fill_(1)
        else:
            topk_weights = topk_weights.detach()
        given = topk_ids, topk_weights
        call = self._call(op)
        if scales is not None and scales.dim() == 2:
            # Copies of a token differ, which takes larger windows from the first such call on.
            config = dataclasses.replace(config, per_expert=True)
            call = self._call(op, config, scales="given")
        num_rows = None if self.exact else config.capacity(self.rank)
        tokens = DispatchInput(
            x, ids, weights, scales, num_rows, self.load, self.counts_dtype, given
        )
        return self.communicator.transport(op).dispatch_send(call, tokens)

    def finish_dispatch(self, operation: Pending) -> Received:
        """Wait for all ranks' tokens."""
        received = self._transport_of(DISPATCH, operation).dispatch_recv(operation)
        self.last = (operation.call.config, operation.data)
        if received.scales is None:
            return received
        scales = quantization.as_e8m0(self.config.quant, received.scales)
        return dataclasses.replace(received, scales=scales)

    def gather_load(self) -> torch.Tensor:
        """[E] int64 ``load`` of all ranks, in the order of the routed experts."""
        op, topology = f"{OP}.gather_load", self.config.topology
        if self.load is None:
            error = ArgumentValueError(op, "count_load", "be True to count anything", False)
            self.communicator.abort_peers("exchange", op, error)
            raise error
        mine = self.load
        if topology.is_shared_rank(self.rank):
            # Rows are equally long on all ranks; these hold no routed experts, and are left out.
            mine = mine.new_zeros(topology.experts_per_rank)
        sent = mine.view(torch.uint8).repeat(topology.world_size, 1)
        counts = [1] * topology.world_size
        parts = self.communicator.transport(op).all_to_all_v(op, sent, counts)
        return torch.cat(parts[topology.num_shared_ranks :]).view(torch.int64).flatten()

    # Combine.

    def numbering(
        self, expert_ids: torch.Tensor, recv_counts_cumsum: torch.Tensor
    ) -> tuple[RoutingPlan, RecvPermutation]:
        """The plan and the sources of a dispatch, from what its handle says in any case.

        Args:
            expert_ids: [T, K] int32.
            recv_counts_cumsum: [L * W] int32.
        """
        config, topology = self.config, self.config.topology
        counts = recv_counts_cumsum.diff(prepend=recv_counts_cumsum.new_zeros(1)).view(
            -1, topology.world_size
        )
        fixed = self._steps.fixed_shapes and not self.exact
        capacity = config.capacity(self.rank) if fixed else None
        return (
            self._steps.routing_plan(expert_ids, topology.num_experts),
            self._steps.recv_permutation(counts, config.alignment, capacity),
        )

    def start_combine(
        self, y: torch.Tensor, handle: Handle, addend: torch.Tensor | None = None
    ) -> tuple[Pending, torch.Tensor | None]:
        """Send the rows back.

        Args:
            y: [A, H] or [n, H], rows as dispatch delivered them.
            handle: of that dispatch.
            addend: what ``finish_combine`` will be given, to be checked before anything is sent.

        Returns:
            The operation, and the memory of ``output_rows`` if it was for this combine.
        """
        op = COMBINE
        try:
            checks.required(op, y=y, handle=handle)
            if not isinstance(handle, Handle):
                raise ArgumentTypeError(
                    op, "handle", "be that of a dispatch", type(handle).__name__
                )
            ids = handle.expert_ids
            plan, recv_permutation = handle.numbering or self.numbering(
                ids, handle.recv_counts_cumsum
            )
            self._check_outputs(op, y, len(recv_permutation.source))
            self.check_addend(addend, len(ids))
        except MoeError as error:
            self.communicator.abort_peers("combine", op, error)
            raise
        _, borrowed = self.borrowed.get(id(handle), (None, None))
        outputs = CombineInput(
            y, recv_permutation, ids, plan, handle.weights, borrowed=borrowed is not None
        )
        transport = self.communicator.transport(op)
        try:
            operation = transport.combine_send(self._call(op), outputs)
        except PeerAbortError:
            raise  # the rows still stand, for another try
        except BaseException:
            self.borrowed.clear()
            raise
        self.borrowed.clear()
        return operation, borrowed

    def finish_combine(self, operation: Pending, addend: torch.Tensor | None) -> torch.Tensor:
        """Wait for all rows, and sum those of each token; [T, H]."""
        self.check_addend(addend, len(operation.data.expert_ids))
        transport = self._transport_of(COMBINE, operation)
        return transport.combine_recv(operation, CombineEpilogue(addend=addend))

    def output_rows(self, handle: Handle) -> torch.Tensor:
        """Memory from which the next combine need not copy, if there is such."""
        if id(handle) in self.borrowed:
            return self.borrowed[id(handle)][1]
        _, recv_permutation = handle.numbering or self.numbering(
            handle.expert_ids, handle.recv_counts_cumsum
        )
        num_rows = len(recv_permutation.source)
        transport = self.communicator.transport(f"{OP}.output_rows")
        rows = None if self.borrowed else transport.output_rows(self.config, num_rows)
        if rows is None:
            shape = (num_rows, self.config.hidden)
            return torch.empty(shape, dtype=self.config.dtype, device=self.device)
        # Detached from the view it was made as, so that autograd lets the experts write to it.
        rows = rows.detach()
        self.borrowed[id(handle)] = (handle, rows)
        return rows

    # Gradients, which travel the other way.

    def send_gradients(
        self, gradient: torch.Tensor, expert_ids: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        """From [T, H], a gradient of combine's output, to [num_rows, H], the experts' rows of it.

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
        rows: torch.Tensor | None,
        row_weights: torch.Tensor,
        expert_ids: torch.Tensor,
        recv_counts_cumsum: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """From gradients of what dispatch delivered to those of what it sent.

        Always both in turn, so that the ranks' sequences agree whatever each of them asked for.

        Args:
            rows: [A, H] gradient of the rows, or None with quantised rows, which have none.
            row_weights: [A] gradient of their weights.
            expert_ids: [T, K] int32.
            recv_counts_cumsum: [L * W] int32.

        Returns:
            x: [T, H], or None.
            weights: [T, K].
        """
        op = f"{DISPATCH}, backward"
        plan, recv_permutation = self.numbering(expert_ids, recv_counts_cumsum)
        transport = self.communicator.transport(op)
        self.borrowed.clear()

        def back(call: Call, values: torch.Tensor, finish: CombineEpilogue) -> torch.Tensor:
            outputs = CombineInput(values, recv_permutation, expert_ids, plan, None)
            return transport.combine_recv(transport.combine_send(call, outputs), finish)

        x = None
        if rows is not None:
            x = back(self._call(op, gradient="of the tokens"), rows, CombineEpilogue())
        scalars = dataclasses.replace(self.config, hidden=1, dtype=self.config.weight_dtype)
        call = self._call(op, scalars, gradient="of the weights")
        weights = back(call, row_weights[:, None], CombineEpilogue(apart=True))
        return x, weights[:, : self.config.top_k, 0].contiguous()

    def _call(self, op: str, config: MoeConfig | None = None, **more: object) -> Call:
        return Call(op, config or self.config, self._arguments | more, self._steps, self.device)

    def _transport_of(self, op: str, operation: Pending) -> Transport:
        """The transport, if it is the one that set up an operation."""
        transport = self.communicator.transport(op)
        if operation.owner is not transport:
            raise SequenceError(
                op, "pending must come from this object's setup since recover(), got another's"
            )
        return transport

    # Checks.

    def check_addend(self, addend: torch.Tensor | None, num_tokens: int) -> None:
        """``addend`` is None or [T, H] of the object's dtype."""
        name, expected = "shared_expert_x", (num_tokens, self.config.hidden)
        checks.dtype(COMBINE, name, addend, (self.config.dtype,))
        checks.shape(COMBINE, name, addend, expected, "(T, H)", self.device)

    def _check_outputs(self, op: str, y: torch.Tensor, num_rows: int) -> None:
        checks.dtype(op, "y", y, (self.config.dtype,))
        checks.shape(op, "y", y, (None, self.config.hidden), "(rows, H)", self.device)
        contract = f"have at least the {num_rows} rows of dispatch"
        checks.value(op, "y", len(y) >= num_rows, contract, f"shape {tuple(y.shape)}")

    def _check_dispatch(
        self,
        op: str,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
    ) -> None:
        config = self.config
        checks.required(op, x=x, topk_ids=topk_ids)
        checks.dtype(op, "x", x, (config.dtype,))
        checks.dtype(op, "topk_ids", topk_ids, (torch.int32, torch.int64))
        checks.dtype(op, "topk_weights", topk_weights, (config.weight_dtype,))
        checks.dtype(op, "scales", scales, (torch.float32,))
        checks.shape(op, "x", x, (None, config.hidden), "(T, H)", self.device)
        most = config.max_tokens
        contract = f"have at most max_tokens = {most} rows"
        checks.value(op, "x", len(x) <= most, contract, f"shape {tuple(x.shape)}")
        expected = (len(x), config.top_k)
        checks.shape(op, "topk_ids", topk_ids, expected, "(T, K)", self.device)
        checks.shape(op, "topk_weights", topk_weights, expected, "(T, K)", self.device)
        quantization.check_factors(
            op, scales, config.quant, config.topology, config.hidden, self.device
        )
        if x.device.type == "cpu":
            active = topk_ids != NOWHERE
            num_experts = config.topology.num_experts
            checks.expert_ids(
                op, "topk_ids", topk_ids, num_experts, active=active, otherwise=" or -1 for none"
            )
