"""Expert parallelism as an object: sizes fixed and windows allocated once, calls move tokens."""

from __future__ import annotations

import numbers
from types import TracebackType

import torch
import torch.distributed as dist
from typing_extensions import Self  # a dependency of torch; part of typing from Python 3.11

from .. import comm
from ..comm import Traffic, WindowBytes
from ..errors import (
    ArgumentTypeError,
    ArgumentValueError,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
)
from ..ops import checks, layer_config, steps_on
from . import custom_ops, gradients
from .exchange import OP as _OP
from .exchange import Exchange
from .results import CombinePending, Dispatched, DispatchPending, Handle

_LONGEST_TIMEOUT = 1e6  # seconds; more overflows the clocks of some waits


class ExpertParallel:
    """Dispatch and combine for MoE layers of one shape.

    All ranks construct it together and then issue the same sequence of calls; a rank without tokens
    calls with none. One object serves any number of layers.

    Tokens, weights, expert outputs and ``shared_expert_x`` have gradients, but not tokens that are
    sent quantised. Dispatch and combine are each other's backward, so going backward communicates:
    all ranks do it for the same calls, having asked for gradients of the same arguments.
    ``torch.compile`` takes the calls whole, and keeps all of them in their order.

    Args:
        group: a ``ProcessGroup``, a group's name, or None for the default process group; None where
            torch.distributed is not initialised means one rank alone.
        num_experts: E routed experts, a multiple of the ranks that hold them.
        top_k: K experts per token.
        hidden: H.
        max_tokens: most tokens any rank dispatches in one call.
        dtype: torch.bfloat16, float16, float32, or float64 to check gradients with.
        quant: None, or how rows are quantised before they are sent: "int8", "e4m3" and "e5m2" with
            a scale per row, "group_e4m3" and "group_e5m2" with one for every 128 elements,
            "mx_e4m3" and "mx_e5m2" with a power of two for every 32, "int8_static" with factors
            that each dispatch is given.
        shared_experts: NS shared experts on ranks of their own.
        shared_ranks: S ranks for them, the first of the group, a multiple of NS.
        max_recv_tokens: rows to allocate for what a rank receives; None holds the worst case. More
            than that raises on every rank. A captured graph cannot raise: rows without room are
            left out of its sums, and ``num_tokens`` is above ``max_recv_tokens``.
        exact: return exactly the received rows, at the price of reading their number on the host;
            cannot be compiled.
        alignment: the rows of each local expert begin at, and are padded to, a multiple of this.
        counts_dtype: torch.int64 or torch.int32, of ``tokens_per_expert``.
        count_load: count the rows that every dispatch delivers, in ``load``.
        in_flight: dispatches, and combines, that may be set up before the first is torn down.
        timeout: seconds any wait for peers may take.
        transport: "auto", "symmetric" or "collective".
        rank: this rank, needed for an in-process group whose thread is not bound to one.
        device: where the tensors of all calls are. None stands for the accelerator where the
            process group sends no other tensors than its, as NCCL's does, and else for torch's
            default device.

    Raises:
        MoeError: a wrong argument, ranks that disagree, or a transport that cannot work here.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | str | None = None,
        *,
        num_experts: int,
        top_k: int,
        hidden: int,
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        quant: str | None = None,
        shared_experts: int = 0,
        shared_ranks: int = 0,
        max_recv_tokens: int | None = None,
        exact: bool = False,
        alignment: int = 1,
        counts_dtype: torch.dtype = torch.int64,
        count_load: bool = False,
        in_flight: int = 1,
        timeout: float = 30.0,
        transport: str = "auto",
        rank: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        resolved = comm.resolve(_OP, group, rank)
        self.rank, self.world_size = resolved.rank, resolved.size
        try:
            contract = f"be {self.rank}, this rank of the group, or None"
            checks.value(_OP, "rank", rank in (None, self.rank), contract, rank)
            _check_connection(in_flight, timeout, transport)
            contract = "be torch.int64 or torch.int32"
            held = counts_dtype in (torch.int64, torch.int32)
            checks.value(_OP, "counts_dtype", held, contract, counts_dtype)
            config = layer_config(
                _OP,
                self.world_size,
                num_experts=num_experts,
                top_k=top_k,
                hidden=hidden,
                max_tokens=max_tokens,
                dtype=dtype,
                quant=quant,
                shared_experts=shared_experts,
                shared_ranks=shared_ranks,
                max_recv_tokens=max_recv_tokens,
                alignment=alignment,
            )
            self.device = _device(device, resolved)
            steps = steps_on(self.device)
        except MoeError as error:
            comm.abort_communicator(resolved, _OP, error)
            raise
        communicator = comm.open_communicator(
            resolved, transport=transport, in_flight=int(in_flight), timeout=timeout
        )
        arguments: dict[str, object] = {
            "num_experts": int(num_experts),
            "top_k": config.top_k,
            "hidden": config.hidden,
            "max_tokens": config.max_tokens,
            "dtype": str(dtype),
            "quant": quant,
            "shared_experts": int(shared_experts),
            "shared_ranks": int(shared_ranks),
            "max_recv_tokens": config.max_rows,
            "alignment": config.alignment,
        }
        self._exchange = Exchange(
            communicator,
            config,
            arguments,
            steps,
            self.device,
            exact=exact,
            counts_dtype=counts_dtype,
            count_load=count_load,
        )
        try:
            self._exchange.open()
        except PeerTimeoutError:
            comm.abandon_communicator(communicator)
            raise
        except BaseException:
            comm.close_communicator(communicator)
            raise
        self._name = custom_ops.register(self._exchange)

    # What there is on this rank.

    @property
    def num_local_experts(self) -> int:
        """L: routed experts on this rank, or 1 on a shared rank."""
        return self._exchange.config.topology.num_local_experts(self.rank)

    @property
    def local_experts(self) -> range:
        """Global ids of this rank's routed experts; empty on a shared rank."""
        return self._exchange.config.topology.local_experts(self.rank)

    @property
    def is_shared_rank(self) -> bool:
        """Whether this rank holds a shared expert instead of routed ones."""
        return self._exchange.config.topology.is_shared_rank(self.rank)

    @property
    def capacity(self) -> int:
        """A: rows of ``Dispatched.x``, unless ``exact``."""
        return self._exchange.config.capacity(self.rank)

    @property
    def transport(self) -> str | None:
        """One of "single", "symmetric" and "collective"; None after ``close()``."""
        return self._exchange.communicator.transport_name

    @property
    def window_bytes(self) -> WindowBytes:
        """Memory set aside for windows on this rank; none unless the transport is symmetric."""
        if self.transport is None:
            return WindowBytes(0, 0)
        transport = self._exchange.communicator.transport(f"{_OP}.window_bytes")
        return WindowBytes(transport.window_bytes("dispatch"), transport.window_bytes("combine"))

    @property
    def traffic(self) -> Traffic | None:
        """What the last dispatch asks of the wires between ranks; None before the first."""
        return None if self._exchange.last is None else comm.traffic(*self._exchange.last)

    @property
    def load(self) -> torch.Tensor | None:
        """[L] int64 rows that dispatches have delivered for each local expert, padding left out.

        They are counted where the rows are numbered, without a launch of their own, and those of
        replayed graphs too; backward passes are not. ``load.zero_()`` starts over. None without
        ``count_load``.
        """
        return self._exchange.load

    def gather_load(self) -> torch.Tensor:
        """The ``load`` of all ranks together, for ``moe_triton.eplb``; collective.

        Returns:
            [E] int64 rows for each routed expert. Where these are replicas of others,
            ``RoutingPlan.logical_load`` adds them up.

        Raises:
            ArgumentValueError: constructed without ``count_load``.
            PeerAbortError, PeerTimeoutError, BrokenGroupError: as in ``dispatch``.
        """
        return self._exchange.gather_load()

    # Calls.

    def dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        scales: torch.Tensor | None = None,
    ) -> Dispatched:
        """Send each token to the ranks of its experts.

        Args:
            x: [T, H] of the object's dtype, T at most max_tokens, and 0 for an idle rank.
            topk_ids: [T, K] int32 or int64 in [0, E), distinct within a row; -1 for a slot that
                goes nowhere.
            topk_weights: [T, K] float32, or float64 where x is; they travel along, and combine
                applies them.
            scales: float32 factors of the rows before they are quantised: [NS + E, H], one row for
                each expert, shared ones first; for "int8_static", which needs them, also [H] or [1]
                for all experts. None without quant and with MX.

        Raises:
            ArgumentTypeError, ArgumentValueError: nothing was sent; the peers raise PeerAbortError.
            ReceiveOverflowError: some rank received more than max_recv_tokens.
            PeerTimeoutError: peers did not come; the group is broken until ``recover()``.
        """
        return self.dispatch_teardown(self.dispatch_setup(x, topk_ids, topk_weights, scales=scales))

    def dispatch_setup(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        scales: torch.Tensor | None = None,
    ) -> DispatchPending:
        """The first half of ``dispatch``: send; waits only while arguments are new.

        Args:
            x: as in ``dispatch``.
            topk_ids: as in ``dispatch``.
            topk_weights: as in ``dispatch``.
            scales: as in ``dispatch``.

        Returns:
            What ``dispatch_teardown`` takes.

        Raises:
            The errors of ``dispatch``.
        """
        if torch.compiler.is_compiling():
            number = custom_ops.dispatch_setup(
                x=x, topk_ids=topk_ids, topk_weights=topk_weights, scales=scales, name=self._name
            )
            ids = topk_ids.to(torch.int32, copy=True)
            weights = None if topk_weights is None else topk_weights.detach().clone()
            return DispatchPending(number, x, ids, topk_weights, weights)
        operation = self._exchange.start_dispatch(x, topk_ids, topk_weights, scales)
        tokens = operation.data
        weights = None if topk_weights is None else tokens.weights
        return DispatchPending(operation, x, tokens.expert_ids, topk_weights, weights)

    def dispatch_teardown(self, pending: DispatchPending) -> Dispatched:
        """The second half of ``dispatch``: wait for all ranks' tokens. In the order of the setups.

        After a ``PeerTimeoutError`` it may be called again, for a peer that was merely late.

        Args:
            pending: what ``dispatch_setup`` returned.

        Raises:
            The errors of ``dispatch``.
        """
        numbering = None
        if isinstance(pending.operation, torch.Tensor):
            rows, scales, row_weights, per_expert, offsets, recv_counts_cumsum = (
                custom_ops.dispatch_teardown(number=pending.operation, name=self._name)
            )
        else:
            received = self._exchange.finish_dispatch(pending.operation)
            rows, scales, row_weights = received.x, received.scales, received.weights
            per_expert = received.totals
            offsets, recv_counts_cumsum = (
                received.recv_permutation.offsets,
                received.recv_permutation.recv_counts_cumsum,
            )
            numbering = received.plan, received.recv_permutation
        if gradients.needed(pending.x, pending.topk_weights):
            # What nobody wrote would make the gradients of the experts' parameters NaN.
            rest = torch.arange(len(rows), device=rows.device) >= offsets[-1]
            outputs = rows.masked_fill_(rest[:, None], 0), row_weights.masked_fill_(rest, 0)
            recv_permutation = (
                pending.x,
                pending.topk_weights,
                pending.expert_ids,
                recv_counts_cumsum,
            )
            rows, row_weights = gradients.Dispatch.apply(
                *recv_permutation, outputs, *self._identity()
            )
        return Dispatched(
            rows,
            scales,
            None if pending.weights is None else row_weights,
            per_expert,
            offsets,
            recv_counts_cumsum[-1],
            Handle(pending.expert_ids, pending.weights, row_weights, recv_counts_cumsum, numbering),
        )

    def combine(
        self, y: torch.Tensor, handle: Handle, *, shared_expert_x: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Bring the experts' rows back and sum those of each token with its weights.

        The sum runs in float32, experts in the order of topk_ids, then shared experts, then
        ``shared_expert_x``, and is rounded once. Without topk_weights every weight is 1.

        Args:
            y: [A, H] or [n, H] of the object's dtype, rows as dispatch delivered them.
            handle: of that dispatch.
            shared_expert_x: [T, H] of the object's dtype to add with weight 1.

        Returns:
            [T, H] of the object's dtype.

        Raises:
            The errors of ``dispatch``.
        """
        pending = self._combine_setup(y, handle, shared_expert_x)
        return self.combine_teardown(pending, shared_expert_x=shared_expert_x)

    def output_rows(self, handle: Handle) -> torch.Tensor:
        """Memory for the experts to write their outputs to, so that combine need not copy them.

        The memory is void after the next combine, whichever it is; a later one refuses it. Only
        after a ``PeerAbortError`` it may be given to combine again. Nobody has to use it: combine
        takes any tensor.

        Args:
            handle: of a dispatch.

        Returns:
            [n, H] of the object's dtype, uninitialised; n rows as dispatch delivered them, those of
            padding included.
        """
        return self._exchange.output_rows(handle)

    def combine_setup(self, y: torch.Tensor, handle: Handle) -> CombinePending:
        """The first half of ``combine``: send the rows back; waits only while arguments are new.

        Args:
            y: as in ``combine``; must not change before the teardown.
            handle: as in ``combine``.

        Returns:
            What ``combine_teardown`` takes.

        Raises:
            The errors of ``dispatch``.
        """
        return self._combine_setup(y, handle, None)

    def _combine_setup(
        self, y: torch.Tensor, handle: Handle, addend: torch.Tensor | None
    ) -> CombinePending:
        if torch.compiler.is_compiling():
            number = custom_ops.combine_setup(
                y=y,
                expert_ids=handle.expert_ids,
                weights=handle.weights,
                row_weights=handle.row_weights,
                recv_counts_cumsum=handle.recv_counts_cumsum,
                addend=addend,
                name=self._name,
            )
            return CombinePending(number, y, handle, None)
        operation, borrowed = self._exchange.start_combine(y, handle, addend)
        return CombinePending(operation, y, handle, borrowed)

    def combine_teardown(
        self, pending: CombinePending, *, shared_expert_x: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The second half of ``combine``: wait for all rows and sum. In the order of the setups.

        A wrong ``shared_expert_x`` leaves the operation in flight, and the call may be repeated.

        Args:
            pending: what ``combine_setup`` returned.
            shared_expert_x: as in ``combine``.

        Returns:
            [T, H] of the object's dtype.

        Raises:
            The errors of ``dispatch``.
        """
        y, handle = pending.y, pending.handle
        if isinstance(pending.operation, torch.Tensor):
            out = custom_ops.combine_teardown(
                number=pending.operation,
                y=y,
                expert_ids=handle.expert_ids,
                addend=shared_expert_x,
                name=self._name,
            )
        else:
            try:
                out = self._exchange.finish_combine(pending.operation, shared_expert_x)
            except PeerAbortError:
                if pending.borrowed is not None:
                    self._exchange.borrowed[id(handle)] = (handle, pending.borrowed)
                raise
        if gradients.needed(y, handle.row_weights, shared_expert_x):
            # The values are needed again, and lent memory is void from the next combine on.
            y = y if pending.borrowed is None else y.clone()
            recv_permutation = y, handle.row_weights, shared_expert_x, handle.expert_ids
            out = gradients.Combine.apply(*recv_permutation, (out,), *self._identity())
        return out

    def _identity(self) -> tuple[str, Exchange | None]:
        """How gradients find the exchange, and what keeps it until then, but in compiled code."""
        return self._name, None if torch.compiler.is_compiling() else self._exchange

    # Life and death.

    def check(self) -> None:
        """Raise ``BrokenGroupError`` if a timeout has broken the group."""
        self._exchange.communicator.raise_if_broken(f"{_OP}.check")

    def recover(self) -> None:
        """Start over after a timeout, with fresh windows; collective.

        Operations in flight are lost. A rank that was restarted constructs a new object instead.
        Objects find each other by their number among those that their process has constructed for
        the group: the new process constructs as many as the other ranks have, in the same order,
        while these recover theirs. A closed one among them has nobody to be recovered with.
        """
        self._exchange.borrowed.clear()
        self._exchange.in_flight.clear()
        self._exchange.communicator.recover(f"{_OP}.recover")

    def close(self) -> None:
        """Give up the windows. Peers notice when they next wait for this rank."""
        comm.close_communicator(self._exchange.communicator)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_connection(in_flight: int, timeout: float, transport: str) -> None:
    checks.integers(_OP, in_flight=in_flight)
    checks.value(_OP, "in_flight", in_flight >= 1, "be at least 1", in_flight)
    if not isinstance(timeout, numbers.Real):
        raise ArgumentTypeError(_OP, "timeout", "be a number of seconds", repr(timeout))
    contract = f"be positive and at most {_LONGEST_TIMEOUT:g} s"
    checks.value(_OP, "timeout", 0 < timeout <= _LONGEST_TIMEOUT, contract, timeout)
    choices = comm.TRANSPORTS
    checks.value(_OP, "transport", transport in choices, f"be in {choices}", repr(transport))


def _device(device: torch.device | str | None, group: comm.Group) -> torch.device:
    """The device that an argument means, with its number."""
    if device is None:
        device = torch.get_default_device()
        if comm.only_on_device(group):
            device = torch.accelerator.current_accelerator() or device
    contract = "be a device of this PyTorch"
    try:
        found = torch.device(device)
    except TypeError as error:
        raise ArgumentTypeError(_OP, "device", contract, repr(device)) from error
    except RuntimeError as error:
        raise ArgumentValueError(_OP, "device", contract, repr(device)) from error
    if found.type == "cpu":
        # Tensors on cpu:0 say that they are on cpu.
        return torch.device("cpu")
    if found.index is None:
        steps_on(found)  # says why a device cannot be used
        found = torch.device(found.type, torch.get_device_module(found).current_device())
    return found
