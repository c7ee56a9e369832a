"""Profiles: the values that a product accepts, and the communication buffer that it needs.

A profile changes only validation ranges and the sizes of outputs; arithmetic is the same for all.
``portable`` is this library's own. The others, a module each, refuse what the operators of that
product refuse, so that a script within a profile stays within the product's limits.

Source: the parameter and constraint sections of the aclnnMoeDistribute* operator documents.
"""

from __future__ import annotations

from .choice import ENVIRONMENT, PROFILES, active_profile, get_profile, named, set_profile
from .product import Profile

__all__ = [
    "ENVIRONMENT",
    "PROFILES",
    "Profile",
    "active_profile",
    "get_profile",
    "named",
    "set_profile",
]
