"""vLLM with other models, dtypes, numbers of ranks, batches and kernels than test_vllm.py."""

from __future__ import annotations

import random

import engine_jobs
import pytest
import vllm_jobs
from vllm_jobs import ON, PROMPTS, SPREAD, case, check

pytestmark = [pytest.mark.engines, pytest.mark.full]

FAMILIES = ("qwen3_moe", "mixtral", "glm4_moe")
# In bf16 an expert's row is rounded before rows are summed, and in one process after it, so the
# prompts are some whose next tokens lead by more than that changes.
LEAD = 0.1
ALLOWED_BF16 = 0.05
# Tensor parallelism splits the sums of matrix products.
ALLOWED_TENSOR_PARALLEL = 4e-6

LONG = 40  # tokens, so that a sequence needs two blocks of 32
_draw = random.Random(7)
MANY = engine_jobs.prompts(200, seed=3, longest=60)
MANY_TOKENS = [_draw.randint(1, 12) for _ in MANY]


@pytest.fixture(scope="module")
def engine():
    return engine_jobs.python("vllm")


@pytest.fixture(scope="module")
def stock(engine, checkpoint, tmp_path_factory):
    """Outputs of one process without this library, by case."""
    cases = [case(family, checkpoint(family), [PROMPTS]) for family in FAMILIES]
    cases += [
        case(
            f"{family} bfloat16",
            checkpoint(family),
            [engine_jobs.clear_prompts(family)],
            dtype="bfloat16",
        )
        for family in FAMILIES
    ]
    cases.append(case("long", checkpoint("qwen3_moe"), [PROMPTS], LONG))
    cases.append(case("many", checkpoint("qwen3_moe"), [MANY], [MANY_TOKENS], max_num_seqs=32))
    results = vllm_jobs.run(engine, tmp_path_factory.mktemp("stock"), 1, cases)
    return {name: engine_jobs.merged(ranks) for name, ranks in results.items()}


@pytest.fixture(scope="module")
def two_ranks(engine, checkpoint, tmp_path_factory):
    """Results of two ranks, by case."""
    path, halves = checkpoint("qwen3_moe"), engine_jobs.split(PROMPTS, 2)
    cases = [case(family, checkpoint(family), halves, **SPREAD) for family in FAMILIES]
    cases += [
        case(
            f"{family} bfloat16",
            checkpoint(family),
            engine_jobs.split(engine_jobs.clear_prompts(family), 2),
            dtype="bfloat16",
            **SPREAD,
        )
        for family in FAMILIES
    ]
    cases += [
        case("idle", path, [PROMPTS, []], **SPREAD),
        case("uneven", path, [PROMPTS[:1], PROMPTS[1:]], **SPREAD),
        case("single", path, [[], PROMPTS[:1]], **SPREAD),
        # Three blocks and one that is reserved, for four sequences that need two each in the end.
        case(
            "preempted",
            path,
            halves,
            LONG,
            block_size=32,
            num_gpu_blocks_override=4,
            max_model_len=64,
            disable_log_stats=False,
            **SPREAD,
        ),
        case(
            "many",
            path,
            engine_jobs.split(MANY, 2),
            engine_jobs.split(MANY_TOKENS, 2),
            max_num_seqs=32,
            **SPREAD,
        ),
    ]
    return vllm_jobs.run(engine, tmp_path_factory.mktemp("two"), 2, cases, **ON)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_generate_what_one_process_does(stock, two_ranks, family):
    check(engine_jobs.merged(two_ranks[family]), stock[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_what_transformers_does(stock, checkpoint, family):
    """So does SGLang, in test_sglang.py."""
    expected = engine_jobs.transformers_tokens(checkpoint(family), PROMPTS, 8)
    assert engine_jobs.tokens(stock[family]) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16(stock, two_ranks, family):
    name = f"{family} bfloat16"
    for output in stock[name]:
        for step in output["logprobs"]:
            best, second, *_ = sorted(step.values(), reverse=True)
            assert best - second >= LEAD
    check(engine_jobs.merged(two_ranks[name]), stock[name], ALLOWED_BF16)


def test_idle_rank(stock, two_ranks):
    check(two_ranks["idle"][0]["outputs"], stock["qwen3_moe"])


def test_uneven_batches(stock, two_ranks):
    first, second = two_ranks["uneven"]
    check(first["outputs"] + second["outputs"], stock["qwen3_moe"])


def test_batch_of_one(stock, two_ranks):
    check(two_ranks["single"][1]["outputs"], stock["qwen3_moe"][:1])


def test_preempted_sequences(stock, two_ranks):
    results = two_ranks["preempted"]
    assert sum(result["preemptions"] for result in results) > 0
    check(engine_jobs.merged(results), stock["long"])


def test_200_requests_of_random_length(stock, two_ranks):
    actual = engine_jobs.merged(two_ranks["many"])
    assert [len(output["tokens"]) for output in actual] == MANY_TOKENS
    check(actual, stock["many"])


def test_four_ranks(engine, stock, checkpoint, tmp_path):
    quarters = engine_jobs.split(PROMPTS, 4)
    cases = [case(family, checkpoint(family), quarters, **SPREAD) for family in FAMILIES]
    results = vllm_jobs.run(engine, tmp_path, 4, cases, **ON)
    for family in FAMILIES:
        check(engine_jobs.merged(results[family]), stock[family])


def test_tensor_parallel_ranks(engine, stock, checkpoint, tmp_path):
    """TP 2 x DP 2: Qwen3-MoE is sequence-parallel there, in the others TP ranks share tokens."""
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", **SPREAD}
    halves = engine_jobs.split(PROMPTS, 2)
    cases = [case(family, checkpoint(family), halves, **options) for family in FAMILIES]
    results = vllm_jobs.run(engine, tmp_path, 2, cases, **ON)
    for family in FAMILIES:
        check(engine_jobs.merged(results[family]), stock[family], ALLOWED_TENSOR_PARALLEL)


def test_triton_kernels_interpreted(engine, stock, checkpoint, tmp_path):
    cases = [case("one", checkpoint("qwen3_moe"), engine_jobs.split(PROMPTS, 2), **SPREAD)]
    interpreted = {"MOE_TRITON_BACKEND": "interpret", "TRITON_INTERPRET": "1"}
    results = vllm_jobs.run(engine, tmp_path, 2, cases, **interpreted, **ON)
    check(engine_jobs.merged(results["one"]), stock["qwen3_moe"])
