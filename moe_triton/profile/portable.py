"""This library's own profile: the limits of its formats and algorithms, on any device.

Besides the checks that correctness needs, only K is limited: to 16, the largest limit of any
product, and to 12 with fullmesh_v2, as on every product.
"""

from __future__ import annotations

from dataclasses import replace

from .limits import Limits
from .product import Profile

_ANY = Limits(top_k=range(1, 17), quant_modes=range(5), float8=True)
_REPLICAS = Limits()

PROFILE = Profile(
    "portable",
    {
        "v1": {"": _ANY},
        "v2": {
            "": _ANY,
            "fullmesh": _ANY,
            "fullmesh_v1": _ANY,
            "fullmesh_v2": replace(_ANY, top_k=range(1, 13)),
            "hierarchy": _ANY,
        },
        "rms": {"": _ANY},
        "split": {"": _ANY},
        "eplb": {"": replace(_REPLICAS, balance_modes=(0,))},
        "update_expert": {"": _REPLICAS},
    },
)
