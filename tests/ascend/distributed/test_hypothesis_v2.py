"""Drawn configurations of v2 dispatch and combine against the definition.

The short profile is part of the ordinary run; the tests marked ``full`` draw enough to mean
something.
"""

from __future__ import annotations

import drawn
import pytest
from hypothesis import given

VERSION = 2
LOCAL_FULL, PROCESS_FULL = 1000, 200
HEADING = "Drawn configurations of v2 dispatch and combine against the definition"
# (W, T): ranks of an expert-parallel group, and of a tensor-parallel one.
LAYOUTS = [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (1, 2), (2, 2), (3, 2)]


@drawn.profile(60)
@given(drawn.configs(VERSION))
def test_threads(config):
    drawn.check_in_threads(config)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
@pytest.mark.parametrize("layout", [(2, 1), (3, 1), (2, 2)])
def test_processes(world, layout):
    drawn.many_in_processes(VERSION, world, [layout], batches=1, each=3)


@pytest.mark.full
def test_many_in_threads(record_evidence):
    tally = drawn.many_in_threads(VERSION, LOCAL_FULL + LOCAL_FULL // 10)
    assert len(tally.distinct) >= LOCAL_FULL
    record_evidence(HEADING, tally.summary("threads"))


@pytest.mark.full
@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_many_in_processes(world, record_evidence):
    tally = drawn.many_in_processes(VERSION, world, LAYOUTS, batches=7, each=4)
    assert len(tally.distinct) >= PROCESS_FULL
    record_evidence(HEADING, tally.summary(f"processes, {world}"))
