"""What SGLang calls, with stand-ins for the few things of SGLang it asks for.

tests/engines/test_sglang.py runs SGLang itself.
"""

from __future__ import annotations

import sys
import types
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from harness import describe, run_world

from moe_triton import UnavailableError
from moe_triton.integrations import sglang as integration

EXPERTS, TOP_K, HIDDEN, RANKS = 6, 2, 16, 2


class TopK(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor | None = None


class Rows(NamedTuple):
    hidden_states: torch.Tensor
    hidden_states_scale: None = None
    topk_output: Any = None


def stand_in(counts=None):
    """Put an ``sglang`` into ``sys.modules`` with what the adaptor asks of it."""
    layers = "sglang.srt.layers"
    names = {
        f"{layers}.dp_attention": {
            "get_dp_global_num_tokens": lambda: counts,
            "is_dp_attention_enabled": lambda: True,
        },
        f"{layers}.moe.token_dispatcher.standard": {"StandardDispatchOutput": Rows},
        f"{layers}.moe.topk": {"StandardTopKOutput": TopK},
    }
    for name, attributes in names.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        vars(sys.modules[name]).update(attributes)


def inputs(count, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, HIDDEN), generator=generator).to(dtype)
    ids = torch.rand((count, EXPERTS), generator=generator).argsort(dim=1)[:, :TOP_K]
    return x, TopK(torch.rand((count, TOP_K), generator=generator), ids.int())


def factor(experts):
    return 1 + experts / 4


def experts_of(rows):
    """Expert e multiplies by ``factor(e)`` and by the weight."""
    weights, ids, logits = rows.topk_output
    assert weights.shape == ids.shape == (len(rows.hidden_states), 1)
    assert ids.dtype == torch.int32
    assert logits.shape[0] == len(ids)
    scale = weights * factor(ids + EXPERTS // RANKS * dist.get_rank())
    return Rows((rows.hidden_states * scale).to(rows.hidden_states.dtype))


def dense(x, topk):
    scale = factor(topk.topk_ids) * topk.topk_weights * (topk.topk_ids >= 0)
    return x * scale.sum(dim=1, keepdim=True)


def on_ranks(work):
    def call(ctx):
        stand_in()
        result = work(ctx)
        integration.close_exchanges()
        return result

    return run_world("symmetric", RANKS, call)


def dispatcher(**options):
    return integration.Dispatcher(dist.group.WORLD, EXPERTS, **options)


@pytest.mark.parametrize("on_input", [False, True], ids=["by combine", "by the experts"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "capacity"])
def test_layer_is_the_dense_one(exact, on_input):
    def work(ctx):
        layer = dispatcher(exact=exact, weights_on_input=on_input)
        for count in (5 + ctx.rank, 1, 0 if ctx.rank else 3):
            x, topk = inputs(count, ctx.rank)
            topk.topk_ids[:1, 1] = -1
            rows = layer.dispatch(hidden_states=x, topk_output=topk)
            assert len(rows.hidden_states) > 0
            out = layer.combine(combine_input=experts_of(rows))
            torch.testing.assert_close(out, dense(x, topk))

    on_ranks(work)


def test_two_batches_overlap():
    def work(ctx):
        layer = dispatcher(in_flight=2)
        batches = [inputs(4, ctx.rank), inputs(2, ctx.rank + 9)]
        outputs = []
        for number, (x, topk) in enumerate(batches):
            layer.dispatch_a(hidden_states=x, topk_output=topk, tbo_subbatch_index=number)
        for number in (0, 1):
            rows = layer.dispatch_b(tbo_subbatch_index=number)
            layer.combine_a(combine_input=experts_of(rows), tbo_subbatch_index=number)
        for number, (x, topk) in enumerate(batches):
            outputs.append(layer.combine_b(tbo_subbatch_index=number))
            torch.testing.assert_close(outputs[-1], dense(x, topk))

    on_ranks(work)


def test_the_engine_says_the_most_tokens_of_a_rank():
    def work(ctx):
        stand_in(counts=[3, 3])
        x, topk = inputs(9 if ctx.rank else 3, 0)
        try:
            dispatcher().dispatch(x, topk)
        except Exception as error:
            return describe(error)
        return None

    first, second = on_ranks(work)
    assert "x must have at most max_tokens = 4 rows, got shape (9, 16)" in second["text"]
    assert first["types"][0] == "PeerAbortError"


def test_other_forms_of_topk_output_are_refused():
    def work(ctx):
        x, _ = inputs(2, 0)
        with pytest.raises(TypeError, match=r"topk_output must have topk_weights .*, got str"):
            dispatcher().dispatch(x, "bypassed")

    on_ranks(work)


def test_inert_without_the_variable(monkeypatch):
    monkeypatch.delenv("MOE_TRITON_SGLANG", raising=False)
    integration.register()
    assert not any(name.split(".")[0] == "sglang" for name in sys.modules)


def test_says_that_sglang_is_missing(monkeypatch):
    monkeypatch.setenv("MOE_TRITON_SGLANG", "1")
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(UnavailableError, match=r"register: needs SGLang 0\.5\.23: "):
        integration.register()
