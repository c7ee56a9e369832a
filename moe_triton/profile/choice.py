"""The profile in effect: that of the process, of the environment, or the portable one."""

from __future__ import annotations

import functools
import logging
import os

from ..errors import UnavailableError
from . import a2, a3, a950, portable
from .product import Profile

ENVIRONMENT = "MOE_TRITON_PROFILE"

PROFILES = {module.PROFILE.name: module.PROFILE for module in (portable, a2, a3, a950)}

_LOG = logging.getLogger("moe_triton")
_override: str | None = None


@functools.cache  # each choice once, and not with every call
def _log_choice(name: str, reason: str) -> None:
    _LOG.info("profile %s, because %s", name, reason)


def named(op: str, name: str, argument: str = "profile") -> Profile:
    """The profile of that name.

    Raises:
        UnavailableError: an unknown name; the message lists the known ones.
    """
    if name not in PROFILES:
        problem = f"{argument} must be one of {[*PROFILES]}, got {name!r}"
        raise UnavailableError(op, problem, argument=argument)
    return PROFILES[name]


def set_profile(name: str | None) -> None:
    """Choose the profile of all following calls of this process.

    None restores the environment variable ``MOE_TRITON_PROFILE``, and without it "portable".

    Raises:
        UnavailableError: an unknown name; the message lists the known ones.
    """
    global _override
    _override = None if name is None else named("set_profile", name).name


def get_profile() -> str:
    """The name of the profile in effect.

    Raises:
        UnavailableError: the environment variable has an unknown name.
    """
    return active_profile().name


def active_profile() -> Profile:
    """The profile in effect; errors as in ``get_profile``."""
    by_environment = os.environ.get(ENVIRONMENT)
    profile = named("get_profile", _override or by_environment or "portable")
    reason = "it is the default"
    if _override:
        reason = "set_profile() chose it"
    elif by_environment:
        reason = f"{ENVIRONMENT} is set"
    _log_choice(profile.name, reason)
    return profile
