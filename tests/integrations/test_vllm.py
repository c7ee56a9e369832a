"""What vLLM calls, with stand-ins for the few things of vLLM it asks for.

tests/engines/test_vllm.py runs vLLM itself.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from harness import describe, run_world

from moe_triton import ArgumentValueError, UnavailableError
from moe_triton.integrations import vllm as integration

EXPERTS, TOP_K, HIDDEN, RANKS = 6, 2, 128, 2
LINEAR = [[0, 1, 2, -1, -1, -1], [-1, -1, -1, 0, 1, 2]]
ROUND_ROBIN = [[0, -1, 1, -1, 2, -1], [-1, 0, -1, 1, -1, 2]]
UNEVEN = [[0, 1, 2, 3, -1, -1], [-1, -1, -1, -1, 0, 1]]


class QuantConfig(NamedTuple):
    """The fields of vLLM's class that decide how rows are quantised."""

    quant_dtype: torch.dtype | None = None
    per_act_token_quant: bool = False
    block_shape: list[int] | None = None
    a1_scale: torch.Tensor | None = None
    a1_gscale: torch.Tensor | None = None
    use_nvfp4_w4a4: bool = False
    is_scale_swizzled: bool = False
    mx_alignment: int = 0

    @property
    def is_per_tensor(self):
        return not self.per_act_token_quant and self.block_shape is None


def stand_in(max_tokens=None):
    """Put a ``vllm`` into ``sys.modules`` with what the adaptor asks of it."""

    def quantize(x, scale, **options):
        scale = x.abs().amax() / 127 if scale is None else scale
        return (x / scale).round().to(torch.int8), scale

    counts = types.SimpleNamespace(num_tokens_across_dp_cpu=torch.tensor([max_tokens or 0]))
    context = types.SimpleNamespace(dp_metadata=None if max_tokens is None else counts)
    layers = "vllm.model_executor.layers.fused_moe"
    names = {
        "vllm.distributed": {
            "get_ep_group": lambda: types.SimpleNamespace(
                rank_in_group=dist.get_rank(),
                world_size=dist.get_world_size(),
                cpu_group=dist.group.WORLD,
                device_group=dist.group.WORLD,
            )
        },
        "vllm.forward_context": {
            "is_forward_context_available": lambda: True,
            "get_forward_context": lambda: context,
        },
        "vllm.utils.deep_gemm": {"is_deep_gemm_e8m0_used": lambda: False},
        f"{layers}.modular_kernel": {"ExpertTokensMetadata": lambda *counts: counts},
        f"{layers}.utils": {"moe_kernel_quantize_input": quantize},
    }
    for name, attributes in names.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        vars(sys.modules[name]).update(attributes)


def inputs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, HIDDEN), generator=generator)
    ids = torch.rand((count, EXPERTS), generator=generator).argsort(dim=1)[:, :TOP_K]
    return x, ids.int(), torch.rand((count, TOP_K), generator=generator)


def factor(experts):
    return 1 + experts / 4


def dense(x, ids, weights):
    return x * (factor(ids) * weights * (ids >= 0)).sum(dim=1, keepdim=True)


def run_layer(adaptor, maps, x, ids, weights, *, on_input=False, quant=None, defer=False):
    """An MoE layer whose expert e multiplies by ``factor(e)``; its output and its rows."""
    expert_map = None if maps is None else torch.tensor(maps[dist.get_rank()], dtype=torch.int32)
    quant = QuantConfig() if quant is None else quant
    arguments = (EXPERTS, expert_map, on_input, quant)
    rows, scales, _, row_ids, ones = adaptor.prepare(
        x, weights, ids, *arguments, defer_input_quant=defer
    )
    assert row_ids.shape == ones.shape == (len(rows), 1)
    assert row_ids.dtype == ids.dtype
    assert (ones == 1).all()
    experts = row_ids[:, 0].long()
    if adaptor._exact:
        own = torch.tensor((maps or LINEAR)[dist.get_rank()])
        experts = (own[:, None] == experts).int().argmax(dim=0)
    y = (
        rows
        if scales is None
        else rows.float()
        * scales.repeat_interleave(
            rows.shape[1] // (scales.shape[1] if scales.dim() else 1), dim=-1
        )
        if scales.dim()
        else rows.float() * scales
    )
    y = y * factor(experts)[:, None]
    output = torch.full_like(x, float("nan"))
    adaptor.finalize(output, y, ones, row_ids, on_input, None)
    return output, rows, scales, row_ids


def on_ranks(work, ranks=RANKS, world="symmetric"):
    def call(ctx):
        stand_in()
        result = work(ctx)
        integration.close_exchanges()
        return result

    return run_world(world, ranks, call)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "capacity"])
@pytest.mark.parametrize(
    "maps",
    [LINEAR, ROUND_ROBIN, UNEVEN, None],
    ids=["linear", "round-robin", "uneven", "no map"],
)
def test_layer_is_the_dense_one_wherever_experts_are(maps, exact, world):
    def work(ctx):
        adaptor = integration.PrepareFinalize(RANKS, exact=exact)
        for count in (5 + ctx.rank, 1, 0 if ctx.rank else 3):
            x, ids, weights = inputs(count, ctx.rank)
            ids[:1, 1] = -1
            output, _, _, row_ids = run_layer(adaptor, maps, x, ids, weights)
            torch.testing.assert_close(output, dense(x, ids, weights))
        if not exact:
            # Rows after the last one are of an expert that vLLM's map sends elsewhere.
            own = torch.tensor((maps or LINEAR)[ctx.rank])
            assert (own[row_ids[-1].long()] == -1).all()

    on_ranks(work, world=world)


def test_the_engine_says_the_most_tokens_of_a_rank():
    """No all-reduce then: a rank with more tokens is refused, and its peer hears of it.

    In float32 each of the two copies of a token counts.
    """

    def work(ctx):
        stand_in(max_tokens=4)
        adaptor = integration.PrepareFinalize(RANKS)
        error = None
        try:
            run_layer(adaptor, LINEAR, *inputs(9 if ctx.rank else 3, 0))
        except Exception as caught:
            error = caught
        return describe(error)

    first, second = on_ranks(work)
    assert "x must have at most max_tokens = 8 rows, got shape (18, 128)" in second["text"]
    assert first["types"][0] == "PeerAbortError"


def test_ranks_that_share_tokens_send_a_part_each():
    def work(ctx):
        adaptor = integration.PrepareFinalize(RANKS, (ctx.rank, RANKS))
        for count in (5, 1):
            x, ids, weights = inputs(count, 0)
            output, *_ = run_layer(adaptor, LINEAR, x, ids, weights)
            dist.all_reduce(output)
            torch.testing.assert_close(output, dense(x, ids, weights))

    on_ranks(work)


def test_float32_is_summed_as_in_the_kernel_of_vllm():
    """Slot by slot, each product fused with its sum; tests/engines compares with vLLM itself."""

    def work(ctx):
        adaptor = integration.PrepareFinalize(RANKS)
        x, ids, weights = inputs(40, ctx.rank)
        output, *_ = run_layer(adaptor, LINEAR, x, ids, weights)
        terms = [x * factor(ids[:, slot, None]) for slot in range(TOP_K)]
        expected = terms[0] * weights[:, :1]
        unfused = expected + terms[1] * weights[:, 1:]
        expected = (expected.double() + terms[1].double() * weights[:, 1:].double()).float()
        assert torch.equal(output, expected)
        assert not torch.equal(unfused, expected)

    on_ranks(work)


def test_weights_on_the_input_are_applied_once():
    def work(ctx):
        adaptor = integration.PrepareFinalize(RANKS)
        x, ids, weights = inputs(4, ctx.rank)
        ids, weights = ids[:, :1], weights[:, :1]
        output, *_ = run_layer(adaptor, LINEAR, x, ids, weights, on_input=True)
        torch.testing.assert_close(output, dense(x, ids, weights))

    on_ranks(work)


def test_shared_experts_can_run_between_the_halves():
    def work(ctx):
        adaptor = integration.PrepareFinalize(RANKS)
        assert adaptor.supports_async()
        x, ids, weights = inputs(4, ctx.rank)
        expert_map = torch.tensor(LINEAR[ctx.rank])
        receive = adaptor.prepare_async(x, weights, ids, EXPERTS, expert_map, False, QuantConfig())
        rows, _, _, row_ids, ones = receive()
        y = rows * factor(row_ids + 3 * ctx.rank)
        output = torch.empty_like(x)
        adaptor.finalize_async(output, y[:, None], ones, row_ids, False, None)()
        torch.testing.assert_close(output, dense(x, ids, weights))

    on_ranks(work)


QUANTISED = {
    # Sent quantised: half or a quarter of the bytes.
    "int8 per token": (QuantConfig(torch.int8, per_act_token_quant=True), torch.int8, 2e-2),
    "fp8 per token": (
        QuantConfig(torch.float8_e4m3fn, per_act_token_quant=True),
        torch.float8_e4m3fn,
        8e-2,
    ),
    "fp8 blocks": (
        QuantConfig(torch.float8_e4m3fn, block_shape=[128, 128]),
        torch.float8_e4m3fn,
        8e-2,
    ),
    # Quantised where they arrive, by vLLM's function.
    "given scale": (QuantConfig(torch.int8, a1_scale=torch.tensor(0.05)), torch.int8, 5e-2),
    "one scale": (QuantConfig(torch.int8), torch.int8, 5e-2),
}


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "capacity"])
@pytest.mark.parametrize("name", QUANTISED)
def test_rows_come_as_the_experts_want_them(name, exact):
    def work(ctx):
        quant, dtype, allowed = QUANTISED[name]
        adaptor = integration.PrepareFinalize(RANKS, exact=exact)
        x, ids, weights = inputs(6, ctx.rank)
        output, rows, _, _ = run_layer(adaptor, LINEAR, x, ids, weights, quant=quant)
        assert rows.dtype == dtype
        error = (output - dense(x, ids, weights)).abs().max()
        assert 0 < error < allowed * dense(x, ids, weights).abs().max()
        _, rows, scales, _ = run_layer(adaptor, LINEAR, x, ids, weights, quant=quant, defer=True)
        assert rows.dtype == torch.float32
        assert scales is None

    on_ranks(work)


def test_rank_without_rows_gets_one_of_zeros():
    def work(ctx):
        adaptor = integration.PrepareFinalize(RANKS)
        x, _, weights = inputs(3, ctx.rank)
        quant = QuantConfig(torch.float8_e4m3fn, per_act_token_quant=True)
        ids = torch.tensor([[0, 2]] * 3, dtype=torch.int32)
        output, rows, scales, _ = run_layer(adaptor, LINEAR, x, ids, weights, quant=quant)
        assert output.isfinite().all()
        return len(rows), len(scales), rows.float().abs().sum().item()

    assert on_ranks(work)[1] == (1, 1, 0.0)


@pytest.mark.parametrize(
    "maps",
    [
        [[0, 1, -1], [-1, 0, 1]],  # on two ranks
        [[0, -1, -1], [-1, -1, 0]],  # on none
        [[0, 2, -1], [-1, -1, 0]],  # a gap
        [[1, 1, 0], [0, 0, 1]],  # a mask, as AITER's experts take it
    ],
)
def test_maps_that_are_no_placement_are_refused(maps):
    maps = [torch.tensor(one) for one in maps]
    with pytest.raises(
        ArgumentValueError, match=r"expert_map must number the experts .*, got \[\["
    ):
        integration.Placement.of(maps, 0, torch.device("cpu"))


def test_placement_example():
    """Rank 1 has most experts, 4, so that its slots start at 4."""
    maps = [torch.tensor([0, 1, -1, -1, -1, -1]), torch.tensor([-1, -1, 0, 1, 2, 3])]
    placement = integration.Placement.of(maps, 1, torch.device("cpu"))
    assert placement.num_slots == 8
    assert placement.slots.tolist() == [0, 1, 4, 5, 6, 7]
    assert placement.experts.tolist() == [2, 3, 4, 5]
    assert placement.foreign == 0


# Wrong input: this library's errors on the rank that erred, and no hang on its peers.
WRONG = {
    "another K": (lambda x, ids, weights: (x, ids[:, :1], weights), "topk_weights must have shape"),
    "dtype of ids": (
        lambda x, ids, weights: (x, ids.float(), weights),
        "topk_ids must be int32 or int64",
    ),
    "no expert": (lambda x, ids, weights: (x, ids + 9, weights), "topk_ids must be"),
    "three dimensions": (lambda x, ids, weights: (x[None], ids, weights), "x must have shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused_on_all_ranks(name):
    change, expected = WRONG[name]

    def work(ctx):
        adaptor = integration.PrepareFinalize(RANKS)
        x, ids, weights = inputs(3, 0)
        if ctx.rank:
            x, ids, weights = change(x, ids, weights)
        try:
            expert_map = torch.tensor(LINEAR[ctx.rank])
            adaptor.prepare(x, weights, ids, EXPERTS, expert_map, False, QuantConfig())
        except Exception as error:
            return describe(error)
        return None

    first, second = on_ranks(work)
    assert "MoeError" in first["types"]
    assert "MoeError" in second["types"]
    if first["types"][0] == "PeerAbortError":
        assert expected in second["text"]
    else:
        assert first["types"][0] == second["types"][0] == "ArgumentMismatchError"


def test_inert_without_the_variable(monkeypatch):
    monkeypatch.delenv("MOE_TRITON_VLLM", raising=False)
    integration.register()
    monkeypatch.setenv("MOE_TRITON_VLLM", "0")
    integration.register()
    assert not any(name.split(".")[0] == "vllm" for name in sys.modules)


def test_says_that_vllm_is_missing(monkeypatch):
    monkeypatch.setenv("MOE_TRITON_VLLM", "1")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UnavailableError, match=r"register: needs vLLM 0\.32 or 0\.33: "):
        integration.register()


def test_the_package_declares_the_entry_points():
    """tests/engines sees them work."""
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for group, name in (("vllm.general_plugins", "vllm"), ("sglang.srt.plugins", "sglang")):
        entry = f'"{group}"]\nmoe_triton = "moe_triton.integrations.{name}:register"\n'
        assert f"[project.entry-points.{entry}" in text
