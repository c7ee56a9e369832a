"""What tests take for hypothesis where it is not installed: a test of drawn examples is skipped.

Machines with accelerators often come as they are. The other tests need nothing but pytest there.
"""

from __future__ import annotations

import pytest


class _Anything:
    """A strategy, or what is made of one; nothing is drawn from it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs):
        return self


HealthCheck = strategies = _Anything()


class settings:
    """Leaves the test as it is."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __call__(self, test):
        return test

    @staticmethod
    def register_profile(*args, **kwargs) -> None:
        pass

    @staticmethod
    def load_profile(name) -> None:
        pass


def given(*args, **kwargs):
    return pytest.mark.skip(reason="hypothesis is not installed")
