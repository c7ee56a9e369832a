"""Shared by all benches: facts of the machine, JSON lines, statistics and tables.

As a script, it writes the committed results into README.md and docs/results.md.
"""

import functools
import json
import os
import platform
import statistics
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import moe_triton

ROOT = Path(__file__).resolve().parents[1]


def machine():
    """Device, versions and revision, part of every line of results."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "moe_triton": moe_triton.__version__,
        "revision": _revision(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _revision():
    """The revision from ``MOE_TRITON_REVISION``, for copies without git, or of the checkout."""
    if revision := os.environ.get("MOE_TRITON_REVISION"):
        return revision
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _cpu():
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def destination(bench, record):
    """Where results go: into the repository only where they are meant to be committed."""
    return ROOT / ("bench/results" if record else "build/bench") / f"{bench}.jsonl"


def write(path, rows):
    """Write one JSON line per row, with the facts of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = machine()
    path.write_text("".join(json.dumps(row | facts) + "\n" for row in rows), encoding="utf-8")


def slowest(seconds_of_ranks):
    """Median and interquartile range, in ms over samples, of the slowest rank."""
    slowest = [max(sample) * 1e3 for sample in zip(*seconds_of_ranks, strict=True)]
    quartiles = statistics.quantiles(slowest, n=4)
    return statistics.median(slowest), quartiles[2] - quartiles[0]


def table(rows, columns):
    """A Markdown table; ``columns`` maps headings to functions of a row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(cell(row)) for cell in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


# Results recorded before a column existed go without it.
TRANSPORT = {
    "ranks": lambda row: row["world_size"],
    "tokens, hidden": lambda row: f"{row['tokens']}, {row['hidden']}",
    "rows": lambda row: row["payload"],
    "by hand / `shm`": lambda row: f"{row['shm_ratio']:.2f}",
    "by hand / `collective`": lambda row: f"{row['collective_ratio']:.2f}",
    "by hand": lambda row: f"{row['by_hand_ms']:.2f} ms",
    "`shm`": lambda row: f"{row['shm_ms']:.1f} ms",
    "`collective`": lambda row: f"{row['collective_ms']:.1f} ms",
    "ratio": lambda row: f"{row['ratio']:.2f}",
}


TRANSPORT_COPIES = {
    "ranks": lambda row: row["world_size"],
    "tokens, hidden": lambda row: f"{row['tokens']}, {row['hidden']}",
    "rows": lambda row: row["payload"],
    "`shm`": lambda row: f"{row['shm_ms']:.1f} ms",
    "`shm`, experts' rows copied": lambda row: f"{row['copied_ms']:.1f} ms",
    "copy of the rows": lambda row: f"{row['copy_ms']:.1f} ms ({row['share_of_copy']:.0%})",
}


def transport_table(rows, columns=TRANSPORT):
    """The columns that the rows have values for; sizes only where they differ."""
    columns = {name: cell for name, cell in columns.items() if _has(rows[0], cell)}
    if len({columns["tokens, hidden"](row) for row in rows}) == 1:
        del columns["tokens, hidden"]
    return table(rows, columns)


def _has(row, cell):
    try:
        cell(row)
    except KeyError:
        return False
    return True


TRANSFORMERS = {
    "ranks": lambda row: row["world_size"],
    "step": lambda row: f"{row['batch']}, {row['tokens']} tokens a rank",
    "`all_to_all`": lambda row: f"{row['all_to_all_ms']:.1f} ms",
    "`collective`, gloo": lambda row: f"{row['gloo_ms']:.1f} ms",
    "`shm`": lambda row: f"{row['windows_ms']:.1f} ms",
    "`all_to_all` / `shm`": lambda row: f"{row['ratio']:.2f}",
    "in the experts only": lambda row: (
        f"{row['all_to_all_experts_ms']:.1f} / {row['windows_experts_ms']:.1f} ms = "
        f"{row['experts_ratio']:.2f}"
    ),
}


OVERLAP = {
    "ranks": lambda row: row["world_size"],
    "operation": lambda row: row["operation"],
    "one rank is late by": lambda row: f"{row['late_ms']:g} ms",
    "own compute": lambda row: f"{row['compute_ms']:.1f} ms",
    "in sequence": lambda row: f"{row['sequence_ms']:.1f} ms",
    "compute in between": lambda row: f"{row['overlap_ms']:.1f} ms",
    "saved": lambda row: f"{row['saved_ms']:.1f} ms",
    "until the setups are back": lambda row: f"{row['setup_ms']:.1f} ms",
}


LOAD = {
    "ranks": lambda row: row["ranks"],
    "slots": lambda row: row["slots"],
    "Zipf": lambda row: row["exponent"],
    "no replicas": lambda row: f"{row['no_replicas']:.2f}",
    "greedy, equal parts": lambda row: f"{row['greedy_equal_parts']:.3f}",
    "greedy, by rank": lambda row: f"{row['greedy']:.3f}",
    "ours, by rank": lambda row: f"{row['plan']:.3f}",
    "ours, by token": lambda row: f"{row['plan_by_token']:.3f}",
    "by rank, at least": lambda row: f"{row['at_least']:.3f}",
    "unseen ids: greedy / ours": lambda row: f"{row['greedy_next']:.2f} / {row['plan_next']:.2f}",
    "CPU time: greedy / ours": lambda row: f"{row['greedy_ms']:.0f} / {row['plan_ms']:.0f} ms",
}


# Implementations to compare with, and the numbers of tokens that docs/results.md shows.
PEERS = ("pytorch", "torch.compile", "transformer_engine", "triton_kernels")
KERNEL_TOKENS = (128, 4096)


def kernels(rows):
    """Tables of bench_kernels: one column per model, then one per peer."""
    chosen = [row for row in rows if row["tokens"] in KERNEL_TOKENS] or rows
    models = list(dict.fromkeys(row["model"] for row in chosen))
    results, ours = {}, {}
    for row in chosen:
        line = tuple(row[name] for name in ("kernel", "world_size", "tokens"))
        results.setdefault((line, row["model"]), {})[row["implementation"]] = row
        ours[line] = None
    columns = {
        "kernel": lambda line: line[0],
        "ranks": lambda line: line[1],
        "tokens": lambda line: line[2],
    }

    def cell(line, model, name, share):
        row = results.get((line, model), {}).get(name)
        if row is None:
            return ""
        text = f"{row.get('graph_us', row['eager_us']):.1f}"
        text += "" if "graph_us" in row else " (eager)"
        return f"{text}, {row['share_of_copy']:.0%}" if share else text

    def models_cell(model):
        return lambda line: cell(line, model, "moe_triton", True)

    tables = table(ours, columns | {model: models_cell(model) for model in models})
    beside = [line for line in ours if len(results.get((line, models[0]), ())) > 1]
    if not beside:
        return tables
    # Peers are timed on the first model only.
    names = {"ours": "moe_triton"} | {name: name for name in PEERS}

    def peer_cell(name):
        return lambda line: cell(line, models[0], name, False)

    others = table(beside, columns | {head: peer_cell(name) for head, name in names.items()})
    return f"{tables}\n\nThe same beside others, {models[0]}:\n\n{others}"


def sections():
    """The section of each page, from ``bench/results``."""
    results = [_copies(), *_kernels(), *_overlap(), _transformers(), _load()]
    return {"README.md": _transport(), "docs/results.md": "\n\n".join(results)}


def _kernels():
    """A paragraph and tables per GPU with results."""
    for path in sorted((ROOT / "bench/results").glob("*/kernels.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        row = rows[0]
        yield (
            f"The kernels on one {row['device']} (torch {row['torch']}, triton {row['triton']}, "
            f"{row['date']},\nrevision {row['revision']}): microseconds of a call in a CUDA graph, "
            "medians, over rotating\ninputs, and the share of the rate of a plain copy on the "
            "device of as many bytes in the same run.\n\n" + kernels(rows)
        )


def _transport():
    """Each size once, in bf16: time and lead over by hand, ranks beside each other."""
    rows = [row for row in _read("transport") if row["payload"] == "bf16"]
    row = rows[0]
    sizes = list(dict.fromkeys((row["tokens"], row["hidden"]) for row in rows))
    worlds = sorted({row["world_size"] for row in rows})
    by_size = {(row["tokens"], row["hidden"], row["world_size"]): row for row in rows}
    columns = {"tokens, hidden": lambda size: f"{size[0]}, {size[1]}"} | {
        f"{world} ranks, `{name}`": functools.partial(_lead, by_size, world, name)
        for world in worlds
        for name in ("shm", "collective")
    }
    return (
        f"Dispatch and combine in bf16, median of {row['samples']} samples of the slowest rank, "
        "and times faster than [by hand](docs/results.md)\nover gloo, on one host of "
        f"{row['cores']} cores ({row['device']}, torch {row['torch']}, {row['date']}, "
        f"revision {row['revision']}).\n\n" + table(sizes, columns)
    )


def _lead(rows, world, name, size):
    row = rows[(*size, world)]
    return f"{row[f'{name}_ms']:.1f} ms, {row[f'{name}_ratio']:.1f}"


def _copies():
    rows = _read("transport")
    row = rows[0]
    return (
        f"All runs of the README's table ({row['date']}, revision {row['revision']}). By hand is "
        "argsort, `all_to_all_single` of\ncounts, of rows, and back, over gloo; the ratios are "
        "times faster than by hand.\n\n" + transport_table(rows) + "\n\n"
        "In the column `shm` the experts write to `output_rows`; in the next one combine copies "
        "their rows. The\nlast column is a plain copy of the rows that each rank gets delivered, "
        "and its share of the time of `shm`.\n\n" + transport_table(rows, TRANSPORT_COPIES)
    )


def _overlap():
    """A paragraph and a table, if results exist."""
    if not (ROOT / "bench/results/overlap.jsonl").exists():
        return
    rows = _read("overlap")
    row = rows[0]
    yield (
        f"Split-phase dispatch and combine between processes of one host, {row['tokens']} tokens a "
        f"rank,\nhidden {row['hidden']}, top-{row['top_k']} of {row['experts']} experts, on "
        f"{row['cores']} cores ({row['device']},\ntorch {row['torch']}, {row['date']}, revision "
        f"{row['revision']}), while one rank enters late:\ntime until an operation and compute of "
        "the rank's own are done, which comes after the teardown or\nbetween setup and teardown. "
        f"Medians of {row['samples']} samples of the slowest rank that is not late.\nThe wait can "
        "be hidden; the copies cannot, as the same cores make them.\n\n" + table(rows, OVERLAP)
    )


def _transformers():
    rows = _read("transformers")
    row = rows[0]
    return (
        "A forward of a random Qwen3-MoE in transformers "
        f"{row['transformers']}: {row['num_hidden_layers']} layers, hidden {row['hidden_size']},\n"
        f"top-{row['num_experts_per_tok']} of {row['num_experts']} experts of "
        f"{row['moe_intermediate_size']}, bf16, on {row['cores']} cores ({row['device']},\n"
        f"torch {row['torch']}, {row['date']}, revision {row['revision']}). Medians of "
        f"{row['samples']} samples of the slowest\nrank; `all_to_all` is transformers' own, over "
        "gloo.\n\n" + table(rows, TRANSFORMERS)
    )


def _load():
    rows = _read("load")
    row = rows[0]
    shown = [row for row in rows if row["exponent"] in (1.0, 1.5, 2.0)]
    return (
        f"The most loaded rank over the mean with replicas of {row['experts']} experts, load after "
        f"Zipf's law in {row['layers']}\norders of the experts, the worst of them (torch "
        f"{row['torch']}, {row['date']}, revision\n{row['revision']}). 288 slots do not divide by "
        "64. DeepSeek's greedy scheme assumes equal\nparts. By rank: the table is applied by "
        "source rank, the default of `npu_moe_update_expert`.\nAt least: the lower bound of any "
        "such table, since a rank sends all its rows for an expert to\none replica. Unseen ids "
        "are top-8 of 512 tokens a rank, mapped by rank and drawn after those that\nwere planned "
        "for. One case is drawn in `bench/results/load.svg`.\n\n" + table(shown, LOAD)
    )


def _read(bench):
    path = ROOT / f"bench/results/{bench}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def filled(text, section):
    """The page with the section between its marks replaced."""
    head, tail = text.split("<!-- results: begin", 1)
    begin, tail = tail.split("-->", 1)
    _, tail = tail.split("<!-- results: end -->", 1)
    return f"{head}<!-- results: begin{begin}-->\n{section}\n<!-- results: end -->{tail}"


def main():
    for name, section in sections().items():
        page = ROOT / name
        page.write_text(filled(page.read_text(encoding="utf-8"), section), encoding="utf-8")


if __name__ == "__main__":
    main()
