"""Plot the load of each rank without and with a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UnavailableError
from .replica_plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_load(plan: Plan) -> Figure:
    """Draw the load of each rank over the mean, without replicas and with the plan's table.

    Args:
        plan: of one layer, or of several, one row of bars each.

    Returns:
        A figure without a window; ``figure.savefig(path)`` writes it.

    Raises:
        UnavailableError: matplotlib is not installed (extra ``plot``).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        problem = f"needs matplotlib: pip install 'moe_triton[plot]' ({error})"
        raise UnavailableError("eplb.plot_load", problem) from error
    before, after = plan.load_before, plan.load_after
    worst = plan.balance_before, plan.balance_after
    if before.dim() == 1:
        before, after = before[None], after[None]
        worst = worst[0][None], worst[1][None]
    figure = Figure(figsize=(8, 0.6 + 2.4 * len(before)), layout="constrained")
    rows = figure.subplots(len(before), squeeze=False)[:, 0]
    ranks = range(plan.num_ranks)
    for layer, axes in enumerate(rows):
        mean = float(before[layer].mean()) or 1.0
        for load, balance, label, colour in (
            (before, worst[0], "no replicas", "0.75"),
            (after, worst[1], "plan", "tab:blue"),
        ):
            heights = (load[layer] / mean).tolist()
            axes.bar(ranks, heights, 0.8, color=colour, label=f"{label}: {balance[layer]:.2f}")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel("load / mean" if len(before) == 1 else f"layer {layer}")
        axes.legend(title="max / mean", frameon=False)
    rows[-1].set_xlabel("rank")
    return figure
