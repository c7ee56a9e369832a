"""Markdown tables of results: the columns of each bench."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Any], object]]


def table(rows: Iterable[Any], columns: Columns) -> str:
    """A Markdown table; ``columns`` maps headings to functions of a row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(cell(row)) for cell in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


# Results recorded before a column existed go without it.
TRANSPORT: Columns = {
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


TRANSPORT_COPIES: Columns = {
    "ranks": lambda row: row["world_size"],
    "tokens, hidden": lambda row: f"{row['tokens']}, {row['hidden']}",
    "rows": lambda row: row["payload"],
    "`shm`": lambda row: f"{row['shm_ms']:.1f} ms",
    "`shm`, experts' rows copied": lambda row: f"{row['copied_ms']:.1f} ms",
    "copy of the rows": lambda row: f"{row['copy_ms']:.1f} ms ({row['share_of_copy']:.0%})",
}


def present(rows: Sequence[Row], columns: Columns) -> Columns:
    """The columns that the rows have values for; sizes only where they differ."""
    shown = {name: cell for name, cell in columns.items() if _has(rows[0], cell)}
    if len({shown["tokens, hidden"](row) for row in rows}) == 1:
        del shown["tokens, hidden"]
    return shown


def _has(row: Row, cell: Callable[[Row], object]) -> bool:
    try:
        cell(row)
    except KeyError:
        return False
    return True


VLLM: Columns = {
    "ranks": lambda row: row["world_size"],
    "batch": lambda row: row["batch"],
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
    "MoE layers": lambda row: f"{row['layers_share']:.0%}",
    "dispatch and combine, of the layers": lambda row: f"{row['exchange_share']:.0%}",
}


TRANSFORMERS: Columns = {
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


OVERLAP: Columns = {
    "ranks": lambda row: row["world_size"],
    "operation": lambda row: row["operation"],
    "one rank is late by": lambda row: f"{row['late_ms']:g} ms",
    "own compute": lambda row: f"{row['compute_ms']:.1f} ms",
    "in sequence": lambda row: f"{row['sequence_ms']:.1f} ms",
    "compute in between": lambda row: f"{row['overlap_ms']:.1f} ms",
    "saved": lambda row: f"{row['saved_ms']:.1f} ms",
    "until the setups are back": lambda row: f"{row['setup_ms']:.1f} ms",
}


LOAD: Columns = {
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


# Implementations to compare with, and the numbers of tokens that a table shows.
PEERS = ("pytorch", "torch.compile", "transformer_engine", "triton_kernels")
KERNEL_TOKENS = (128, 4096)


def kernels(rows: Sequence[Row]) -> str:
    """Tables of bench_kernels: one column per model, then one per peer."""
    chosen = [row for row in rows if row["tokens"] in KERNEL_TOKENS] or rows
    models = list(dict.fromkeys(row["model"] for row in chosen))
    results: dict[Any, dict[str, Row]] = {}
    ours: dict[Any, None] = {}
    for row in chosen:
        line = tuple(row[name] for name in ("kernel", "world_size", "tokens"))
        results.setdefault((line, row["model"]), {})[row["implementation"]] = row
        ours[line] = None
    columns: Columns = {
        "kernel": lambda line: line[0],
        "ranks": lambda line: line[1],
        "tokens": lambda line: line[2],
    }

    def cell(line: Any, model: str, name: str, share: bool) -> str:
        row = results.get((line, model), {}).get(name)
        if row is None:
            return ""
        text = f"{row.get('graph_us', row['eager_us']):.1f}"
        text += "" if "graph_us" in row else " (eager)"
        return f"{text}, {row['share_of_copy']:.0%}" if share else text

    def models_cell(model: str) -> Callable[[Any], str]:
        return lambda line: cell(line, model, "moe_triton", True)

    tables = table(ours, {**columns, **{model: models_cell(model) for model in models}})
    beside = [line for line in ours if len(results.get((line, models[0]), ())) > 1]
    if not beside:
        return tables
    # Peers are timed on the first model only.
    names = {"ours": "moe_triton"} | {name: name for name in PEERS}

    def peer_cell(name: str) -> Callable[[Any], str]:
        return lambda line: cell(line, models[0], name, False)

    others = table(beside, {**columns, **{head: peer_cell(name) for head, name in names.items()}})
    return f"{tables}\n\nThe same beside others, {models[0]}:\n\n{others}"
