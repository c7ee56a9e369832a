"""Checkpoints and reference outputs that the tests of all engines share."""

from __future__ import annotations

import functools

import checkpoints
import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """``checkpoint(family)``: the path of its checkpoint."""

    @functools.cache
    def write(family):
        path = tmp_path_factory.mktemp(family)
        checkpoints.write(family, path)
        return str(path)

    return write
