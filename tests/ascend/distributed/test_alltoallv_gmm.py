"""Matrix products around an exchange: forth against one product for each row, and back again."""

from __future__ import annotations

import re

import harness
import numpy as np
import pytest
import torch
from harness import run_world

from moe_triton import MoeError, PeerAbortError
from moe_triton.compat import torch_npu

WORLD, EXPERTS, H1, N1 = 3, 2, 4, 5
# Rows of each rank for each (rank, expert of that rank).
COUNTS = [[1, 0, 2, 3, 0, 1], [0, 0, 1, 1, 2, 0], [3, 1, 0, 0, 0, 2]]


def rows_of(rank: int) -> torch.Tensor:
    """[rows, H1] small integers, whose products are exact."""
    random = torch.Generator().manual_seed(rank)
    return torch.randint(-4, 5, (sum(COUNTS[rank]), H1), generator=random).float()


def matrices_of(rank: int, sizes: tuple[int, int] = (H1, N1)) -> torch.Tensor:
    random = torch.Generator().manual_seed(9 + rank)
    return torch.randint(-4, 5, (EXPERTS, *sizes), generator=random).float()


def recv_counts(rank: int) -> list[int]:
    """Rows of this rank from each (rank, own expert)."""
    return [count for row in COUNTS for count in row[rank * EXPERTS : (rank + 1) * EXPERTS]]


def received(rank: int) -> list[list[torch.Tensor]]:
    """For each own expert, the rows from each rank."""
    parts = [rows_of(source).split(COUNTS[source]) for source in range(WORLD)]
    return [
        [parts[source][rank * EXPERTS + expert] for source in range(WORLD)]
        for expert in range(EXPERTS)
    ]


def forth_and_back(ctx, transposed: bool) -> bool:
    rank = ctx.ep_rank
    weight, counts = matrices_of(rank), recv_counts(rank)
    shared = torch.ones(2, 3), torch.full((3, 4), 2.0)
    common = {"hcom": ctx.ep_group, "ep_world_size": WORLD}
    y, mm_y, rows = torch_npu.npu_alltoallv_gmm(
        rows_of(rank),
        weight.mT.contiguous() if transposed else weight,
        send_counts=COUNTS[rank],
        recv_counts=np.array(counts),
        mm_x=shared[0],
        mm_weight=shared[1].T.contiguous() if transposed else shared[1],
        trans_gmm_weight=transposed,
        trans_mm_weight=transposed,
        permute_out_flag=True,
        **common,
    )
    wanted = received(rank)
    right = torch.equal(rows, torch.cat([part for expert in wanted for part in expert]))
    products = [torch.cat(parts) @ weight[expert] for expert, parts in enumerate(wanted)]
    right &= torch.equal(y, torch.cat(products))
    right &= torch.equal(mm_y, torch.full((2, 4), 6.0))

    back, none = torch_npu.npu_gmm_alltoallv(
        rows, weight, send_counts=counts, recv_counts=COUNTS[rank], **common
    )
    parts = rows_of(rank).split(COUNTS[rank])
    own = [
        part @ matrices_of(place // EXPERTS)[place % EXPERTS] for place, part in enumerate(parts)
    ]
    return bool(right and torch.equal(back, torch.cat(own)) and none is None)


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_forth_and_back(world, transposed):
    assert run_world(world, WORLD, lambda ctx: forth_and_back(ctx, transposed)) == [True] * WORLD


def call(ctx, **changes):
    rank = ctx.ep_rank
    arguments = {
        "gmm_x": rows_of(rank),
        "gmm_weight": matrices_of(rank),
        "hcom": ctx.ep_group,
        "ep_world_size": WORLD,
        "send_counts": COUNTS[rank],
        "recv_counts": recv_counts(rank),
    }
    return torch_npu.npu_alltoallv_gmm(**arguments | changes)


REFUSED = [
    ({"gmm_weight": matrices_of(0).half()}, "gmm_weight must be float32"),
    ({"gmm_weight": matrices_of(0, (3, N1))}, "gmm_x must have as many columns"),
    ({"ep_world_size": 2}, "ep_world_size must be the size of the group, 3"),
    ({"send_counts": [1] * 6}, "send_counts must be E .* that add up"),
    ({"send_counts": [1] * 5}, "send_counts must be E .* = 6 counts"),
    ({"recv_counts": [-1] * 6}, "recv_counts must be E"),
    ({"mm_x": torch.ones(2, 3)}, "mm_weight must be given if and only if mm_x is"),
    ({"send_counts_tensor": torch.ones(6)}, "send_counts_tensor must be left at its default"),
    ({"gmm_x": None}, "gmm_x must be given"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_a_refusal_aborts_the_peers(changes, message):
    def work(ctx):
        try:
            call(ctx, **(changes if ctx.ep_rank == 1 else {}))
        except MoeError as error:
            return type(error) is PeerAbortError, str(error)
        return None

    results = run_world("local", WORLD, work)
    assert not results[1][0]
    assert re.search(f"npu_alltoallv_gmm: .*{message}", results[1][1])
    assert results[0][0]
    assert results[2][0]


def test_counts_that_the_peers_do_not_send():
    def work(ctx):
        counts = [*recv_counts(ctx.ep_rank)]
        counts[0] += 1
        try:
            call(ctx, recv_counts=counts)
        except MoeError as error:
            return str(error)
        return None

    for text in run_world("local", WORLD, work):
        assert "recv_counts must be what the peers send" in text
