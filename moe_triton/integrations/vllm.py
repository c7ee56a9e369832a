"""vLLM: its expert-parallel MoE layers over ``ExpertParallel``.

    MOE_TRITON_VLLM=1 vllm serve MODEL --data-parallel-size W --enable-expert-parallel

vLLM calls ``register`` in each of its processes, through the entry point in its group
``vllm.general_plugins``. Without the variable it does nothing.

vLLM 0.32 and 0.33 have no registry for an exchange of another package, so ``register`` replaces one
function: ``make_moe_prepare_and_finalize_naive_dp_ep`` in ``fused_moe.all2all_utils``, which all
methods, quantised ones included, reach with the default ``--all2all-backend
allgather_reducescatter``. vLLM's own exchange stays in use without expert parallelism, and for
experts that run the router themselves.

Between router and experts, vLLM calls ``prepare`` and ``finalize``. Rows are copies of a token for
one expert each, so the experts see K = 1 and weight 1, and the weights are applied when rows are
back; for float32 on CPUs with the roundings of vLLM's own kernel, so that results are equal to the
bit. On CPUs the experts get local ids and as many rows as arrived. On devices they get vLLM's ids
and the most rows that can arrive, those after the last one with the id of an expert of another
rank, so that the layer can be captured.

vLLM is imported by ``register`` and not before.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ArgumentValueError, UnavailableError
from ..ops.layer_config import QuantName
from .expert_rows import ExpertExchange, ExpertRows, Options, close_exchanges, exchange_for

__all__ = ["close_exchanges", "register"]

_OP = "integrations.vllm"
_SYMBOL = "make_moe_prepare_and_finalize_naive_dp_ep"
# Ranks of an engine may be minutes apart while one of them compiles.
_OPTIONS = Options(timeout=300.0)


def register() -> None:
    """Route expert-parallel MoE layers through this library if ``MOE_TRITON_VLLM=1``.

    A second call changes nothing.

    Raises:
        UnavailableError: vLLM is missing, or is no version that has the function to replace.
    """
    if os.environ.get("MOE_TRITON_VLLM") != "1":
        return
    try:
        from vllm.model_executor.layers.fused_moe import all2all_utils

        original = getattr(all2all_utils, _SYMBOL)
    except (AttributeError, ImportError) as error:
        problem = f"needs vLLM 0.32 or 0.33: {error}"
        raise UnavailableError(f"{_OP}.register", problem) from error
    if not hasattr(original, "moe_triton_replaces"):
        setattr(all2all_utils, _SYMBOL, _replacement(original))


def _replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    """The function that vLLM calls for each MoE layer instead of ``original``."""

    @functools.wraps(original)
    def make(
        use_monolithic: bool, is_sequence_parallel: bool = False, num_dispatchers: int = 1
    ) -> Any:
        from vllm.config import get_current_vllm_config
        from vllm.distributed import get_tp_group
        from vllm.platforms import current_platform

        expert_parallel = get_current_vllm_config().parallel_config.enable_expert_parallel
        if use_monolithic or not expert_parallel:
            return original(use_monolithic, is_sequence_parallel, num_dispatchers)
        tp = get_tp_group()
        share = (0, 1) if is_sequence_parallel else (tp.rank_in_group, tp.world_size)
        return _prepare_finalize_class()(num_dispatchers, share, exact=current_platform.is_cpu())

    make.moe_triton_replaces = original  # type: ignore[attr-defined]
    return make


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where vLLM's experts are: linear, round-robin, or with redundant experts.

    Attributes:
        num_slots: W * L for the L experts of the rank that has most; slot s is on rank s // L.
        slots: [E] slot of each of vLLM's experts, or None where they are equal.
        experts: [L] vLLM's id of each expert of this rank.
        foreign: id of an expert that is not on this rank.
    """

    num_slots: int
    slots: torch.Tensor | None
    experts: torch.Tensor
    foreign: int

    @classmethod
    def of(cls, expert_maps: list[torch.Tensor], rank: int, device: torch.device) -> Placement:
        """The placement that the maps of all ranks say.

        Args:
            expert_maps: for each rank [E], the local number of each expert, -1 for those elsewhere.
            rank: this rank.
            device: of the tensors.

        Raises:
            ArgumentValueError: some expert is on no rank or on several, or local numbers have gaps.
        """
        maps = torch.stack([expert_map.cpu().long() for expert_map in expert_maps])
        world_size, num_experts = maps.shape
        most = int(maps.max()) + 1
        held = maps >= 0
        numbered = all(
            sorted(own[own >= 0].tolist()) == list(range(int((own >= 0).sum()))) for own in maps
        )
        if not numbered or (held.sum(dim=0) != 1).any():
            raise ArgumentValueError(
                f"{_OP}.prepare",
                "expert_map",
                "number the experts of each rank from 0, each expert on one rank, and be -1 for "
                "the others",
                maps.tolist(),
            )
        owners = held.int().argmax(dim=0)
        slots = owners * most + maps[owners, torch.arange(num_experts)]
        is_identity = torch.equal(slots, torch.arange(num_experts))
        experts = torch.zeros(most, dtype=torch.int64)
        own = held[rank].nonzero()[:, 0]
        experts[maps[rank, own]] = own
        foreign = int(held[rank].int().argmin())
        return cls(
            world_size * most,
            None if is_identity else slots.to(device),
            experts.to(device),
            foreign,
        )

    def slots_of(self, expert_ids: torch.Tensor) -> torch.Tensor:
        """Slots for ids of vLLM, [T, K] each; -1 stays."""
        if self.slots is None:
            return expert_ids
        slots = self.slots[expert_ids.long().clamp(min=0)]
        return torch.where(expert_ids < 0, -1, slots)

    def experts_of(self, local_experts: torch.Tensor) -> torch.Tensor:
        """Ids of vLLM for local numbers, [R] each; -1 becomes an expert of another rank."""
        experts = self.experts[local_experts.clamp(min=0)]
        return torch.where(local_experts < 0, self.foreign, experts)


class PrepareFinalize:
    """What vLLM calls before and after the experts of one layer.

    ``_prepare_finalize_class`` adds vLLM's base class. vLLM's ranks call in the same order, an idle
    one with a dummy batch.

    Args:
        world_size: W, the ranks of vLLM's expert-parallel group.
        share: this rank and the size of the group whose ranks call with the same tokens, and add up
            their outputs afterwards. These are tensor-parallel ranks of models without
            sequence-parallel MoE; each sends its share of the tokens, with zeros for the others.
        exact: as many rows as arrive, with local ids; else the most that can, with vLLM's ids.
    """

    def __init__(
        self, world_size: int, share: tuple[int, int] = (0, 1), *, exact: bool = True
    ) -> None:
        super().__init__()
        self._world_size = world_size
        self._share = share
        self._exact = exact
        self._expert_map: torch.Tensor | None = None
        self._placement: Placement | None = None
        self._exchange: ExpertExchange | None = None
        self._rows: ExpertRows | None = None
        # [T, K] float32 if copies return one by one, to be summed here.
        self._weights: torch.Tensor | None = None

    # What vLLM asks.

    @property
    def activation_format(self) -> Any:
        """[R, H] rows."""
        from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEActivationFormat

        return FusedMoEActivationFormat.Standard

    def topk_indices_dtype(self) -> torch.dtype | None:
        """None: int32 and int64 will do."""
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        """None: any number."""
        return None

    def num_dispatchers(self) -> int:
        """W."""
        return self._world_size

    def output_is_reduced(self) -> bool:
        """False: vLLM adds up the outputs of ranks that share their tokens."""
        return False

    def supports_async(self) -> bool:
        """True: shared experts run while the rows return."""
        return True

    def supports_dbo(self) -> bool:
        """False: one dispatch and one combine are in flight."""
        return False

    # The calls.

    def prepare(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Send the tokens and wait for the rows; arguments and result as ``prepare_async``."""
        return self.prepare_async(*args, **kwargs)()

    def prepare_async(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: Any,
        defer_input_quant: bool = False,
    ) -> Callable[[], tuple[Any, ...]]:
        """Send the tokens.

        Args:
            a1: [T, H].
            topk_weights: [T, K].
            topk_ids: [T, K] vLLM's ids, physical ones with EPLB; -1 for none.
            num_experts: E, redundant ones included.
            expert_map: [E] local numbers of this rank's experts, -1 for the others; None if they
                are E / W consecutive ones.
            apply_router_weight_on_input: multiply the tokens by their weights, of K = 1.
            quant_config: ``FusedMoEQuantConfig``, how the experts want their rows.
            defer_input_quant: the experts quantise the rows.

        Returns:
            A function that waits, and returns the rows [R, H], their scales or None, the counts of
            the rows, their expert ids [R, 1], and weights of 1 [R, 1].
        """
        part = self._part_of(len(a1))
        a1, topk_weights, topk_ids = a1[part], topk_weights[part], topk_ids[part]
        if apply_router_weight_on_input:
            a1 = a1 * topk_weights.to(a1.dtype)
        weights = None if apply_router_weight_on_input else topk_weights
        ids, most = topk_ids, _max_tokens()
        self._weights = None
        if self._exact and a1.dtype == torch.float32 and weights is not None:
            # Each copy is a token of its own, so that combine returns it alone.
            self._weights, top_k = weights, ids.shape[-1]
            a1 = a1.repeat_interleave(top_k, dim=0)
            ids, weights = ids.reshape(-1, 1), weights.reshape(-1, 1)
            most = None if most is None else most * top_k
        quant = None if defer_input_quant else _quant_in_flight(quant_config)
        placement = self._placement_for(num_experts, expert_map, a1.device)
        exchange = self._exchange_for(placement, quant)
        pending = exchange.dispatch_setup(a1, placement.slots_of(ids), weights, max_tokens=most)

        def receive() -> tuple[Any, ...]:
            rows = exchange.dispatch_teardown(pending, keep_quantized=True)
            self._exchange, self._rows = exchange, rows
            x, scales = rows.x, rows.scales
            if quant is not None:
                assert scales is not None
                scales = scales.view(len(x), -1)
            elif not defer_input_quant and quant_config.quant_dtype is not None:
                x, scales = _quantize(rows, quant_config)
            experts = rows.experts if self._exact else placement.experts_of(rows.experts)
            experts = experts.to(topk_ids.dtype)[:, None]
            ones = torch.ones_like(experts, dtype=torch.float32)
            return x, scales, _counts(rows), experts, ones

        return receive

    def finalize(self, *args: Any, **kwargs: Any) -> None:
        """Bring the rows back and sum them; arguments as ``finalize_async``."""
        self.finalize_async(*args, **kwargs)()

    def finalize_async(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        *_reduction: Any,
    ) -> Callable[[], None]:
        """Send the rows back.

        Args:
            output: [T, H] to write.
            fused_expert_output: [R, H] or [R, 1, H], the experts' outputs.
            _reduction: how to sum the K rows of a token by their weights; not needed, as
                ``prepare`` returned tokens with K = 1 and weight 1.

        Returns:
            A function that waits for the rows and writes ``output``.
        """
        exchange, rows = self._exchange, self._rows
        assert exchange is not None, "finalize follows prepare"
        assert rows is not None, "finalize follows prepare"
        self._rows, weights = None, self._weights
        y = fused_expert_output.view(-1, output.shape[1])
        pending = exchange.combine_setup(y, rows, weighted=weights is not None)

        def receive() -> None:
            sums, part = exchange.combine_teardown(pending), self._part_of(len(output))
            if weights is not None:
                sums = _sum_as_vllm(sums.view(*weights.shape, sums.shape[1]), weights)
            if len(sums) < len(output):
                output.zero_()
            output[part] = sums

        return receive

    def _part_of(self, num_tokens: int) -> slice:
        """The tokens that this rank sends."""
        rank, size = self._share
        most = -(-num_tokens // size)
        return slice(rank * most, (rank + 1) * most)

    def _placement_for(
        self, num_experts: int, expert_map: torch.Tensor | None, device: torch.device
    ) -> Placement:
        """Agreed between the ranks at the first call, and when elastic EP brings another map."""
        if self._placement is None or expert_map is not self._expert_map:
            rank, maps = _gathered_maps(num_experts, expert_map)
            self._placement = Placement.of(maps, rank, device)
            self._expert_map = expert_map
        return self._placement

    def _exchange_for(self, placement: Placement, quant: QuantName | None) -> ExpertExchange:
        from vllm.distributed import get_ep_group

        options = dataclasses.replace(_OPTIONS, quant=quant, exact=self._exact)
        return exchange_for(get_ep_group().device_group, placement.num_slots, options)


@functools.cache
def _prepare_finalize_class() -> type:
    """``PrepareFinalize`` as a class of vLLM's; its base exists once vLLM is imported."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import (
        FusedMoEPrepareAndFinalizeModular,
    )

    bases = (PrepareFinalize, FusedMoEPrepareAndFinalizeModular)
    return type("MoETritonPrepareAndFinalize", bases, {"__doc__": PrepareFinalize.__doc__})


def _gathered_maps(
    num_experts: int, expert_map: torch.Tensor | None
) -> tuple[int, list[torch.Tensor]]:
    """This rank, and the expert maps of all."""
    from vllm.distributed import get_ep_group

    group = get_ep_group()
    rank, world_size = group.rank_in_group, group.world_size
    if expert_map is None:
        first = torch.arange(num_experts) - rank * (num_experts // world_size)
        expert_map = torch.where((first >= 0) & (first < num_experts // world_size), first, -1)
    own = expert_map.cpu().int()
    maps = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(maps, own, group=group.cpu_group)
    return rank, maps


def _max_tokens() -> int | None:
    """Most tokens of a rank in this step, which vLLM's ranks have agreed on; None if not."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    metadata = get_forward_context().dp_metadata if is_forward_context_available() else None
    return None if metadata is None else int(metadata.num_tokens_across_dp_cpu.max())


def _quant_in_flight(quant_config: Any) -> QuantName | None:
    """The quantisation of this library that makes the rows the experts want; None for none."""
    dynamic = quant_config.a1_scale is None and quant_config.a1_gscale is None
    if not dynamic:
        return None
    dtype, block_shape = quant_config.quant_dtype, quant_config.block_shape
    if quant_config.per_act_token_quant and block_shape is None:
        names: dict[Any, QuantName] = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}
        return names.get(dtype)
    if dtype == torch.float8_e4m3fn and block_shape is not None and block_shape[-1] == 128:
        from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

        # DeepGEMM on Blackwell wants scales that are powers of two.
        return None if is_deep_gemm_e8m0_used() else "group_e4m3"
    return None


def _quantize(rows: ExpertRows, quant_config: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Received rows quantised by vLLM: its scales are per row or given, so the sender's are equal.

    A scale of the whole tensor, where there is one, is that of this rank's rows.
    """
    from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input

    x = rows.x
    if quant_config.is_per_tensor:
        x = torch.where((rows.experts >= 0)[:, None], x, 0)  # garbage must not set the scale
    scale = quant_config.a1_gscale if quant_config.use_nvfp4_w4a4 else quant_config.a1_scale
    return moe_kernel_quantize_input(
        x,
        scale,
        quant_dtype=quant_config.quant_dtype,
        per_act_token_quant=quant_config.per_act_token_quant,
        block_shape=quant_config.block_shape,
        is_scale_swizzled=quant_config.is_scale_swizzled,
        mx_alignment=quant_config.mx_alignment,
    )


def _sum_as_vllm(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums [T, H] of rows [T, K, H] in float32, rounded as in vLLM's kernel for CPUs.

    It adds the slots in order and fuses each product with its sum, as ``addcmul`` does.
    """
    sums = rows[:, 0] * weights[:, :1]
    for slot in range(1, rows.shape[1]):
        sums = torch.addcmul(sums, rows[:, slot], weights[:, slot, None])
    return sums


def _counts(rows: ExpertRows) -> Any:
    """The rows of each local expert, as vLLM's metadata."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import ExpertTokensMetadata

    counts = rows.dispatched.tokens_per_expert.int()
    return ExpertTokensMetadata(counts, counts if counts.device.type == "cpu" else None)
