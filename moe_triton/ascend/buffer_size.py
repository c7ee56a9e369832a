"""The HCCL_BUFFSIZE that an op needs on an Ascend product."""

from __future__ import annotations

from ..errors import UnavailableError
from ..ops import checks
from ..profile import buffers, named
from .op_names import FAMILIES, family

_OP = "required_buffsize_mb"


def required_buffsize_mb(
    product: str,
    op: str,
    *,
    world_size: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    max_tokens: int,
    num_shared_ranks: int = 0,
    num_shared_experts: int = 1,
    tp_world_size: int = 0,
    comm_alg: str = "",
    itemsize: int = 2,
    vector_cores: int | None = None,
) -> int:
    """The least HCCL_BUFFSIZE, in MB, with which an op runs on an Ascend product.

    It sizes the buffer of one group, and each pair of dispatch and combine has its own group. Its
    default on the products is 200.

    Args:
        product: "a2", "a3" or "950".
        op: a function of ``compat.torch_npu``, by name.
        world_size: W.
        num_experts: E, a multiple of W - S.
        top_k: K.
        hidden: H.
        max_tokens: largest BS of a rank.
        num_shared_ranks: S.
        num_shared_experts: shared experts; no effect if S = 0.
        tp_world_size: T; 0 or 1 without a TP group.
        comm_alg: of the op; "" is the choice of the environment. v1 on a2 has no such argument:
            "hierarchy" is the choice of the switches there.
        itemsize: bytes of an element of x on a2: 2, or 4 for int4 packed in int32.
        vector_cores: of the device; needed by v1 on 950, whose documents leave it open.

    Raises:
        ArgumentTypeError, ArgumentValueError: an unknown op, placement or algorithm.
        UnavailableError: an unknown product, or one without the op or without a documented formula
            for it.
    """
    profile = named(_OP, product, "product")
    checks.value(_OP, "op", op in FAMILIES, f"be one of {[*FAMILIES]}", repr(op))
    numbers = {
        "world_size": world_size,
        "top_k": top_k,
        "hidden": hidden,
        "max_tokens": max_tokens,
        "itemsize": itemsize,
    }
    others = {"num_experts": num_experts, "num_shared_ranks": num_shared_ranks}
    others |= {"num_shared_experts": num_shared_experts, "tp_world_size": tp_world_size}
    checks.integers(_OP, **numbers, **others)
    for name, number in numbers.items():
        checks.value(_OP, name, number >= 1, "be positive", number)
    names = ("num_experts", "num_shared_experts", "num_shared_ranks")
    topology = checks.topology(
        _OP, world_size, num_experts, num_shared_experts, num_shared_ranks, names=names
    )
    limits, where = profile.limits(family(op), op, comm_alg)
    if limits.buffer is None:
        raise UnavailableError(
            _OP, f"the documents give no buffer size for {op} {where}", argument="op"
        )
    if limits.buffer is buffers.a950_v1 and vector_cores is None:
        problem = f"vector_cores must be given for {op} {where}, whose documents leave it open"
        raise UnavailableError(_OP, problem, argument="vector_cores")
    sizes = buffers.Sizes(
        topology.world_size,
        topology.num_experts,
        topology.experts_per_rank,
        top_k,
        hidden,
        max_tokens,
        topology.num_shared_experts,
        tp_world_size,
        itemsize,
        vector_cores,
    )
    return buffers.megabytes(limits.buffer(sizes))
