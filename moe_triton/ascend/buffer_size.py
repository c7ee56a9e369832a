"""What HCCL_BUFFSIZE has to be where an op runs on an Ascend product."""

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

    It holds for a group, and a group is for one pair of dispatch and combine. Where it is not set,
    it is 200 there.

    Args:
        product: "a2", "a3" or "950".
        op: a function of ``compat.torch_npu``, by name.
        world_size: W.
        num_experts: E, a multiple of W - S.
        top_k: K.
        hidden: H.
        max_tokens: largest BS of a rank.
        num_shared_ranks: S.
        num_shared_experts: shared experts, of no effect where S = 0.
        tp_world_size: T; 0 and 1 both mean that there is no TP group.
        comm_alg: as the op takes it; "" is what the environment chooses. "hierarchy" for v1 on a2,
            which has no such argument, is what the switches there would choose.
        itemsize: bytes of an element of x on a2: 2, or 4 for int4 packed in int32.
        vector_cores: of the device, which v1 on 950 depends on, and which its documents leave open.

    Raises:
        ArgumentTypeError, ArgumentValueError: there is no such op, placement or algorithm.
        UnavailableError: the product is not known, does not have the op, or nothing says how much
            it needs.
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
        raise UnavailableError(_OP, f"nothing says what buffer {op} needs {where}", argument="op")
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
