"""What every engine needs: its tokens at the ranks of their experts, and the results back.

An engine's MoE layer has tokens, expert ids and weights, and experts that work on rows.
``RowExchange`` is what lies between, in the form that experts of any engine take; docs/engines.md
shows how to write an integration with it. There is one per group, number of experts and options,
shared by all layers, and its windows are allocated when the first call of a shape comes.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from ..errors import ArgumentValueError
from ..expert_parallel import CombinePending, Dispatched, DispatchPending, ExpertParallel
from ..ops.layer_config import QuantName, TransportName

_DISPATCH = "RowExchange.dispatch"


@dataclasses.dataclass(frozen=True)
class Options:
    """How tokens travel; equal on all ranks.

    Attributes:
        quant: None, or "int8" to send rows quantised with a scale each.
        max_tokens: most tokens that a rank brings to one call. None: the ranks tell each other
            before every call, by a small all-reduce, and windows grow when needed.
        transport: a name of ``comm.TRANSPORTS``, as for ``ExpertParallel``.
        timeout: seconds any wait for peers may take.
    """

    quant: QuantName | None = None
    max_tokens: int | None = None
    transport: TransportName = "auto"
    timeout: float = 30.0


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the experts of this rank work on.

    Attributes:
        x: [R, H] of the tokens' dtype, dequantised if they came as int8. R is at least 1: where
            nothing came there is one row of zeros for expert 0, which has no effect. It spares
            experts the empty input, and keeps their part in a backward pass.
        experts: [R] int64, the local expert of each row, ascending.
        weights: [R] the routing weights of the rows, of the dtype they were given in; or None.
        layer: the object that dispatched them, and that brings them back.
        dispatched: what it returned.
    """

    x: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor | None
    layer: ExpertParallel
    dispatched: Dispatched


@dataclasses.dataclass(frozen=True)
class RowsPending:
    """A dispatch between setup and teardown.

    Attributes:
        layer: the object that sent the tokens.
        operation: what it returned.
        dtype: of the tokens.
        weight_dtype: of the weights as they were given, or None.
    """

    layer: ExpertParallel
    operation: DispatchPending
    dtype: torch.dtype
    weight_dtype: torch.dtype | None


@dataclasses.dataclass(frozen=True)
class SumsPending:
    """A combine between setup and teardown.

    Attributes:
        layer: the object that sent the rows.
        operation: what it returned.
    """

    layer: ExpertParallel
    operation: CombinePending


class RowExchange:
    """Tokens to the ranks of their experts and back, whatever their shapes.

    Expert e is on rank ``e // (num_experts / ranks)`` of the group. All ranks issue the same calls
    in the same order; one without tokens calls with none.

    Args:
        group: of the ranks, or None for this one alone.
        num_experts: E, a multiple of the ranks.
        options: how tokens travel.
    """

    def __init__(self, group: dist.ProcessGroup | None, num_experts: int, options: Options) -> None:
        self.group = group
        self._num_experts = num_experts
        self._options = options
        # By hidden size, experts per token and dtype; with the tokens that the windows hold.
        self._layers: dict[tuple[int, int, torch.dtype], tuple[ExpertParallel, int]] = {}

    def dispatch(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor | None = None
    ) -> Rows:
        """Send each token to the ranks of its experts.

        Args:
            x: [T, H] bfloat16, float16, float32 or float64.
            expert_ids: [T, K] int32 or int64 in [0, E), distinct within a row; -1 for a slot that
                goes nowhere.
            weights: [T, K] of any float dtype, for the experts or ``combine`` to apply; or None.

        Raises:
            ArgumentValueError: the tokens are to have gradients, and travel as int8.
            MoeError: as ``ExpertParallel.dispatch``.
        """
        return self.dispatch_teardown(self.dispatch_setup(x, expert_ids, weights))

    def dispatch_setup(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor | None = None
    ) -> RowsPending:
        """The first half of ``dispatch``: send. What needs no rows can run before the second.

        Args:
            x: as in ``dispatch``.
            expert_ids: as in ``dispatch``.
            weights: as in ``dispatch``.

        Raises:
            The errors of ``dispatch``.
        """
        if self._options.quant is not None and x.requires_grad and torch.is_grad_enabled():
            contract = "be None where tokens have gradients (torch.no_grad() is for inference)"
            raise ArgumentValueError(_DISPATCH, "quant", contract, repr(self._options.quant))
        layer = self._layer(x, expert_ids.shape[1])
        wide = torch.promote_types(x.dtype, torch.float32)
        operation = layer.dispatch_setup(
            x, expert_ids, None if weights is None else weights.to(wide)
        )
        return RowsPending(layer, operation, x.dtype, None if weights is None else weights.dtype)

    def dispatch_teardown(self, pending: RowsPending) -> Rows:
        """The second half of ``dispatch``: wait for all ranks' tokens.

        Args:
            pending: what ``dispatch_setup`` returned.

        Raises:
            The errors of ``dispatch``.
        """
        layer = pending.layer
        dispatched = layer.dispatch_teardown(pending.operation)
        x, weights = dispatched.x, dispatched.weights
        if dispatched.scales is not None:
            x = dispatched.dequantized(pending.dtype)
        experts = torch.repeat_interleave(
            torch.arange(layer.num_local_experts, device=x.device),
            dispatched.tokens_per_expert,
            output_size=len(x),
        )
        if weights is not None:
            weights = weights.to(pending.weight_dtype)
        if len(x) == 0:
            x, experts = pad(x, (0, 0, 0, 1)), pad(experts, (0, 1))
            weights = None if weights is None else pad(weights, (0, 1))
        return Rows(x, experts, weights, layer, dispatched)

    def combine(self, y: torch.Tensor, rows: Rows, *, weighted: bool = False) -> torch.Tensor:
        """Bring the experts' rows back and sum those of each token with its weights.

        Args:
            y: [R, H] of the tokens' dtype, what the experts made of ``rows.x``.
            rows: of the dispatch.
            weighted: the experts have applied ``rows.weights``; only sum.

        Returns:
            [T, H] of the tokens' dtype, summed in float32 (float64) and rounded once.

        Raises:
            MoeError: as ``ExpertParallel.combine``.
        """
        return self.combine_teardown(self.combine_setup(y, rows, weighted=weighted))

    def combine_setup(self, y: torch.Tensor, rows: Rows, *, weighted: bool = False) -> SumsPending:
        """The first half of ``combine``: send the rows back.

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
        """The second half of ``combine``: wait for all rows, and sum.

        Args:
            pending: what ``combine_setup`` returned.

        Returns:
            As ``combine``.

        Raises:
            The errors of ``combine``.
        """
        return pending.layer.combine_teardown(pending.operation)

    def close(self) -> None:
        """Give up the windows; on all ranks. The next call allocates new ones."""
        for layer, _ in self._layers.values():
            layer.close()
        self._layers.clear()

    def _layer(self, x: torch.Tensor, top_k: int) -> ExpertParallel:
        """The object for tokens of this shape, with room for those of every rank."""
        key = (x.shape[1], top_k, x.dtype)
        needed = self._most_tokens(x)
        layer, held = self._layers.get(key, (None, 0))
        # Somebody may have closed all communicators of the process.
        if layer is None or layer.transport is None or held < needed:
            # The smaller one is not closed: a backward pass may still need it.
            layer = ExpertParallel(
                self.group,
                num_experts=self._num_experts,
                top_k=top_k,
                hidden=x.shape[1],
                max_tokens=needed,
                dtype=x.dtype,
                quant=self._options.quant,
                exact=True,
                timeout=self._options.timeout,
                transport=self._options.transport,
            )
            self._layers[key] = layer, needed
        return layer

    def _most_tokens(self, x: torch.Tensor) -> int:
        """Tokens that the windows must hold, the same on all ranks."""
        if self._options.max_tokens is not None:
            return self._options.max_tokens
        most = torch.tensor(len(x), device=x.device)
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        # Powers of two: a sequence that grows token by token asks for new windows rarely.
        return 1 << max(int(most) - 1, 0).bit_length()


_exchanges: dict[tuple[str, int, Options], RowExchange] = {}


def exchange_for(
    group: dist.ProcessGroup | None, num_experts: int, options: Options
) -> RowExchange:
    """The exchange of a group, made when first asked for; the same order of calls on all ranks.

    It stays until ``close_exchanges``: were it to go with the last model that uses it, garbage
    collection would decide on each rank alone whether the next model shares it.

    Args:
        group: of the ranks; None for the default process group, or for this rank alone where
            torch.distributed is not initialised.
        num_experts: E, a multiple of the ranks.
        options: how tokens travel.
    """
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    key = ("" if group is None else group.group_name, num_experts, options)
    found = _exchanges.get(key)
    # A process group that was destroyed and made again may have the old name.
    if found is None or found.group is not group:
        found = _exchanges[key] = RowExchange(group, num_experts, options)
    return found


def close_exchanges() -> None:
    """Give up the windows of all exchanges of this process; on all ranks.

    Models go on working, with new windows: also after a ``PeerTimeoutError`` has broken the old.
    """
    for found in _exchanges.values():
        found.close()
    _exchanges.clear()
