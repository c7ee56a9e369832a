"""The plot of ``bench kernels``: share of a copy's rate over tokens, one panel per kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .tables import Row

COLUMNS = 5
TICKS = (1, 16, 256, 4096)


def plot(rows: Sequence[Row], path: Path) -> None:
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


def panel(row: Row) -> str:
    """The title of a row's panel."""
    return row["kernel"] + (f", {row['world_size']} ranks" if row["world_size"] > 1 else "")
