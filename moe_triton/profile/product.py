"""A profile: the limits of one product for each family of ops, and the check against them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import ArgumentTypeError, ArgumentValueError, UnavailableError
from . import buffers
from .limits import Limits, is_combine, rules, words


@dataclass(frozen=True)
class Profile:
    """The limits of one product, and the outputs that only it has.

    Attributes:
        name: "portable", or a product.
        families: the limits of a family of ops under each name of an algorithm: "v1", "v2", "rms"
            (combine with RMSNorm), "split" (split-phase), "eplb" (aclnnMoeEPLBUpdateExpert) and
            "update_expert" (its successor). The product does not have the ops of a missing family.
        switches: environment variables and the values with which they choose "hierarchy" if
            ``comm_alg`` is ""; empty if none do.
        server_ranks: ranks of a server, for each of which ep_recv_counts has room for words of the
            product's own algorithm; 0 without this room.
    """

    name: str
    families: Mapping[str, Mapping[str, Limits]]
    switches: Mapping[str, str] = field(default_factory=dict)
    server_ranks: int = 0

    def check(
        self,
        family: str,
        op: str,
        *,
        max_tokens: int | None = None,
        hidden: int | None = None,
        top_k: int | None = None,
        world_size: int | None = None,
        num_experts: int | None = None,
        experts_per_rank: int | None = None,
        num_tokens: int | None = None,
        num_shared_ranks: int = 0,
        num_shared_experts: int = 0,
        num_zero_experts: int = 0,
        num_copy_experts: int = 0,
        num_const_experts: int = 0,
        tp_world_size: int = 0,
        quant_mode: int | None = None,
        float8: str | None = None,
        float16: bool = False,
        comm_quant_mode: int | None = None,
        comm_type: int | None = None,
        comm_alg: str = "",
        token_nums_type: int | None = None,
        balance_mode: int | None = None,
        mask_dims: int | None = None,
        index_dims: int | None = None,
        elastic: bool = False,
        with_scales: bool = False,
        with_expert_scales: bool = False,
        with_expand_scales: bool | None = None,
        with_shared_expert_x: bool = False,
    ) -> None:
        """Raise ``ArgumentValueError`` for the first argument that the product does not accept.

        An op passes the arguments that it has; None and defaults are not checked.

        Args:
            family: of the op, see ``families``.
            op: name of the op, a dispatch, a combine, or an update of experts.
            max_tokens: largest BS of any rank, from ``global_bs``.
            hidden: H.
            top_k: K.
            world_size: W.
            num_experts: E; in an update of experts the logical ones.
            experts_per_rank: L.
            num_tokens: BS of this rank; None for ``max_tokens``.
            num_shared_ranks: S.
            num_shared_experts: shared experts; no effect if S = 0.
            num_zero_experts: zero experts.
            num_copy_experts: copy experts.
            num_const_experts: constant experts.
            tp_world_size: ranks of the TP group; 0 or 1 without one.
            quant_mode: mode of dispatch.
            float8: the argument by which rows of dispatch are float8, or None.
            float16: whether rows of combine are float16.
            comm_quant_mode: mode of combine.
            comm_type: of the split-phase ops.
            comm_alg: the algorithm; always "" in v1.
            token_nums_type: form of ``expert_token_nums``.
            balance_mode: choice of a replica.
            mask_dims: dimensions of ``x_active_mask``, or None without it.
            index_dims: dimensions of ``expand_idx``, or None in an op without it.
            elastic: whether ``elastic_info`` is given.
            with_scales: whether dispatch gets ``scales``.
            with_expert_scales: whether dispatch gets ``expert_scales``.
            with_expand_scales: whether combine gets ``expand_scales``; None in dispatch.
            with_shared_expert_x: whether combine gets ``shared_expert_x``.
        """
        limits, where = self.limits(family, op, comm_alg)
        if float8 is not None and not limits.float8:
            raise ArgumentTypeError(op, float8, f"not be a float8 {where}", "one")
        if float16 and not limits.float16:
            raise ArgumentTypeError(op, "expand_x", f"be bfloat16 {where}", "torch.float16")
        for argument, present in (
            ("x_active_mask", mask_dims is not None),
            ("elastic_info", elastic),
            ("scales", with_scales),
            ("expert_scales", with_expert_scales),
            ("expand_scales", with_expand_scales),
            ("shared_expert_x", with_shared_expert_x and num_shared_ranks > 0),
        ):
            if present and argument in limits.refused:
                raise ArgumentValueError(op, argument, f"be None {where}", "a tensor")
            if present is False and argument in limits.required:
                raise ArgumentValueError(op, argument, f"be given {where}", None)
        slots = world_size and experts_per_rank and world_size * experts_per_rank
        facts = {
            "num_tokens": max_tokens if num_tokens is None else num_tokens,
            "max_tokens": max_tokens,
            "hidden": hidden,
            "top_k": top_k,
            "world_size": world_size,
            "num_experts": num_experts,
            "experts_per_rank": experts_per_rank,
            "expert_slots": slots,
            "num_shared_ranks": num_shared_ranks,
            "num_shared_experts": num_shared_experts if num_shared_ranks else None,
            "num_zero_experts": num_zero_experts,
            "num_copy_experts": num_copy_experts,
            "num_const_experts": num_const_experts,
            "tp_world_size": tp_world_size,
            "quant_mode": quant_mode,
            "comm_quant_mode": comm_quant_mode,
            "comm_type": comm_type,
            "token_nums_type": token_nums_type,
            "balance_mode": balance_mode,
            "mask_dims": mask_dims,
            "index_dims": index_dims,
        }
        for rule in rules(family, op):
            got, values = facts[rule.fact], getattr(limits, rule.limit)
            if got is not None and values is not None and got not in values:
                contract = f"{rule.contract} {words(values)} {where}"
                raise ArgumentValueError(op, rule.argument, contract, got)
        if (
            max_tokens is not None
            and hidden is not None
            and top_k is not None
            and world_size is not None
            and num_experts is not None
            and experts_per_rank is not None
        ):
            sizes = buffers.Sizes(
                world_size,
                num_experts,
                experts_per_rank,
                top_k,
                hidden,
                max_tokens,
                num_shared_experts if num_shared_ranks else 0,
                tp_world_size,
            )
            buffers.check(op, limits.buffer, sizes, where)

    def limits(self, family: str, op: str, comm_alg: str = "") -> tuple[Limits, str]:
        """The limits of an op under an algorithm, and the text that names both in messages.

        Raises:
            ArgumentValueError: an unknown algorithm of this op.
            UnavailableError: the product does not have the op.
        """
        algorithms = self.families.get(family)
        if algorithms is None:
            raise UnavailableError(op, f"is not an operator of {self.name}")
        combine = is_combine(op)
        names = [name for name, limits in algorithms.items() if limits.in_combine or not combine]
        if comm_alg not in names:
            contract = f"be one of {names} on {self.name}"
            raise ArgumentValueError(op, "comm_alg", contract, repr(comm_alg))
        if comm_alg == "" and "hierarchy" in algorithms and self._switched_on():
            comm_alg = "hierarchy"
        where = f"on {self.name}" + (f" with {comm_alg}" if comm_alg else "")
        return algorithms[comm_alg], where

    def _switched_on(self) -> bool:
        """Whether all environment variables have the values that choose "hierarchy"."""
        values = {name: os.environ.get(name) for name in self.switches}
        return bool(values) and values == dict(self.switches)

    def spare_counts(self, world_size: int, max_tokens: int, top_k: int) -> int:
        """Unused words of ep_recv_counts behind the prefix sums."""
        servers = world_size // self.server_ranks if self.server_ranks else 0
        return 2 * max_tokens * world_size * top_k * servers
