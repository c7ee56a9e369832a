"""Plot results of bench_kernels: share of a copy's rate over tokens, one panel per kernel.

    python -m moe_triton.bench.kernel_plot bench/results/<gpu>/kernels.jsonl [kernels.png]

Needs matplotlib (extra ``bench``).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

COLUMNS = 5
TICKS = (1, 16, 256, 4096)


def plot(rows, path):
    """Write the figure of our kernels; the suffix of ``path`` is the format."""
    from matplotlib.figure import Figure

    ours = [row for row in rows if row["implementation"] == "moe_triton"]
    kernels = list(dict.fromkeys(map(panel, ours)))
    models = list(dict.fromkeys(row["model"] for row in ours))
    columns = min(COLUMNS, len(kernels))
    lines = math.ceil(len(kernels) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for panel_id, kernel in enumerate(kernels):
        axis = axes[panel_id // columns][panel_id % columns]
        for model in models:
            of_model = sorted(
                (row["tokens"], row["share_of_copy"])
                for row in ours
                if (panel(row), row["model"]) == (kernel, model)
            )
            # An empty line keeps a model without results in the legend.
            axis.plot(*(zip(*of_model, strict=True) if of_model else ([], [])), ".-", label=model)
        axis.set_title(kernel, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xticks(TICKS, map(str, TICKS))
        axis.tick_params(labelbottom=True)
        axis.set_ylim(bottom=0)
        axis.axhline(1, color="grey", linewidth=0.5)
    for panel_id in range(len(kernels), lines * columns):
        axes[panel_id // columns][panel_id % columns].set_axis_off()
    figure.supxlabel("tokens")
    figure.supylabel("share of the rate of a copy")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower right", fontsize=8)
    figure.suptitle(ours[0]["device"], fontsize=10)
    figure.savefig(path)


def panel(row):
    """The title of a row's panel."""
    return row["kernel"] + (f", {row['world_size']} ranks" if row["world_size"] > 1 else "")


def main():
    source = Path(sys.argv[1])
    target = sys.argv[2] if len(sys.argv) > 2 else source.with_suffix(".png")
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    if not any("share_of_copy" in row for row in rows):
        sys.exit(f"{source} has no times to plot")
    try:
        plot(rows, target)
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: plots need pip install 'moe_triton[bench]'")


if __name__ == "__main__":
    main()
