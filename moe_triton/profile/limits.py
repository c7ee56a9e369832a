"""Limits of a product: the accepted values, and the argument that carries each of them.

Letters: BS tokens of a rank, H their length, K experts a token, W ranks, E routed experts, L of
them on each rank that has any, S ranks reserved for shared experts, T ranks of a TP group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .buffers import Sizes

Values = range | tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """The values that the ops of a family accept with one algorithm; None means no limit.

    Attributes:
        tokens: BS.
        hidden: H.
        top_k: K.
        world_sizes: W.
        experts: E.
        experts_per_rank: L.
        expert_slots: L * W.
        shared_ranks: S.
        shared_experts: number of shared experts if S > 0.
        zero_experts: number of zero experts, and of copy experts.
        const_experts: number of constant experts.
        tp_world_sizes: T.
        quant_modes: modes of dispatch that both the product and this library have.
        float8: whether rows of dispatch may be float8, as input or by quant_mode 2.
        float16: whether rows of combine may be float16.
        comm_quant_modes: modes of combine that both have.
        comm_types: ways to communicate, of the split-phase ops.
        token_nums_types: forms of ``expert_token_nums``.
        mask_dims: dimensions that ``x_active_mask`` may have.
        index_dims: dimensions that ``expand_idx`` of combine may have.
        balance_modes: ways to choose a replica.
        refused: tensors that must be None; ``expert_scales`` only in dispatch, ``shared_expert_x``
            only if S > 0.
        required: tensors that must be given.
        in_combine: whether combine accepts this algorithm by name, as dispatch does.
        buffer: formula of the bytes of the communication buffer; None if unknown.
    """

    tokens: Values | None = None
    hidden: Values | None = None
    top_k: Values | None = None
    world_sizes: Values | None = None
    experts: Values | None = None
    experts_per_rank: Values | None = None
    expert_slots: Values | None = None
    shared_ranks: Values | None = None
    shared_experts: Values | None = None
    zero_experts: Values | None = None
    const_experts: Values | None = None
    tp_world_sizes: Values = (0, 1, 2)
    quant_modes: Values = (0, 2)
    float8: bool = False
    float16: bool = True
    comm_quant_modes: Values = (0, 2)
    comm_types: Values = range(3)
    token_nums_types: Values = (0, 1)
    mask_dims: Values = (1, 2)
    index_dims: Values | None = None
    balance_modes: Values = (0, 1)
    refused: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    in_combine: bool = True
    buffer: Callable[[Sizes], int] | None = None


class Rule(NamedTuple):
    """A number that products limit.

    Attributes:
        fact: its argument of ``Profile.check``.
        limit: its attribute of ``Limits``.
        argument: of the op, which carries it.
        contract: of that argument, before the values.
    """

    fact: str
    limit: str
    argument: str
    contract: str


_PLACEMENT = (
    Rule("world_size", "world_sizes", "ep_world_size", "be"),
    Rule("num_experts", "experts", "moe_expert_num", "be"),
    Rule("experts_per_rank", "experts_per_rank", "moe_expert_num", "give an L"),
    Rule("expert_slots", "expert_slots", "moe_expert_num", "give an L * ep_world_size"),
    Rule("num_shared_ranks", "shared_ranks", "shared_expert_rank_num", "be"),
    Rule("num_shared_experts", "shared_experts", "shared_expert_num", "be"),
    Rule("num_zero_experts", "zero_experts", "zero_expert_num", "be"),
    Rule("num_copy_experts", "zero_experts", "copy_expert_num", "be"),
    Rule("num_const_experts", "const_experts", "const_expert_num", "be"),
    Rule("tp_world_size", "tp_world_sizes", "tp_world_size", "be"),
    Rule("mask_dims", "mask_dims", "x_active_mask", "have a number of dimensions"),
    Rule("comm_type", "comm_types", "comm_type", "be"),
)
DISPATCH_RULES = (
    Rule("num_tokens", "tokens", "x", "have a BS"),
    Rule("max_tokens", "tokens", "global_bs", "allow a BS"),
    Rule("hidden", "hidden", "x", "have an H"),
    Rule("top_k", "top_k", "expert_ids", "have a K"),
    *_PLACEMENT,
    Rule("quant_mode", "quant_modes", "quant_mode", "be"),
    Rule("token_nums_type", "token_nums_types", "expert_token_nums_type", "be"),
)
COMBINE_RULES = (
    Rule("num_tokens", "tokens", "expert_ids", "have a BS"),
    Rule("max_tokens", "tokens", "global_bs", "allow a BS"),
    Rule("hidden", "hidden", "expand_x", "have an H"),
    Rule("top_k", "top_k", "expert_ids", "have a K"),
    *_PLACEMENT,
    Rule("index_dims", "index_dims", "expand_idx", "have a number of dimensions"),
    Rule("comm_quant_mode", "comm_quant_modes", "comm_quant_mode", "be"),
)
REPLICA_RULES = (
    Rule("num_tokens", "tokens", "expert_ids", "have a BS"),
    Rule("top_k", "top_k", "expert_ids", "have a K"),
    Rule("num_experts", "experts", "eplb_table", "have an E"),
    Rule("world_size", "world_sizes", "world_size", "be"),
    Rule("balance_mode", "balance_modes", "balance_mode", "be"),
)


def is_combine(op: str) -> bool:
    """Whether an op is a combine, by its name."""
    return "combine" in op.lower()


def rules(family: str, op: str) -> tuple[Rule, ...]:
    """The numbers of an op that products limit, in the order of the checks."""
    if family in ("eplb", "update_expert"):
        return REPLICA_RULES
    return COMBINE_RULES if is_combine(op) else DISPATCH_RULES


def words(values: Values) -> str:
    """``values`` as text of a message."""
    if isinstance(values, range):
        steps = f" in steps of {values.step}" if values.step > 1 else ""
        return f"in [{values[0]}, {values[-1]}]{steps}"
    return f"one of {[*values]}" if len(values) > 1 else f"equal to {values[0]}"
