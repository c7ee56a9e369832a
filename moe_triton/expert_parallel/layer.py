"""``ExpertParallel``: dispatch and combine for layers of one shape, with windows allocated once."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

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
    UnavailableError,
)
from ..ops import checks, layer_config, quantization, steps_on
from ..ops.layer_config import QuantGradient, QuantName, TransportName
from . import custom_ops, gradients
from .exchange import OP as _OP
from .exchange import Exchange
from .results import CombinePending, Dispatched, DispatchPending, Handle

_LONGEST_TIMEOUT = 1e6  # seconds; more overflows the clocks of some waits
SINGLE = "single"  # as a group: one rank alone


class ExpertParallel:
    """Dispatch and combine for MoE layers of one shape.

    All ranks construct it together and then issue the same sequence of calls; a rank without tokens
    calls with none. One object serves any number of layers.

    Tokens, weights, expert outputs and ``shared_expert_x`` have gradients; tokens that are sent
    quantised only with ``quant_gradient``, and else a backward pass that reaches them raises
    ``UnavailableError``. Dispatch and combine are each other's backward, so the backward pass
    communicates: all ranks run it for the same calls, with gradients of the same arguments.
    ``torch.compile`` traces the calls without graph breaks and keeps their order.

    An object of one rank can be copied and pickled; the copy has windows and a ``load`` of its own.
    One of a larger group cannot, as its windows are shared with peers: share the object, or
    construct another on every rank.

    Args:
        group: a ``ProcessGroup``, a group's name, or None for the default process group. One rank
            alone is "single", and also None where torch.distributed is not initialised and the
            environment's WORLD_SIZE is 1 or not set.
        num_experts: E routed experts, a multiple of the ranks that hold them.
        top_k: K experts per token.
        hidden: H.
        max_tokens: most tokens any rank dispatches in one call.
        dtype: torch.bfloat16, float16, float32, or float64 to check gradients with.
        quant: None, or how rows are quantised before they are sent: "int8", "e4m3" and "e5m2" with
            a scale per row, "group_e4m3" and "group_e5m2" with one for every 128 elements,
            "pow2_e4m3" with a power of two for every 128, "mx_e4m3" and "mx_e5m2" with one for
            every 32, "int8_static" with factors that each dispatch is given.
        quant_gradient: None, or "straight_through": the gradient of ``Dispatched.dequantized`` goes
            to the tokens as if they had been sent unquantised. Rows dequantised by other means have
            none. Not with "int8_static", and dispatch then takes no ``scales``.
        shared_experts: NS shared experts on ranks of their own.
        shared_ranks: S ranks for them, the first of the group, a multiple of NS.
        max_recv_tokens: rows to allocate for the tokens that a rank receives; None holds the worst
            case. More rows raise on every rank. A captured graph cannot raise: rows beyond the
            limit are left out of its sums, and ``num_tokens`` is above ``max_recv_tokens``.
        exact: return exactly the received rows, at the price of reading their number on the host;
            cannot be compiled.
        alignment: the rows of each local expert begin at, and are padded to, a multiple of this.
        counts_dtype: torch.int64 or torch.int32, of ``tokens_per_expert``.
        count_load: count the rows that every dispatch delivers, in ``load``.
        in_flight: dispatches, and combines, that may be set up before the first is torn down.
        timeout: seconds any wait for peers may take.
        transport: "single" (one rank alone), "local" (windows between threads of one process),
            "shm" (windows between processes of one host), "symmetric" (windows in whichever memory
            fits the group and the device), "collective" (torch.distributed), or "auto" for the
            first of these that works.
        rank: this rank, needed for an in-process group whose thread is not bound to one.
        device: of the tensors of all calls. None stands for the accelerator where the process
            group sends only its tensors, as NCCL's does, and else for torch's default device.

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
        quant: QuantName | None = None,
        quant_gradient: QuantGradient | None = None,
        shared_experts: int = 0,
        shared_ranks: int = 0,
        max_recv_tokens: int | None = None,
        exact: bool = False,
        alignment: int = 1,
        counts_dtype: torch.dtype = torch.int64,
        count_load: bool = False,
        in_flight: int = 1,
        timeout: float = 30.0,
        transport: TransportName = "auto",
        rank: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        resolved = _resolve(group, rank)
        self.rank, self.world_size = resolved.rank, resolved.size
        try:
            contract = f"be {self.rank}, this rank of the group, or None"
            checks.value(_OP, "rank", rank in (None, self.rank), contract, rank)
            _check_connection(in_flight, timeout, transport)
            contract, dtypes = "be torch.int64 or torch.int32", (torch.int64, torch.int32)
            checks.value(_OP, "counts_dtype", counts_dtype in dtypes, contract, counts_dtype)
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
            _check_quant_gradient(quant_gradient, quant)
            self.device = _device(device, resolved)
            steps = steps_on(self.device)
        except MoeError as error:
            comm.abort_communicator(resolved, _OP, error)
            raise
        communicator = comm.open_communicator(
            resolved, transport=transport, in_flight=int(in_flight), timeout=timeout
        )
        agreed: dict[str, object] = {
            "num_experts": int(num_experts),
            "top_k": config.top_k,
            "hidden": config.hidden,
            "max_tokens": config.max_tokens,
            "dtype": str(dtype),
            "quant": quant,
            "quant_gradient": quant_gradient,
            "shared_experts": int(shared_experts),
            "shared_ranks": int(shared_ranks),
            "max_recv_tokens": config.max_rows,
            "alignment": config.alignment,
        }
        self._options = agreed | {
            "dtype": dtype,
            "exact": exact,
            "counts_dtype": counts_dtype,
            "count_load": count_load,
            "in_flight": int(in_flight),
            "timeout": timeout,
            "transport": transport,
            "device": self.device,
        }
        self._exchange = Exchange(
            communicator,
            config,
            agreed,
            steps,
            self.device,
            exact=exact,
            counts_dtype=counts_dtype,
            count_load=count_load,
            quant_gradient=quant_gradient,
        )
        try:
            self._exchange.open()
        except PeerTimeoutError:
            comm.abandon_communicator(communicator)
            raise
        except BaseException:
            comm.close_communicator(communicator)
            raise
        custom_ops.register(self._exchange)
        self._name = self._exchange.name

    def __repr__(self) -> str:
        names = ("num_experts", "top_k", "hidden", "max_tokens", "dtype", "quant")
        sizes = ", ".join(f"{name}={self._options[name]}" for name in names)
        where = f"rank {self.rank} of {self.world_size}, transport={self.transport}"
        return f"ExpertParallel({where}, {sizes}, device={self.device})"

    def __reduce__(self) -> tuple[Callable[..., ExpertParallel], tuple[dict[str, Any]]]:
        if self.world_size > 1:
            raise UnavailableError(
                _OP,
                "only an object of one rank can be copied or pickled, got one of "
                f"{self.world_size} ranks, whose windows are shared with peers; share the object, "
                "which serves any number of layers, or construct another on every rank, and save "
                "a model by its state_dict()",
            )
        return _of_one_rank, (self._options,)

    # Properties.

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
        """One of "single", "local", "shm", "symm_mem", "collective"; None after ``close()``."""
        return self._exchange.communicator.transport_name

    @property
    def window_bytes(self) -> WindowBytes:
        """Bytes of this rank's windows; zero over the transports "single" and "collective"."""
        if self.transport is None:
            return WindowBytes(0, 0)
        transport = self._exchange.communicator.transport(f"{_OP}.window_bytes")
        return WindowBytes(transport.window_bytes("dispatch"), transport.window_bytes("combine"))

    @property
    def traffic(self) -> Traffic | None:
        """Rows and bytes that the last dispatch sent; None before the first."""
        return None if self._exchange.last is None else comm.traffic(*self._exchange.last)

    @property
    def load(self) -> torch.Tensor | None:
        """[L] int64 rows that dispatches have delivered for each local expert, without padding.

        The numbering of the rows counts them, in no launch of its own, replayed graphs included;
        backward passes are not counted. ``load.zero_()`` starts over. None without ``count_load``.
        """
        return self._exchange.load

    def gather_load(self) -> torch.Tensor:
        """Gather the ``load`` of all ranks, for ``moe_triton.eplb``; collective.

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

        Rows after the last one are zeros if gradients are enabled and inference mode is off,
        whichever tensors require them: experts may train alone. Else they are garbage.

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

        Arguments and errors are those of ``dispatch``.
        """
        if torch.compiler.is_compiling():
            number = custom_ops.dispatch_setup(
                x=x, topk_ids=topk_ids, topk_weights=topk_weights, scales=scales, name=self._name
            )
            ids = topk_ids.to(torch.int32, copy=True)
            weights = None if topk_weights is None else topk_weights.detach().clone()
            return DispatchPending(number, x, ids, topk_weights, weights)
        operation = self._exchange.dispatch_send(x, topk_ids, topk_weights, scales)
        tokens = operation.data
        weights = None if topk_weights is None else tokens.weights
        return DispatchPending(operation, x, tokens.expert_ids, topk_weights, weights)

    def dispatch_teardown(self, pending: DispatchPending) -> Dispatched:
        """The second half of ``dispatch``: wait for all ranks' tokens. In the order of the setups.

        Errors are those of ``dispatch``. After a ``PeerTimeoutError`` it may be called again, for a
        peer that was merely late.
        """
        numbering, gradient_path = None, None
        if isinstance(pending.operation, torch.Tensor):
            rows, scales, row_weights, per_expert, offsets, counts_cumsum = (
                custom_ops.dispatch_teardown(
                    number=pending.operation,
                    with_gradients=torch.is_grad_enabled(),
                    name=self._name,
                )
            )
        else:
            received = self._exchange.dispatch_recv(
                pending.operation, with_gradients=torch.is_grad_enabled()
            )
            rows, scales, row_weights = received.x, received.scales, received.weights
            per_expert, permutation = received.totals, received.recv_permutation
            offsets, counts_cumsum = permutation.offsets, permutation.recv_counts_cumsum
            numbering = received.plan, permutation
        if scales is not None:
            # Outside the custom op: inductor takes no op that returns float8_e8m0fnu.
            scales = quantization.as_e8m0(self._exchange.config.quant, scales)
        if gradients.needed(pending.x, pending.topk_weights):
            quantised = rows.dtype != pending.x.dtype
            differentiable = rows
            if quantised:
                differentiable = pending.x.new_zeros(()).expand(rows.shape)
            differentiable, row_weights = gradients.DispatchFunction.apply(
                pending.x,
                pending.topk_weights,
                pending.expert_ids,
                counts_cumsum,
                (differentiable, row_weights),
                *self._identity(),
                quantised,
            )
            if not quantised:
                rows = differentiable
            elif pending.x.requires_grad:
                gradient_path = differentiable
                _, owner = self._identity()
                if owner is not None and owner.tokens_have_gradients and scales is not None:
                    scales = gradients.ScalesFunction.apply(gradient_path, (scales,), owner)
        ids, weights = pending.expert_ids, pending.weights
        return Dispatched(
            rows,
            scales,
            None if weights is None else row_weights,
            per_expert,
            offsets,
            counts_cumsum[-1],
            Handle(ids, weights, row_weights, counts_cumsum, numbering, self._name),
            gradient_path,
        )

    def combine(
        self, y: torch.Tensor, handle: Handle, *, shared_expert_x: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Bring the experts' rows back and sum those of each token with its weights.

        The sum runs in float32, experts in the order of topk_ids, then shared experts, then
        ``shared_expert_x``, and is rounded once. Without topk_weights every weight is 1.

        Args:
            y: [A, H] or [n, H] of the object's dtype, rows as dispatch delivered them.
            handle: of a dispatch of this object.
            shared_expert_x: [T, H] of the object's dtype to add with weight 1.

        Returns:
            [T, H] of the object's dtype.

        Raises:
            The errors of ``dispatch``.
        """
        pending = self._combine_setup(y, handle, shared_expert_x)
        return self._combine_teardown(pending, shared_expert_x)

    def output_rows(self, handle: Handle) -> torch.Tensor:
        """The zero-copy combine buffer: rows that experts write, and combine sends without a copy.

        It is void after the next combine, of any handle; a later combine refuses it. Only after a
        ``PeerAbortError`` may it be combined again. It is optional: combine takes any tensor. Where
        the transport has no such buffer these rows are ordinary memory.

        Args:
            handle: of a dispatch of this object.

        Returns:
            Of the shape of ``Dispatched.x`` and of the object's dtype, uninitialised.

        Raises:
            ArgumentTypeError, ArgumentValueError: not a handle, or that of another object.
        """
        return self._exchange.output_rows(handle)

    def combine_setup(self, y: torch.Tensor, handle: Handle) -> CombinePending:
        """The first half of ``combine``: send the rows back; waits only while arguments are new.

        Arguments and errors are those of ``combine``; ``y`` must not change before the teardown.
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
                owner=handle.owner,
                name=self._name,
            )
            return CombinePending(number, y, handle, None)
        operation, borrowed = self._exchange.combine_send(y, handle, addend)
        return CombinePending(operation, y, handle, borrowed)

    def combine_teardown(
        self, pending: CombinePending, *, shared_expert_x: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The second half of ``combine``: wait for all rows and sum. In the order of the setups.

        Result and errors are those of ``combine``. A wrong ``shared_expert_x`` leaves the operation
        in flight, and the call may be repeated.
        """
        if not torch.compiler.is_compiling():
            self._exchange.check_addend(shared_expert_x, len(pending.handle.expert_ids))
        return self._combine_teardown(pending, shared_expert_x)

    def _combine_teardown(
        self, pending: CombinePending, addend: torch.Tensor | None
    ) -> torch.Tensor:
        y, handle = pending.y, pending.handle
        if isinstance(pending.operation, torch.Tensor):
            out = custom_ops.combine_teardown(
                number=pending.operation,
                y=y,
                expert_ids=handle.expert_ids,
                addend=addend,
                name=self._name,
            )
        else:
            try:
                out = self._exchange.combine_recv(pending.operation, addend)
            except PeerAbortError:
                if pending.borrowed is not None:
                    self._exchange.borrowed[id(handle.expert_ids)] = (handle, pending.borrowed)
                raise
        if gradients.needed(y, handle.row_weights, addend):
            if pending.borrowed is not None and handle.row_weights.requires_grad:
                # Backward needs the values, and the next combine overwrites the zero-copy buffer.
                y = y.clone()
            out = gradients.CombineFunction.apply(
                y, handle.row_weights, addend, handle.expert_ids, (out,), *self._identity()
            )
        return out

    def _identity(self) -> tuple[str, Exchange | None]:
        """Exchange name for the backward pass, and a reference to keep it alive (eager only)."""
        return self._name, None if torch.compiler.is_compiling() else self._exchange

    # Lifecycle.

    def check(self) -> None:
        """Raise ``BrokenGroupError`` if a time-out has broken the group."""
        self._exchange.communicator.raise_if_broken(f"{_OP}.check")

    def recover(self) -> None:
        """Start over after a time-out, with fresh windows; collective.

        Operations in flight are lost. A rank that was restarted constructs a new object instead.
        Objects find each other by their number among those that their process has constructed for
        the group: the new process constructs as many as the other ranks have, in the same order,
        while these recover theirs. An object that was closed has no peer to recover with.
        """
        self._exchange.forget_pending()
        self._exchange.communicator.recover(f"{_OP}.recover")

    def close(self) -> None:
        """Release the windows. Peers notice when they next wait for this rank."""
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


def _of_one_rank(options: dict[str, Any]) -> ExpertParallel:
    return ExpertParallel(SINGLE, **options)


def _resolve(group: dist.ProcessGroup | str | None, rank: int | None) -> comm.Group:
    """The group and this rank in it; None means one rank only where that is all there can be."""
    if group == SINGLE:
        return comm.Group(SINGLE, 0, 1, None)
    initialized = dist.is_available() and dist.is_initialized()
    ranks = os.environ.get("WORLD_SIZE", "1")
    if group is None and not initialized and ranks.isdigit() and int(ranks) > 1:
        raise ArgumentValueError(
            _OP,
            "group",
            f"be a process group where the environment's WORLD_SIZE is {ranks}",
            "None before torch.distributed.init_process_group(); call that first, or write "
            f"group={SINGLE!r} if each process is to be one rank alone",
        )
    return comm.resolve(_OP, group, rank)


def _check_quant_gradient(quant_gradient: str | None, quant: str | None) -> None:
    if quant_gradient is None:
        return
    name, contract = "quant_gradient", 'be None or "straight_through"'
    checks.value(_OP, name, quant_gradient == "straight_through", contract, repr(quant_gradient))
    contract, dequantizes = "be None without scales per row", quant not in (None, "int8_static")
    checks.value(_OP, name, dequantizes, contract, f"{quant_gradient!r} with quant={quant!r}")


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
    """The device of an argument, with its index."""
    if device is None:
        device = torch.get_default_device()
        if comm.only_on_device(group):
            device = torch.accelerator.current_accelerator() or device
    contract = "be a device of this PyTorch"
    try:
        parsed = torch.device(device)
    except TypeError as error:
        raise ArgumentTypeError(_OP, "device", contract, repr(device)) from error
    except RuntimeError as error:
        raise ArgumentValueError(_OP, "device", contract, repr(device)) from error
    if parsed.type == "cpu":
        # Tensors on cpu:0 report the device cpu.
        return torch.device("cpu")
    if parsed.index is None:
        steps_on(parsed)  # raises the cause where the device cannot be used
        parsed = torch.device(parsed.type, torch.get_device_module(parsed).current_device())
    return parsed
