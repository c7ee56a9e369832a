"""vLLM itself: two expert-parallel ranks generate what one process of stock vLLM does.

Stock vLLM has no exchange for expert-parallel ranks on CPUs, so what runs here is this library's.
test_vllm_matrix.py has the other models, dtypes and sizes.
"""

from __future__ import annotations

import subprocess

import engine_jobs
import pytest
import vllm_jobs

pytestmark = pytest.mark.engines


def test_two_ranks_generate_what_one_process_does(checkpoint, tmp_path):
    """In the root of the checkout, whose links ``kernels`` and ``comm`` engines look for."""
    engine, path = engine_jobs.python("vllm"), checkpoint("qwen3_moe")
    prompts = vllm_jobs.PROMPTS
    stock = vllm_jobs.run(engine, tmp_path / "stock", 1, [vllm_jobs.case("one", path, [prompts])])
    parts = engine_jobs.split(prompts, 2)
    spread = vllm_jobs.run(
        engine,
        tmp_path / "spread",
        2,
        [vllm_jobs.case("two", path, parts, **vllm_jobs.SPREAD)],
        **vllm_jobs.ON,
    )
    expected = stock["one"][0]["outputs"]
    vllm_jobs.check(engine_jobs.merged(spread["two"]), expected)
    assert engine_jobs.tokens(expected) == engine_jobs.transformers_tokens(path, prompts, 8)


def test_plug_in_changes_nothing_when_not_asked():
    """vLLM calls it, and what it would replace is as it was; with the variable it is replaced."""
    engine = engine_jobs.python("vllm")
    subprocess.run([engine, engine_jobs.FOLDER / "vllm_classes.py"], check=True, timeout=300)
