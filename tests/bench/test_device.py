"""``bench device`` on the CPU: its parts pass, and fail where sums are wrong."""

from __future__ import annotations

import pytest

from moe_triton.bench import device, layer_cases
from moe_triton.cli import main

CPU = ["--device", "cpu", "--rounds", "3"]


@pytest.mark.parametrize("part", ["rounds", "faults", "graphs", "streams"])
def test_parts(part, capsys):
    assert main(["bench", "device", part, *CPU]) == 0
    assert f"passed  {part} in " in capsys.readouterr().out


def test_the_peers_of_a_killed_rank_must_name_it(monkeypatch, capsys):
    monkeypatch.setattr(device, "_until_killed", _names_nobody)
    assert main(["bench", "device", "faults", *CPU]) == 1
    assert "rank 1 was killed, and its peers name [(), ()]" in capsys.readouterr().out


def _names_nobody(ctx, options, timeout):
    ctx.store.set(f"running {ctx.rank}", "1")
    return () if ctx.rank != 1 else ctx.store.wait(["never"])


def test_wrong_sums_fail(monkeypatch, capsys):
    def wrong(*_):
        raise AssertionError("wrong sums")

    monkeypatch.setattr(layer_cases, "check_sums", wrong)
    assert main(["bench", "device", "streams", *CPU]) == 1
    assert "FAILED  streams: AssertionError: wrong sums" in capsys.readouterr().out


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "device", "dance"])
    assert "PART must be in " in capsys.readouterr().err
