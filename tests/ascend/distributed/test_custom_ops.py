"""The npu_ functions as custom ops: their schemas, fake outputs, and calls in compiled code.

One rank alone, or two processes; what the ops compute is the business of other tests.
"""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
import typing
from collections.abc import Sequence

import compilers
import harness
import pytest
import torch
import torch.distributed as dist

from moe_triton import comm, testing
from moe_triton.ascend.distributed import grouped_matmul, schemas
from moe_triton.ascend.local import schemas as local_schemas
from moe_triton.compat import torch_npu
from moe_triton.errors import ArgumentTypeError, ArgumentValueError, PeerAbortError
from moe_triton.ops.custom_op import Function, Operator

pytestmark = compilers.MARKS

NAMES = torch_npu.__all__
# Names of torch_npu's that a schema cannot have, or spells as the others do.
IN_SCHEMAS = {"input": "x", "self": "x", "expertIdx": "expert_idx"}
REGISTERED = [
    one
    for module in (schemas, local_schemas, grouped_matmul)
    for one in vars(module).values()
    if isinstance(one, (Operator, Function))
]
WRITE = ("npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2")  # performance_info
BS, H, K, E = 6, 16, 2, 4


@pytest.fixture(scope="module")
def alone():
    """The name of a group of one rank."""
    comm.register_group("alone", dist.HashStore(), 1, rank=0)
    yield "alone"
    comm.unregister_group("alone")


def tensors(rank: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, expert_ids and expert_scales of a rank."""
    random = torch.Generator().manual_seed(rank)
    x = torch.randn(BS, H, generator=random).bfloat16()
    ids = torch.stack([torch.randperm(E, generator=random)[:K] for _ in range(BS)]).int()
    return x, ids, torch.rand(BS, K, generator=random)


MASK = torch.ones(BS, K, dtype=torch.bool)
MASK[1, 0] = MASK[4] = False
SMOOTH = torch.linspace(0.5, 2, E * H).view(E, H)

# name -> version, and further arguments of dispatch, of combine, and of both.
LAYERS = {
    "v1": (1, {}, {}, {}),
    "v1 with all": (
        1,
        {"quant_mode": 2, "scales": SMOOTH, "expert_token_nums_type": 0},
        {"shared_expert_x": torch.ones(BS, H, dtype=torch.bfloat16)},
        {"x_active_mask": MASK},
    ),
    "v2": (2, {}, {}, {}),
    "v2 with all": (
        2,
        {"quant_mode": 2, "scales": SMOOTH},
        {
            "shared_expert_x": torch.ones(1, BS, H, dtype=torch.bfloat16),
            "ori_x": torch.ones(BS, H, dtype=torch.bfloat16),
            "const_expert_alpha_1": torch.full((1,), 2, dtype=torch.bfloat16),
            "const_expert_alpha_2": torch.full((1,), 3, dtype=torch.bfloat16),
            "const_expert_v": torch.ones(1, H, dtype=torch.bfloat16),
            "comm_quant_mode": 2,
        },
        {
            "x_active_mask": MASK,
            "zero_expert_num": 1,
            "copy_expert_num": 1,
            "const_expert_num": 1,
            "comm_alg": "fullmesh_v1",
        },
    ),
}


def layer(name: str, where: tuple, x, ids, weights):
    """All outputs of dispatch and combine around experts that multiply by -2, none undefined."""
    version, for_dispatch, for_combine, for_both = LAYERS[name]
    suffix = "_v2" if version == 2 else ""
    dispatch = getattr(torch_npu, "npu_moe_distribute_dispatch" + suffix)
    combine = getattr(torch_npu, "npu_moe_distribute_combine" + suffix)
    out = dispatch(x, ids, *where, expert_scales=weights, **for_dispatch, **for_both)
    rows, scales, index, nums, counts, tp_counts, row_weights = out
    y = -2 * (rows if rows.dtype == x.dtype else (rows.float() * scales[:, None]).to(x.dtype))
    combined = combine(y, ids, index, counts, weights, *where, **for_combine, **for_both)
    # Mask the unwritten elements.
    written = torch.arange(len(rows)) < counts[-1]
    rows = rows.where(written[:, None], 0)
    scales = scales.where(written, 0)
    words = torch.arange(len(index)) < 3 * counts[-1]
    index = index.where(words, 0) if version == 2 else index
    return rows, scales, index, nums, counts, tp_counts, row_weights.where(written, 0), combined


def assert_same(got, expected) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# What is registered.


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_is_the_public_signature(name):
    schema = getattr(torch.ops.moe_triton, name).default._schema
    parameters = inspect.signature(getattr(torch_npu, name), eval_str=True).parameters
    kinds = {"Tensor": torch.Tensor, "int": int, "float": float, "str": str, "bool": bool}
    kinds |= {"List[int]": Sequence[int], "List[Tensor]": Sequence[torch.Tensor]}
    kinds |= {f"Optional[{kind}]": python | None for kind, python in kinds.items()}
    operator = next(one for one in REGISTERED if one._name == f"moe_triton::{name}")
    arguments = [*schema.arguments]
    if isinstance(operator, Operator):
        assert arguments.pop(0).alias_info.is_write
    assert not any(argument.alias_info for argument in arguments if name not in WRITE)
    if name == "npu_moe_init_routing_v2":  # the mode that compiled code is traced in
        assert arguments.pop().name == "zero_unwritten"
    # What has gradients has no tensors by keyword only.
    by_keyword = not getattr(operator, "_has_gradients", False)
    names = [argument.name for argument in arguments]
    assert names == [IN_SCHEMAS.get(parameter, parameter) for parameter in parameters]
    for argument, parameter in zip(arguments, parameters.values(), strict=True):
        annotation = parameter.annotation
        if torch.dtype in typing.get_args(annotation):  # goes by its number
            optional = type(None) in typing.get_args(annotation)
            annotation = int | None if optional else int
        if annotation == torch.Tensor | Sequence[int] | None:  # numbers travel as a tensor
            annotation = torch.Tensor | None
        assert kinds[str(argument.type)] == annotation
        keyword_only = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert argument.kwarg_only == (keyword_only and by_keyword)
        has_default = parameter.default is not inspect.Parameter.empty
        assert argument.has_default_value() == has_default
        assert not has_default or argument.default_value == parameter.default


def test_neither_import_nor_call_loads_the_compiler():
    code = """
import sys, torch, torch.distributed as dist, moe_triton
assert not any(name.startswith("moe_triton.compat.") for name in sys.modules)
from moe_triton.compat.torch_npu import npu_moe_distribute_dispatch
moe_triton.comm.register_group("alone", dist.HashStore(), 1, rank=0)
x, ids = torch.ones(1, 8).half(), torch.zeros(1, 1, dtype=torch.int32)
npu_moe_distribute_dispatch(x, ids, "alone", 1, 0, 1)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("name", LAYERS)
def test_opcheck(name, alone):
    """All utilities of opcheck, for the calls that a layer makes."""
    with compilers.Recorded() as recorded:
        layer(name, (alone, 1, 0, E), *tensors())
    assert len(recorded.calls) == 2
    for op, args, kwargs in recorded.calls:
        # The last one compares values, also those of rows that a mask leaves unwritten.
        masked = kwargs.get("x_active_mask") is not None
        utilities = OPCHECK if masked else (*OPCHECK, "test_aot_dispatch_dynamic")
        torch.library.opcheck(op, args, kwargs, test_utils=utilities)


@pytest.mark.parametrize("number", [True, 1.0, "1"])
def test_numbers_that_the_dispatcher_would_convert(number, alone):
    x, ids, _ = tensors()
    with pytest.raises(ArgumentTypeError, match="ep_world_size must be an integer"):
        torch_npu.npu_moe_distribute_dispatch(x, ids, alone, number, 0, E)


# Shapes known in advance.


def facts(outputs):
    return [None if one is None else (tuple(one.shape), one.dtype) for one in outputs]


def on_meta(name: str, **arguments):
    """What the fake implementation returns."""
    moved = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in arguments.items()}
    out = getattr(torch.ops.moe_triton, name)(torch.zeros((), device="meta"), **moved)
    return out if isinstance(out, (tuple, list)) else [out]


# world size, tensor-parallel size, arguments, tokens of each rank -> A, L of each EP rank
WORLDS = {
    "plain": (2, 1, {"moe_expert_num": 4}, [3, 3], [(12, 2), (12, 2)]),
    "few experts": (2, 1, {"moe_expert_num": 2}, [3, 3], [(6, 1), (6, 1)]),
    "global_bs": (2, 1, {"moe_expert_num": 4, "global_bs": 10}, [0, 5], [(20, 2), (20, 2)]),
    "shared rank": (
        2,
        1,
        {"moe_expert_num": 3, "shared_expert_rank_num": 1},
        [4, 4],
        [(8, 1), (16, 3)],
    ),
    "two copies": (
        4,
        1,
        {"moe_expert_num": 4, "shared_expert_rank_num": 2},
        [3, 3, 3, 3],
        [(6, 1), (6, 1), (24, 2), (24, 2)],
    ),
    "pairs": (4, 2, {"moe_expert_num": 2}, [3, 3, 3, 3], [(6, 1), (6, 1)]),
}


@pytest.mark.parametrize("quant_mode", [0, 2])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("case", WORLDS)
def test_static_shapes(case, version, quant_mode):
    world, tp, group, batches, sizes = WORLDS[case]
    suffix = "_v2" if version == 2 else ""
    top_k, int32 = 2, torch.int32

    def calls(ctx):
        given = {
            **group,
            "group_ep": ctx.ep_group,
            "ep_world_size": ctx.ep_world_size,
            "ep_rank_id": ctx.ep_rank,
        }
        if tp == 2:
            given |= {
                "group_tp": ctx.tp_group,
                "tp_world_size": 2,
                "tp_rank_id": ctx.tp_rank,
            }
        tokens = batches[ctx.rank]
        ids = torch.arange(top_k, dtype=int32).repeat(tokens, 1)
        weights = torch.ones(tokens, top_k)
        for_dispatch = {
            "x": torch.ones(tokens, H, dtype=torch.float16),
            "expert_ids": ids,
            "quant_mode": quant_mode,
            # With weights or without, in one of the cases each.
            "expert_scales": weights if quant_mode else None,
            **given,
        }
        name = "npu_moe_distribute_dispatch" + suffix
        out = getattr(torch_npu, name)(**for_dispatch)
        assert facts(on_meta(name, **for_dispatch)) == facts(out)
        for_combine = {
            "expand_x": out[0].half(),
            "expert_ids": ids,
            "assist_info_for_combine" if version == 2 else "expand_idx": out[2],
            "ep_send_counts": out[4],
            "expert_scales": weights,
            "tp_send_counts": out[5],
            **given,
        }
        name = "npu_moe_distribute_combine" + suffix
        combined = getattr(torch_npu, name)(**for_combine)
        assert facts(on_meta(name, **for_combine)) == facts([combined])
        return facts([*out, combined])

    for rank, got in enumerate(testing.run_local(world, calls, tp_world_size=tp)):
        rows, local = sizes[rank // tp]
        tokens, ranks = batches[rank], world // tp
        index = tokens * top_k if version == 1 else 128 * rows
        assert got == [
            ((tp * rows, H), torch.int8 if quant_mode else torch.float16),
            ((tp * rows,), torch.float32),
            ((index,), int32),
            ((local,), torch.int64),
            ((tp * ranks * local,), int32),
            ((2 if tp == 2 else 0,), int32),
            ((rows,), torch.float32),
            ((tokens, H), torch.float16),
        ]


@pytest.mark.parametrize(
    "change",
    [
        {"ep_world_size": 0},
        {"ep_world_size": -1},
        {"ep_rank_id": 9},
        {"moe_expert_num": 0},
        {"moe_expert_num": -3},
        {"shared_expert_rank_num": 2},
        {"shared_expert_rank_num": 1, "shared_expert_num": 3},
        {"tp_world_size": 3},
        {"tp_world_size": -1},
        {"global_bs": -5},
        {"quant_mode": 7},
        {"x": torch.ones(4)},
        {"x": torch.ones(2, 3, 4)},
        {"x": torch.ones(())},
        {"expert_ids": torch.ones(4)},
        {"expert_ids": torch.ones(1, 1, 1, 1)},
    ],
    ids=lambda change: " ".join(
        f"{name} {tuple(value.shape) if torch.is_tensor(value) else value}"
        for name, value in change.items()
    ),
)
def test_shapes_of_wrong_calls_raise_nothing(change):
    """A compiler would wrap the error; the op raises it when it runs."""
    group = {"group_ep": "none", "ep_world_size": 2, "ep_rank_id": 0, "moe_expert_num": 4}
    x, ids, weights = tensors()
    given = {"x": x, "expert_ids": ids, "expert_scales": weights, **group} | change
    assert len(on_meta("npu_moe_distribute_dispatch", **given)) == 7
    assert len(on_meta("npu_moe_distribute_dispatch_v2", **given)) == 7
    given["expand_x"] = given.pop("x")
    given.pop("quant_mode", None)
    given["ep_send_counts"] = ids
    assert len(on_meta("npu_moe_distribute_combine", expand_idx=ids, **given)) == 1
    assert len(on_meta("npu_moe_distribute_combine_v2", assist_info_for_combine=ids, **given)) == 1


# Compiled.


@pytest.mark.parametrize("backend", compilers.BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_gives_the_eager_bits(name, backend, alone):
    run = functools.partial(layer, name, (alone, 1, 0, E))
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for rank in range(2):  # the second time, nothing is compiled
        assert_same(compiled(*tensors(rank)), run(*tensors(rank)))


@pytest.mark.parametrize("backend", compilers.BACKENDS)
def test_compiled_outputs_have_no_gradients(backend, alone):
    run = functools.partial(layer, "v1", (alone, 1, 0, E))
    x, ids, weights = tensors()
    inputs = x.requires_grad_(), ids, weights.requires_grad_()
    outputs = torch.compile(run, backend=backend, fullgraph=True)(*inputs)
    assert not any(out is not None and out.requires_grad for out in outputs)


@pytest.mark.parametrize("backend", compilers.BACKENDS)
def test_compiled_calls_are_all_made_in_order(backend, alone, monkeypatch):
    made = []
    for name in ("distribute_dispatch", "distribute_combine"):
        function = getattr(schemas, name)

        def recorded(op, *, function=function, **given):
            made.append(op.removeprefix("npu_moe_distribute_"))
            return function(op, **given)

        monkeypatch.setattr(schemas, name, recorded)

    where = (alone, 1, 0, E)
    x, ids, weights = tensors()

    def calls(x):
        rows, _, index, _, counts, *_ = torch_npu.npu_moe_distribute_dispatch(x, ids, *where)
        torch_npu.npu_moe_distribute_dispatch(x, ids, *where)  # unused, and equal to the first
        send = (rows, ids, index, counts, weights, *where)
        torch_npu.npu_moe_distribute_combine(*send)
        rows, _, assist, *_ = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, *where)
        torch_npu.npu_moe_distribute_dispatch_v2(x, ids, *where)
        torch_npu.npu_moe_distribute_combine_v2(rows, ids, assist, counts, weights, *where)
        return torch_npu.npu_moe_distribute_combine(*send)

    v1, v2 = ["dispatch", "dispatch", "combine"], ["dispatch_v2", "dispatch_v2", "combine_v2"]
    compiled = torch.compile(calls, backend=backend, fullgraph=True)
    for _ in range(2):
        compiled(x)
        assert made == [*v1, *v2, "combine"]
        made.clear()


@pytest.mark.parametrize("backend", compilers.BACKENDS)
def test_compiled_performance_info_grows(backend, alone):
    x, ids, weights = tensors()
    info = torch.full((1,), 100, dtype=torch.int64)
    where = (alone, 1, 0, E)

    def calls(x):
        out = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, *where, performance_info=info)
        gained = info - 100
        torch_npu.npu_moe_distribute_combine_v2(
            out[0], ids, out[2], out[4], weights, *where, performance_info=info
        )
        return gained

    gained = torch.compile(calls, backend=backend, fullgraph=True)(x)
    assert 0 < gained.item() < info.item() - 100


@pytest.mark.parametrize(
    "change, error, argument",
    [
        ({"expert_ids": torch.full((BS, K), E, dtype=torch.int32)}, ArgumentValueError, None),
        ({"x": torch.ones(BS, H)}, ArgumentTypeError, "x"),
        ({"x": torch.ones(1, BS, H).half()}, ArgumentValueError, "x"),
        ({"quant_mode": 7}, ArgumentValueError, "quant_mode"),
        ({"moe_expert_num": -1}, ArgumentValueError, "moe_expert_num"),
        ({"group_ep": "x" * 200}, ValueError, "group_ep"),
    ],
    ids=["ids", "dtype", "shape", "quant_mode", "moe_expert_num", "group_ep"],
)
def test_compiled_errors_are_the_same(change, error, argument, alone):
    x, ids, _ = tensors()
    group = {"group_ep": alone, "ep_world_size": 1, "ep_rank_id": 0, "moe_expert_num": E}
    given = {"x": x, "expert_ids": ids, **group} | change

    def call():
        return torch_npu.npu_moe_distribute_dispatch(**given)

    with pytest.raises(error) as eager:
        call()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with pytest.raises(type(eager.value)) as caught:
        compiled()
    assert type(caught.value) is type(eager.value)
    assert str(caught.value) == str(eager.value)
    assert caught.value.argument == (argument or "expert_ids")


@compilers.needed
def test_compiled_on_two_processes():
    def run(ctx):
        torch.set_num_threads(1)
        where = (dist.group.WORLD, 2, ctx.rank, E)
        actual = []
        for name in ("v1", "v2 with all"):

            def model(x, ids, weights, name=name):
                first = layer(name, where, x, ids, weights)
                layer(name, where, x, ids, weights)  # unused, and equal to the first
                return *first, layer(name, where, first[-1], ids, weights)[-1]

            expected = model(*tensors(ctx.rank))
            for backend in ("aot_eager", "inductor"):
                compiled = torch.compile(model, backend=backend, fullgraph=True)
                actual += [(compiled(*tensors(ctx.rank)), expected) for _ in range(2)]
        # A refusal in compiled code aborts the peers, and all ranks go on.
        x, ids, weights = tensors(ctx.rank)
        error = None
        try:
            compiled(x, ids + 100 * ctx.rank, weights)
        except Exception as caught:
            error = caught
        actual.append((compiled(x, ids, weights), expected))
        return actual, harness.describe(error)

    for rank, (actual, error) in enumerate(harness.run_world("symmetric", 2, run, limit=240)):
        assert len(actual) == 9
        for got, expected in actual:
            assert_same(got, expected)
        assert error["types"][0] == [PeerAbortError, ArgumentValueError][rank].__name__
