"""Drawn configurations of dispatch and combine, v1 and v2, against the definition.

The short profile is part of the ordinary run; the tests marked ``full`` draw many configurations.
"""

from __future__ import annotations

import drawn
import pytest
from hypothesis import given

LOCAL_FULL, PROCESS_FULL = 1000, 200
# (W, T): ranks of an expert-parallel group, and of a tensor-parallel one.
LAYOUTS = [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (1, 2), (2, 2), (3, 2)]

pytestmark = pytest.mark.parametrize("version", [1, 2])


def heading(version):
    return f"Drawn configurations of v{version} dispatch and combine against the definition"


def test_threads(version):
    @drawn.profile(60)
    @given(drawn.configs(version))
    def draw_and_check(config):
        drawn.check_in_threads(config)

    draw_and_check()


@pytest.mark.parametrize("world", ["symmetric", "collective"])
@pytest.mark.parametrize("layout", [(2, 1), (3, 1), (2, 2)])
def test_processes(world, layout, version):
    drawn.many_in_processes(version, world, [layout], batches=1, each=3)


@pytest.mark.full
def test_many_in_threads(version, record_evidence):
    tally = drawn.many_in_threads(version, LOCAL_FULL + LOCAL_FULL // 10)
    assert len(tally.distinct) >= LOCAL_FULL
    record_evidence(heading(version), tally.summary("threads"))


@pytest.mark.full
@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_many_in_processes(world, version, record_evidence):
    tally = drawn.many_in_processes(version, world, LAYOUTS, batches=7, each=4)
    assert len(tally.distinct) >= PROCESS_FULL
    record_evidence(heading(version), tally.summary(f"processes, {world}"))
