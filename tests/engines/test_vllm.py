"""vLLM itself: expert-parallel ranks generate what one process of stock vLLM does.

Stock vLLM has no exchange for expert-parallel ranks on CPUs, so what runs here is this library's.
"""

from __future__ import annotations

import random
import subprocess

import engine_jobs
import pytest

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("engine")]

FAMILIES = ("qwen3_moe", "mixtral", "glm4_moe")
DTYPES = ("float32", "bfloat16")
PROMPTS = engine_jobs.prompts(8)
ON = {"MOE_TRITON_VLLM": "1"}
# A product of matrices depends on the number of rows by a few units in the last place, 2.4e-7 for
# most of these log-probabilities; tensor parallelism splits its sums, too.
ALLOWED = 3e-6
ALLOWED_TENSOR_PARALLEL = 4e-6
# bf16 turns ties of the router and of tokens: experts' rows are rounded before they are summed, and
# in one process after it. Where a token differs, stock vLLM's best two are closer than this.
TIE = 0.1

LONG = 40  # tokens, so that a sequence needs two blocks of 32
_draw = random.Random(7)
MANY = engine_jobs.prompts(200, seed=3, longest=60)
MANY_TOKENS = [_draw.randint(1, 12) for _ in MANY]


@pytest.fixture(scope="module")
def engine():
    return engine_jobs.python("vllm")


def case(name, path, prompts, tokens=8, **options):
    """A case of a job; ``tokens`` for all prompts, or for each."""
    if isinstance(tokens, int):
        tokens = [[tokens] * len(part) for part in prompts]
    return {
        "name": name,
        "prompts": prompts,
        "tokens": tokens,
        "engine": {"model": path, **options},
    }


def run(engine, folder, ranks, cases, **environment):
    script = engine_jobs.FOLDER / "vllm_rank.py"
    job = {"cases": cases, "port": engine_jobs.free_ports()}
    return engine_jobs.run([engine, script], ranks, job, folder, **environment)


@pytest.fixture(scope="module")
def stock(engine, checkpoint, tmp_path_factory):
    """Outputs of one process without this library, by case."""
    cases = [
        case(f"{family} {dtype}", checkpoint(family), [PROMPTS], dtype=dtype)
        for family in FAMILIES
        for dtype in DTYPES
    ]
    cases.append(case("long", checkpoint("qwen3_moe"), [PROMPTS], LONG))
    cases.append(case("many", checkpoint("qwen3_moe"), [MANY], [MANY_TOKENS], max_num_seqs=32))
    results = run(engine, tmp_path_factory.mktemp("stock"), 1, cases)
    return {name: engine_jobs.merged(ranks) for name, ranks in results.items()}


@pytest.fixture(scope="module")
def two_ranks(engine, checkpoint, tmp_path_factory):
    """Results of two ranks, by case."""
    path, options = checkpoint("qwen3_moe"), {"enable_expert_parallel": True}
    cases = [
        case(
            f"{family} {dtype}",
            checkpoint(family),
            engine_jobs.split(PROMPTS, 2),
            dtype=dtype,
            **options,
        )
        for family in FAMILIES
        for dtype in DTYPES
    ]
    cases += [
        case("idle", path, [PROMPTS, []], **options),
        case("uneven", path, [PROMPTS[:1], PROMPTS[1:]], **options),
        case("single", path, [[], PROMPTS[:1]], **options),
        # Three blocks and one that is reserved, for four sequences that need two each in the end.
        case(
            "preempted",
            path,
            engine_jobs.split(PROMPTS, 2),
            LONG,
            block_size=32,
            num_gpu_blocks_override=4,
            max_model_len=64,
            disable_log_stats=False,
            **options,
        ),
        case(
            "many",
            path,
            engine_jobs.split(MANY, 2),
            engine_jobs.split(MANY_TOKENS, 2),
            max_num_seqs=32,
            **options,
        ),
    ]
    return run(engine, tmp_path_factory.mktemp("two"), 2, cases, **ON)


def check(actual, expected, allowed):
    assert engine_jobs.tokens(actual) == engine_jobs.tokens(expected)
    assert engine_jobs.logprob_difference(actual, expected) <= allowed


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_generate_what_one_process_does(stock, two_ranks, family):
    name = f"{family} float32"
    check(engine_jobs.merged(two_ranks[name]), stock[name], ALLOWED)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_differ_in_bf16_only_at_ties(stock, two_ranks, family):
    name = f"{family} bfloat16"
    outputs = list(zip(engine_jobs.merged(two_ranks[name]), stock[name], strict=True))
    different = [pair for pair in outputs if pair[0]["tokens"] != pair[1]["tokens"]]
    assert len(different) <= len(outputs) // 4
    for actual, expected in different:
        steps = zip(actual["tokens"], expected["tokens"], expected["logprobs"], strict=True)
        logprobs = next(logprobs for token, other, logprobs in steps if token != other)
        best, second, *_ = sorted(logprobs.values(), reverse=True)
        assert best - second < TIE


def test_idle_rank(stock, two_ranks):
    check(two_ranks["idle"][0]["outputs"], stock["qwen3_moe float32"], ALLOWED)


def test_uneven_batches(stock, two_ranks):
    first, second = two_ranks["uneven"]
    check(first["outputs"] + second["outputs"], stock["qwen3_moe float32"], ALLOWED)


def test_batch_of_one(stock, two_ranks):
    check(two_ranks["single"][1]["outputs"], stock["qwen3_moe float32"][:1], ALLOWED)


def test_preempted_sequences(stock, two_ranks):
    results = two_ranks["preempted"]
    assert sum(result["preemptions"] for result in results) > 0
    check(engine_jobs.merged(results), stock["long"], ALLOWED)


def test_200_requests_of_random_length(stock, two_ranks):
    actual = engine_jobs.merged(two_ranks["many"])
    assert [len(output["tokens"]) for output in actual] == MANY_TOKENS
    check(actual, stock["many"], ALLOWED)


def test_four_ranks(engine, stock, checkpoint, tmp_path):
    cases = [
        case(family, checkpoint(family), engine_jobs.split(PROMPTS, 4), enable_expert_parallel=True)
        for family in FAMILIES
    ]
    results = run(engine, tmp_path, 4, cases, **ON)
    for family in FAMILIES:
        check(engine_jobs.merged(results[family]), stock[f"{family} float32"], ALLOWED)


def test_tensor_parallel_ranks(engine, stock, checkpoint, tmp_path):
    """TP 2 x DP 2: Qwen3-MoE is sequence-parallel there, in the others TP ranks share tokens."""
    cases = [
        case(
            family,
            checkpoint(family),
            engine_jobs.split(PROMPTS, 2),
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
            enable_expert_parallel=True,
        )
        for family in FAMILIES
    ]
    results = run(engine, tmp_path, 2, cases, **ON)
    for family in FAMILIES:
        actual = engine_jobs.merged(results[family])
        check(actual, stock[f"{family} float32"], ALLOWED_TENSOR_PARALLEL)


def test_triton_kernels_interpreted(engine, stock, checkpoint, tmp_path):
    path = checkpoint("qwen3_moe")
    cases = [case("one", path, engine_jobs.split(PROMPTS, 2), enable_expert_parallel=True)]
    results = run(
        engine, tmp_path, 2, cases, MOE_TRITON_BACKEND="interpret", TRITON_INTERPRET="1", **ON
    )
    check(engine_jobs.merged(results["one"]), stock["qwen3_moe float32"], ALLOWED)


def test_plug_in_changes_nothing_when_not_asked(engine):
    """vLLM calls it, and what it would replace is as it was; with the variable it is replaced."""
    script = engine_jobs.FOLDER / "vllm_classes.py"
    subprocess.run([engine, script], check=True, timeout=300)
