"""Parts of compare by hand: errors, rules, layouts, known splits, and msprobe's own columns."""

from __future__ import annotations

import csv
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from ascend_dumps import COMBINE, DATA, DISPATCH, Dump

from moe_triton import testing
from moe_triton.compare import compare, metrics
from moe_triton.compare.layouts import Batch, received, received_contiguous
from moe_triton.compare.metrics import errors
from moe_triton.compare.report import bin_names
from moe_triton.compare.rules import Kind, Verdict, judge
from moe_triton.compat import torch_npu
from moe_triton.topology import Topology

# metrics


def test_errors_by_hand():
    x, y = torch.tensor([1.0, 2.0, 0.0, 4.0]), torch.tensor([1.0, 2.002, 0.0, 4.0])
    e = errors(x, y)
    assert (e.elements, e.exact, e.nan_mismatches) == (4, 3, 0)
    assert e.max_abs == pytest.approx(0.002, rel=1e-4)
    assert e.max_relative == pytest.approx(0.002 / 2.002, rel=1e-4)
    assert (e.below_thousandth, e.below_five_thousandths) == (4, 4)
    assert e.mare == pytest.approx(0.002 / 2.002, rel=1e-4)
    assert e.mere == pytest.approx(0.002 / 2.002 / 4, rel=1e-4)
    dot = 1 + 2 * 2.002 + 16
    assert e.cosine == pytest.approx(dot / math.sqrt(21 * (17 + 2.002**2)), abs=1e-7)


def test_steps_of_formats():
    codes = errors(
        torch.tensor([1, -128, 127], dtype=torch.int8),
        torch.tensor([1, 127, 126], dtype=torch.int8),
    )
    assert (codes.max_step, codes.off_by_one, codes.exact) == (255, 1, 1)
    one = torch.tensor([1.0], dtype=torch.bfloat16)
    assert errors((one.view(torch.int16) + 3).view(torch.bfloat16), one).max_step == 3
    # Across zero: the smallest negative and the smallest positive number.
    tiny = torch.tensor([1, -(2**31) + 1], dtype=torch.int32).view(torch.float32)
    assert errors(tiny[:1], tiny[1:]).max_step == 2
    assert errors(torch.tensor([0.0]), torch.tensor([-0.0])).exact == 1
    eight = torch.tensor([0x38, 0xB9], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert errors(eight[:1], eight[:1]).exact == 1
    assert errors(eight[1:], eight[:1]).max_step == 0x38 + 0x39


def test_nan_and_infinity():
    nan, inf = math.nan, math.inf
    same = errors(torch.tensor([nan, inf, 2.0]), torch.tensor([nan, inf, 2.0]))
    assert (same.exact, same.nan_mismatches, same.cosine) == (3, 0, 1)
    other = errors(torch.tensor([nan, 1.0]), torch.tensor([0.0, 1.0]))
    assert (other.exact, other.nan_mismatches) == (1, 1)
    assert math.isnan(other.cosine)
    assert errors(torch.tensor([inf]), torch.tensor([-inf])).nan_mismatches == 1


def test_merging_is_measuring_together():
    x, y = torch.randn(64), torch.randn(64)
    whole = errors(x, y)
    parts = metrics.merged([errors(x[:20], y[:20]), errors(x[20:], y[20:])])
    for name in ("elements", "exact", "max_step", "histogram", "max_abs", "below_thousandth"):
        assert getattr(parts, name) == getattr(whole, name)
    assert parts.cosine == pytest.approx(whole.cosine)
    assert parts.mere == pytest.approx(whole.mere)
    assert len(bin_names()) == len(whole.histogram)
    assert metrics.merged([]).cosine == 1


@pytest.mark.parametrize(
    "kind, found, expected, verdict",
    [
        (Kind.EXACT, torch.tensor([1, 2]), torch.tensor([1, 2]), Verdict.IN_RULE),
        (Kind.EXACT, torch.tensor([1, 3]), torch.tensor([1, 2]), Verdict.OUT_OF_RULE),
        (Kind.VALUES, torch.tensor([1 + 2.0**-14]), torch.tensor([1.0]), Verdict.IN_RULE),
        (Kind.VALUES, torch.tensor([1 + 2.0**-12]), torch.tensor([1.0]), Verdict.OUT_OF_RULE),
        (Kind.VALUES, torch.tensor([math.nan]), torch.tensor([1.0]), Verdict.OUT_OF_RULE),
    ],
)
def test_rules(kind, found, expected, verdict):
    assert judge("cann", kind, found.dtype, errors(found, expected)).verdict is verdict


@pytest.mark.parametrize("wrong, verdict", [(1, Verdict.IN_RULE), (3, Verdict.OUT_OF_RULE)])
def test_codes_may_differ_by_one_on_less_than_a_thousandth(wrong, verdict):
    expected = torch.zeros(2000, dtype=torch.int8)
    found = expected.clone()
    found[:wrong] = 1
    assert judge("cann", Kind.CODES, torch.int8, errors(found, expected)).verdict is verdict
    found[0] = 2
    two = judge("cann", Kind.CODES, torch.int8, errors(found, expected))
    assert two.verdict is Verdict.OUT_OF_RULE


# layouts: the worked example of the operators' specification, 4 ranks, 2 of them shared

IDS = [[[0, 2], [1, 3]], [[0, 2], [3, 1]], [[0, 1], [2, 0]], [[3, 2], [2, 1]]]


def test_layout_is_that_of_dispatch():
    """Triples against those that dispatch_v2 returns, on all ranks."""
    topology = Topology(4, 4, 1, 2)
    batches = [Batch.of(torch.tensor(ids), None) for ids in IDS]

    def dispatch(ctx):
        ids = torch.tensor(IDS[ctx.rank], dtype=torch.int32)
        x = torch.ones(2, 8, dtype=torch.bfloat16)
        out = torch_npu.npu_moe_distribute_dispatch_v2(
            x, ids, ctx.ep_group, 4, ctx.rank, 4, shared_expert_rank_num=2
        )
        return out[2], int(out[4][-1])

    for rank, (words, n) in enumerate(testing.run_local(4, dispatch)):
        rows = received(topology, batches, rank)
        assert len(rows) == n
        assert rows.key().reshape(-1).tolist() == words[: 3 * n].tolist()


def test_the_contiguous_split_of_old_kernels():
    topology = Topology(4, 4, 1, 2)
    batches = [Batch.of(torch.tensor(ids), None) for ids in IDS]
    rows = [received_contiguous(topology, batches, rank) for rank in (0, 1)]
    pairs = [list(zip(r.source.tolist(), r.token.tolist(), strict=True)) for r in rows]
    assert pairs == [[(0, 0), (0, 1), (2, 0), (3, 0)], [(1, 0), (1, 1), (2, 1), (3, 1)]]


def contiguous_calls(folder):
    """Files of dispatch and combine v1 as a kernel with the contiguous split leaves them."""

    def layer(ctx):
        ids = torch.tensor(IDS[ctx.rank], dtype=torch.int32)
        x = torch.tensor([[10.0 * ctx.rank + t + 1, t + 1] * 4 for t in (0, 1)]).bfloat16()
        weights = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
        common = (ctx.ep_group, 4, ctx.rank, 4)
        shared = {"shared_expert_rank_num": 2}
        out = torch_npu.npu_moe_distribute_dispatch(x, ids, *common, **shared)
        y = torch.zeros_like(out[0])
        n = int(out[4][-1])
        y[:n] = out[0][:n] * (64 if ctx.rank < 2 else ctx.rank)
        result = torch_npu.npu_moe_distribute_combine(
            y, ids, out[2], out[4], weights, *common, **shared
        )
        return {"x": x, "ids": ids, "weights": weights, "out": out, "y": y, "result": result}

    ranks = testing.run_local(4, layer)
    # Rows of ranks 0 and 1: (own token, own token, token 0 or 1 of rank 2, of rank 3).
    regular = {0: [(0, 0), (0, 1), (2, 0), (2, 1)], 1: [(1, 0), (1, 1), (3, 0), (3, 1)]}
    split = {0: [(0, 0), (0, 1), (2, 0), (3, 0)], 1: [(1, 0), (1, 1), (2, 1), (3, 1)]}
    where = {key: (rank, row) for rank, keys in regular.items() for row, key in enumerate(keys)}
    for name in ("dispatch", "combine"):
        moved = {}
        for rank, keys in split.items():
            tensor = ranks[rank]["out"][0] if name == "dispatch" else ranks[rank]["y"]
            moved[rank] = tensor.clone()
            for row, key in enumerate(keys):
                holder, position = where[key]
                source = ranks[holder]["out"][0] if name == "dispatch" else ranks[holder]["y"]
                moved[rank][row] = source[position]
        for rank, tensor in moved.items():
            ranks[rank][f"{name}_rows"] = tensor
    for rank, r in enumerate(ranks):
        target = folder / str(rank)
        target.mkdir(parents=True)
        counts = torch.tensor([1, 2, 3, 4], dtype=torch.int32) if rank < 2 else r["out"][4]
        files = {name: r[name] for name in ("x", "ids", "weights", "result")}
        files |= {"counts": counts, "idx": r["out"][2], "nums": r["out"][3]}
        files["rows"] = r.get("dispatch_rows", r["out"][0])
        files["y"] = r.get("combine_rows", r["y"])
        for name, tensor in files.items():
            torch.save(tensor, target / f"{name}.pt")
    (folder / "calls.yaml").write_text("""
defaults: {ep_world_size: 4, moe_expert_num: 4, shared_expert_rank_num: 2}
calls:
  - op: npu_moe_distribute_dispatch
    ranks: 4
    inputs: {x: "{rank}/x.pt", expert_ids: "{rank}/ids.pt"}
    outputs:
      expand_x: "{rank}/rows.pt"
      expand_idx: "{rank}/idx.pt"
      expert_token_nums: "{rank}/nums.pt"
      ep_recv_counts: "{rank}/counts.pt"
  - op: npu_moe_distribute_combine
    ranks: 4
    inputs:
      expand_x: "{rank}/y.pt"
      expert_ids: "{rank}/ids.pt"
      expand_idx: "{rank}/idx.pt"
      ep_send_counts: "{rank}/counts.pt"
      expert_scales: "{rank}/weights.pt"
    outputs: {x: "{rank}/result.pt"}
""")


def test_the_contiguous_split_is_recognised(tmp_path):
    contiguous_calls(tmp_path)
    report = compare(tmp_path)
    assert (report.exit_code, report.problems) == (1, ())
    assert report.deviations == ["contiguous-shared-split"]
    verdicts = {(c.op, o.name): o.verdict for c in report.calls for o in c.outputs}
    dispatch = "npu_moe_distribute_dispatch"
    assert verdicts[dispatch, "expand_x"] is verdicts[dispatch, "ep_recv_counts"] is Verdict.KNOWN
    assert verdicts[dispatch, "expand_idx"] is Verdict.IN_RULE
    assert verdicts["npu_moe_distribute_combine", "x"] is Verdict.IN_RULE
    assert compare(tmp_path, accept=["contiguous-shared-split"]).exit_code == 0
    # A wrong row in it is still found.
    rows = torch.load(tmp_path / "1" / "rows.pt", weights_only=True)
    rows[1] += 1
    torch.save(rows, tmp_path / "1" / "rows.pt")
    wrong = compare(tmp_path, accept=["contiguous-shared-split"])
    assert wrong.exit_code == 1


# msprobe's own comparison

COLUMNS = {
    "Cosine": lambda e: e.cosine,
    "MaxAbsErr": lambda e: e.max_abs,
    "MaxRelativeErr": lambda e: e.max_relative,
    "One Thousandth Err Ratio": lambda e: e.share(e.below_thousandth),
    "Five Thousandths Err Ratio": lambda e: e.share(e.below_five_thousandths),
}


def disturbed(dump):
    """Differences of many sizes in the outputs of layer 1, and a tensor as long as what counts.

    msprobe compares whole tensors: what is undefined is cut off on both sides.
    """
    generator = torch.Generator().manual_seed(5)
    whole = Dump(dump.path.parent / "whole")
    for rank in range(4):
        n = int(whole.read(rank, DISPATCH, 1, "ep_recv_counts")[-1])
        for name in ("expand_x", "dynamic_scales"):
            value = whole.read(rank, DISPATCH, 1, name)[:n].clone()
            whole.write(value, rank, DISPATCH, 1, name)
            noise = torch.randn(value.shape, generator=generator)
            if name == "expand_x":
                value = (value + (noise > 1.5).to(torch.int8)).clamp(-127, 127)
            else:
                value = value * (1 + 0.003 * noise)
            dump.write(value.to(whole.read(rank, DISPATCH, 1, name).dtype), rank, DISPATCH, 1, name)
        out = dump.read(rank, COMBINE, 1, "x")
        noise = torch.randn(out.shape, generator=generator)
        dump.write((out.float() * (1 + 0.004 * noise)).bfloat16(), rank, COMBINE, 1, "x")

        def cut(calls, n=n):
            for entry in calls[f"NPU.{DISPATCH}.1.forward"]["output"][:2]:
                entry["shape"][0] = n

        whole.edit_json(rank, cut)
        dump.edit_json(rank, cut)
    return whole


def printed(path):
    """The columns of a result of `msprobe compare`, by call and number of the output."""
    rows = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            name = row["NPU Name"]
            if ".1.forward.output." in name and name.startswith("NPU."):
                rows[name] = {column: row[column] for column in COLUMNS}
    return rows


def check_columns(dump, results):
    """Compare the columns by rank with what msprobe printed; its ratios are rounded or cut."""
    report = compare(dump.path)
    checked = 0
    for call in report.calls:
        if ".1.forward" not in call.name:
            continue
        for number, output in enumerate(call.outputs):
            if output.verdict is Verdict.UNDEFINED:
                continue
            for rank in output.ranks:
                row = results[rank.rank].get(f"{call.name}.output.{number}")
                if row is None or number in (2, 4):  # with words beyond those that count
                    continue
                for column, of in COLUMNS.items():
                    if row[column] == "unsupported":
                        assert rank.errors.elements == 1
                        continue
                    value = float(row[column])
                    assert of(rank.errors) == pytest.approx(value, rel=1e-9, abs=1e-12) or (
                        column == "Cosine" and round(of(rank.errors), 6) == value
                    ), (call.name, number, rank.rank, column)
                    checked += 1
    return checked


def test_columns_are_those_that_msprobe_printed(tmp_path):
    """Printed by msprobe 26.2.0 for this very edit of the dump."""
    dump = Dump(tmp_path)
    disturbed(dump)
    results = [printed(DATA / "msprobe_compare" / f"rank{rank}.csv") for rank in range(4)]
    assert check_columns(dump, results) > 60


def msprobe():
    """The command, of an environment of its own."""
    default = Path(__file__).resolve().parents[2] / ".venv" / "msprobe"
    command = Path(os.environ.get("MOE_TRITON_MSPROBE", default)) / "bin" / "msprobe"
    if not command.is_file():
        pytest.skip("msprobe is not installed: see MOE_TRITON_MSPROBE in docs/environment.md")
    return command


def run_msprobe(command, dump, whole, folder):
    results = []
    for rank in range(4):
        out = folder / f"rank{rank}"
        mine, golden = (d.rank(rank) / "dump.json" for d in (dump, whole))
        subprocess.run(
            [command, "compare", "-tp", mine, "-gp", golden, "-o", out],
            check=True,
            capture_output=True,
        )
        (file,) = out.glob("*.csv")
        results.append(file)
    return results


@pytest.mark.full
def test_msprobe_itself(tmp_path):
    """Dumps two layers over 4 ranks, compares them here, and an edit of them with msprobe."""
    command = msprobe()
    script = Path(__file__).parent / "scripts" / "msprobe_layer.py"
    python = command.with_name("python")
    target = tmp_path / "made"
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [python, "-m", "moe_triton", "npu-run", script, target],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    report = compare(target / "dump")
    assert (report.exit_code, len(report.outputs)) == (0, 12)
    dump = Dump(tmp_path)
    whole = disturbed(dump)
    results = [printed(file) for file in run_msprobe(command, dump, whole, tmp_path / "out")]
    assert check_columns(dump, results) > 60
