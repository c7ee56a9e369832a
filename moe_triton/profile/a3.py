"""Atlas A3: every family of ops; a card of the documents is a die."""

from __future__ import annotations

from dataclasses import replace

from . import buffers
from .limits import Limits
from .product import Profile

V1 = Limits(
    tokens=range(1, 513),
    hidden=(7168,),
    top_k=range(1, 9),
    world_sizes=(8, 16, 32, 64, 128, 144, 256, 288),
    experts=range(1, 513),
    shared_experts=(1,),
    index_dims=(1,),
    refused=frozenset({"x_active_mask", "expert_scales", "shared_expert_x"}),
    buffer=buffers.a3_v1,
)
V2 = replace(
    V1,
    hidden=range(1024, 8193),
    top_k=range(1, 17),
    world_sizes=range(2, 769),
    experts=range(1, 1025),
    expert_slots=range(1, 2049),
    shared_experts=range(1, 5),
    refused=frozenset({"shared_expert_x"}),
    buffer=buffers.a3_v2,
)
_V2_FULLMESH_V1 = replace(V2, in_combine=False)
_V2_FULLMESH_V2 = replace(
    _V2_FULLMESH_V1, tokens=range(1, 257), top_k=range(1, 13), buffer=buffers.a3_fullmesh_v2
)
_V2_HIERARCHY = replace(
    V2,
    tokens=range(1, 257),
    world_sizes=range(16, 257, 16),
    experts=range(1, 513),
    refused=V2.refused | {"x_active_mask"},
    buffer=buffers.a3_v2_hierarchy,
)
_RMS = replace(V2, float16=False, comm_quant_modes=(0,), buffer=buffers.a3_v1)
SPLIT = replace(
    V2,
    world_sizes=range(2, 385),
    experts=range(1, 513),
    expert_slots=None,
    comm_quant_modes=(0,),
    comm_types=(0,),
    mask_dims=(1,),
    buffer=buffers.a3_split,
)
_EPLB = Limits(
    tokens=range(1, 513),
    top_k=range(1, 17),
    world_sizes=range(2, 385),
    experts=range(1, 513),
    balance_modes=(0,),
)
_UPDATE_EXPERT = replace(
    _EPLB, world_sizes=range(2, 769), experts=range(1, 1025), balance_modes=(0, 1)
)

PROFILE = Profile(
    "a3",
    {
        "v1": {"": V1},
        "v2": {
            "": V2,
            "fullmesh_v1": _V2_FULLMESH_V1,
            "fullmesh_v2": _V2_FULLMESH_V2,
            "hierarchy": _V2_HIERARCHY,
        },
        "rms": {"": _RMS},
        "split": {"": SPLIT},
        "eplb": {"": _EPLB},
        "update_expert": {"": _UPDATE_EXPERT},
    },
)
