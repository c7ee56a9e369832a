r"""SGLang: its expert-parallel MoE layers over ``ExpertParallel``.

    MOE_TRITON_SGLANG=1 python -m sglang.launch_server --model-path MODEL --tp W --dp W \
        --enable-dp-attention --moe-a2a-backend deepep

SGLang calls ``register`` in each of its processes, through the entry point in its group
``sglang.srt.plugins``. Without the variable it does nothing. With it, three hooks in SGLang's own
registry apply where the backend is ``deepep``, whose name all models know; DeepEP need not be
installed:

- ``create_moe_dispatcher`` makes our dispatcher,
- ``get_moe_impl_class`` answers ``FusedMoE``, as the class for DeepEP insists on DeepGEMM,
- ``post_experts_output_is_complete`` answers True, as combine sums the rows of all ranks.

The experts get copies of tokens for one expert each, with local ids and weight 1; combine applies
the weights. On CPUs there are as many rows as arrived, on devices the most that can arrive, those
after the last one with id -1.

SGLang is imported by ``register`` and not before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ArgumentTypeError, UnavailableError
from .expert_rows import (
    ExpertExchange,
    ExpertRows,
    ExpertRowsPending,
    Options,
    SumsPending,
    close_exchanges,
    exchange_for,
)

__all__ = ["close_exchanges", "register"]

_OP = "integrations.sglang"
_LAYERS = "sglang.srt.layers.moe"
# Ranks of an engine may be minutes apart while one of them compiles.
_TIMEOUT = 300.0


def register() -> None:
    """Route expert-parallel MoE layers through this library if ``MOE_TRITON_SGLANG=1``.

    A second call changes nothing.

    Raises:
        UnavailableError: SGLang is missing, or has no registry of hooks.
    """
    if os.environ.get("MOE_TRITON_SGLANG") != "1":
        return
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    except ImportError as error:
        problem = f"needs SGLang 0.5.23: {error}"
        raise UnavailableError(f"{_OP}.register", problem) from error
    hooks = {
        f"{_LAYERS}.fused_moe_triton.layer.create_moe_dispatcher": _create_dispatcher,
        f"{_LAYERS}.ep_moe.layer.get_moe_impl_class": _experts_class,
        f"{_LAYERS}.utils.post_experts_output_is_complete": _output_is_complete,
    }
    for target, hook in hooks.items():
        registered = [function for _, function, _ in HookRegistry._hooks[target]]
        if hook not in registered:
            HookRegistry.register(target, hook, HookType.AROUND)


def _is_ours() -> bool:
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    return get_moe_a2a_backend().is_deepep()


def _create_dispatcher(original: Callable[..., Any], config: Any, quant_method: Any) -> Any:
    if not _is_ours():
        return original(config, quant_method)
    from sglang.srt.batch_overlap.two_batch_overlap import is_tbo_enabled
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.utils.common import get_device

    return _dispatcher_class()(
        get_parallel().tp_group.device_group,
        config.num_experts,
        weights_on_input=config.apply_router_weight_on_input,
        in_flight=2 if is_tbo_enabled() else 1,
        exact=get_device() == "cpu",
    )


def _experts_class(original: Callable[..., Any], quant_config: Any) -> Any:
    if not _is_ours():
        return original(quant_config)
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    return FusedMoE


def _output_is_complete(original: Callable[..., Any], **arguments: Any) -> bool:
    return _is_ours() or original(**arguments)


class Dispatcher:
    """What SGLang calls before and after the experts of one layer.

    ``_dispatcher_class`` adds SGLang's base class. The halves are for two-batch overlap, whose two
    sub-batches are in flight together.

    Args:
        group: of the ranks that hold the experts.
        num_experts: E, a multiple of the ranks.
        weights_on_input: the experts multiply their input by the weights, so combine must not.
        in_flight: sub-batches.
        exact: as many rows as arrive; else the most that can.
    """

    def __init__(
        self,
        group: Any,
        num_experts: int,
        *,
        weights_on_input: bool = False,
        in_flight: int = 1,
        exact: bool = True,
    ) -> None:
        super().__init__()
        self._group, self._num_experts = group, num_experts
        self._weights_on_input = weights_on_input
        self._options = Options(timeout=_TIMEOUT, exact=exact, in_flight=in_flight)
        # By sub-batch.
        self._dispatches: dict[int, tuple[ExpertExchange, ExpertRowsPending, torch.dtype]] = {}
        self._rows: dict[int, tuple[ExpertExchange, ExpertRows]] = {}
        self._combines: dict[int, tuple[ExpertExchange, SumsPending]] = {}

    def dispatch(
        self, hidden_states: torch.Tensor, topk_output: Any, tbo_subbatch_index: int | None = None
    ) -> Any:
        """Send the tokens and wait for the rows.

        Args:
            hidden_states: [T, H].
            topk_output: SGLang's standard one: weights [T, K] and global ids [T, K], -1 for none.
            tbo_subbatch_index: 0 or 1 with two-batch overlap.

        Returns:
            SGLang's standard output: rows [R, H], and their weights and local ids [R, 1].

        Raises:
            ArgumentTypeError: another form of ``topk_output``.
            MoeError: as ``ExpertParallel.dispatch``.
        """
        self.dispatch_a(hidden_states, topk_output, tbo_subbatch_index)
        return self.dispatch_b(tbo_subbatch_index)

    def dispatch_a(
        self, hidden_states: torch.Tensor, topk_output: Any, tbo_subbatch_index: int | None = None
    ) -> None:
        """Send the tokens; arguments and errors as ``dispatch``."""
        weights = getattr(topk_output, "topk_weights", None)
        ids = getattr(topk_output, "topk_ids", None)
        if weights is None or ids is None:
            contract = "have topk_weights and topk_ids, as SGLang's standard form has"
            got = type(topk_output).__name__
            raise ArgumentTypeError(f"{_OP}.dispatch", "topk_output", contract, got)
        exchange = exchange_for(self._group, self._num_experts, self._options)
        pending = exchange.dispatch_setup(hidden_states, ids, weights, max_tokens=_max_tokens())
        self._dispatches[tbo_subbatch_index or 0] = exchange, pending, ids.dtype

    def dispatch_b(self, tbo_subbatch_index: int | None = None) -> Any:
        """Wait for the rows; result and errors as ``dispatch``."""
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        batch = tbo_subbatch_index or 0
        exchange, pending, id_dtype = self._dispatches.pop(batch)
        rows = exchange.dispatch_teardown(pending)
        self._rows[batch] = exchange, rows
        ids = rows.experts.to(id_dtype)[:, None]
        if self._weights_on_input:
            assert rows.weights is not None
            weights = rows.weights.float()[:, None]
        else:
            weights = torch.ones_like(ids, dtype=torch.float32)
        # Native experts do not read the logits; others take their number of tokens from them.
        logits = weights.expand(-1, self._num_experts)
        return StandardDispatchOutput(rows.x, None, StandardTopKOutput(weights, ids, logits))

    def combine(self, combine_input: Any, tbo_subbatch_index: int | None = None) -> torch.Tensor:
        """Bring the rows back and sum those of each token.

        Args:
            combine_input: SGLang's standard one, with the experts' outputs [R, H].
            tbo_subbatch_index: as in ``dispatch``.

        Returns:
            [T, H].

        Raises:
            MoeError: as ``ExpertParallel.combine``.
        """
        self.combine_a(combine_input, tbo_subbatch_index)
        return self.combine_b(tbo_subbatch_index)

    def combine_a(self, combine_input: Any, tbo_subbatch_index: int | None = None) -> None:
        """Send the rows back; arguments and errors as ``combine``."""
        batch = tbo_subbatch_index or 0
        exchange, rows = self._rows.pop(batch)
        y = combine_input.hidden_states
        pending = exchange.combine_setup(y, rows, weighted=self._weights_on_input)
        self._combines[batch] = exchange, pending

    def combine_b(self, tbo_subbatch_index: int | None = None) -> torch.Tensor:
        """Wait for the rows; result and errors as ``combine``."""
        exchange, pending = self._combines.pop(tbo_subbatch_index or 0)
        return exchange.combine_teardown(pending)


@functools.cache
def _dispatcher_class() -> type:
    """``Dispatcher`` as a class of SGLang's; its base exists once SGLang is imported."""
    from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher

    bases = (Dispatcher, BaseDispatcher)
    return type("MoETritonDispatcher", bases, {"__doc__": Dispatcher.__doc__})


def _max_tokens() -> int | None:
    """Most tokens of a rank in this step, which SGLang's ranks have agreed on; None if not."""
    from sglang.srt.layers.dp_attention import get_dp_global_num_tokens, is_dp_attention_enabled

    counts = get_dp_global_num_tokens() if is_dp_attention_enabled() else None
    return max(counts) if counts else None
