"""How long do dispatch and combine of a layer take, beside a copy of their rows?

Ranks are processes of this host (``--ranks``), or those of torchrun. Each alternates dispatch and
combine; a sample is a few rounds one after the other, and its time that of the slowest rank. The
sums are compared with those computed directly before anything is timed.

Bytes are those of the rows that a rank gets delivered, every copy and its own tokens included; the
share is relative to a plain copy of as many bytes, by all ranks at once in the same run. Experts
are left out: their outputs are taken to stand where ``output_rows`` says.

On a GPU without torchrun the ranks share the device, driven by one thread, and times are those of
CUDA graphs (``bench kernels`` has the kernels alone).

    moe-triton bench layer --preset deepseek-v3 --tokens 1 8 64 --plot layer.svg
    torchrun --nproc-per-node 8 -m moe_triton bench layer --tokens 128 --quant int8
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

import moe_triton

from .. import testing
from ..layout import QUANTS, RowFormat
from . import extras, models, output, published, ranks, results, tables
from .models import Shape

# Those that need no factors.
FORMATS = ("bf16", *(quant for quant in QUANTS if quant != "int8_static"))
HALVES = ("dispatch", "combine")
_MOST_ROUNDS = 20  # of a sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    models.add_arguments(parser)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[1, 8, 64, 128], metavar="T", help="of a rank")
    add(
        "--quant",
        nargs="+",
        choices=FORMATS,
        default=["bf16"],
        metavar="FORMAT",
        help=f"of dispatched rows: {', '.join(FORMATS)} (default: bf16)",
    )
    add("--ranks", type=int, default=2, metavar="W", help="without torchrun (default: 2)")
    add("--backend", help="cpu, interpret, cuda, ...; by default that of the device")
    add("--device", help="cpu or cuda; by default a GPU where PyTorch sees one")
    add("--transport", default="auto", choices=("auto", "shm", "symmetric", "collective"))
    add("--samples", type=int, default=15, help="of each case (default: 15)")
    add("--quick", action="store_true", help="5 short samples")
    output.add_arguments(parser, plot="times over tokens")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        shape: of the layer.
        tokens: of a rank.
        ranks: W.
        quant: of dispatched rows, or None.
        backend: of all calls, or None for that of the device.
        transport: as for ``ExpertParallel``.
        samples: to take.
        seconds: to spend on a sample, at most about.
    """

    shape: Shape
    tokens: int
    ranks: int
    quant: str | None
    backend: str | None
    transport: str
    samples: int
    seconds: float

    def __str__(self) -> str:
        payload = self.quant or "bf16"
        return f"{self.shape.model}, {self.tokens} tokens of {self.ranks} ranks, {payload}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one rank.

    Attributes:
        seconds: of a call, by half and "copy" of it, sample by sample.
        row_bytes: delivered to this rank by dispatch, and back by combine.
        launches: of kernels in a call, by half; None on the reference, which has none.
        transport: that was chosen.
        backend: that ran.
    """

    seconds: dict[str, list[float]]
    row_bytes: dict[str, int]
    launches: dict[str, int | None]
    transport: str
    backend: str


def run(arguments: argparse.Namespace) -> int:
    """Run the bench; returns the exit code."""
    output.check_arguments(arguments)
    device = _device(arguments.device)
    with ranks.torchrun(device) as context:
        leading = context is None or context.rank == 0
        cases = _cases(arguments, context.world_size if context else arguments.ranks)
        rows = []
        with output.progress(len(cases)) if leading else _silent() as announce:
            for case in cases:
                announce(str(case))
                row = _measured(case, device, context)
                rows.append(row)
    if leading:
        output.show(rows, COLUMNS, _title(rows))
        _show_published(rows)
        _say_what_is_missing(rows)
        output.finish(arguments, rows, plot)
    return 0


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _silent() -> Iterator[Any]:
    yield lambda _: None


def _cases(arguments: argparse.Namespace, world: int) -> list[Case]:
    quick = arguments.quick
    return [
        Case(
            shape,
            tokens,
            world,
            None if quant == "bf16" else quant,
            arguments.backend,
            arguments.transport,
            min(arguments.samples, 5) if quick else arguments.samples,
            0.2 if quick else 1.0,
        )
        for shape in models.chosen(arguments)
        for quant in arguments.quant
        for tokens in arguments.tokens
    ]


def _measured(case: Case, device: torch.device, context: ranks.Rank | None) -> dict[str, Any]:
    if device.type == "cuda" and context is None:
        return _on_one_device(case, device)
    if context is not None:
        measured = ranks.gathered(measure(context, case))
    elif case.ranks == 1:
        measured = [measure(ranks.Rank(0, 1, None, device), case)]
    else:
        if case.backend is not None:
            moe_triton.set_backend(case.backend)  # sets the environment of the processes
        measured = testing.run_processes(case.ranks, functools.partial(measure, case=case))
    return _row(case, measured)


def measure(ctx: Any, case: Case) -> Measured:
    """Check and time a case on one rank."""
    from . import layer_cases  # imports Triton, which by now knows whether it interprets

    if case.backend is not None:
        moe_triton.set_backend(case.backend)
    device, shape = ctx.device, case.shape
    inputs = layer_cases.drawn(shape, case.tokens, device, ctx.rank)
    with moe_triton.ExpertParallel(
        ctx.ep_group,
        num_experts=shape.experts,
        top_k=shape.top_k,
        hidden=shape.hidden,
        max_tokens=case.tokens,
        quant=cast("Any", case.quant),
        exact=device.type == "cpu",
        transport=cast("Any", case.transport),
        timeout=ranks.TIMEOUT,
        device=device,
    ) as ep:
        return _time(ctx, ep, case, inputs)


def _time(ctx: Any, ep: moe_triton.ExpertParallel, case: Case, inputs: Any) -> Measured:
    from . import kernel_cases, launches, layer_cases

    x, _, weights = inputs
    backend = moe_triton.get_backend(ctx.device)

    def synchronize() -> float:
        if ctx.device.type != "cpu":
            torch.get_device_module(ctx.device).synchronize()
        return time.perf_counter()

    def barrier() -> None:
        if ctx.world_size > 1:
            dist.barrier()

    with torch.no_grad():
        counts: dict[str, int | None] = dict.fromkeys(HALVES)
        counting = contextlib.nullcontext() if backend == "cpu" else launches.counted()
        with counting as count:
            recv = ep.dispatch(*inputs)
            sent = count.value if count else None
            rows = ep.output_rows(recv.handle)
            rows.copy_(recv.x[: len(rows)])
            before = count.value if count else 0
            out = ep.combine(rows, recv.handle)
            if count:
                counts = {"dispatch": sent, "combine": count.value - before}
        layer_cases.check_sums(out, x, weights, case.quant)

        # A rank without rows copies one, so that times are above zero.
        num_rows = max(int(recv.num_tokens), 1)
        fmt = RowFormat.quantized(case.quant, torch.bfloat16, case.shape.hidden)
        sizes = {
            "dispatch": num_rows * kernel_cases.row_bytes(fmt),
            "combine": case.tokens * case.shape.top_k * case.shape.hidden * 2,
        }
        copies = {
            half: [torch.zeros(size, dtype=torch.uint8, device=ctx.device) for _ in range(2)]
            for half, size in sizes.items()
        }

        def round_trip(seconds: dict[str, float]) -> None:
            start = synchronize()
            recv = ep.dispatch(*inputs)
            middle = synchronize()
            ep.combine(ep.output_rows(recv.handle), recv.handle)
            end = synchronize()
            seconds["dispatch"] += middle - start
            seconds["combine"] += end - middle

        def copy(seconds: dict[str, float]) -> None:
            for half, (source, target) in copies.items():
                start = synchronize()
                target.copy_(source)
                seconds[f"copy_{half}"] += synchronize() - start

        barrier()
        start = time.perf_counter()
        round_trip(dict.fromkeys(HALVES, 0.0))
        took = torch.tensor([time.perf_counter() - start])
        if ctx.world_size > 1:  # all ranks take equally many rounds
            dist.all_reduce(took, dist.ReduceOp.MAX, group=_host_group(ctx))
        rounds = max(1, min(_MOST_ROUNDS, int(case.seconds / float(took))))
        samples: dict[str, list[float]] = {}
        for sample in range(-1, case.samples):
            seconds = dict.fromkeys((*HALVES, *(f"copy_{half}" for half in HALVES)), 0.0)
            for work in (round_trip, copy):
                barrier()
                for _ in range(rounds):
                    work(seconds)
            if sample >= 0:  # the first one warms up
                for name, value in seconds.items():
                    samples.setdefault(name, []).append(value / rounds)
    return Measured(samples, sizes, counts, ep.transport or "unknown", backend)


def _host_group(ctx: Any) -> Any:
    return ctx.ep_group if isinstance(ctx, ranks.Rank) else None


def _row(case: Case, measured: Sequence[Measured]) -> dict[str, Any]:
    """Medians over samples of the slowest rank; bytes are the mean over ranks."""
    row = _sizes(case) | {"backend": measured[0].backend, "transport": measured[0].transport}
    row["samples"] = case.samples
    for half in HALVES:
        for name in (half, f"copy_{half}"):
            slowest, spread = results.slowest([rank.seconds[name] for rank in measured])
            row[f"{name}_us"], row[f"{name}_iqr_us"] = slowest * 1e3, spread * 1e3
        row[f"{half}_bytes"] = statistics.mean(rank.row_bytes[half] for rank in measured)
        row[f"{half}_gb_s"] = row[f"{half}_bytes"] / row[f"{half}_us"] / 1e3
        row[f"{half}_share_of_copy"] = row[f"copy_{half}_us"] / row[f"{half}_us"]
        row[f"{half}_launches"] = measured[0].launches[half]
    return row


def _sizes(case: Case) -> dict[str, Any]:
    sizes = case.shape._asdict() | {"tokens": case.tokens, "ranks": case.ranks}
    return {"bench": "layer", **sizes, "quant": case.quant}


def _on_one_device(case: Case, device: torch.device) -> dict[str, Any]:
    """Ranks that share a GPU, by CUDA graphs and events."""
    from . import gpu_timing, kernels, launches, layer_cases

    timer = gpu_timing.Timer(device)
    row = _sizes(case) | {"backend": moe_triton.get_backend(device), "transport": "local"}
    with layer_cases.layer(
        case.shape,
        case.tokens,
        device,
        world_size=case.ranks,
        quant=case.quant,
        num_sets=timer.num_sets,
    ) as halves:
        for half, measured in zip(HALVES, halves, strict=True):
            with launches.counted() as count:
                measured.calls[0]()
            facts = kernels.figures(timer, measured.num_bytes, measured.calls)
            row |= {
                f"{half}_us": facts.get("graph_us", facts["eager_us"]) / case.ranks,
                f"{half}_iqr_us": facts.get("graph_iqr_us", facts["eager_iqr_us"]) / case.ranks,
                f"{half}_host_us": facts["host_us"] / case.ranks,
                f"copy_{half}_us": facts["copy_us"] / case.ranks,
                f"{half}_bytes": measured.num_bytes / case.ranks,
                f"{half}_gb_s": facts["gb_s"],
                f"{half}_share_of_copy": facts["share_of_copy"],
                f"{half}_launches": count.value // case.ranks,
            }
    return row | gpu_timing.Clocks(kernels.device_uuid(device)).read()


def _microseconds(value: float) -> str:
    return f"{value:.1f} us" if value < 1000 else f"{value / 1000:.2f} ms"


def _half_cell(half: str, row: Mapping[str, Any]) -> str:
    spread = f"{row[f'{half}_iqr_us'] / row[f'{half}_us']:.0%}"
    return f"{_microseconds(row[f'{half}_us'])} ± {spread}"


def _rate_cell(half: str, row: Mapping[str, Any]) -> str:
    size = row[f"{half}_bytes"] / 1e6
    rate, share = row[f"{half}_gb_s"], row[f"{half}_share_of_copy"]
    return f"{size:.3g} MB, {rate:.3g} GB/s, {share:.0%}"


def _launch_cell(row: Mapping[str, Any]) -> str:
    counts = [row[f"{half}_launches"] for half in HALVES]
    return "none" if None in counts else " + ".join(map(str, counts))


COLUMNS: tables.Columns = {
    "model": lambda row: row["model"],
    "tokens": lambda row: row["tokens"],
    "ranks": lambda row: row["ranks"],
    "rows": lambda row: row["quant"] or "bf16",
    **{half: functools.partial(_half_cell, half) for half in HALVES},
    **{f"{half}: bytes, rate, of a copy": functools.partial(_rate_cell, half) for half in HALVES},
    "launches": _launch_cell,
}

PUBLISHED: tables.Columns = {
    name: functools.partial(lambda name, row: row[name], name)
    for name in ("system", "hardware", "tokens", "ranks", "rows", "dispatch", "combine", "note")
}


def _title(rows: Sequence[Mapping[str, Any]]) -> str:
    row = rows[0]
    return f"dispatch and combine: back end {row['backend']}, transport {row['transport']}"


def of_same_workload(row: Mapping[str, Any]) -> tuple[published.PublishedRow, ...]:
    """The published rows of a measured row's workload."""
    return published.same_workload(**{name: row[name] for name in published.WORKLOAD})


def _show_published(rows: Sequence[Mapping[str, Any]]) -> None:
    """Measured and published rows, one table a workload that has any."""
    without = []
    for row in {tuple(row[name] for name in published.WORKLOAD): row for row in rows}.values():
        same = of_same_workload(row)
        if not same:
            without.append(f"{row['model']} {row['tokens']} tokens")
            continue
        here = {
            "system": "moe_triton, this run",
            "hardware": results.machine()["device"],
            "rows": row["quant"] or "bf16",
            "tokens": row["tokens"],
            "ranks": row["ranks"],
            "note": f"back end {row['backend']}",
        }
        here |= {half: _microseconds(row[f"{half}_us"]) for half in HALVES}
        theirs = [
            {**published.cells(other), "tokens": other.tokens or "", "ranks": other.ranks or ""}
            for other in same
        ]
        sizes = f"{row['tokens']} tokens, {row['hidden']}, top-{row['top_k']}, {row['ranks']} ranks"
        output.show([here, *theirs], PUBLISHED, f"published, the same workload ({sizes})")
    if without:
        print(
            f"published: no row has the workload of {', '.join(without)} on {rows[0]['ranks']} "
            "ranks; all rows: moe-triton bench --published"
        )


def _say_what_is_missing(rows: Sequence[Mapping[str, Any]]) -> None:
    """Say what this machine cannot show."""
    if "clocks_from" not in rows[0]:
        print("clocks and power: none, no GPU was timed by this process")
    elif str(rows[0]["clocks_from"]).startswith("unknown"):
        print("clocks and power: unknown; pip install 'moe_triton[bench]' brings nvidia-ml-py")
    else:
        facts = [f"{name} {rows[0][name]}" for name in ("sm_mhz", "memory_mhz", "power_w")]
        print(f"clocks and power ({rows[0]['clocks_from']}): {', '.join(facts)}")
    if rows[0]["dispatch_launches"] is None:
        print("launches: none, the cpu back end is PyTorch")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw times over tokens, with copies, and published times of the same workloads as points."""
    figure_module = extras.require("matplotlib.figure", "--plot")
    figure = figure_module.Figure(figsize=(9, 4.2), layout="constrained")
    lines = list(dict.fromkeys((row["model"], row["quant"] or "bf16") for row in rows))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, half in zip(axes, HALVES, strict=True):
        for number, (model, quant) in enumerate(lines):
            of_line = sorted(
                (row for row in rows if (row["model"], row["quant"] or "bf16") == (model, quant)),
                key=lambda row: row["tokens"],
            )
            tokens = [row["tokens"] for row in of_line]
            color = f"C{number}"
            label = f"{model}, {quant}"
            axis.plot(
                tokens, [row[f"{half}_us"] for row in of_line], "o-", color=color, label=label
            )
            copies = [row[f"copy_{half}_us"] for row in of_line]
            axis.plot(tokens, copies, ":", color=color, label=f"copy of the rows, {label}")
            for row in of_line:
                for other in of_same_workload(row):
                    if (value := getattr(other, f"{half}_us")) is not None:
                        text = f"{other.system}, {other.hardware}"
                        axis.plot([row["tokens"]], [value], "x", color="0.4")
                        axis.annotate(text, (row["tokens"], value), fontsize=5, color="0.4")
        axis.set_title(f"{half}, {rows[0]['ranks']} ranks", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = sorted({row["tokens"] for row in rows})
        axis.set_xticks(ticks, map(str, ticks))
        axis.set_xlabel("tokens of a rank")
        axis.grid(visible=True, which="major", color="0.9")
    axes[0].set_ylabel("microseconds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    first = rows[0]
    title = f"{first.get('device', '')}, back end {first['backend']}, {first['transport']}"
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
