"""The figure shows the numbers of the plan."""

from __future__ import annotations

import sys

import pytest
import torch

from moe_triton import UnavailableError, eplb


def bars(axes):
    return [[bar.get_height() for bar in group] for group in axes.containers]


def test_one_layer(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plan = eplb.plan(torch.tensor([8, 4, 2, 2]), num_ranks=2, num_slots=6)
    figure = eplb.plot_load(plan)
    (axes,) = figure.axes
    assert bars(axes) == [[1.5, 0.5], [1, 1]]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["no replicas: 1.50", "plan: 1.00"]
    figure.savefig(tmp_path / "load.svg")
    assert "<svg" in (tmp_path / "load.svg").read_text(encoding="utf-8")


def test_layers_with_and_without_load():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plan = eplb.plan(torch.tensor([[3, 1], [0, 0]]), num_ranks=2, num_slots=2)
    first, second = eplb.plot_load(plan).axes
    assert bars(first) == [[1.5, 0.5], [1.5, 0.5]]
    assert bars(second) == [[0, 0], [0, 0]]


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plan = eplb.plan(torch.ones(2), num_ranks=2, num_slots=2)
    with pytest.raises(UnavailableError, match=r"eplb.plot_load: needs matplotlib: pip install"):
        eplb.plot_load(plan)
