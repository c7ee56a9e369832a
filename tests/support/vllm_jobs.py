"""Jobs for vLLM: cases of expert-parallel ranks, and of one process to compare them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_jobs

ON = {"MOE_TRITON_VLLM": "1"}
SPREAD = {"enable_expert_parallel": True}
PORTS = 8
PROMPTS = engine_jobs.prompts(8)
# Stock vLLM's log-probabilities in fp32 do not depend on the batch, and ranks round as it does. The
# rest is for CPUs whose compilers fuse products and sums otherwise.
ALLOWED = 2e-6


def case(
    name: str, path: str, prompts: list[Any], tokens: int | list[Any] = 8, **options: Any
) -> dict[str, Any]:
    """A case of a job.

    Args:
        name: of the case.
        path: of the checkpoint.
        prompts: for each rank its prompts.
        tokens: to generate for all prompts, or for each.
        options: of ``vllm.LLM``.
    """
    if isinstance(tokens, int):
        tokens = [[tokens] * len(part) for part in prompts]
    return {
        "name": name,
        "prompts": prompts,
        "tokens": tokens,
        "engine": {"model": path, **options},
    }


def run(
    engine: Path, folder: Path, ranks: int, cases: list[dict[str, Any]], **environment: str
) -> dict[str, list[dict[str, Any]]]:
    """The results of each case in rank order."""
    script = engine_jobs.FOLDER / "vllm_rank.py"
    # One for the ranks to meet, and for each case some that vLLM takes in a row.
    port = engine_jobs.free_ports(PORTS * (len(cases) + 1))
    job = {"cases": cases, "port": port, "ports": PORTS}
    return engine_jobs.run([engine, script], ranks, job, folder, **environment)


def check(actual: list[Any], expected: list[Any], allowed: float = ALLOWED) -> None:
    """The same tokens, and log-probabilities that differ by no more than ``allowed``."""
    assert engine_jobs.tokens(actual) == engine_jobs.tokens(expected)
    assert engine_jobs.logprob_difference(actual, expected) <= allowed
