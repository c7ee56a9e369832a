"""Files of Ascend's profilers: parsed with their traps, and laid beside results of a workload."""

from __future__ import annotations

import json
import shutil

import pytest
from ascend_dumps import DATA

from moe_triton.bench.published import published
from moe_triton.cli import main
from moe_triton.compare.timing import compare_times

FILES = DATA / "timing"


def read(*names, **options):
    return compare_times([FILES / name for name in names], **options)


@pytest.mark.parametrize("name", ["kernel_details.csv", "op_summary_20260701120000.csv"])
def test_calls(name):
    """A tab behind the start time, Block Num and Block Dim, quoted shapes, N/A."""
    report = read(name)
    assert report.problems == ()
    dispatch = report.measured[0]
    assert (dispatch.phase, dispatch.type) == ("dispatch", "MoeDistributeDispatchV2")
    assert (dispatch.tokens, dispatch.hidden, dispatch.top_k) == (64, 7168, 8)
    assert dispatch.format == "int8"
    assert dispatch.fastest == dispatch.slowest == 132.4
    if name == "kernel_details.csv":
        combine = report.measured[1]
        assert (combine.phase, combine.tokens, combine.format) == ("combine", 64, "bf16")
        assert combine.fastest == 126.1
    # 64 tokens x 8 copies x (7168 codes + a scale).
    assert dispatch.gb_s() == pytest.approx(64 * 8 * 7172 / 132.4 / 1000)


def test_a_summary():
    report = read("op_statistic.csv")
    assert [(m.phase, m.calls, m.summary) for m in report.measured] == [
        ("dispatch", 58, True),
        ("combine", 58, True),
    ]
    assert (report.measured[0].lowest, report.measured[0].fastest) == (118.3, 132.4)
    assert report.measured[0].highest == 171.9
    assert report.workloads == {}, "no shapes"


def test_collectives_are_no_dispatch():
    report = read("communication.json")
    assert report.exit_code == 2
    texts = [text for _, text in report.problems]
    assert "1 hcom operation of 0.420 ms are no dispatch or combine" in texts
    assert any("communicate inside their kernel" in text for text in texts)


def test_a_dispatch_among_the_collectives(tmp_path):
    value = json.loads((FILES / "communication.json").read_text())
    entry = {"Communication Time Info": {"Start Timestamp(us)": 1.5, "Elapse Time(ms)": 0.13}}
    value["step5"]["collective"]["MoeDistributeDispatchV2__123_0_1@4"] = entry
    file = tmp_path / "communication.json"
    file.write_text(json.dumps(value))
    (measured,) = compare_times([file]).measured
    assert (measured.type, measured.fastest) == ("MoeDistributeDispatchV2", 130.0)


def test_a_trace():
    (measured,) = read("trace_view.json").measured
    assert (measured.phase, measured.fastest, measured.tokens) == ("dispatch", 132.4, None)


def test_all_files_of_a_run_count_once():
    report = read(
        "kernel_details.csv",
        "op_summary_20260701120000.csv",
        "op_statistic.csv",
        "trace_view.json",
    )
    assert [(m.phase, m.calls) for m in report.measured] == [("dispatch", 1), ("combine", 1)]


HEADER = (
    "Device_id,Name,Type,Accelerator Core,Start Time(us),Duration(us),Wait Time(us),Block Dim,"
    "Input Shapes,Input Data Types,Input Formats,Output Shapes,Output Data Types,Output Formats"
)
V3 = "MoeDistributeDispatchV3"


def row(start, duration, kind=V3, shapes="4100;1,4096;1,6", types="INT32;DT_BF16;INT32"):
    return (
        f'0,node_1,{kind},AI_VECTOR_CORE,{start}\t,{duration},N/A,24,"""{shapes}""",{types},'
        'ND;ND;ND,"""6,4096;6""",INT8;FLOAT,ND;ND'
    )


def test_v3_has_a_context_and_the_last_row_may_be_cut_off(tmp_path):
    # Start times with more digits than a float has; the second row starts first.
    rows = [
        row("1790795144682503.333", "50.0"),
        row("1790795144682503.331", "43.03"),
        row("1790795144682504.5", "N/A"),
        "0,other,MatMulV2" + 11 * ",",
        row("1790795144682505.5", "41.0")[:40],
    ]
    file = tmp_path / "kernel_details.csv"
    file.write_bytes("\r\n".join([HEADER, *rows]).encode("utf-8-sig"))
    report = compare_times([file], ranks=8)
    (measured,) = report.measured
    assert (measured.tokens, measured.hidden, measured.top_k) == (1, 4096, 6)
    assert (measured.type, measured.calls, measured.format) == (V3, 2, "int8")
    assert (measured.lowest, measured.highest) == (43.03, 50.0)
    texts = [text for _, text in report.problems]
    assert "1 row was cut off or too long, and left out" in texts
    assert any("a duration must be a number, got 'N/A'" in text for text in texts)


def test_inputs_without_elements_are_empty(tmp_path):
    file = tmp_path / "kernel_details.csv"
    text = row(
        "1.5", "10", "MoeDistributeDispatchV2", "64,7168;64,8;;;64,8", "DT_BF16;INT32;;;FLOAT"
    )
    file.write_text(f"{HEADER}\n{text}\n")
    (measured,) = compare_times([file]).measured
    assert (measured.tokens, measured.hidden, measured.top_k) == (64, 7168, 8)


def test_ranks_wait_for_one_another(tmp_path):
    """Rank 0 is late in the first call, rank 1 in the second: each waits for the other."""
    for rank, times in enumerate([(100, 190, 110), (160, 105, 112)]):
        folder = tmp_path / f"worker{rank}_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
        folder.mkdir(parents=True)
        (folder.parent / f"profiler_info_{rank}.json").write_text("{}")
        rows = [row(i, t) for i, t in enumerate(times)]
        (folder / "kernel_details.csv").write_text("\n".join([HEADER, *rows, ""]))
    report = compare_times([tmp_path])
    (measured,) = report.measured
    assert dict(measured.by_rank) == {"rank 0": 110, "rank 1": 112}
    assert (measured.fastest, measured.slowest) == (105, 160)


def test_published_rows_of_the_workload_stand_beside(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    text = (FILES / "kernel_details.csv").read_text().replace("64,7168", "128,7168")
    (folder / "kernel_details.csv").write_text(text.replace("64,8", "128,8"))
    report = compare_times([folder], ranks=8, experts=256)
    (rows,) = report.workloads.values()
    same = [row for row in rows if not row.differs]
    cann = next(r for r in published() if r.system.startswith("CANN EP") and r.ranks == 8)
    mine = next(row for row in same if row.system == cann.system)
    assert (mine.dispatch_us, mine.combine_us) == (cann.dispatch_us, cann.combine_us)
    for other in rows[len(same) :]:
        assert other.differs
        assert all(" not " in text for text in other.differs)
    # Without the ranks no row is silently of the same workload.
    (rows,) = compare_times([folder]).workloads.values()
    assert all("ranks" in row.unknown for row in rows)


def test_own_benches_stand_beside(tmp_path):
    case = {"tokens": 64, "hidden": 7168, "top_k": 8, "experts": 256, "ranks": 4, "quant": "int8"}
    case |= {"dispatch_us": 900.5, "combine_us": 800.25, "device": "a CPU", "backend": "cpu"}
    file = tmp_path / "layer.jsonl"
    file.write_text(json.dumps(case) + "\n" + json.dumps({"bench": "load"}) + "\n")
    report = read("kernel_details.csv", ranks=8, experts=256, bench=[file])
    (rows,) = report.workloads.values()
    assert rows[0].system == "moe_triton bench"
    assert (rows[0].dispatch_us, rows[0].differs) == (900.5, ("ranks 4, not 8",))


def test_the_dump_of_the_run_says_ranks_and_experts(capsys):
    arguments = ["compare", str(DATA / "msprobe_dump"), "--timing", str(FILES), "--json"]
    assert main(arguments) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["timing"]["ranks"], value["timing"]["experts"]) == (1, 8)
    assert value["compared"] == 6


def test_the_command(capsys, tmp_path):
    page = tmp_path / "times.html"
    names = [str(FILES / "kernel_details.csv"), str(FILES / "communication.json")]
    arguments = ["compare", "--timing", *names, "--ranks", "8", "--experts", "256"]
    assert main([*arguments, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "DispatchV2" in out
    assert "132.4" in out
    assert "tokens 128, not 64" in out
    text = page.read_text()
    assert "data:image/svg+xml" in text
    assert "http" not in text.replace("http://www.w3.org", "").replace("https://matplotlib", "")
    assert main(["compare", "--timing", str(FILES / "communication.json")]) == 2
    assert "NOTHING COMPARED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, words",
    [
        pytest.param("kernel_details.csv", b"", "an empty file", id="empty"),
        pytest.param("kernel_details.csv", b"a,b\n1,2\n", "the columns a, b", id="columns"),
        pytest.param("op_summary_1.csv", b"\xff\xfe\x00x", "not UTF-8", id="bytes"),
        pytest.param("kernel_details.csv", b"x," * 10**6, "1000001 columns", id="million-columns"),
        pytest.param(
            "kernel_details.csv",
            b'Type,Duration(us)\n"' + b"x" * 300_000,
            "field larger",
            id="field",
        ),
        pytest.param("communication.json", b"{", "Expecting", id="json"),
        pytest.param("communication.json", b"[" * 200_000, "nesting", id="deep-json"),
        pytest.param("communication.json", b'{"a": 1}', "keys ['a']", id="other-json"),
        pytest.param("communication.json", b"1" * 10_000, "be a JSON file", id="huge-number"),
    ],
)
def test_a_broken_file(tmp_path, capsys, name, content, words):
    file = tmp_path / name
    file.write_bytes(content)
    report = compare_times([file])
    assert report.exit_code == 2
    ((place, problem),) = report.problems
    assert place == name
    assert problem.startswith(f"compare: {file} must ")
    assert ", got " in problem
    assert words in problem
    assert main(["compare", "--timing", str(file)]) == 2
    assert capsys.readouterr().err == ""


def test_a_folder_without_files(tmp_path):
    ((_, problem),) = compare_times([tmp_path]).problems
    assert "kernel_details*.csv" in problem
    shutil.copy(FILES / "op_statistic.csv", tmp_path / "op_statistic_3.csv")
    assert len(compare_times([tmp_path]).measured) == 2
