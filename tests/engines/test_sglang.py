"""SGLang itself: expert-parallel ranks generate what one process of stock SGLang does."""

from __future__ import annotations

import engine_jobs
import pytest

pytestmark = [pytest.mark.engines, pytest.mark.full]

FAMILIES = ("qwen3_moe", "glm4_moe")
PROMPTS = engine_jobs.prompts(8)
ALLOWED = 4e-6  # stock SGLang's log-probabilities change by as much with the batch


@pytest.fixture(scope="module")
def engine():
    return engine_jobs.python("sglang")


def case(name, path, ranks):
    # An engine that was shut down keeps its ports as long as its process lives.
    options = {"model_path": path, "port": engine_jobs.free_ports(1)}
    if ranks > 1:
        options |= {
            "tp_size": ranks,
            "dp_size": ranks,
            "ep_size": ranks,
            "enable_dp_attention": True,
            "moe_a2a_backend": "deepep",
        }
    return {"name": name, "prompts": PROMPTS, "tokens": [8] * len(PROMPTS), "engine": options}


def run(engine, folder, cases, **environment):
    """The outputs of each case."""
    script = engine_jobs.FOLDER / "sglang_engine.py"
    results = engine_jobs.run(
        [engine, script], 1, {"cases": cases}, folder, **engine_jobs.SGLANG_AIDS, **environment
    )
    return {name: result[0]["outputs"] for name, result in results.items()}


@pytest.fixture(scope="module")
def stock(engine, checkpoint, tmp_path_factory):
    """Outputs of one process without this library, by family."""
    cases = [case(family, checkpoint(family), 1) for family in FAMILIES]
    return run(engine, tmp_path_factory.mktemp("stock"), cases)


@pytest.fixture(scope="module")
def spread(engine, checkpoint, tmp_path_factory):
    """Outputs of expert-parallel ranks, by family and their number."""
    runs = (("qwen3_moe", 2), ("qwen3_moe", 4), ("glm4_moe", 2))
    cases = [case(f"{family} {ranks}", checkpoint(family), ranks) for family, ranks in runs]
    return run(engine, tmp_path_factory.mktemp("spread"), cases, MOE_TRITON_SGLANG="1")


@pytest.mark.parametrize("family, ranks", [("qwen3_moe", 2), ("qwen3_moe", 4), ("glm4_moe", 2)])
def test_ranks_generate_what_one_process_does(stock, spread, family, ranks):
    actual, expected = spread[f"{family} {ranks}"], stock[family]
    assert engine_jobs.tokens(actual) == engine_jobs.tokens(expected)
    assert engine_jobs.logprob_difference(actual, expected) <= ALLOWED


def test_plug_in_changes_nothing_when_not_asked(engine, tmp_path):
    """SGLang calls it, and has no hook of ours; with the variable it has three."""
    script = engine_jobs.FOLDER / "sglang_hooks.py"
    engine_jobs.run([engine, script], 1, {"cases": []}, tmp_path, **engine_jobs.SGLANG_AIDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_what_transformers_does(stock, checkpoint, family):
    """So does vLLM, in test_vllm.py and test_vllm_matrix.py."""
    expected = engine_jobs.transformers_tokens(checkpoint(family), PROMPTS, 8)
    assert engine_jobs.tokens(stock[family]) == expected
