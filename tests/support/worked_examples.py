"""The worked examples of the contract, with their numbers as literals.

One object holds the inputs of every rank and everything the ops must return. The numbers were
computed apart from this repository; nothing here is derived, so the definition and the ops can both
be held against them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from definition import Group, Tokens, encode
from definition_numbers import TORCH_DTYPES, same_bits


@dataclass
class Example:
    """Inputs and literal outputs, one list entry per world rank.

    Attributes:
        expand_x: valid rows, as plain numbers; with tensor parallelism the peer's follow.
        dynamic_scales: valid factors as hexadecimal floats; None where the output has no meaning.
        expert_outputs: rows handed to combine, as plain numbers.
        combined: rows of the result of combine.
        rows: (source, token, slot) of each own row.
        expand_idx: None where only version 2 can be called.
        expand_scales: routing weights of the own rows, or None where the contract does not list
            them.
        tp_recv_counts: None without tensor parallelism, where the output has no meaning.
    """

    group: Group
    tokens: list[Tokens]
    capacity: list[int]
    rows: list
    expand_x: list
    expand_idx: list | None
    token_nums: list
    token_nums_running: list
    ep_recv_counts: list
    expert_outputs: list
    combined: list
    dynamic_scales: list | None = None
    expand_scales: list | None = None
    tp_recv_counts: list | None = None


def bits(values: list, dtype: str = "bfloat16") -> np.ndarray:
    """Bits of numbers that are exact in ``dtype``."""
    return encode(np.array(values, np.float32), dtype)


def tokens(
    x: list, ids: list, weights: list, scales: list | None = None, dtype: str = "bfloat16"
) -> Tokens:
    """One rank's inputs from plain numbers; x is exact in ``dtype``."""
    return Tokens(
        x=bits(x, dtype),
        ids=np.array(ids, np.int32),
        weights=np.array(weights, np.float32),
        scales=None if scales is None else np.array(scales, np.float32),
    )


BASIC = Example(
    group=Group(world_size=2, num_experts=4, top_k=2, hidden=2),
    tokens=[
        tokens(
            [[1, 2], [3, 4], [5, 6]], [[0, 2], [2, 1], [0, 3]], [[0.5, 0.5], [0.75, 0.25], [1, 0.5]]
        ),
        tokens(
            [[10, 20], [30, 40], [50, 60]],
            [[3, 0], [0, 1], [2, 0]],
            [[0.25, 0.75], [0.5, 0.5], [0.125, 0.875]],
        ),
    ],
    capacity=[12, 12],
    expand_x=[
        [[1, 2], [5, 6], [10, 20], [30, 40], [50, 60], [3, 4], [30, 40]],
        [[1, 2], [3, 4], [50, 60], [5, 6], [10, 20]],
    ],
    rows=[
        [(0, 0, 0), (0, 2, 0), (1, 0, 1), (1, 1, 0), (1, 2, 1), (0, 1, 1), (1, 1, 1)],
        [(0, 0, 1), (0, 1, 0), (1, 2, 0), (0, 2, 1), (1, 0, 0)],
    ],
    expand_idx=[[0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 2]],
    token_nums=[[5, 2], [3, 2]],
    token_nums_running=[[5, 7], [3, 5]],
    ep_recv_counts=[[2, 5, 6, 7], [2, 3, 4, 5]],
    expand_scales=[[0.5, 1, 0.75, 0.5, 0.875, 0.25, 0.5], [0.5, 0.75, 0.125, 0.5, 0.25]],
    expert_outputs=[
        [[1, 2], [5, 6], [10, 20], [30, 40], [50, 60], [6, 8], [60, 80]],
        [[3, 6], [9, 12], [150, 180], [20, 24], [40, 80]],
    ],
    combined=[[[2, 4], [8.25, 11], [15, 18]], [[17.5, 35], [45, 60], [62.5, 75]]],
)

_SHARED_IDS = [[[0, 3], [1, 2]], [[2, 0], [3, 1]], [[1, 0], [0, 2]], [[3, 2], [2, 1]]]
_SHARED_TOKENS = [
    tokens([[10 * r + 1, 1], [10 * r + 2, 2]], ids, [[0.5, 0.25], [0.75, 0.25]])
    for r, ids in enumerate(_SHARED_IDS)
]
_ROUTED_X = [
    [[1, 1], [11, 1], [21, 1], [22, 2], [2, 2], [12, 2], [21, 1], [32, 2]],
    [[2, 2], [11, 1], [22, 2], [31, 1], [32, 2], [1, 1], [12, 2], [31, 1]],
]
# Expert e multiplies by e + 1, the shared expert by 64.
_ROUTED_OUTPUTS = [
    [[1, 1], [11, 1], [21, 1], [22, 2], [4, 4], [24, 4], [42, 2], [64, 4]],
    [[6, 6], [33, 3], [66, 6], [93, 3], [96, 6], [4, 4], [48, 8], [124, 4]],
]
_ROUTED_ROWS = [
    [(0, 0, 0), (1, 0, 1), (2, 0, 1), (2, 1, 0), (0, 1, 0), (1, 1, 1), (2, 0, 0), (3, 1, 1)],
    [(0, 1, 1), (1, 0, 0), (2, 1, 1), (3, 0, 1), (3, 1, 0), (0, 0, 1), (1, 1, 0), (3, 0, 0)],
]

# 810 and 2136 are ties between two bf16 values and go to the even one.
SHARED = Example(
    group=Group(world_size=4, num_experts=4, top_k=2, hidden=2, shared_ranks=2, shared_experts=1),
    tokens=_SHARED_TOKENS,
    capacity=[4, 4, 16, 16],
    expand_x=[
        [[1, 1], [2, 2], [21, 1], [22, 2]],
        [[11, 1], [12, 2], [31, 1], [32, 2]],
        *_ROUTED_X,
    ],
    rows=[
        [(0, 0, 2), (0, 1, 2), (2, 0, 2), (2, 1, 2)],
        [(1, 0, 2), (1, 1, 2), (3, 0, 2), (3, 1, 2)],
        *_ROUTED_ROWS,
    ],
    expand_idx=[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]],
    token_nums=[[4], [4], [4, 4], [5, 3]],
    token_nums_running=[[4], [4], [4, 8], [5, 8]],
    ep_recv_counts=[[2, 2, 4, 4], [0, 2, 2, 4], [1, 2, 4, 4, 5, 6, 7, 8], [1, 2, 3, 5, 6, 7, 7, 8]],
    expert_outputs=[
        [[64, 64], [128, 128], [1344, 64], [1408, 128]],
        [[704, 64], [768, 128], [1984, 64], [2048, 128]],
        *_ROUTED_OUTPUTS,
    ],
    combined=[
        [[65.5, 65.5], [132, 132]],
        [[724, 66], [808, 135]],
        [[1368, 65], [1440, 131]],
        [[2064, 67], [2144, 134]],
    ],
)

# The same tokens, two shared experts with one copy each: both shared ranks receive every token.
TWO_SHARED = Example(
    group=Group(world_size=4, num_experts=4, top_k=2, hidden=2, shared_ranks=2, shared_experts=2),
    tokens=_SHARED_TOKENS,
    capacity=[8, 8, 16, 16],
    expand_x=[
        *([[[1, 1], [2, 2], [11, 1], [12, 2], [21, 1], [22, 2], [31, 1], [32, 2]]] * 2),
        *_ROUTED_X,
    ],
    rows=[
        *[[(source, token, slot) for source in range(4) for token in range(2)] for slot in (2, 3)],
        *_ROUTED_ROWS,
    ],
    expand_idx=[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]],
    token_nums=[[8], [8], [4, 4], [5, 3]],
    token_nums_running=[[8], [8], [4, 8], [5, 8]],
    ep_recv_counts=[[2, 4, 6, 8], [2, 4, 6, 8], [1, 2, 4, 4, 5, 6, 7, 8], [1, 2, 3, 5, 6, 7, 7, 8]],
    # Row by row the two experts return together what the one of SHARED does, so the sums agree.
    expert_outputs=[
        [
            [60, 60],
            [120, 120],
            [660, 60],
            [720, 120],
            [1264, 60],
            [1320, 120],
            [1856, 60],
            [1920, 120],
        ],
        [[4, 4], [8, 8], [44, 4], [48, 8], [80, 4], [88, 8], [128, 4], [128, 8]],
        *_ROUTED_OUTPUTS,
    ],
    combined=[
        [[65.5, 65.5], [132, 132]],
        [[724, 66], [808, 135]],
        [[1368, 65], [1440, 131]],
        [[2064, 67], [2144, 134]],
    ],
)

_SMOOTH = [[1, 1, 1, 1], [2, 0.5, 1, 4]]
# Expert outputs are the dequantised rows rounded to bf16 (experts that change nothing).
QUANTISED = Example(
    group=Group(world_size=2, num_experts=1, top_k=1, hidden=4, shared_ranks=1, quant_mode=2),
    tokens=[
        tokens([[1, -2, 0.5, 4], [0, 0, 0, 0]], [[0], [0]], [[1], [0.5]], _SMOOTH),
        tokens([[3, -8, 1.5, 0.25], [0.125, 0.25, -0.5, 1]], [[0], [0]], [[0.5], [2]], _SMOOTH),
    ],
    capacity=[4, 4],
    expand_x=[
        [[32, -64, 16, 127], [0, 0, 0, 0], [48, -127, 24, 4], [16, 32, -64, 127]],
        [[16, -8, 4, 127], [0, 0, 0, 0], [127, -85, 32, 21], [8, 4, -16, 127]],
    ],
    rows=[
        [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)],
        [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)],
    ],
    dynamic_scales=[
        ["0x1.020408p-5", "0x0p+0", "0x1.020408p-4", "0x1.020408p-7"],
        ["0x1.020408p-3", "0x0p+0", "0x1.83060cp-5", "0x1.020408p-5"],
    ],
    expand_idx=[[0, 1], [0, 1]],
    token_nums=[[4], [4]],
    token_nums_running=[[4], [4]],
    ep_recv_counts=[[2, 4], [2, 4]],
    expert_outputs=[None, None],
    combined=[
        [[3.03125, -3.03125, 1.0078125, 20], [0, 0, 0, 0]],
        [[6.03125, -10, 2.28125, 0.75], [0.62890625, 0.50390625, -1.515625, 9]],
    ],
)

# World rank = 2 * EP rank + TP rank; the rank of TP rank 1 computes three quarters of each expert.
TENSOR_PARALLEL = Example(
    group=Group(world_size=2, num_experts=2, top_k=1, hidden=2, tp_world_size=2),
    tokens=[
        tokens([[10 * w + 1, 1], [10 * w + 2, 2]], ids, [[0.5], [2]])
        for w, ids in enumerate([[[0], [1]], [[1], [1]], [[0], [0]], [[1], [0]]])
    ],
    capacity=[4, 4, 4, 4],
    rows=[
        [(0, 0, 0), (1, 0, 0), (1, 1, 0)],
        [(1, 1, 0)],
        [(0, 1, 0)],
        [(0, 0, 0), (0, 1, 0), (1, 0, 0)],
    ],
    expand_x=[
        [[1, 1], [21, 1], [22, 2], [32, 2]],
        [[32, 2], [1, 1], [21, 1], [22, 2]],
        [[2, 2], [11, 1], [12, 2], [31, 1]],
        [[11, 1], [12, 2], [31, 1], [2, 2]],
    ],
    expand_idx=[[0, 0], [0, 1], [0, 1], [0, 0]],
    token_nums=[[4], [4], [4], [4]],
    token_nums_running=[[4], [4], [4], [4]],
    ep_recv_counts=[[1, 3, 0, 1], [0, 1, 1, 3], [1, 1, 2, 3], [2, 3, 1, 1]],
    tp_recv_counts=[[3, 1], [3, 1], [1, 3], [1, 3]],
    expand_scales=[[0.5, 0.5, 2], [2], [2], [0.5, 2, 0.5]],
    expert_outputs=[
        [[1, 1], [21, 1], [22, 2], [32, 2]],
        [[96, 6], [3, 3], [63, 3], [66, 6]],
        [[2, 2], [11, 1], [12, 2], [31, 1]],
        [[33, 3], [36, 6], [93, 3], [6, 6]],
    ],
    combined=[
        [[2, 2], [16, 16]],
        [[22, 2], [96, 16]],
        [[42, 2], [176, 16]],
        [[62, 2], [256, 16]],
    ],
)


def _comm_quantised(dtype: str, arrived: list) -> Example:
    """One row that travels as int8 to another rank and to its own."""
    row = [1, -2, 0.5, 4, 3, -0.125, 0, 2.5] + [0] * 8
    return Example(
        group=Group(
            world_size=2, num_experts=2, top_k=1, hidden=16, dtype=dtype, comm_quant_mode=2
        ),
        tokens=[tokens([[0] * 16], [[1]], [[1]], dtype=dtype) for _ in range(2)],
        capacity=[2, 2],
        rows=[[], [(0, 0, 0), (1, 0, 0)]],
        expand_x=[[], [[0] * 16] * 2],
        expand_idx=[[0], [0]],
        token_nums=[[0], [2]],
        token_nums_running=[[0], [2]],
        ep_recv_counts=[[0, 0], [1, 2]],
        expert_outputs=[[], [row, row]],
        combined=[[arrived + [0] * 8]] * 2,
    )


COMM_QUANTISED_BF16 = _comm_quantised(
    "bfloat16", [1.0078125, -2.015625, 0.50390625, 4, 2.984375, -0.1259765625, 0, 2.484375]
)
COMM_QUANTISED_FP16 = _comm_quantised(
    "float16", [1.0078125, -2.015625, 0.50390625, 4, 2.9921875, -0.1259765625, 0, 2.48828125]
)


def _zero_computation_tokens(x: list, ids: list, weights: list, mask: list) -> Tokens:
    mine = tokens(x, ids, weights)
    mine.mask = np.array(mask, bool)
    mine.ori_x = mine.x
    mine.alpha_1, mine.alpha_2, mine.const_v = bits([2]), bits([3]), bits([[1, -1]])
    return mine


# Expert 2 is zero, 3 copies, 4 is constant; the routed experts multiply by 10.
ZERO_COMPUTATION = Example(
    group=Group(
        world_size=2,
        num_experts=2,
        top_k=2,
        hidden=2,
        zero_experts=1,
        copy_experts=1,
        const_experts=1,
    ),
    tokens=[
        _zero_computation_tokens(
            [[1, 2], [3, 4], [5, 6]],
            [[0, 1], [1, 2], [3, 0]],
            [[0.5, 0.5], [0.5, 0.5], [0.25, 1]],
            [[1, 1], [1, 1], [1, 0]],
        ),
        _zero_computation_tokens(
            [[7, 8], [9, 10], [11, 12]],
            [[4, 0], [1, 0], [0, 1]],
            [[2, 1], [0.5, 0.5], [1, 1]],
            [[1, 1], [0, 1], [0, 0]],
        ),
    ],
    capacity=[6, 6],
    rows=[[(0, 0, 0), (1, 0, 1), (1, 1, 1)], [(0, 0, 1), (0, 1, 0)]],
    expand_x=[[[1, 2], [7, 8], [9, 10]], [[1, 2], [3, 4]]],
    expand_idx=None,
    token_nums=[[3], [2]],
    token_nums_running=[[3], [2]],
    ep_recv_counts=[[1, 3], [2, 2]],
    expand_scales=[[0.5, 1, 0.5], [0.5, 0.5]],
    expert_outputs=[[[10, 20], [70, 80], [90, 100]], [[10, 20], [30, 40]]],
    combined=[[[10, 20], [15, 20], [1.25, 1.5]], [[104, 106], [45, 50], [0, 0]]],
)

EXAMPLES = {
    "basic": BASIC,
    "shared": SHARED,
    "two_shared": TWO_SHARED,
    "quantised": QUANTISED,
    "tensor_parallel": TENSOR_PARALLEL,
    "comm_quantised_bf16": COMM_QUANTISED_BF16,
    "comm_quantised_fp16": COMM_QUANTISED_FP16,
    "zero_computation": ZERO_COMPUTATION,
}
# One group, no quantised returns.
PLAIN = ("basic", "shared", "two_shared", "quantised")


def expert_bits(example: Example, rank: int) -> np.ndarray:
    """(n, H) uint16 bits of the outputs of the experts of ``rank``."""
    outputs = example.expert_outputs[rank]
    if outputs is None:
        codes = np.array(example.expand_x[rank], np.float32)
        outputs = codes * dynamic_scales(example, rank)[:, None]
    shape = len(outputs), example.group.hidden
    return bits(outputs, example.group.dtype).reshape(shape)


def dynamic_scales(example: Example, rank: int) -> np.ndarray:
    """(n,) float32 from the hexadecimal literals."""
    literals = example.dynamic_scales[rank]
    return np.array([float.fromhex(literal) for literal in literals], np.float32)


def example_calls(example: Example, **options: Any) -> list[dict | None]:
    """The arguments of every rank; options as for :func:`harness.make_calls`."""
    import harness  # needs cloudpickle, which the numbers alone do not

    rows = [expert_bits(example, rank) for rank in range(len(example.tokens))]
    return harness.make_calls(example.group, example.tokens, rows, **options)


def check_literal(
    example: Example,
    rank: int,
    outputs: tuple,
    combined: torch.Tensor,
    *,
    version: int = 1,
    token_nums_type: int = 1,
) -> None:
    """Every output of one rank against the numbers of the worked example."""
    x, factors, index, nums, counts, tp_counts, weights = outputs
    group, capacity = example.group, example.capacity[rank]
    rows, n = group.tp_world_size * capacity, len(example.expand_x[rank])
    assert tuple(x.shape) == (rows, group.hidden)
    assert x.dtype == (torch.int8 if group.quant_mode else TORCH_DTYPES[group.dtype])
    assert x[:n].tolist() == example.expand_x[rank]
    assert tuple(factors.shape) == (rows,)
    assert factors.dtype == torch.float32
    if group.quant_mode:
        # Bits, as the factor of a zero row is 0.0 and not -0.0.
        same_bits(factors[:n], dynamic_scales(example, rank), "dynamic_scales")
    assert index.dtype == torch.int32
    if version == 1:
        assert index.tolist() == example.expand_idx[rank]
    else:
        assert tuple(index.shape) == (max(example.tokens[rank].ids.size, capacity * 128),)
        triples = index[: 3 * len(example.rows[rank])].view(-1, 3).tolist()
        assert triples == [list(row) for row in example.rows[rank]]
    assert nums.dtype == torch.int64
    wanted = example.token_nums if token_nums_type == 1 else example.token_nums_running
    assert nums.tolist() == wanted[rank]
    assert counts.dtype == torch.int32
    assert counts.tolist() == example.ep_recv_counts[rank]
    assert tp_counts.dtype == torch.int32
    if example.tp_recv_counts is None:
        assert tuple(tp_counts.shape) in ((0,), (1,))  # tp_world_size
    else:
        assert tp_counts.tolist() == example.tp_recv_counts[rank]
    assert tuple(weights.shape) == (capacity,)
    assert weights.dtype == torch.float32
    own = len(example.rows[rank])
    if example.expand_scales is not None:
        assert weights[:own].tolist() == example.expand_scales[rank]
    if rank // group.tp_world_size < group.shared_ranks:
        assert weights[:own].tolist() == [1.0] * own
    assert combined.dtype == TORCH_DTYPES[group.dtype]
    assert combined.tolist() == example.combined[rank]
