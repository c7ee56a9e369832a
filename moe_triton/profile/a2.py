"""Atlas A2: dispatch and combine, flat or, between servers of eight ranks, hierarchical.

It has no shared ranks, no TP group, no constant experts and no elastic groups, and none of the
split-phase ops, RMSNorm after combine, and replicas.
"""

from __future__ import annotations

from dataclasses import replace

from . import buffers
from .limits import Limits
from .product import Profile

_V1 = Limits(
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
    buffer=buffers.a2_fullmesh,
)
_V1_HIERARCHY = replace(
    _V1,
    experts_per_rank=None,
    comm_quant_modes=(0, 2),
    refused=_V1.refused | {"scales"},
    buffer=buffers.a2_v1_hierarchy,
)
_V2 = replace(
    _V1,
    world_sizes=(2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 192, 256, 384),
    experts=range(1, 1025),
    experts_per_rank=None,
    const_experts=(0,),
    refused=frozenset({"elastic_info"}),
)
_V2_HIERARCHY = replace(
    _V2,
    tokens=range(1, 513),
    hidden=range(32, 10241, 32),
    world_sizes=(16, 32, 64),
    experts=range(1, 513),
    zero_experts=(0,),
    comm_quant_modes=(0, 2),
    refused=_V2.refused | {"x_active_mask", "scales"},
    buffer=buffers.a2_v2_hierarchy,
)

PROFILE = Profile(
    "a2",
    {
        "v1": {"": _V1, "hierarchy": _V1_HIERARCHY},
        "v2": {"": _V2, "fullmesh": _V2, "hierarchy": _V2_HIERARCHY},
    },
    switches={"HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "0"},
    server_ranks=8,
)
