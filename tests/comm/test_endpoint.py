"""Endpoints: what the choice of a transport comes to, and how one ends."""

from __future__ import annotations

import harness
import pytest

from moe_triton import BrokenGroupError, MoeError, comm

OP = "test_op"
worlds = pytest.mark.parametrize("world", harness.WORLDS)


def open_endpoint(ctx, *, in_flight=1, timeout=5.0, transport="auto"):
    group = comm.resolve(OP, harness.own_group(ctx), ctx.ep_rank)
    return comm.open_endpoint(group, transport=transport, in_flight=in_flight, timeout=timeout)


def barrier(ctx, name: str) -> None:
    """All ranks come here; over the store, apart from what is tested."""
    ctx.store.add(name, 1)
    while ctx.store.add(name, 0) < ctx.world_size:
        pass


@worlds
def test_a_rank_that_cannot_tell_its_peers_keeps_its_own_error(world):
    """It refuses more calls than it may be ahead, and its peer never comes."""

    def fn(ctx):
        endpoint = open_endpoint(ctx, timeout=0.3)
        endpoint.transport(OP)
        if ctx.rank == 0:
            for _ in range(2):
                endpoint.reject("dispatch", OP, MoeError(OP, "wrong"))
            with pytest.raises(BrokenGroupError, match="call recover"):
                endpoint.raise_if_broken(OP)
            endpoint.reject("dispatch", OP, MoeError(OP, "wrong"))
        barrier(ctx, "done")
        comm.close_endpoint(endpoint)

    harness.run_world(world, 2, fn)
