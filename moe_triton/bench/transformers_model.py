"""How fast is a transformers model with our exchange, compared with its own all_to_all?

Each case loads one random Qwen3-MoE several times in the same processes, once per
``ep_implementation``: transformers' ``all_to_all`` over gloo, ours over gloo, and ours over shared
memory. Their logits are compared with the unmodified model's before anything is timed. A sample is
one forward of each, in turn; its time is the slowest rank's. The forward includes parts common to
all, such as attention and FSDP's gathering of other weights over gloo, so the time in the experts
modules (exchange, experts, and waiting for slower ranks) is reported separately.

"prefill" has 128 tokens per rank, "decode" 8. Ours gets ``max_tokens``, as from serving engines.

    moe-triton bench transformers [--world-size 2 4] [--samples 15]
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import testing
from . import bars, extras, output, results, tables

IMPLEMENTATIONS = ("all_to_all", "gloo", "windows")
MODEL = {
    "hidden_size": 1024,
    "moe_intermediate_size": 128,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
}
BATCHES = {"prefill": (1, 128), "decode": (8, 1)}  # sequences, and new tokens of each
WARM_UP = 2

# Of a rank: (seconds of a forward, of its experts) by batch, implementation and sample.
Times = dict[str, dict[str, list[tuple[float, float]]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--world-size", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=int, default=15, help="of each implementation")
    output.add_arguments(parser, plot="times of a forward", record=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the bench; returns the exit code."""
    output.check_arguments(arguments)
    extras.require("transformers", "this bench", "transformers")
    quiet()
    rows = []
    with tempfile.TemporaryDirectory() as path:
        write_checkpoint(path)
        for world in arguments.world_size:
            work = functools.partial(measure, path=path, samples=arguments.samples)
            ranks = testing.run_processes(world, work)
            for batch in BATCHES:
                row = summary(world, batch, [times[batch] for times in ranks])
                rows.append(row | {"samples": arguments.samples})
                print(
                    f"W {world} {batch}: "
                    + ", ".join(
                        f"{name} {row[f'{name}_ms']:.1f} ms ({row[f'{name}_experts_ms']:.1f})"
                        for name in IMPLEMENTATIONS
                    ),
                    flush=True,
                )
    output.show(rows, tables.TRANSFORMERS)
    output.finish(arguments, rows, plot, record="transformers")
    return 0


def plot(rows: Sequence[tables.Row], path: Path) -> None:
    """Draw the time of a forward, by implementation."""
    cases = [f"{row['batch']}, {row['world_size']} ranks" for row in rows]
    ways = {name: [row[f"{name}_ms"] for row in rows] for name in IMPLEMENTATIONS}
    bars.draw(path, cases, ways, "milliseconds", f"a forward of Qwen3-MoE, {rows[0]['device']}")


def quiet() -> None:
    """Keep transformers from printing warnings and bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def write_checkpoint(path: str) -> None:
    """Write random weights, spread so that routing and logits differ."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        **MODEL,
        vocab_size=512,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        norm_topk_prob=True,
        dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2 if "embed" in name else weight.shape[-1] ** -0.5)
    model.save_pretrained(path)


def measure(ctx: testing.RankContext, *, path: str, samples: int) -> Times:
    """On a rank: seconds of a forward and of its experts, per batch, implementation and sample."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from ..integrations import transformers as integration

    quiet()
    most = max(sequences * length for sequences, length in BATCHES.values())
    integration.register("gloo", transport="collective", max_tokens=most)
    integration.register("windows", transport="symmetric", max_tokens=most)
    whole = AutoModelForCausalLM.from_pretrained(path)
    models: dict[str, Any] = {}
    clocks: dict[str, list[float]] = {}
    for name in IMPLEMENTATIONS:
        config = DistributedConfig(
            fsdp_size=ctx.world_size, ep_size=ctx.world_size, ep_implementation=name
        )
        models[name] = AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
        clocks[name] = watch(models[name])

    times: Times = {}
    with torch.no_grad():
        for batch, shape in BATCHES.items():
            ids = torch.randint(whole.config.vocab_size, shape)
            expected = whole(ids).logits.float()
            for name in IMPLEMENTATIONS:
                check(name, models[name](ids).logits.float(), expected)
            times[batch] = {name: [] for name in IMPLEMENTATIONS}
            for sample in range(-WARM_UP, samples):
                for name in IMPLEMENTATIONS:
                    seconds = forward(models[name], ids, clocks[name])
                    if sample >= 0:
                        times[batch][name].append(seconds)
    integration.close_exchanges()
    return times


def forward(model: Any, ids: torch.Tensor, clock: list[float]) -> tuple[float, float]:
    """Seconds of a forward, and of its experts."""
    clock.clear()
    dist.barrier()
    start = time.perf_counter()
    model(ids)
    return time.perf_counter() - start, sum(clock)


def watch(model: Any) -> list[float]:
    """A list to which every experts module of ``model`` appends the seconds of its calls."""
    clock: list[float] = []

    def timed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            out = forward(*args)
            clock.append(time.perf_counter() - start)
            return out

        return call

    for layer in model.model.layers:
        layer.mlp.experts.forward = timed(layer.mlp.experts.forward)
    return clock


def check(name: str, logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Most tokens must agree; in bf16, routing ties may break differently for some."""
    error = (logits - expected).abs().amax(dim=-1) / expected.std()
    assert error.median() < 0.05, f"{name}: logits are off by {error.median():.3f} deviations"


def summary(
    world: int, batch: str, ranks: Sequence[Mapping[str, Sequence[tuple[float, float]]]]
) -> dict[str, Any]:
    """Medians over samples of the slowest rank, in milliseconds."""
    row: dict[str, Any] = {"bench": "transformers", "world_size": world, "batch": batch, **MODEL}
    row["transformers"] = version("transformers")
    row["tokens"] = BATCHES[batch][0] * BATCHES[batch][1]
    for name in IMPLEMENTATIONS:
        for index, kind in enumerate(("", "_experts")):
            row[f"{name}{kind}_ms"], row[f"{name}{kind}_iqr_ms"] = results.slowest(
                [[pair[index] for pair in times[name]] for times in ranks]
            )
    row["ratio"] = row["all_to_all_ms"] / row["windows_ms"]
    row["experts_ratio"] = row["all_to_all_experts_ms"] / row["windows_experts_ms"]
    return row
