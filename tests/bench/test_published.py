"""The published rows: the reader, workloads, and the command that prints them."""

from __future__ import annotations

import dataclasses

import pytest

from moe_triton.bench.published import WORKLOAD, PublishedRow, published, same_workload
from moe_triton.cli import main


def test_every_row_says_what_where_and_something_measured():
    names = {field.name for field in dataclasses.fields(PublishedRow)}
    assert {*WORKLOAD, "dispatch_us", "combine_gbs"} <= names
    for row in published():
        assert row.system and row.hardware and row.source, row
        assert row.mode in ("low_latency", "normal", "all_to_all", "one_device"), row
        measured = (row.dispatch_us, row.combine_us, row.dispatch_gbs, row.combine_gbs)
        assert any(measured) and all(value is None or value > 0 for value in measured), row
    assert len(set(published())) == len(published()), "a row stands there twice"


def test_bandwidth_and_time_of_a_row_agree():
    """128 tokens of 7168, top-8: bytes of all copies, over the time, are the bandwidth."""
    (row,) = (
        row
        for row in published()
        if row.source.endswith("legacy.md") and row.ranks == 8 and row.mode == "low_latency"
    )
    fp8 = 128 * 8 * (7168 + 7168 // 128 * 4)
    assert fp8 / row.dispatch_us / 1e3 == pytest.approx(row.dispatch_gbs, rel=0.02)
    assert 128 * 8 * 7168 * 2 / row.combine_us / 1e3 == pytest.approx(row.combine_gbs, rel=0.02)


def test_workloads_are_not_mixed():
    rows = same_workload(tokens=128, hidden=7168, top_k=8, experts=256, ranks=8)
    systems = {row.system for row in rows}
    assert {"DeepEP V1 low latency", "CANN EP", "FlashInfer", "mori low latency"} <= systems
    assert {(row.tokens, row.hidden, row.top_k, row.ranks) for row in rows} == {(128, 7168, 8, 8)}
    assert {row.experts for row in rows} == {256, None}
    assert "pplx-garden" not in systems, "its source does not say the hidden size"
    assert not same_workload(tokens=129, hidden=7168, top_k=8, experts=256, ranks=8)


def test_differences_and_unknowns_have_names():
    row = PublishedRow("a", "b", "c", "normal", tokens=128, hidden=7168, ranks=16)
    assert row.differences(tokens=128, hidden=4096, ranks=8, top_k=8) == (
        "hidden 7168, not 4096",
        "ranks 16, not 8",
    )
    assert row.differences(tokens=None) == ()
    assert row.unknown(tokens=128, top_k=8, experts=256) == ("top_k", "experts")


def test_the_command_prints_every_row(capsys):
    assert main(["bench", "--published"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(published()) + 2  # the two of a head
    assert any("128/7168/8/?" in line and "77 us, 98 GB/s" in line for line in lines)


def test_a_bench_is_required(capsys):
    with pytest.raises(SystemExit):
        main(["bench"])
    assert "a bench is required" in capsys.readouterr().err
