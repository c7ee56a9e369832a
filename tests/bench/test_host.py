"""``bench host``: nothing is launched, the path is that of devices, the scale is checked."""

from __future__ import annotations

import json

import pytest
import torch

from moe_triton import kernels
from moe_triton.bench import host, layer_cases, models
from moe_triton.cli import main

TINY = ["--hidden", "64", "--experts", "8", "--top-k", "2", "--samples", "3", "--rounds", "2"]


def test_ranks_and_causes(tmp_path, capsys):
    path = tmp_path / "host.jsonl"
    assert main(["bench", "host", *TINY, "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["ranks"] for row in rows] == [1, 8]
    assert all(row["round_us"] >= row["least_round_us"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "8 ranks: functions with the most time of their own" in printed
    assert printed.count(" | ") > 2 * 5, "five causes each"


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_launched_and_nothing_is_read(monkeypatch, ranks):
    """Outputs stay as they were, and shapes are those of a device."""
    shape = models.Shape("tiny", 64, 8, 2)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("the host read a tensor"))
    with host._without_launches(shape, 3, ranks, "int8") as (dispatch, combine):
        received = dispatch()
        assert [len(recv.x) for recv in received] == [ranks * 3 * 2] * ranks
        assert len(combine(received)) == ranks
        x = torch.full((2, 4), 7.0)
        kernels.zero_padding(x, torch.tensor([-1, 0]))
        assert (x == 7).all()


def test_the_scale_is_checked_before_it_is_timed(monkeypatch):
    options = ["bench", "host", "--scale", "--ranks", "2", "3", *TINY[6:]]
    assert main(options) == 0

    def wrong(*_):
        raise AssertionError("wrong sums")

    monkeypatch.setattr(layer_cases, "check_sums", wrong)
    with pytest.raises(AssertionError, match="wrong sums"):
        main(options)


def test_experts_divide_over_the_ranks():
    assert [host._divisible(768, ranks) for ranks in (8, 768, 5)] == [768, 768, 770]
