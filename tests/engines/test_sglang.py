"""SGLang itself: expert-parallel ranks generate what one process of stock SGLang does."""

from __future__ import annotations

import engine_jobs
import pytest

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("engine")]

FAMILIES = ("qwen3_moe", "glm4_moe")
PROMPTS = engine_jobs.prompts(8)
ALLOWED = 4e-6  # as in tests/engines/test_vllm.py; SGLang's batches differ more from run to run


@pytest.fixture(scope="module")
def engine():
    return engine_jobs.python("sglang")


def case(name, path, ranks):
    options = {"model_path": path}
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
    aids = str(engine_jobs.FOLDER / "sglang_aids")
    results = engine_jobs.run(
        [engine, script], 1, {"cases": cases}, folder, PYTHONPATH=aids, **environment
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
    aids = str(engine_jobs.FOLDER / "sglang_aids")
    engine_jobs.run([engine, script], 1, {"cases": []}, tmp_path, PYTHONPATH=aids)


@pytest.mark.parametrize("family", FAMILIES)
def test_engines_agree(stock, checkpoint, family, tmp_path):
    """The same checkpoint gives the same tokens in transformers, vLLM and SGLang."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(family), dtype=torch.float32
    )
    with torch.no_grad():
        expected = [
            model.generate(
                torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False
            )[0, len(ids) :].tolist()
            for ids in PROMPTS
        ]
    assert engine_jobs.tokens(stock[family]) == expected
    script = engine_jobs.FOLDER / "vllm_rank.py"
    vllm_case = {
        "name": "one",
        "prompts": [PROMPTS],
        "tokens": [[8] * len(PROMPTS)],
        "engine": {"model": checkpoint(family)},
    }
    job = {"cases": [vllm_case], "port": engine_jobs.free_ports()}
    results = engine_jobs.run([engine_jobs.python("vllm"), script], 1, job, tmp_path)
    assert engine_jobs.tokens(engine_jobs.merged(results["one"])) == expected
