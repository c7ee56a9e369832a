"""Ascend 950 (910_95): every quantisation, float8 rows, no TP group, no replicas.

The documents give no limit of H in v1, and no buffer size for combine with RMSNorm.
"""

from __future__ import annotations

from dataclasses import replace

from . import a3, buffers
from .product import Profile

_MODES = range(5)

_V1 = replace(
    a3.V1,
    hidden=None,
    world_sizes=(4, 8, 16, 32, 64, 128, 144, 256, 288),
    quant_modes=_MODES,
    float8=True,
    tp_world_sizes=(0, 1),
    comm_quant_modes=(0,),
    buffer=buffers.a950_v1,
)
_V2 = replace(
    a3.V2,
    world_sizes=range(2, 1025),
    quant_modes=_MODES,
    float8=True,
    tp_world_sizes=(0, 1),
    comm_quant_modes=(0, 2, 3, 4),
    refused=a3.V2.refused | {"elastic_info"},
)
_V2_FULLMESH_V1 = replace(_V2, in_combine=False)
_V2_FULLMESH_V2 = replace(_V2_FULLMESH_V1, top_k=range(1, 13), buffer=buffers.a3_fullmesh_v2)
_RMS = replace(_V2, float16=False, comm_quant_modes=(0,), buffer=None)
_SPLIT = replace(
    a3.SPLIT,
    quant_modes=(0, 4),
    float8=True,
    comm_types=(2,),
    token_nums_types=(1,),
    buffer=buffers.a950_split,
)

PROFILE = Profile(
    "950",
    {
        "v1": {"": _V1},
        "v2": {"": _V2, "fullmesh_v1": _V2_FULLMESH_V1, "fullmesh_v2": _V2_FULLMESH_V2},
        "rms": {"": _RMS},
        "split": {"": _SPLIT},
    },
)
