"""This library's own profile: what its formats and algorithms can do, on any device.

Beyond what correctness needs, only K is limited, to the 16 that is the most of any product, or 12
with fullmesh_v2, as everywhere.
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
