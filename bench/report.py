"""Write the committed results into README.md and docs/results.md."""

import functools
import json
from pathlib import Path

from moe_triton.bench.tables import (
    LOAD,
    OVERLAP,
    TRANSFORMERS,
    TRANSPORT,
    TRANSPORT_COPIES,
    VLLM,
    kernels,
    present,
    table,
)

ROOT = Path(__file__).resolve().parents[1]


def sections():
    """The section of each page, from ``bench/results``."""
    results = [_copies(), *_kernels(), *_overlap(), _transformers(), *_vllm(), _load()]
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
        "times faster than by hand.\n\n" + table(rows, present(rows, TRANSPORT)) + "\n\n"
        "In the column `shm` the experts write to `output_rows`; in the next one combine copies "
        "their rows. The\nlast column is a plain copy of the rows that each rank gets delivered, "
        "and its share of the time of `shm`.\n\n" + table(rows, present(rows, TRANSPORT_COPIES))
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


def _vllm():
    """A paragraph and a table, if results exist."""
    if not (ROOT / "bench/results/vllm.jsonl").exists():
        return
    rows = _read("vllm")
    row = rows[0]
    # Several processes get more of a busy machine than one.
    busy = row["load"] > row["cores"]
    caution = (
        "\nThe machine had other work: rates of different numbers of ranks do not compare."
        if busy
        else ""
    )
    yield (
        f"vLLM {row['vllm']} on CPUs, serving a random Qwen3-MoE: {row['num_hidden_layers']} "
        f"layers, hidden {row['hidden_size']}, top-{row['num_experts_per_tok']} of "
        f"{row['num_experts']}\nexperts of {row['moe_intermediate_size']}, fp32, "
        f"{row['sequences']} sequences a rank, on {row['cores']} cores ({row['device']}, torch "
        f"{row['torch']},\n{row['date']}, revision {row['revision']}; load average before the "
        f"run {row['load']:.1f}). Tokens of all ranks per second of\nthe slowest, medians of "
        f"{row['samples']} samples: prompts of 96 tokens, or 32 new ones. One rank is stock vLLM, "
        "which has no\nexchange for more on CPUs and stops. The shares are of the MoE layers in "
        "the time, and of dispatch and\ncombine in theirs, waiting for slower ranks included."
        f"{caution}\n\n" + table(rows, VLLM)
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
