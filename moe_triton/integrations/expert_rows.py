"""Send an engine's tokens to the ranks of their experts, and bring the experts' rows back.

An engine's MoE layer has tokens, expert ids and weights, and experts that compute rows.
``ExpertExchange`` connects the two; docs/engines.md shows how to write an integration with it. All
layers share one exchange per group, number of experts and options. Windows are allocated at the
first call of each shape.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from ..expert_parallel import CombinePending, Dispatched, DispatchPending, ExpertParallel
from ..ops.layer_config import QuantGradient, QuantName, TransportName


@dataclasses.dataclass(frozen=True)
class Options:
    """How rows are sent; equal on all ranks.

    Attributes:
        quant: None, or "int8" to send rows quantised per row.
        max_tokens: most tokens that a rank passes to one call. None: each call says it, or the
            ranks agree on it by a small all-reduce; windows grow when needed.
        transport: a name of ``comm.TRANSPORTS``, as for ``ExpertParallel``.
        timeout: limit in seconds of each wait for peers.
        quant_gradient: None, or "straight_through", as for ``ExpertParallel``: without it a
            backward pass that reaches tokens sent quantised raises.
        exact: True for as many rows as arrive, whose number the host reads. False for the most
            that can arrive, which a device can capture: rows after the last one are garbage, and
            have expert -1.
        in_flight: dispatches, and combines, that may be set up before the first is torn down.
    """

    quant: QuantName | None = None
    max_tokens: int | None = None
    transport: TransportName = "auto"
    timeout: float = 30.0
    quant_gradient: QuantGradient | None = None
    exact: bool = True
    in_flight: int = 1


@dataclasses.dataclass(frozen=True)
class ExpertRows:
    """Rows for the experts of this rank.

    Attributes:
        x: [R, H] of the tokens' dtype, or as they were sent with ``keep_quantized``. R is at least
            1: a rank that receives no token has one row of zeros for expert 0, which changes no
            result, spares the experts empty inputs and keeps them in the backward pass.
        experts: [R] int64, the local expert of each row, ascending; with ``exact=False`` -1 for
            the rows after the last one.
        weights: [R] routing weights of the rows, in the dtype passed to dispatch; or None.
        scales: [R] or [R, groups] float32 of quantised rows, with ``keep_quantized``; or None.
        layer: the ``ExpertParallel`` that dispatched the rows and combines them.
        dispatched: its result.
    """

    x: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor | None
    scales: torch.Tensor | None
    layer: ExpertParallel
    dispatched: Dispatched


@dataclasses.dataclass(frozen=True)
class ExpertRowsPending:
    """A dispatch between setup and teardown.

    Attributes:
        layer: the ``ExpertParallel`` that sent the tokens.
        operation: its pending operation.
        dtype: of the tokens.
        weight_dtype: of the weights passed to dispatch, or None.
    """

    layer: ExpertParallel
    operation: DispatchPending
    dtype: torch.dtype
    weight_dtype: torch.dtype | None


@dataclasses.dataclass(frozen=True)
class SumsPending:
    """A combine between setup and teardown.

    Attributes:
        layer: the ``ExpertParallel`` that sent the rows.
        operation: its pending operation.
    """

    layer: ExpertParallel
    operation: CombinePending


class ExpertExchange:
    """Dispatch and combine for tokens of any shape.

    Expert e is on rank ``e // (num_experts / ranks)`` of the group. All ranks issue the same calls
    in the same order; a rank without tokens passes zero rows. Exact counts need the host: under
    ``torch.compile``, call it from a function marked ``torch.compiler.disable``.

    Args:
        group: of the ranks, or None for one rank.
        num_experts: E, a multiple of the ranks.
        options: how rows are sent.
    """

    def __init__(self, group: dist.ProcessGroup | None, num_experts: int, options: Options) -> None:
        self.group = group
        self._num_experts = num_experts
        self._options = options
        # (hidden, top_k, dtype, bucket) -> the layer and the max_tokens of its windows.
        self._layers: dict[tuple[int, int, torch.dtype, int], tuple[ExpertParallel, int]] = {}

    def dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        max_tokens: int | None = None,
    ) -> ExpertRows:
        """Send each token to the ranks of its experts.

        Args:
            x: [T, H] bfloat16, float16, float32 or float64.
            expert_ids: [T, K] int32 or int64 in [0, E), distinct within a row; -1 for a slot that
                goes nowhere.
            weights: [T, K] of any float dtype, applied by the experts or by ``combine``; or None.
            max_tokens: most tokens that any rank passes to this call, the same on all ranks, where
                the engine knows it; it spares the all-reduce.

        Raises:
            MoeError: as ``ExpertParallel.dispatch``.
        """
        pending = self.dispatch_setup(x, expert_ids, weights, max_tokens=max_tokens)
        return self.dispatch_teardown(pending)

    def dispatch_setup(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        max_tokens: int | None = None,
    ) -> ExpertRowsPending:
        """Send the tokens; compute that needs no rows can run before the teardown.

        Args:
            x: as in ``dispatch``.
            expert_ids: as in ``dispatch``.
            weights: as in ``dispatch``.
            max_tokens: as in ``dispatch``.

        Raises:
            The errors of ``dispatch``.
        """
        layer = self._layer(x, expert_ids, max_tokens)
        wide = torch.promote_types(x.dtype, torch.float32)
        operation = layer.dispatch_setup(
            x, expert_ids, None if weights is None else weights.to(wide)
        )
        return ExpertRowsPending(
            layer, operation, x.dtype, None if weights is None else weights.dtype
        )

    def dispatch_teardown(
        self, pending: ExpertRowsPending, *, keep_quantized: bool = False
    ) -> ExpertRows:
        """Wait for all ranks' tokens and return this rank's rows.

        Args:
            pending: from ``dispatch_setup``.
            keep_quantized: return quantised rows as they were sent, with their scales.

        Raises:
            The errors of ``dispatch``.
        """
        layer = pending.layer
        dispatched = layer.dispatch_teardown(pending.operation)
        x, weights, scales = dispatched.x, dispatched.weights, dispatched.scales
        if scales is not None and not keep_quantized:
            x, scales = dispatched.dequantized(pending.dtype), None
        experts = self._experts(layer, dispatched)
        if weights is not None:
            weights = weights.to(pending.weight_dtype)
        if len(x) == 0:
            experts = pad(experts, (0, 1))
            weights = None if weights is None else pad(weights, (0, 1))
            if scales is None:
                x = pad(x, (0, 0, 0, 1))
            else:  # codes have no gradient, and pad takes no float8
                x, scales = x.new_zeros(1, *x.shape[1:]), scales.new_zeros(1, *scales.shape[1:])
        return ExpertRows(x, experts, weights, scales, layer, dispatched)

    def _experts(self, layer: ExpertParallel, dispatched: Dispatched) -> torch.Tensor:
        """[R] the local expert of each row."""
        num_rows, device = len(dispatched.x), dispatched.x.device
        if self._options.exact:
            experts = torch.arange(layer.num_local_experts, device=device)
            counts = dispatched.tokens_per_expert
            return torch.repeat_interleave(experts, counts, output_size=num_rows)
        experts = torch.searchsorted(
            dispatched.offsets,
            torch.arange(num_rows, dtype=torch.int32, device=device),
            right=True,
        )
        return torch.where(experts < layer.num_local_experts, experts, -1)

    def combine(self, y: torch.Tensor, rows: ExpertRows, *, weighted: bool = False) -> torch.Tensor:
        """Send the experts' rows back and return each token's weighted sum.

        Args:
            y: [R, H] of the tokens' dtype, the experts' outputs for ``rows.x``.
            rows: of the dispatch.
            weighted: True if the experts have applied ``rows.weights``: the rows are only summed.

        Returns:
            [T, H] of the tokens' dtype, summed in float32 (float64) and rounded once.

        Raises:
            MoeError: as ``ExpertParallel.combine``.
        """
        return self.combine_teardown(self.combine_setup(y, rows, weighted=weighted))

    def combine_setup(
        self, y: torch.Tensor, rows: ExpertRows, *, weighted: bool = False
    ) -> SumsPending:
        """Send the experts' rows back.

        Args:
            y: as in ``combine``; must not change before the teardown.
            rows: as in ``combine``.
            weighted: as in ``combine``.

        Raises:
            The errors of ``combine``.
        """
        handle = rows.dispatched.handle
        if weighted:
            handle = handle.unweighted()
        operation = rows.layer.combine_setup(y[: len(rows.dispatched.x)], handle)
        return SumsPending(rows.layer, operation)

    def combine_teardown(self, pending: SumsPending) -> torch.Tensor:
        """Wait for all rows and return each token's weighted sum.

        Args:
            pending: from ``combine_setup``.

        Returns:
            As ``combine``.

        Raises:
            The errors of ``combine``.
        """
        return pending.layer.combine_teardown(pending.operation)

    def close(self) -> None:
        """Free the windows, on all ranks; the next call allocates new ones."""
        for layer, _ in self._layers.values():
            layer.close()
        self._layers.clear()

    def _layer(
        self, x: torch.Tensor, expert_ids: torch.Tensor, max_tokens: int | None
    ) -> ExpertParallel:
        """The layer for tokens of this shape, with windows for the largest rank's tokens."""
        # A tensor without dimensions makes a size of 0, which the layer refuses on all ranks.
        hidden = x.shape[-1] if x.dim() else 0
        top_k = expert_ids.shape[-1] if expert_ids.dim() else 0
        needed = self._max_tokens(x, max_tokens)
        # Without exact counts the windows' size is that of the experts' input.
        key = hidden, top_k, x.dtype, 0 if self._options.exact else needed
        layer, room = self._layers.get(key, (None, 0))
        # transport is None after comm.close_all().
        if layer is None or layer.transport is None or room < needed:
            # Keep the smaller layer open: a backward pass may still need it.
            layer = ExpertParallel(
                self.group,
                num_experts=self._num_experts,
                top_k=top_k,
                hidden=hidden,
                max_tokens=needed,
                dtype=x.dtype,
                quant=self._options.quant,
                quant_gradient=self._options.quant_gradient,
                exact=self._options.exact,
                in_flight=self._options.in_flight,
                timeout=self._options.timeout,
                transport=self._options.transport,
                device=x.device,
            )
            self._layers[key] = layer, needed
        return layer

    def _max_tokens(self, x: torch.Tensor, max_tokens: int | None) -> int:
        """Tokens per rank that the windows must hold, the same on all ranks."""
        if self._options.max_tokens is not None:
            return self._options.max_tokens
        if max_tokens is None:
            most = torch.tensor(len(x) if x.dim() else 0, device=x.device)
            if self.group is not None and self.group.size() > 1:
                dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
            max_tokens = int(most)
        # Powers of two: a sequence that grows token by token rarely needs new windows.
        return 1 << max(max_tokens - 1, 0).bit_length()


_exchanges: dict[tuple[str, int, Options], ExpertExchange] = {}


def exchange_for(
    group: dist.ProcessGroup | None, num_experts: int, options: Options
) -> ExpertExchange:
    """The exchange of a group, created by the first call; all ranks call in the same order.

    It lives until ``close_exchanges``. If it ended with its last model, each rank's garbage
    collector would decide alone whether the next model shares it.

    Args:
        group: of the ranks; None for the default process group, or for one rank if
            torch.distributed is not initialised.
        num_experts: E, a multiple of the ranks.
        options: how rows are sent.
    """
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    key = ("" if group is None else group.group_name, num_experts, options)
    exchange = _exchanges.get(key)
    # A process group that was destroyed and created again may have the old name.
    if exchange is None or exchange.group is not group:
        exchange = _exchanges[key] = ExpertExchange(group, num_experts, options)
    return exchange


def close_exchanges() -> None:
    """Free the windows of all exchanges of this process, on all ranks.

    The next call allocates new windows, also after a ``PeerTimeoutError`` broke the old ones.
    """
    for exchange in _exchanges.values():
        exchange.close()
    _exchanges.clear()
