"""The quantisations of dispatch under torch_npu's modes and dtype numbers, by literal numbers.

That any drawn configuration equals the definition is the business of test_hypothesis_quant.
"""

from __future__ import annotations

import harness
import pytest
import torch

from moe_triton.ascend.quant_modes import dtype_number
from moe_triton.compat import torch_npu

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
ROW = [5, -7.5, 0.30078125, 0.010009765625, 2, 1] + [0.0] * 58


def as_bytes(tensor):
    """A tensor as its bytes and dtype: torch does not pickle float8."""
    return None if tensor is None else (tensor.view(torch.uint8), tensor.dtype)


def from_bytes(pair):
    return None if pair is None else pair[0].view(pair[1])


def dispatched(x, *, world="local", scales=None, **arguments):
    """expand_x and dynamic_scales of one row that rank 0 of two sends to the expert on rank 1."""
    sent = as_bytes(x), as_bytes(scales)

    def fn(ctx):
        x, scales = map(from_bytes, sent)
        ids = torch.tensor([[1 - ctx.rank]], dtype=torch.int32)
        where = (ctx.ep_group, 2, ctx.ep_rank, 2)
        out = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, *where, scales=scales, **arguments)
        return [as_bytes(one) for one in out[:2]]

    rows, scales = map(from_bytes, harness.run_world(world, 2, fn)[1])
    return rows[:1], scales[:1]


# 13 #27: MX scales come in pairs, as e8m0. 13 #28: MX saturates, here -480 to -448.
WORKED = {
    "MX e4m3": (
        {"quant_mode": 4},
        [[121, 0]],
        "7a fe 5a 32 70 68",
        [320, -448, 20, 0.625, 128, 64],
    ),
    "MX e5m2": (
        {"quant_mode": 4, "y_dtype": E5M2},
        [[114, 0]],
        "79 fb 69 55 74 70",
        [40960, -57344, 2560, 80, 16384, 8192],
    ),
    "group e4m3": (
        {"quant_mode": 3, "y_dtype": 24},
        [[0.0167410708963871]],
        "79 fe 59 32 6f 67",
        [288, -448, 18, 0.625, 120, 60],
    ),
    "group e5m2": (
        {"quant_mode": 3, "y_dtype": 291},
        [[0.00013078961637802422]],
        "79 fb 68 55 73 6f",
        [40960, -57344, 2048, 80, 14336, 7168],
    ),
    # A group that holds the whole row has one scale per row.
    "row e4m3": (
        {"quant_mode": 2, "y_dtype": 292},
        [0.0167410708963871],
        "79 fe 59 32 6f 67",
        [288, -448, 18, 0.625, 120, 60],
    ),
}


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("name", WORKED)
def test_worked_example(name, world):
    arguments, scales, codes, values = WORKED[name]
    rows, actual = dispatched(torch.tensor([ROW]).bfloat16(), world=world, **arguments)
    assert [f"{code:02x}" for code in rows.view(torch.uint8)[0, :6].tolist()] == codes.split()
    assert rows[0].float().tolist() == values + [0.0] * 58
    if arguments["quant_mode"] == 4:
        assert actual.dtype == E8M0
        actual = actual.view(torch.uint8)
    else:
        assert actual.dtype == torch.float32
    assert actual.tolist() == scales


@pytest.mark.parametrize(
    "factors, codes",
    [
        pytest.param([2.0], [2, -5, 127, -128], id="one factor"),
        pytest.param([1.0, 1.0, 0.25, 10.0], [1, -2, 25, -128], id="a factor for each column"),
        pytest.param([[9.0] * 4, [2.0, 1, 1, 1]], [2, -2, 100, -100], id="those of expert 1"),
    ],
)
def test_static_factors(factors, codes):
    """13 #6: the mode is there. Ties go to the even code, and codes saturate."""
    x = torch.tensor([[1.0, -2.5, 100.0, -100.0]]).half()
    rows, scales = dispatched(x, quant_mode=1, scales=torch.tensor(factors))
    assert rows.dtype == torch.int8
    assert rows.tolist() == [codes]
    assert scales.tolist() == [0.0]


@pytest.mark.parametrize("kind", [E4M3, E5M2])
@pytest.mark.parametrize(
    "scales",
    [
        pytest.param(torch.tensor([0.5]), id="one, without a dimension"),
        pytest.param(torch.tensor([[0.5]]), id="one"),
        pytest.param(torch.tensor([[0.5, -3.0, 7.0]]), id="three"),
        pytest.param(torch.tensor([[7, 255]], dtype=torch.uint8).view(E8M0), id="e8m0"),
    ],
)
@pytest.mark.parametrize("world", harness.WORLDS)
def test_given_codes_pass_as_they_are(world, scales, kind):
    x = torch.tensor([[0x00, 0x80, 0x7F, 0x55, 0xFF]], dtype=torch.uint8).view(kind)
    rows, actual = dispatched(x, world=world, scales=scales)
    assert rows.dtype == kind
    assert torch.equal(rows.view(torch.uint8), x.view(torch.uint8))
    assert actual.dtype == scales.dtype
    assert actual.shape == scales.shape
    assert torch.equal(actual.view(torch.uint8), scales.view(torch.uint8))


def test_one_given_scale_of_any_strides():
    """torch calls one strided row contiguous."""
    x = torch.tensor([[1, 2]], dtype=torch.uint8).view(E4M3)
    where = {"ep_world_size": 1, "ep_rank_id": 0, "moe_expert_num": 1}
    scales = torch.tensor([[3.0, 7.0]])[:, ::2]
    ids = torch.zeros(1, 1, dtype=torch.int32)

    def fn(ctx):
        dispatch = torch_npu.npu_moe_distribute_dispatch
        return dispatch(x, ids, group_ep=ctx.ep_group, scales=scales, **where)[1].tolist()

    assert harness.run_world("local", 1, fn) == [[[3.0]]]


def test_given_codes_may_come_as_bytes():
    x = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    scales = torch.tensor([[7, 9]], dtype=torch.uint8)
    rows, actual = dispatched(x, scales=scales, x_dtype=24, scales_dtype=293)
    assert (rows.dtype, actual.dtype) == (E4M3, E8M0)
    assert rows.view(torch.uint8).tolist() == [[1, 2, 3]]
    assert actual.view(torch.uint8).tolist() == [[7, 9]]


@pytest.mark.parametrize("argument", ["y_dtype", "scales"])
def test_ranks_that_differ(argument):
    def fn(ctx):
        arguments = {"quant_mode": 1, "scales": torch.ones(1)}
        if argument == "y_dtype":
            arguments = {"quant_mode": 3, "y_dtype": [E4M3, E5M2][ctx.rank]}
        elif ctx.rank == 1:
            arguments["scales"] = torch.ones(2, 4)
        try:
            torch_npu.npu_moe_distribute_dispatch_v2(
                torch.ones(1, 4).half(),
                torch.zeros(1, 1, dtype=torch.int32),
                *(ctx.ep_group, 2, ctx.ep_rank, 2),
                **arguments,
            )
        except ValueError as error:
            return harness.describe(error)

    for error in harness.run_world("local", 2, fn):
        assert error["types"][0] == "ArgumentMismatchError"
        assert error["argument"] == argument


KINDS = {
    "static": ({"quant_mode": 1, "scales": torch.ones(1)}, torch.float16),
    "e4m3": ({"quant_mode": 2, "y_dtype": E4M3}, torch.float16),
    "group": ({"quant_mode": 3}, torch.bfloat16),
    "MX": ({"quant_mode": 4, "y_dtype": 23}, torch.bfloat16),
    "given": ({"scales": torch.ones(3, 2)}, E5M2),
    "given, one": ({"scales": torch.ones(3)}, E4M3),
    "bytes": ({"scales": torch.ones(3), "x_dtype": 24}, torch.uint8),
}


@pytest.mark.parametrize("name", KINDS)
def test_shapes_are_known_in_advance(name):
    arguments, kind = KINDS[name]
    x = torch.ones(3, 130).to(kind)
    ids = torch.zeros(3, 1, dtype=torch.int32)
    numbers = {
        key: dtype_number(value) if key.endswith("dtype") else value
        for key, value in arguments.items()
    }

    def fn(ctx):
        where = {
            "group_ep": ctx.ep_group,
            "ep_world_size": 1,
            "ep_rank_id": 0,
            "moe_expert_num": 1,
        }
        real = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, **where, **arguments)
        moved = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in numbers.items()}
        meta = torch.ops.moe_triton.npu_moe_distribute_dispatch_v2(
            torch.zeros((), device="meta"), x.to("meta"), ids.to("meta"), **where, **moved
        )
        return real, meta

    ((real, meta),) = harness.run_world("local", 1, fn)
    for one, other in zip(real, meta, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.shape, one.dtype) == (other.shape, other.dtype)


def rounded_to_mx(rows, kind):
    """Rows as MX holds them: codes times the power of two below each 32 elements' largest."""
    blocks = rows.float().unflatten(1, (-1, 32))
    most_exponent, most = (8, 448) if kind == E4M3 else (15, 57344)
    exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent - 1 - most_exponent
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    codes = (blocks / scale).clamp(-most, most).to(kind)
    return (codes.float() * scale).flatten(1).to(rows.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("mode, kind", [(3, E5M2), (4, E4M3)], ids=["e5m2", "e4m3"])
def test_combine_rounds_rows_to_mx(mode, kind, dtype):
    def fn(ctx):
        generator = torch.Generator().manual_seed(ctx.rank)
        x = torch.randn(5, 96, generator=generator).to(dtype)
        ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in x]).int()
        weights = torch.rand(5, 2, generator=generator)
        where = (ctx.ep_group, 2, ctx.ep_rank, 4)
        rows, _, assist, _, counts, *_ = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, *where)
        rows[int(counts[-1]) :] = torch.nan
        return [
            torch_npu.npu_moe_distribute_combine_v2(
                sent, ids, assist, counts, weights, *where, comm_quant_mode=mode
            )
            for sent, mode in ((rows, mode), (rounded_to_mx(rows, kind), 0), (rows, 0))
        ]

    for actual, wanted, unrounded in harness.run_world("local", 2, fn):
        assert torch.equal(actual, wanted)
        assert not torch.equal(actual, unrounded)


def test_mx_is_refused_in_other_combines():
    def fn(ctx):
        x, ids = torch.ones(1, 32).half(), torch.zeros(1, 1, dtype=torch.int32)
        where = (ctx.ep_group, 1, 0, 1)
        rows, _, idx, _, counts, *_ = torch_npu.npu_moe_distribute_dispatch(x, ids, *where)
        try:
            torch_npu.npu_moe_distribute_combine(
                rows, ids, idx, counts, torch.ones(1, 1), *where, comm_quant_mode=4
            )
        except ValueError as error:
            return harness.describe(error)

    (error,) = harness.run_world("local", 1, fn)
    assert error["argument"] == "comm_quant_mode"
    assert error["code"] == 561002
