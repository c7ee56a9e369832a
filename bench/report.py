"""What all benches share: the machine they ran on, JSON lines, a table.

Run as a script, it puts the committed results into README.md.
"""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def machine():
    """Device, versions and revision, for every line of results."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moe_triton": version("moe_triton"),
        "revision": revision.stdout.strip(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


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


TRANSPORT = {
    "ranks": lambda row: row["world_size"],
    "rows": lambda row: row["payload"],
    "windows": lambda row: f"{row['symmetric_ms']:.1f} ms",
    "gloo": lambda row: f"{row['collective_ms']:.1f} ms",
    "gloo / windows": lambda row: f"{row['ratio']:.2f}",
    "windows, experts' rows copied": lambda row: f"{row['copied_ms']:.1f} ms",
    "copy of the rows": lambda row: f"{row['copy_ms']:.1f} ms ({row['share_of_copy']:.0%})",
}


TRANSFORMERS = {
    "ranks": lambda row: row["world_size"],
    "step": lambda row: f"{row['batch']}, {row['tokens']} tokens a rank",
    "`all_to_all`": lambda row: f"{row['all_to_all_ms']:.1f} ms",
    "ours, gloo": lambda row: f"{row['gloo_ms']:.1f} ms",
    "ours, windows": lambda row: f"{row['windows_ms']:.1f} ms",
    "`all_to_all` / windows": lambda row: f"{row['ratio']:.2f}",
    "the same, in the experts only": lambda row: (
        f"{row['all_to_all_experts_ms']:.1f} / {row['windows_experts_ms']:.1f} ms = "
        f"{row['experts_ratio']:.2f}"
    ),
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
    "no table below": lambda row: f"{row['at_least']:.3f}",
    "unseen ids: greedy / ours": lambda row: f"{row['greedy_next']:.2f} / {row['plan_next']:.2f}",
    "CPU time: greedy / ours": lambda row: f"{row['greedy_ms']:.0f} / {row['plan_ms']:.0f} ms",
}


def section():
    """The README's results, from ``bench/results``."""
    return f"{_transport()}\n\n{_transformers()}"


def _transport():
    rows = _read("transport")
    one = rows[0]
    return (
        f"Dispatch and combine between processes of one host: {one['tokens']} tokens a rank,\n"
        f"hidden {one['hidden']}, top-{one['top_k']} of {one['experts']} experts, on "
        f"{one['cores']} cores ({one['device']},\n"
        f"torch {one['torch']}, {one['date']}, revision {one['revision']}). Medians of "
        f"{one['samples']} samples of the slowest\nrank. The last column is a plain copy of the "
        "rows that each rank gets delivered, and its share of\nthe time of the windows.\n\n"
        + table(rows, TRANSPORT)
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


def _read(bench):
    path = ROOT / f"bench/results/{bench}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main():
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split("<!-- results: begin", 1)
    begin, rest = rest.split("-->", 1)
    _, tail = rest.split("<!-- results: end -->", 1)
    filled = f"{head}<!-- results: begin{begin}-->\n{section()}\n<!-- results: end -->{tail}"
    readme.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
