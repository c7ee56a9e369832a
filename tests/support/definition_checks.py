"""The seven outputs of dispatch as tensors, against the definition."""

from __future__ import annotations

import numpy as np
import torch
from definition import Group, Received
from definition_numbers import ROW_DTYPES, TORCH_DTYPES, same_bits


def without_spare(group: Group, outputs: tuple, batch: int) -> tuple:
    """The outputs under the profile "a2", without the words behind the counts."""
    spare = 2 * batch * group.world_size * group.top_k * (group.world_size // 8)
    counts = outputs[4]
    assert counts.shape == (group.num_experts + spare,)
    return (*outputs[:4], counts[: group.num_experts], *outputs[5:])


def check_dispatch(
    group: Group,
    expected: Received,
    outputs: tuple[torch.Tensor, ...],
    *,
    rank: int,
    version: int = 1,
    token_nums_type: int = 1,
    weights_given: bool = True,
) -> None:
    """Assert that the seven outputs of dispatch on world rank ``rank`` are the expected ones.

    Shapes and dtypes are checked in full, contents on the valid rows.
    """
    x, factors, index, nums, counts, tp_counts, weights = outputs
    rows = group.tp_world_size * expected.capacity
    assert tuple(x.shape) == (rows, group.hidden)
    kind = group.given or (group.rows if group.quant_mode else None)
    assert x.dtype == (ROW_DTYPES[kind] if kind else TORCH_DTYPES[group.dtype])
    same_bits(x[: len(expected.expand_x)], expected.expand_x, f"rank {rank} expand_x")

    if expected.dynamic_scales is None:
        assert tuple(factors.shape) == (rows,) and factors.dtype == torch.float32
    else:
        wanted = expected.dynamic_scales
        e8m0 = wanted.dtype == np.uint8
        assert factors.dtype == (torch.float8_e8m0fnu if e8m0 else torch.float32)
        assert tuple(factors.shape) == (rows, *wanted.shape[1:])
        same_bits(factors[: len(wanted)], wanted, f"rank {rank} dynamic_scales")

    assert index.dtype == torch.int32 and index.ndim == 1
    if version == 1:
        wanted = np.array(expected.expand_idx, np.int32)
        same_bits(index, wanted, f"rank {rank} expand_idx")
    else:
        assert len(index) == max(len(expected.expand_idx), expected.capacity * 128)
        triples = np.array([row[1:] for row in expected.rows], np.int32).reshape(-1)
        same_bits(index[: len(triples)], triples, f"rank {rank} assist_info_for_combine")

    assert nums.dtype == torch.int64 and nums.ndim == 1
    wanted = expected.token_nums if token_nums_type == 1 else expected.token_nums_running
    same_bits(nums, np.array(wanted, np.int64), f"rank {rank} expert_token_nums")

    for what, actual, wanted in (
        ("ep_recv_counts", counts, expected.ep_recv_counts),
        ("tp_recv_counts", tp_counts, expected.tp_recv_counts),
    ):
        assert actual.dtype == torch.int32 and actual.ndim == 1
        if wanted is None:
            assert len(actual) in (0, 1), what  # tp_world_size
        else:
            same_bits(actual, np.array(wanted, np.int32), f"rank {rank} {what}")

    assert tuple(weights.shape) == (expected.capacity,) and weights.dtype == torch.float32
    if weights_given:
        n = len(expected.expand_scales)
        same_bits(weights[:n], expected.expand_scales, f"rank {rank} expand_scales")
