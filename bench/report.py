"""What all benches share: the machine they ran on, JSON lines, a table.

Run as a script, it puts the committed results into README.md and docs/results.md.
"""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import moe_triton

ROOT = Path(__file__).resolve().parents[1]


def machine():
    """Device, versions and revision, for every line of results."""
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
    """That of the checkout; a copy without one has it from ``MOE_TRITON_REVISION``."""
    if given := os.environ.get("MOE_TRITON_REVISION"):
        return given
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def _cpu():
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write(path, rows):
    """One JSON line per row, with the machine in each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = machine()
    path.write_text("".join(json.dumps(row | facts) + "\n" for row in rows), encoding="utf-8")


def table(rows, columns):
    """A Markdown table of ``columns``, each a heading and a function of a row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(cell(row)) for cell in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


# What the README shows of the transports, and what docs/results.md adds.
TRANSPORT = {
    "ranks": lambda row: row["world_size"],
    "rows": lambda row: row["payload"],
    "`shm`": lambda row: f"{row['symmetric_ms']:.1f} ms",
    "`collective`": lambda row: f"{row['collective_ms']:.1f} ms",
    "ratio": lambda row: f"{row['ratio']:.2f}",
}


TRANSPORT_COPIES = {
    "ranks": lambda row: row["world_size"],
    "rows": lambda row: row["payload"],
    "`shm`": lambda row: f"{row['symmetric_ms']:.1f} ms",
    "`shm`, experts' rows copied": lambda row: f"{row['copied_ms']:.1f} ms",
    "copy of the rows": lambda row: f"{row['copy_ms']:.1f} ms ({row['share_of_copy']:.0%})",
}


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
    """Tables of bench_kernels: all models beside each other, and ours beside others."""
    chosen = [row for row in rows if row["tokens"] in KERNEL_TOKENS] or rows
    models = list(dict.fromkeys(row["model"] for row in chosen))
    found, ours = {}, {}
    for row in chosen:
        line = tuple(row[name] for name in ("kernel", "world_size", "tokens"))
        found.setdefault((line, row["model"]), {})[row["implementation"]] = row
        ours[line] = None
    columns = {
        "kernel": lambda line: line[0],
        "ranks": lambda line: line[1],
        "tokens": lambda line: line[2],
    }

    def cell(line, model, name, share):
        row = found.get((line, model), {}).get(name)
        if row is None:
            return ""
        text = f"{row.get('graph_us', row['eager_us']):.1f}"
        text += "" if "graph_us" in row else " (eager)"
        return f"{text}, {row['share_of_copy']:.0%}" if share else text

    def models_cell(model):
        return lambda line: cell(line, model, "moe_triton", True)

    tables = table(ours, columns | {model: models_cell(model) for model in models})
    beside = [line for line in ours if len(found.get((line, models[0]), ())) > 1]
    if not beside:
        return tables
    # The model that comes first is the one that others were timed on.
    names = {"ours": "moe_triton"} | {name: name for name in PEERS}

    def peer_cell(name):
        return lambda line: cell(line, models[0], name, False)

    others = table(beside, columns | {head: peer_cell(name) for head, name in names.items()})
    return f"{tables}\n\nThe same beside others, {models[0]}:\n\n{others}"


def sections():
    """What each page shows of ``bench/results``."""
    rest = [_copies(), *_kernels(), *_overlap(), _transformers(), _load()]
    return {"README.md": _transport(), "docs/results.md": "\n\n".join(rest)}


def _kernels():
    """A paragraph and tables for each GPU that has results."""
    for path in sorted((ROOT / "bench/results").glob("*/kernels.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        one = rows[0]
        yield (
            f"The kernels on one {one['device']} (torch {one['torch']}, triton {one['triton']}, "
            f"{one['date']},\nrevision {one['revision']}): microseconds of a call in a CUDA graph, "
            "medians, over rotating\ninputs, and the share of the rate of a plain copy on the "
            "device of as many bytes in the same run.\n\n" + kernels(rows)
        )


def _transport():
    rows = _read("transport")
    one = rows[0]
    return (
        f"Dispatch and combine on one host, median of {one['samples']} samples of the slowest "
        f"rank: {one['tokens']} tokens a rank,\nhidden {one['hidden']}, top-{one['top_k']} of "
        f"{one['experts']} experts; `collective` over gloo; {one['cores']} cores "
        f"({one['device']},\ntorch {one['torch']}, {one['date']}, revision {one['revision']}). "
        "[More](docs/results.md).\n\n" + table(rows, TRANSPORT)
    )


def _copies():
    rows = _read("transport")
    one = rows[0]
    return (
        f"The runs of the README's table ({one['date']}, revision {one['revision']}). In the "
        "column `shm` the experts write\nto `output_rows`; in the next one combine copies their "
        "rows. The last column is a plain copy of the\nrows that each rank gets delivered, and "
        "its share of the time of `shm`.\n\n" + table(rows, TRANSPORT_COPIES)
    )


def _overlap():
    """A paragraph and a table, if there are results."""
    if not (ROOT / "bench/results/overlap.jsonl").exists():
        return
    rows = _read("overlap")
    one = rows[0]
    yield (
        f"Split-phase dispatch and combine between processes of one host, {one['tokens']} tokens a "
        f"rank,\nhidden {one['hidden']}, top-{one['top_k']} of {one['experts']} experts, on "
        f"{one['cores']} cores ({one['device']},\ntorch {one['torch']}, {one['date']}, revision "
        f"{one['revision']}), while one rank enters late:\ntime until an operation and compute of "
        "the rank's own are done, which comes after the teardown or\nbetween setup and teardown. "
        f"Medians of {one['samples']} samples of the slowest rank that is not late.\nThe wait can "
        "be hidden; the copies cannot, as the same cores make them.\n\n" + table(rows, OVERLAP)
    )


def _transformers():
    rows = _read("transformers")
    one = rows[0]
    return (
        "A forward of a random Qwen3-MoE in transformers "
        f"{one['transformers']}: {one['num_hidden_layers']} layers, hidden {one['hidden_size']},\n"
        f"top-{one['num_experts_per_tok']} of {one['num_experts']} experts of "
        f"{one['moe_intermediate_size']}, bf16, on {one['cores']} cores ({one['device']},\n"
        f"torch {one['torch']}, {one['date']}, revision {one['revision']}). Medians of "
        f"{one['samples']} samples of the slowest\nrank; `all_to_all` is transformers' own, over "
        "gloo.\n\n" + table(rows, TRANSFORMERS)
    )


def _load():
    rows = _read("load")
    one = rows[0]
    shown = [row for row in rows if row["exponent"] in (1.0, 1.5, 2.0)]
    return (
        f"The most loaded rank over the mean with replicas of {one['experts']} experts, load after "
        f"Zipf's law in {one['layers']}\norders of the experts, the worst of them (torch "
        f"{one['torch']}, {one['date']}, revision\n{one['revision']}). 288 slots do not divide by "
        "64. DeepSeek's greedy scheme counts on equal parts; by\nrank is what "
        "`npu_moe_update_expert` makes of its replicas by default, where no table comes below\n"
        '"at least", since a rank sends all its copies for an expert to one replica. Unseen ids '
        "are top-8 of\n512 tokens a rank, mapped by rank and drawn after those that were planned "
        "for. One case is drawn in\n`bench/results/load.svg`.\n\n" + table(shown, LOAD)
    )


def _read(bench):
    path = ROOT / f"bench/results/{bench}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def filled(text, section):
    """A page with a section in place of what it had between the marks."""
    head, rest = text.split("<!-- results: begin", 1)
    begin, rest = rest.split("-->", 1)
    _, tail = rest.split("<!-- results: end -->", 1)
    return f"{head}<!-- results: begin{begin}-->\n{section}\n<!-- results: end -->{tail}"


def main():
    for name, section in sections().items():
        page = ROOT / name
        page.write_text(filled(page.read_text(encoding="utf-8"), section), encoding="utf-8")


if __name__ == "__main__":
    main()
