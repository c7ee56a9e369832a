"""Run engines in their own environments, and compare what they generate."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "engines"
ROOT = FOLDER.parents[1]
SGLANG_AIDS = {"PYTHONPATH": str(FOLDER / "sglang_aids")}
LIMIT = 900  # seconds for a job

# Of 800 prompts to each checkpoint, those whose 8 greedy tokens in bf16 lead by the widest margin,
# at least 0.17 in log-probability, and which choose the same experts in fp32.
_CLEAR = {
    "qwen3_moe": (520, 523, 609, 499, 384, 40, 546, 168),
    "mixtral": (541, 560, 200, 11, 639, 537, 103, 760),
    "glm4_moe": (601, 59, 713, 706, 656, 77, 738, 620),
}


def python(engine: str) -> Path:
    """The interpreter of an engine's environment; skips the test where there is none."""
    folder = Path(sys.prefix, engine)
    if not (folder / ".ready").exists():
        pytest.skip(f"{engine} is not installed: `make test-engines-full` does")
    return folder / "bin/python"


def prompts(count: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    """Random token ids, 4 to ``longest`` in each prompt."""
    draw = random.Random(seed)
    return [
        [draw.randrange(1, checkpoints.VOCABULARY) for _ in range(draw.randint(4, longest))]
        for _ in range(count)
    ]


def clear_prompts(family: str) -> list[list[int]]:
    """Prompts whose greedy tokens rounding does not change, for the checkpoint of a family."""
    found = []
    for number in _CLEAR[family]:
        draw = random.Random(number)
        found.append([draw.randrange(1, checkpoints.VOCABULARY) for _ in range(4 + number % 16)])
    return found


def split(requests: list[Any], ranks: int) -> list[list[Any]]:
    """Requests as the ranks take them in turn."""
    return [requests[rank::ranks] for rank in range(ranks)]


def run(
    command: list[Any], ranks: int, job: dict[str, Any], folder: Path, **environment: str
) -> dict[str, list[dict[str, Any]]]:
    """Run ``command JOB RANK`` for all ranks; the results of each case in rank order."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    path.write_text(json.dumps(job | {"ranks": ranks, "folder": str(folder)}), encoding="utf-8")
    logs = [folder / f"log.{rank}" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w", encoding="utf-8") as file:
            processes.append(
                subprocess.Popen(
                    [*map(str, command), str(path), str(rank)],
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    end = time.monotonic() + LIMIT
    try:
        # One that fails leaves the others waiting.
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() for process in processes)
            if failed or time.monotonic() > end:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    codes = [process.wait() for process in processes]
    tails = "\n".join(log.read_text(encoding="utf-8")[-3000:] for log in logs)
    assert codes == [0] * ranks, tails
    return {
        case["name"]: [
            json.loads((folder / f"{case['name']}.{rank}.json").read_text(encoding="utf-8"))
            for rank in range(ranks)
        ]
        for case in job["cases"]
    }


def free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row, below those that the system hands out."""
    while True:
        first = random.SystemRandom().randrange(10000, 32000 - count)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    listener = stack.enter_context(socket.socket())
                    listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return first


def merged(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outputs of all ranks in the order in which ``split`` took the requests."""
    ranks = len(results)
    total = sum(len(result["outputs"]) for result in results)
    return [results[n % ranks]["outputs"][n // ranks] for n in range(total)]


def tokens(outputs: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens of each output."""
    return [output["tokens"] for output in outputs]


def logprob_difference(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """The largest difference of a log-probability that both have."""
    return max(
        abs(step[token] - other[token])
        for output, reference in zip(actual, expected, strict=True)
        for step, other in zip(output["logprobs"], reference["logprobs"], strict=True)
        for token in step.keys() & other.keys()
    )


def transformers_tokens(path: str, requests: list[list[int]], count: int) -> list[list[int]]:
    """``count`` greedy tokens in fp32 after each prompt, by transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    lengths = {"max_new_tokens": count, "min_new_tokens": count}
    outputs = []
    with torch.no_grad():
        for ids in requests:
            out = model.generate(torch.tensor([ids]), do_sample=False, **lengths)
            outputs.append(out[0, len(ids) :].tolist())
    return outputs
