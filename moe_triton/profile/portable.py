"""This library's own profile: the limits of its formats and algorithms, on any device.

Besides the checks that correctness needs, only K is limited: to 16, the largest limit of any
product, and to 12 with fullmesh_v2, as on every product.
"""

from __future__ import annotations

from dataclasses import replace

from .limits import Limits
from .product import Profile

_ANY = Limits(top_k=range(1, 17), quant_modes=range(5), float8=True)
_V2 = replace(_ANY, comm_quant_modes=(0, 2, 3, 4))
_REPLICAS = Limits()

PROFILE = Profile(
    "portable",
    {
        "v1": {"": _ANY},
        "v2": {
            "": _V2,
            "fullmesh": _V2,
            "fullmesh_v1": _V2,
            "fullmesh_v2": replace(_V2, top_k=range(1, 13)),
            "hierarchy": _V2,
        },
        "rms": {"": _ANY},
        "split": {"": _ANY},
        "eplb": {"": replace(_REPLICAS, balance_modes=(0,))},
        "update_expert": {"": _REPLICAS},
    },
)
