"""How many tokens per second does vLLM serve on CPUs, with the experts of a model over W ranks?

One random Qwen3-MoE is served by one process of stock vLLM, and by W data-parallel ranks with our
exchange. There is no other exchange to compare with: stock vLLM has none for CPUs, and stops. What
the ranks generate is compared with the one process before anything is timed.

"prefill" has 8 prompts of 96 tokens per rank and one new token of each, "decode" 8 prompts of 4
tokens and 32 new ones. The share is that of dispatch and combine, waiting for slower ranks
included, in the time of the MoE layers. Run it where vLLM is: .venv/vllm/bin/moe-triton bench vllm

    moe-triton bench vllm [--world-size 2 4] [--samples 5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import bars, extras, output, tables, transformers_model

SEQUENCES = 8  # of each rank
BATCHES = {"prefill": (96, 1), "decode": (4, 32)}  # tokens of a prompt, new tokens
LIMIT = 1800  # seconds

# Of a rank by batch: its tokens, and (seconds, of the layers, of the exchange) of each sample.
Measured = Mapping[str, Mapping[str, Any]]
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--world-size", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=int, default=5, help="of each batch")
    output.add_arguments(parser, plot="tokens per second", record=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the bench; returns the exit code."""
    output.check_arguments(arguments)
    extras.require("vllm", "this bench", "bench")
    os.environ.update(SETTINGS)
    rows, load = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as path:
        transformers_model.quiet()
        transformers_model.write_checkpoint(path)
        expected = None
        for world in (1, *arguments.world_size):
            ranks = serve(path, world, arguments.samples)
            if expected is None:
                expected = ranks[0]["decode"]["tokens"]
            for rank in ranks:
                assert rank["decode"]["tokens"] == expected, "the ranks generate other tokens"
            rows += [summary(world, batch, ranks) | {"load": load} for batch in BATCHES]
    output.show(rows, tables.VLLM)
    output.finish(arguments, rows, plot, record="vllm")
    return 0


def plot(rows: Sequence[tables.Row], path: Path) -> None:
    """Draw the tokens per second of all ranks."""
    worlds = list(dict.fromkeys(row["world_size"] for row in rows))
    ways = {
        batch: [row["tokens_per_second"] for row in rows if row["batch"] == batch]
        for batch in BATCHES
    }
    cases = [f"{world} rank" + ("s" if world > 1 else "") for world in worlds]
    bars.draw(path, cases, ways, "tokens per second", f"vLLM, {rows[0]['device']}")


def serve(path: str, world: int, samples: int) -> list[Measured]:
    """The measurements of each rank."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(world), context.Queue()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [
        context.Process(target=measure, args=(path, rank, world, port, samples, barrier, queue))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    ranks = [queue.get(timeout=LIMIT) for _ in processes]
    for process in processes:
        process.join()
    return ranks


def measure(
    path: str, rank: int, world: int, port: int, samples: int, barrier: Any, queue: Any
) -> None:
    """On a rank: for each batch its tokens, and seconds of each sample, its layers and exchange."""
    if world > 1:
        os.environ |= {
            "MOE_TRITON_VLLM": "1",
            "VLLM_DP_RANK": str(rank),
            "VLLM_DP_RANK_LOCAL": str(rank),
            "VLLM_DP_SIZE": str(world),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(port),
        }
    from vllm import LLM, SamplingParams

    clocks = watch()
    llm = LLM(
        model=path,
        skip_tokenizer_init=True,
        dtype="float32",  # greedy tokens of bf16 differ where two are all but equal
        max_model_len=128,
        max_num_seqs=SEQUENCES,
        enforce_eager=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        enable_expert_parallel=world > 1,
    )
    generator = torch.Generator().manual_seed(0)
    results = {}
    for batch, (length, new) in BATCHES.items():
        ids = torch.randint(1, 512, (SEQUENCES, length), generator=generator).tolist()
        prompts = [{"prompt_token_ids": one} for one in ids]
        sampling = SamplingParams(max_tokens=new, temperature=0, detokenize=False, ignore_eos=True)
        times = []
        for sample in range(-1, samples):
            for clock in clocks.values():
                clock.clear()
            barrier.wait()
            start = time.perf_counter()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
            if sample >= 0:
                times.append((seconds, *(sum(clock) for clock in clocks.values())))
        tokens = [list(one.outputs[0].token_ids) for one in outputs]
        results[batch] = {"tokens": tokens, "times": times}
    barrier.wait()
    queue.put(results)
    queue.close()
    queue.join_thread()
    os._exit(0)


def watch() -> dict[str, list[float]]:
    """Lists to which the MoE layers, and their exchange, append the seconds of their calls."""
    from vllm.model_executor.layers.fused_moe import modular_kernel

    from ..integrations.vllm import PrepareFinalize

    clocks: dict[str, list[float]] = {"layers": [], "exchange": []}

    def timed(clock: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = function(*args, **kwargs)
            clock.append(time.perf_counter() - start)
            return timed(clock, out) if callable(out) else out

        return call

    kernel = modular_kernel.FusedMoEKernelModularImpl
    kernel.apply = timed(clocks["layers"], kernel.apply)
    for name in ("prepare_async", "finalize_async"):
        setattr(PrepareFinalize, name, timed(clocks["exchange"], getattr(PrepareFinalize, name)))
    return clocks


def summary(world: int, batch: str, ranks: Sequence[Measured]) -> dict[str, Any]:
    """Tokens per second of all ranks by the slowest, in the median sample."""
    length, new = BATCHES[batch]
    samples = list(zip(*(rank[batch]["times"] for rank in ranks), strict=True))
    seconds = statistics.median(max(one[0] for one in sample) for sample in samples)
    layers = sum(one[1] for sample in samples for one in sample)
    exchange = sum(one[2] for sample in samples for one in sample)
    tokens = length if batch == "prefill" else new
    return {
        "bench": "vllm",
        "vllm": version("vllm-cpu"),
        "world_size": world,
        "batch": batch,
        **transformers_model.MODEL,
        "sequences": SEQUENCES,
        "samples": len(samples),
        "tokens_per_second": world * SEQUENCES * tokens / seconds,
        "exchange_share": exchange / layers,
        "layers_share": layers / sum(one[0] for sample in samples for one in sample),
    }
