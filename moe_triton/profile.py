"""What a product accepts, and how large a communication buffer it would ask for.

A profile changes only validation ranges and the sizes of outputs; arithmetic is the same for all.
``portable`` is this library's own: no limit beyond what correctness needs. The others refuse what
the operators of that product refuse, so that a script which runs here can run there.

Letters: BS tokens of a rank, H their length, K experts a token, W ranks, E routed experts, L of
them on each rank that has any, S ranks reserved for shared experts.
Source: the parameter and constraint sections of the aclnnMoeDistribute* operator documents.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from .errors import ArgumentTypeError, ArgumentValueError, UnavailableError

ENVIRONMENT = "MOE_TRITON_PROFILE"

BUFFER = "HCCL_BUFFSIZE"  # MB of a group's communication buffer; checked where it is set

_MB = 2**20

Values = range | tuple[int, ...]


class Sizes(NamedTuple):
    """What the size of a communication buffer follows from: W, E, L, K, H, largest BS, NS."""

    world: int
    experts: int
    local: int
    top_k: int
    hidden: int
    tokens: int
    shared: int = 0


@dataclass(frozen=True)
class Limits:
    """What a dispatch and its combine take with one algorithm; None means no limit.

    Attributes:
        tokens: BS.
        hidden: H.
        top_k: K.
        world_sizes: W.
        experts: E.
        experts_per_rank: L.
        expert_slots: L * W.
        shared_ranks: S.
        shared_experts: number of shared experts where S > 0.
        zero_experts: number of zero experts, and of copy experts.
        const_experts: number of constant experts.
        tp_world_sizes: ranks of the TP group.
        quant_modes: modes of dispatch that the product and this library have.
        float8: whether rows of dispatch may come as float8, or become such with quant_mode 2.
        float16: whether rows of combine may be float16.
        comm_quant_modes: modes of combine that both have.
        comm_types: ways to communicate, of the split-phase ops.
        refused: tensors that must be None; ``shared_expert_x`` only where S > 0.
        required: tensors that must be given.
        in_combine: whether combine takes this algorithm by name; dispatch does.
        buffer: bytes that the communication buffer must have; None where no formula is known.
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
    refused: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    in_combine: bool = True
    buffer: Callable[[Sizes], int] | None = None


@dataclass(frozen=True)
class Profile:
    """The limits of one product.

    Attributes:
        name: "portable", or a product.
        families: the limits of a family of ops under each name of an algorithm: "v1", "v2", "rms"
            (combine with RMSNorm), "split" (split-phase) and "eplb". The product does not have
            the ops of a family that is not there.
        environment_selects: whether ``comm_alg`` "" means "hierarchy" when the environment says
            HCCL_INTRA_PCIE_ENABLE=1 and HCCL_INTRA_ROCE_ENABLE=0.
    """

    name: str
    families: Mapping[str, Mapping[str, Limits]]
    environment_selects: bool = False

    def check(
        self,
        family: str,
        op: str,
        *,
        max_tokens: int,
        hidden: int,
        top_k: int,
        world_size: int,
        num_experts: int,
        experts_per_rank: int,
        num_tokens: int | None = None,
        num_shared_ranks: int = 0,
        num_shared_experts: int = 0,
        num_zero_experts: int = 0,
        num_copy_experts: int = 0,
        num_const_experts: int = 0,
        tp_world_size: int = 0,
        quant_mode: int = 0,
        float8: str | None = None,
        float16: bool = False,
        comm_quant_mode: int = 0,
        comm_type: int = 0,
        comm_alg: str = "",
        masked: bool = False,
        elastic: bool = False,
        with_scales: bool = False,
        with_expert_scales: bool = False,
        with_expand_scales: bool | None = None,
        with_shared_expert_x: bool = False,
    ) -> None:
        """Raise ``ArgumentValueError`` for the first argument that the product does not take.

        An op passes what it has: the defaults are those of the arguments of the other one.

        Args:
            family: of the op, see ``families``.
            op: name of the op, a dispatch or a combine.
            max_tokens: largest BS of any rank, as ``global_bs`` says.
            hidden: H.
            top_k: K.
            world_size: W.
            num_experts: E.
            experts_per_rank: L.
            num_tokens: BS of this rank; ``max_tokens`` if not given.
            num_shared_ranks: S.
            num_shared_experts: shared experts, of no effect where S = 0.
            num_zero_experts: special experts of that kind, as the next two.
            num_copy_experts: see above.
            num_const_experts: see above.
            tp_world_size: ranks of the TP group; 0 and 1 both mean that there is none.
            quant_mode: mode of dispatch.
            float8: the argument by which rows of dispatch are float8, or None.
            float16: whether rows of combine are float16.
            comm_quant_mode: mode of combine.
            comm_type: of the split-phase ops.
            comm_alg: the algorithm; always "" in v1.
            masked: whether ``x_active_mask`` is given.
            elastic: whether ``elastic_info`` is given.
            with_scales: whether dispatch gets ``scales``.
            with_expert_scales: whether dispatch gets ``expert_scales``.
            with_expand_scales: whether combine gets ``expand_scales``; None in dispatch.
            with_shared_expert_x: whether combine gets ``shared_expert_x``.
        """
        combine = "combine" in op
        limits, where = self._limits(family, op, comm_alg, combine=combine)
        rows, row = ("expert_ids", "expand_x") if combine else ("x", "x")
        tokens = max_tokens if num_tokens is None else num_tokens
        shared = num_shared_experts if num_shared_ranks else None
        slots = experts_per_rank * world_size
        for argument, contract, got, values in (
            (rows, "have a BS", tokens, limits.tokens),
            ("global_bs", "allow a BS", max_tokens, limits.tokens),
            (row, "have an H", hidden, limits.hidden),
            ("expert_ids", "have a K", top_k, limits.top_k),
            ("ep_world_size", "be", world_size, limits.world_sizes),
            ("moe_expert_num", "be", num_experts, limits.experts),
            ("moe_expert_num", "give an L", experts_per_rank, limits.experts_per_rank),
            ("moe_expert_num", "give an L * ep_world_size", slots, limits.expert_slots),
            ("shared_expert_rank_num", "be", num_shared_ranks, limits.shared_ranks),
            ("shared_expert_num", "be", shared, limits.shared_experts),
            ("zero_expert_num", "be", num_zero_experts, limits.zero_experts),
            ("copy_expert_num", "be", num_copy_experts, limits.zero_experts),
            ("const_expert_num", "be", num_const_experts, limits.const_experts),
            ("tp_world_size", "be", tp_world_size, limits.tp_world_sizes),
            ("quant_mode", "be", quant_mode, limits.quant_modes),
            ("comm_quant_mode", "be", comm_quant_mode, limits.comm_quant_modes),
            ("comm_type", "be", comm_type, limits.comm_types),
        ):
            _check_value(op, argument, contract, got, values, where)
        if float8 is not None and not limits.float8:
            raise ArgumentTypeError(op, float8, f"not be a float8 {where}", "one")
        if float16 and not limits.float16:
            raise ArgumentTypeError(op, row, f"be bfloat16 {where}", "torch.float16")
        _check_buffer(
            op,
            limits,
            Sizes(
                world_size,
                num_experts,
                experts_per_rank,
                top_k,
                hidden,
                max_tokens,
                num_shared_experts if num_shared_ranks else 0,
            ),
            where,
        )
        for argument, given in (
            ("x_active_mask", masked),
            ("elastic_info", elastic),
            ("scales", with_scales),
            ("expert_scales", with_expert_scales),
            ("expand_scales", with_expand_scales),
            ("shared_expert_x", with_shared_expert_x and num_shared_ranks > 0),
        ):
            if given and argument in limits.refused:
                raise ArgumentValueError(op, argument, f"be None {where}", "a tensor")
            if given is False and argument in limits.required:
                raise ArgumentValueError(op, argument, f"be given {where}", None)

    def check_replicas(
        self, op: str, *, num_tokens: int, top_k: int, num_experts: int, world_size: int | None
    ) -> None:
        """What ``check`` does, for the op that replaces experts by their replicas.

        Args:
            op: name of the op.
            num_tokens: BS.
            top_k: K.
            num_experts: experts before they are replaced.
            world_size: W, or None where it does not matter.
        """
        limits, where = self._limits("eplb", op, "", combine=False)
        for argument, contract, got, values in (
            ("expert_ids", "have a BS", num_tokens, limits.tokens),
            ("expert_ids", "have a K", top_k, limits.top_k),
            ("eplb_table", "have an E", num_experts, limits.experts),
            ("world_size", "be", world_size, limits.world_sizes),
        ):
            _check_value(op, argument, contract, got, values, where)

    def _limits(self, family: str, op: str, comm_alg: str, *, combine: bool) -> tuple[Limits, str]:
        """The limits under an algorithm, and the words for where they hold."""
        algorithms = self.families.get(family)
        if algorithms is None:
            raise UnavailableError(op, f"is not an operator of {self.name}")
        names = [name for name, limits in algorithms.items() if limits.in_combine or not combine]
        if comm_alg not in names:
            contract = f"be one of {names} on {self.name}"
            raise ArgumentValueError(op, "comm_alg", contract, repr(comm_alg))
        if comm_alg == "" and self.environment_selects and _environment_says_hierarchy():
            comm_alg = "hierarchy"
        where = f"on {self.name}" + (f" with {comm_alg}" if comm_alg else "")
        return algorithms[comm_alg], where


def _environment_says_hierarchy() -> bool:
    """Whether the two switches of A2 choose its hierarchical algorithm."""
    pcie, roce = (os.environ.get(f"HCCL_INTRA_{bus}_ENABLE") for bus in ("PCIE", "ROCE"))
    return (pcie, roce) == ("1", "0")


def _check_value(
    op: str, argument: str, contract: str, got: int | None, values: Values | None, where: str
) -> None:
    """``got`` is among the values, if there is something to compare."""
    if got is not None and values is not None and got not in values:
        raise ArgumentValueError(op, argument, f"{contract} {_words(values)} {where}", got)


def _words(values: Values) -> str:
    """``values`` as a message names them."""
    if isinstance(values, range):
        steps = f" in steps of {values.step}" if values.step > 1 else ""
        return f"in [{values[0]}, {values[-1]}]{steps}"
    return f"one of {[*values]}" if len(values) > 1 else f"equal to {values[0]}"


def _check_buffer(op: str, limits: Limits, sizes: Sizes, where: str) -> None:
    """The buffer that the environment sets, if it does, is large enough."""
    found = os.environ.get(BUFFER)
    if found is None or limits.buffer is None:
        return
    least = -(-limits.buffer(sizes) // _MB)
    if not found.isdecimal() or int(found) < least:
        raise ArgumentValueError(op, BUFFER, f"be at least {least} MB {where}", found)


# Rows of 2-byte elements. Letters as above; BS is the largest of any rank.


def _align(number: int, to: int) -> int:
    return -(-number // to) * to


def _a2_fullmesh(s: Sizes) -> int:
    rows = s.tokens * s.world * min(s.local, s.top_k)
    return 2 * (rows * s.hidden * 2 + 2 * _MB)


def _hierarchy(s: Sizes, extra: int) -> int:
    return s.experts * s.tokens * (2 * s.hidden + 4 * _align(s.top_k, 8) * 4) + extra


def _a2_v2_hierarchy(s: Sizes) -> int:
    row = 2 * s.hidden + 16 * _align(s.top_k, 8)
    return (s.experts + s.world // 4) * _align(s.tokens * row, 512) + 8 * _MB


def _a3_v1(s: Sizes) -> int:
    half = s.tokens * 2 * (s.hidden + 128) * (s.world * s.local + s.top_k + 1)
    return 2 * half + 2 * _MB


def _a3_rows(s: Sizes, row_bytes: int) -> int:
    """Dispatched rows of so many bytes, and those that come back."""
    returned = (s.top_k + s.shared) * s.tokens * _align(2 * s.hidden, 512)
    return 2 * (s.local * s.tokens * s.world * row_bytes + returned)


def _a3_v2(s: Sizes) -> int:
    return _a3_rows(s, _align(_align(2 * s.hidden, 32) + 64, 512))


def _a3_fullmesh_v2(s: Sizes) -> int:
    # 480 bytes of a row in each 512.
    return _a3_rows(s, -(-(_align(2 * s.hidden, 32) + 64) // 480) * 512)


def _a3_split(s: Sizes) -> int:
    return max(_a3_rows(s, _align(_align(2 * s.hidden, 32) + 44, 512)), 2 * _MB)


def _950_split(s: Sizes) -> int:
    return max(2 * _a3_rows(s, _align(_align(2 * s.hidden, 32) + 44, 512)), 2 * _MB)


_MODES = range(5)
_ANYTHING = Limits(quant_modes=_MODES, float8=True)

_PORTABLE = Profile(
    "portable",
    {
        "v1": {"": _ANYTHING},
        "v2": {
            "": _ANYTHING,
            "fullmesh": _ANYTHING,
            "fullmesh_v1": _ANYTHING,
            "fullmesh_v2": replace(_ANYTHING, top_k=range(1, 13)),
            "hierarchy": _ANYTHING,
        },
        "rms": {"": _ANYTHING},
        "split": {"": _ANYTHING},
        "eplb": {"": _ANYTHING},
    },
)

_A2_V1 = Limits(
    tokens=range(1, 257),
    hidden=range(32, 7169, 32),
    top_k=range(1, 17),
    world_sizes=(16, 32, 64),
    experts=range(1, 513),
    experts_per_rank=range(1, 25),
    shared_ranks=(0,),
    tp_world_sizes=(0, 1),
    comm_quant_modes=(0,),
    refused=frozenset({"x_active_mask"}),
    required=frozenset({"expand_scales"}),
    buffer=_a2_fullmesh,
)
_A2_V1_HIERARCHY = replace(
    _A2_V1,
    experts_per_rank=None,
    comm_quant_modes=(0, 2),
    refused=_A2_V1.refused | {"scales"},
    buffer=partial(_hierarchy, extra=104 * _MB),
)
_A2_V2 = replace(
    _A2_V1,
    world_sizes=(2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 192, 256, 384),
    experts=range(1, 1025),
    experts_per_rank=None,
    const_experts=(0,),
    refused=frozenset({"elastic_info"}),
)
_A2_V2_HIERARCHY = replace(
    _A2_V2,
    tokens=range(1, 513),
    hidden=range(32, 10241, 32),
    world_sizes=(16, 32, 64),
    experts=range(1, 513),
    zero_experts=(0,),
    comm_quant_modes=(0, 2),
    refused=_A2_V2.refused | {"x_active_mask", "scales"},
    buffer=_a2_v2_hierarchy,
)
_A2 = Profile(
    "a2",
    {
        "v1": {"": _A2_V1, "hierarchy": _A2_V1_HIERARCHY},
        "v2": {"": _A2_V2, "fullmesh": _A2_V2, "hierarchy": _A2_V2_HIERARCHY},
    },
    environment_selects=True,
)

_A3_V1 = Limits(
    tokens=range(1, 513),
    hidden=(7168,),
    top_k=range(1, 9),
    world_sizes=(8, 16, 32, 64, 128, 144, 256, 288),
    experts=range(1, 513),
    shared_experts=(1,),
    refused=frozenset({"x_active_mask", "expert_scales", "expand_scales", "shared_expert_x"}),
    buffer=_a3_v1,
)
_A3_V2 = replace(
    _A3_V1,
    hidden=range(1024, 8193),
    top_k=range(1, 17),
    world_sizes=range(2, 769),
    experts=range(1, 1025),
    expert_slots=range(1, 2049),
    shared_experts=range(1, 5),
    refused=frozenset({"shared_expert_x"}),
    buffer=_a3_v2,
)
_A3_V2_FULLMESH_V1 = replace(_A3_V2, in_combine=False)
_A3_V2_FULLMESH_V2 = replace(
    _A3_V2_FULLMESH_V1, tokens=range(1, 257), top_k=range(1, 13), buffer=_a3_fullmesh_v2
)
_A3_V2_HIERARCHY = replace(
    _A3_V2,
    tokens=range(1, 257),
    world_sizes=range(16, 257, 16),
    experts=range(1, 513),
    refused=_A3_V2.refused | {"x_active_mask"},
    buffer=partial(_hierarchy, extra=404 * _MB),
)
_A3_RMS = replace(_A3_V2, float16=False, comm_quant_modes=(0,), buffer=_a3_v1)
_A3_SPLIT = replace(
    _A3_V2,
    world_sizes=range(2, 385),
    experts=range(1, 513),
    expert_slots=None,
    comm_quant_modes=(0,),
    comm_types=(0,),
    buffer=_a3_split,
)
_EPLB = Limits(
    tokens=range(1, 513),
    top_k=range(1, 17),
    world_sizes=range(2, 769),
    experts=range(1, 1025),
)
_A3 = Profile(
    "a3",
    {
        "v1": {"": _A3_V1},
        "v2": {
            "": _A3_V2,
            "fullmesh_v1": _A3_V2_FULLMESH_V1,
            "fullmesh_v2": _A3_V2_FULLMESH_V2,
            "hierarchy": _A3_V2_HIERARCHY,
        },
        "rms": {"": _A3_RMS},
        "split": {"": _A3_SPLIT},
        "eplb": {"": _EPLB},
    },
)

_950_V1 = replace(
    _A3_V1,
    hidden=None,
    world_sizes=(4, 8, 16, 32, 64, 128, 144, 256, 288),
    quant_modes=_MODES,
    float8=True,
    tp_world_sizes=(0, 1),
    comm_quant_modes=(0,),
    buffer=None,  # the formula asks for the number of vector cores
)
_950_V2 = replace(
    _A3_V2,
    world_sizes=range(2, 1025),
    quant_modes=_MODES,
    float8=True,
    tp_world_sizes=(0, 1),
    refused=_A3_V2.refused | {"elastic_info"},
)
_950_V2_FULLMESH_V1 = replace(_950_V2, in_combine=False)
_950 = Profile(
    "950",
    {
        "v1": {"": _950_V1},
        "v2": {
            "": _950_V2,
            "fullmesh_v1": _950_V2_FULLMESH_V1,
            "fullmesh_v2": replace(_950_V2_FULLMESH_V1, top_k=range(1, 13), buffer=_a3_fullmesh_v2),
        },
        "rms": {"": replace(_950_V2, float16=False, comm_quant_modes=(0,), buffer=None)},
        "split": {
            "": replace(
                _A3_SPLIT,
                quant_modes=(0, 4),
                float8=True,
                comm_types=(2,),
                buffer=_950_split,
            )
        },
        "eplb": {"": _EPLB},
    },
)

PROFILES = {profile.name: profile for profile in (_PORTABLE, _A2, _A3, _950)}

_override: str | None = None


def _check_name(op: str, name: str) -> str:
    if name not in PROFILES:
        raise UnavailableError(
            op, f"profile must be one of {[*PROFILES]}, got {name!r}", argument="profile"
        )
    return name


def set_profile(name: str | None) -> None:
    """Choose the profile of all following calls of this process.

    None goes back to the environment variable ``MOE_TRITON_PROFILE``, and without that to
    "portable".

    Raises:
        UnavailableError: an unknown name; the message lists the known ones.
    """
    global _override
    _override = None if name is None else _check_name("set_profile", name)


def get_profile() -> str:
    """The name of the profile in effect.

    Raises:
        UnavailableError: the environment variable has an unknown name.
    """
    return _check_name("get_profile", _override or os.environ.get(ENVIRONMENT) or "portable")


def active_profile() -> Profile:
    """The profile in effect; errors as in ``get_profile``."""
    return PROFILES[get_profile()]


def ascend_buffer_mb(
    product: str,
    *,
    world_size: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    max_tokens: int,
    num_shared_ranks: int = 0,
) -> int:
    """HCCL_BUFFSIZE in MB that the v1 dispatch and combine would need on an Ascend product.

    Args:
        product: "a2" (no shared ranks there) or "a3".
        world_size: W.
        num_experts: E.
        top_k: K.
        hidden: H.
        max_tokens: largest BS of a rank.
        num_shared_ranks: S.

    Raises:
        UnavailableError: a product without a formula.
    """
    if product not in ("a2", "a3"):
        raise UnavailableError(
            "ascend_buffer_mb", f"product must be 'a2' or 'a3', got {product!r}", argument="product"
        )
    buffer = PROFILES[product].families["v1"][""].buffer
    assert buffer is not None
    local = num_experts // (world_size - num_shared_ranks)
    sizes = Sizes(world_size, num_experts, local, top_k, hidden, max_tokens)
    return -(-buffer(sizes) // _MB)
