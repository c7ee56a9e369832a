"""The ops by name, which error messages and checks go by."""

from __future__ import annotations

DISPATCH = "npu_moe_distribute_dispatch"
COMBINE = "npu_moe_distribute_combine"
DISPATCH_V2 = "npu_moe_distribute_dispatch_v2"
COMBINE_V2 = "npu_moe_distribute_combine_v2"


def is_dispatch(op: str) -> bool:
    """Whether an op is a dispatch, not a combine."""
    return op in (DISPATCH, DISPATCH_V2)


def family(op: str) -> str:
    """The version of an op: "v1" or "v2"."""
    return "v1" if op in (DISPATCH, COMBINE) else "v2"
