"""Expert parallelism as an object: sizes fixed and windows allocated once, calls move tokens."""

from __future__ import annotations

import dataclasses
import numbers
from types import TracebackType

import torch
import torch.distributed as dist
from typing_extensions import Self  # a dependency of torch; part of typing from Python 3.11

from . import comm
from .comm import (
    Call,
    Finish,
    MoeConfig,
    Outputs,
    Pending,
    Tokens,
    Traffic,
    Transport,
    WindowBytes,
)
from .errors import (
    ArgumentTypeError,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    SequenceError,
)
from .layout import NOWHERE, Plan, Sources
from .ops import checks, device_steps, layer_config

_OP = "ExpertParallel"
_LONGEST_TIMEOUT = 1e6  # seconds; more overflows the clocks of some waits
_CPU = torch.device("cpu")  # the only device whose steps exist so far


@dataclasses.dataclass(frozen=True)
class Handle:
    """What combine needs of a dispatch; good for any number of combines.

    Attributes:
        expert_ids: [T, K] int32 of this rank's tokens.
        weights: [T, K] float32 (float64 where the tokens are), or None.
        plan: of the tokens.
        sources: the numbering of the received rows.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor | None
    plan: Plan
    sources: Sources


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """What a rank received.

    Rows are sorted by (local expert, source rank, token). Those of local expert i end, padding
    included, before row ``offsets[i]``, which is what grouped matrix products ask for. Padding
    rows are zeros; rows after the last one are not written.

    Attributes:
        x: [A, H] of the model's dtype, or int8; [n, H] with ``exact``.
        scales: [A] float32 such that x * scales approximates the tokens; None without quant.
        weights: [A] routing weights of the rows, of the dtype of topk_weights; None without those.
        tokens_per_expert: [L] rows of each local expert without padding, int64 or ``counts_dtype``.
        offsets: [L] int32.
        num_tokens: 0-d int32, received rows without padding.
        handle: for combine.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    weights: torch.Tensor | None
    tokens_per_expert: torch.Tensor
    offsets: torch.Tensor
    num_tokens: torch.Tensor
    handle: Handle


@dataclasses.dataclass(frozen=True)
class DispatchPending:
    """A dispatch between setup and teardown.

    Attributes:
        operation: the transport's part.
        with_weights: the caller gave weights.
    """

    operation: Pending
    with_weights: bool


@dataclasses.dataclass(frozen=True)
class CombinePending:
    """A combine between setup and teardown.

    Attributes:
        operation: the transport's part.
        lent: the handle and the memory of ``output_rows``, if this is the combine they were for.
    """

    operation: Pending
    lent: tuple[Handle, torch.Tensor] | None


class ExpertParallel:
    """Dispatch and combine for MoE layers of one shape.

    All ranks construct it together and then issue the same sequence of calls; a rank without tokens
    calls with none. One object serves any number of layers.

    Args:
        group: a ``ProcessGroup``, a group's name, or None for the default process group; None where
            torch.distributed is not initialised means one rank alone.
        num_experts: E routed experts, a multiple of the ranks that hold them.
        top_k: K experts per token.
        hidden: H.
        max_tokens: most tokens any rank dispatches in one call.
        dtype: torch.bfloat16, float16, float32, or float64 to check gradients with.
        quant: None, or "int8" to send rows quantised with a scale per row.
        shared_experts: NS shared experts on ranks of their own.
        shared_ranks: S ranks for them, the first of the group, a multiple of NS.
        max_recv_tokens: rows to allocate for what a rank receives; None holds the worst case. More
            than that raises on every rank.
        exact: return exactly the received rows, at the price of reading their number on the host.
        alignment: the rows of each local expert begin at, and are padded to, a multiple of this.
        counts_dtype: torch.int64 or torch.int32, of ``tokens_per_expert``.
        in_flight: dispatches, and combines, that may be set up before the first is torn down.
        timeout: seconds any wait for peers may take.
        transport: "auto", "symmetric" or "collective".
        rank: this rank, for an in-process group whose thread is not bound to one.

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
        in_flight: int = 1,
        timeout: float = 30.0,
        transport: str = "auto",
        rank: int | None = None,
    ) -> None:
        resolved = comm.resolve(_OP, group, rank)
        self.rank, self.world_size = resolved.rank, resolved.size
        self._exact, self._counts_dtype = exact, counts_dtype
        self._last: tuple[MoeConfig, Tokens] | None = None  # dispatch
        # What output_rows gave since the last combine, by the handle it is for.
        self._lent: dict[int, tuple[Handle, torch.Tensor]] = {}
        try:
            _check_connection(in_flight, timeout, transport)
            contract = "be torch.int64 or torch.int32"
            held = counts_dtype in (torch.int64, torch.int32)
            checks.value(_OP, "counts_dtype", held, contract, counts_dtype)
            self._config = layer_config(
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
            self._steps = device_steps(_CPU)
        except MoeError as error:
            comm.refuse_endpoint(resolved, _OP, error)
            raise
        self._endpoint = comm.open_endpoint(
            resolved, transport=transport, in_flight=int(in_flight), timeout=timeout
        )
        self._arguments: dict[str, object] = {
            "num_experts": int(num_experts),
            "top_k": self._config.top_k,
            "hidden": self._config.hidden,
            "max_tokens": self._config.max_tokens,
            "dtype": str(dtype),
            "quant": quant,
            "shared_experts": int(shared_experts),
            "shared_ranks": int(shared_ranks),
            "max_recv_tokens": self._config.max_rows,
            "alignment": self._config.alignment,
        }
        try:
            self._open()
        except PeerTimeoutError:
            comm.abandon_endpoint(self._endpoint)
            raise
        except BaseException:
            comm.close_endpoint(self._endpoint)
            raise

    def _open(self) -> None:
        """Meet the ranks, compare arguments and allocate the windows."""
        call = Call(_OP, self._config, self._arguments, self._steps)
        self._endpoint.prepare(
            [
                (call, "dispatch", self._config.dispatch.num_bytes),
                (call, "combine", self._config.combine.num_bytes),
            ]
        )

    # What there is on this rank.

    @property
    def num_local_experts(self) -> int:
        """L: routed experts on this rank, or 1 on a shared rank."""
        return self._config.topology.num_local_experts(self.rank)

    @property
    def local_experts(self) -> range:
        """Global ids of this rank's routed experts; empty on a shared rank."""
        return self._config.topology.local_experts(self.rank)

    @property
    def is_shared_rank(self) -> bool:
        """Whether this rank holds a shared expert instead of routed ones."""
        return self._config.topology.is_shared_rank(self.rank)

    @property
    def capacity(self) -> int:
        """A: rows of ``Dispatched.x``, unless ``exact``."""
        return self._config.capacity(self.rank)

    @property
    def transport(self) -> str | None:
        """One of "single", "symmetric" and "collective"; None after ``close()``."""
        return self._endpoint.transport_name

    @property
    def window_bytes(self) -> WindowBytes:
        """Memory set aside for windows on this rank; none unless the transport is symmetric."""
        if self.transport is None:
            return WindowBytes(0, 0)
        transport = self._endpoint.transport(f"{_OP}.window_bytes")
        return WindowBytes(transport.window_bytes("dispatch"), transport.window_bytes("combine"))

    @property
    def traffic(self) -> Traffic | None:
        """What the last dispatch asks of the wires between ranks; None before the first."""
        return None if self._last is None else comm.traffic(*self._last)

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
            scales: [NS + E, H] float32 smooth factors, only with quant="int8".

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
        op = f"{_OP}.dispatch"
        try:
            self._check_dispatch(op, x, topk_ids, topk_weights, scales)
        except MoeError as error:
            self._endpoint.reject("dispatch", op, error)
            raise
        # Weights have room in the window whether they come or not, so that ranks may differ.
        weights = topk_weights
        if weights is None:
            weights = x.new_ones(topk_ids.shape, dtype=self._config.weight_dtype)
        config, arguments = self._config, self._arguments
        if scales is not None:
            # Copies of a token differ, which takes larger windows from the first such call on.
            config = dataclasses.replace(config, per_expert=True)
            arguments = arguments | {"scales": "given"}
        # Copies: the handle needs them later, and routing buffers are refilled for the next layer.
        ids, weights = topk_ids.to(torch.int32, copy=True), weights.detach().clone()
        num_rows = None if self._exact else config.capacity(self.rank)
        tokens = Tokens(x, ids, weights, scales, num_rows)
        call = Call(op, config, arguments, self._steps)
        pending = self._endpoint.transport(op).dispatch_setup(call, tokens)
        return DispatchPending(pending, with_weights=topk_weights is not None)

    def dispatch_teardown(self, pending: DispatchPending) -> Dispatched:
        """The second half of ``dispatch``: wait for all ranks' tokens. In the order of the setups.

        After a ``PeerTimeoutError`` it may be called again, for a peer that was merely late.

        Args:
            pending: what ``dispatch_setup`` returned.

        Raises:
            The errors of ``dispatch``.
        """
        transport = self._transport_of(f"{_OP}.dispatch", pending.operation)
        received = transport.dispatch_teardown(pending.operation)
        tokens = pending.operation.data
        self._last = (pending.operation.call.config, tokens)
        return Dispatched(
            received.x,
            received.scales,
            received.weights if pending.with_weights else None,
            received.counts.sum(1, dtype=self._counts_dtype),
            received.sources.offsets,
            received.sources.ends[-1],
            Handle(
                tokens.expert_ids,
                tokens.weights if pending.with_weights else None,
                received.plan,
                received.sources,
            ),
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
        op = f"{_OP}.combine"
        try:
            self._check_outputs(op, y, handle)
            self._check_addend(op, shared_expert_x, handle.expert_ids)
        except MoeError as error:
            self._endpoint.reject("combine", op, error)
            raise
        return self.combine_teardown(self.combine_setup(y, handle), shared_expert_x=shared_expert_x)

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
        num_rows = handle.sources.source.numel()
        if id(handle) in self._lent:
            return self._lent[id(handle)][1]
        transport = self._endpoint.transport(f"{_OP}.output_rows")
        rows = None if self._lent else transport.output_rows(self._config, num_rows)
        if rows is None:
            return torch.empty((num_rows, self._config.hidden), dtype=self._config.dtype)
        # Detached from the view it was made as, so that autograd lets the experts write to it.
        rows = rows.detach()
        self._lent[id(handle)] = (handle, rows)
        return rows

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
        op = f"{_OP}.combine"
        try:
            self._check_outputs(op, y, handle)
        except MoeError as error:
            self._endpoint.reject("combine", op, error)
            raise
        lent = self._lent.get(id(handle))
        outputs = Outputs(
            y,
            handle.sources,
            handle.expert_ids,
            handle.plan,
            handle.weights,
            lent=lent is not None,
        )
        call = Call(op, self._config, self._arguments, self._steps)
        transport = self._endpoint.transport(op)
        try:
            operation = transport.combine_setup(call, outputs)
        except PeerAbortError:
            raise  # the rows still stand, for another try
        except BaseException:
            self._lent.clear()
            raise
        self._lent.clear()
        return CombinePending(operation, lent)

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
        op = f"{_OP}.combine"
        operation = pending.operation
        self._check_addend(op, shared_expert_x, operation.data.expert_ids)
        try:
            finish = Finish(addend=shared_expert_x)
            return self._transport_of(op, operation).combine_teardown(operation, finish)
        except PeerAbortError:
            if pending.lent is not None:
                self._lent[id(pending.lent[0])] = pending.lent
            raise

    def _transport_of(self, op: str, pending: Pending) -> Transport:
        """The transport, if it is the one that set up an operation."""
        transport = self._endpoint.transport(op)
        if pending.owner is not transport:
            raise SequenceError(
                op, "pending must come from this object's setup since recover(), got another's"
            )
        return transport

    def _check_outputs(self, op: str, y: torch.Tensor, handle: Handle) -> None:
        checks.required(op, y=y, handle=handle)
        if not isinstance(handle, Handle):
            raise ArgumentTypeError(op, "handle", "be that of a dispatch", type(handle).__name__)
        checks.dtype(op, "y", y, (self._config.dtype,))
        checks.shape(op, "y", y, (None, self._config.hidden), "(rows, H)", _CPU)
        rows = handle.sources.source.numel()
        contract = f"have at least the {rows} rows of dispatch"
        checks.value(op, "y", len(y) >= rows, contract, f"shape {tuple(y.shape)}")

    def _check_addend(self, op: str, addend: torch.Tensor | None, ids: torch.Tensor) -> None:
        expected = (len(ids), self._config.hidden)
        checks.dtype(op, "shared_expert_x", addend, (self._config.dtype,))
        checks.shape(op, "shared_expert_x", addend, expected, "(T, H)", _CPU)

    # Life and death.

    def check(self) -> None:
        """Raise ``BrokenGroupError`` if a timeout has broken the group."""
        self._endpoint.raise_if_broken(f"{_OP}.check")

    def recover(self) -> None:
        """Start over after a timeout, with fresh windows; collective.

        Operations in flight are lost. A rank that was restarted constructs a new object instead.
        Objects find each other by their number among those that their process has constructed for
        the group: the new process constructs as many as the other ranks have, in the same order,
        while these recover theirs. A closed one among them has nobody to be recovered with.
        """
        self._lent.clear()
        self._endpoint.recover(f"{_OP}.recover")

    def close(self) -> None:
        """Give up the windows. Peers notice when they next wait for this rank."""
        comm.close_endpoint(self._endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_dispatch(
        self,
        op: str,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        scales: torch.Tensor | None,
    ) -> None:
        config = self._config
        checks.required(op, x=x, topk_ids=topk_ids)
        checks.dtype(op, "x", x, (config.dtype,))
        checks.dtype(op, "topk_ids", topk_ids, (torch.int32, torch.int64))
        checks.dtype(op, "topk_weights", topk_weights, (config.weight_dtype,))
        checks.dtype(op, "scales", scales, (torch.float32,))
        checks.shape(op, "x", x, (None, config.hidden), "(T, H)", _CPU)
        most = config.max_tokens
        contract = f"have at most max_tokens = {most} rows"
        checks.value(op, "x", len(x) <= most, contract, f"shape {tuple(x.shape)}")
        expected = (len(x), config.top_k)
        checks.shape(op, "topk_ids", topk_ids, expected, "(T, K)", _CPU)
        checks.shape(op, "topk_weights", topk_weights, expected, "(T, K)", _CPU)
        if scales is not None:
            contract = 'be None unless quant is "int8"'
            checks.value(op, "scales", config.quant is not None, contract, "a tensor")
            rows = config.topology.num_shared_experts + config.topology.num_experts
            expected = (rows, config.hidden)
            checks.shape(op, "scales", scales, expected, "(NS + E, H)", _CPU)
        checks.expert_ids(
            op, "topk_ids", topk_ids, config.topology.num_experts, active=topk_ids != NOWHERE
        )


def _check_connection(in_flight: int, timeout: float, transport: str) -> None:
    checks.integers(_OP, in_flight=in_flight)
    checks.value(_OP, "in_flight", in_flight >= 1, "be at least 1", in_flight)
    if not isinstance(timeout, numbers.Real):
        raise ArgumentTypeError(_OP, "timeout", "be a number of seconds", repr(timeout))
    contract = f"be positive and at most {_LONGEST_TIMEOUT:g} s"
    checks.value(_OP, "timeout", 0 < timeout <= _LONGEST_TIMEOUT, contract, timeout)
    choices = comm.TRANSPORTS
    checks.value(_OP, "transport", transport in choices, f"be in {choices}", repr(transport))
