"""The ops by name, which error messages and checks go by."""

from __future__ import annotations

DISPATCH = "npu_moe_distribute_dispatch"
COMBINE = "npu_moe_distribute_combine"
DISPATCH_V2 = "npu_moe_distribute_dispatch_v2"
COMBINE_V2 = "npu_moe_distribute_combine_v2"
COMBINE_ADD_RMS_NORM = "npu_moe_distribute_combine_add_rms_norm"
DISPATCH_SETUP = "npu_moe_distribute_dispatch_setup"
DISPATCH_TEARDOWN = "npu_moe_distribute_dispatch_teardown"
COMBINE_SETUP = "npu_moe_distribute_combine_setup"
COMBINE_TEARDOWN = "npu_moe_distribute_combine_teardown"
UPDATE_EXPERT = "npu_moe_update_expert"
EPLB_UPDATE_EXPERT = "aclnnMoeEPLBUpdateExpert"  # its predecessor, in the C interface only

FAMILIES = {
    DISPATCH: "v1",
    COMBINE: "v1",
    DISPATCH_V2: "v2",
    COMBINE_V2: "v2",
    COMBINE_ADD_RMS_NORM: "rms",
    DISPATCH_SETUP: "split",
    DISPATCH_TEARDOWN: "split",
    COMBINE_SETUP: "split",
    COMBINE_TEARDOWN: "split",
    UPDATE_EXPERT: "update_expert",
    EPLB_UPDATE_EXPERT: "eplb",
}


def is_dispatch(op: str) -> bool:
    """Whether an op is a dispatch, not a combine."""
    return op.startswith(DISPATCH)


def family(op: str) -> str:
    """What an op that a profile limits belongs to, as in ``profile.Profile``."""
    return FAMILIES[op]
