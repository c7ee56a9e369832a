"""A dump of msprobe is in rule, and each planted deviation is found where it is."""

from __future__ import annotations

import json

import pytest
import torch
from ascend_dumps import COMBINE, DATA, DISPATCH, Dump

from moe_triton.compare import Verdict, compare
from moe_triton.compare.deviations import INVERSE, PREFIX_SUMS
from moe_triton.errors import ArgumentValueError


@pytest.fixture
def dump(tmp_path):
    return Dump(tmp_path)


def outputs(report):
    return {
        (call.op, index, output.name): output
        for op in {call.op for call in report.calls}
        for index, call in enumerate(c for c in report.calls if c.op == op)
        for output in call.outputs
    }


def test_a_dump_of_msprobe_is_in_rule(dump):
    report = compare(dump.path)
    assert (report.exit_code, report.problems) == (0, ())
    assert [call.problem for call in report.calls] == [""] * 4
    assert {output.verdict for output in report.outputs} == {Verdict.IN_RULE}
    assert len(report.outputs) == 12
    for output in report.outputs:
        assert output.errors.exact == output.errors.elements > 0
        assert [rank.rank for rank in output.ranks] == [0, 1, 2, 3]
    # 2 layers x (4 ranks x 1 shared row a token + routed rows of the masks).
    received = [
        sum(int(dump.read(rank, DISPATCH, layer, "ep_recv_counts")[-1]) for rank in range(4))
        for layer in (0, 1)
    ]
    actual = outputs(report)
    for layer, rows in enumerate(received):
        assert actual[DISPATCH, layer, "expand_x"].errors.elements == rows * 64
        assert actual[DISPATCH, layer, "assist_info_for_combine"].errors.elements == rows * 3
    for name in ("tp_recv_counts", "expand_scales"):
        assert actual[DISPATCH, 0, name].verdict is Verdict.UNDEFINED


def test_the_example_of_one_rank():
    report = compare(DATA / "msprobe_dump")
    assert report.exit_code == 0
    assert [call.op for call in report.calls] == [DISPATCH, COMBINE]


@pytest.mark.parametrize("path", ["step0", "step0/rank0/dump.json"])
def test_a_part_of_a_dump_can_be_given(dump, path):
    report = compare(dump.path / path)
    if path == "step0":
        assert report.exit_code == 0
    else:  # one of four ranks
        assert report.exit_code == 2
        assert len(report.problems) == 4


def swap_rows(dump):
    rows = dump.read(2, DISPATCH, 0, "expand_x")
    rows[[3, 5]] = rows[[5, 3]]
    dump.write(rows, 2, DISPATCH, 0, "expand_x")


def one_scale_inverted(dump):
    scales = dump.read(3, DISPATCH, 1, "dynamic_scales")
    scales[2] = 1 / scales[2]
    dump.write(scales, 3, DISPATCH, 1, "dynamic_scales")


def all_scales_inverted(dump):
    for rank in range(4):
        scales = dump.read(rank, DISPATCH, 1, "dynamic_scales")
        dump.write(1 / scales, rank, DISPATCH, 1, "dynamic_scales")


def code_off_by_one(dump):
    rows = dump.read(0, DISPATCH, 0, "expand_x")
    rows[1, 7] += 1 if rows[1, 7] < 127 else -1
    dump.write(rows, 0, DISPATCH, 0, "expand_x")


def code_off_by_two(dump):
    rows = dump.read(1, DISPATCH, 1, "expand_x")
    rows[0, 63] += 2 if rows[0, 63] < 100 else -2
    dump.write(rows, 1, DISPATCH, 1, "expand_x")


def count_too_large(dump):
    counts = dump.read(3, DISPATCH, 0, "ep_recv_counts")
    counts[5] += 1
    dump.write(counts, 3, DISPATCH, 0, "ep_recv_counts")


def counts_instead_of_prefix_sums(dump):
    for rank in range(4):
        counts = dump.read(rank, DISPATCH, 0, "ep_recv_counts")
        counts = counts.diff(prepend=counts.new_zeros(1))
        dump.write(counts, rank, DISPATCH, 0, "ep_recv_counts")


def token_nums_wrong(dump):
    counts = dump.read(2, DISPATCH, 1, "expert_token_nums")
    counts[3] -= 1
    dump.write(counts, 2, DISPATCH, 1, "expert_token_nums")


def assist_slot_wrong(dump):
    words = dump.read(1, DISPATCH, 0, "assist_info_for_combine")
    words[3 * 4 + 1] += 1
    dump.write(words, 1, DISPATCH, 0, "assist_info_for_combine")


def row_lost(dump):
    rows = dump.read(3, DISPATCH, 0, "expand_x")
    rows[6] = 0
    dump.write(rows, 3, DISPATCH, 0, "expand_x")


def row_twice(dump):
    rows = dump.read(2, DISPATCH, 1, "expand_x")
    rows[4] = rows[5]
    dump.write(rows, 2, DISPATCH, 1, "expand_x")


def expert_sums(dump, rank, token, weights, skip=()):
    """The sum of a token of layer 1, from the rows that the ranks gave to combine."""
    total = torch.zeros(64)
    for holder in range(4):
        rows = dump.read(holder, COMBINE, 1, 0)
        words = dump.read(holder, COMBINE, 1, 2)
        for row in range(int(dump.read(holder, COMBINE, 1, 3)[-1])):
            source, index, slot = words[3 * row : 3 * row + 3].tolist()
            if (source, index) == (rank, token) and slot not in skip:
                total += (weights[slot] if slot < 3 else 1.0) * rows[row].float()
    return total.bfloat16()


def weight_order(dump):
    weights = dump.read(1, COMBINE, 1, 4)[:, [1, 0, 2]]
    sums = [expert_sums(dump, 1, token, weights[token]) for token in range(6)]
    dump.write(torch.stack(sums), 1, COMBINE, 1, "x")


def shared_expert_missing(dump):
    out = dump.read(3, COMBINE, 1, "x")
    out[1] = expert_sums(dump, 3, 1, dump.read(3, COMBINE, 1, 4)[1], skip=[3])
    dump.write(out, 3, COMBINE, 1, "x")


def slot_missing(dump):
    out = dump.read(0, COMBINE, 1, "x")
    out[2] = expert_sums(dump, 0, 2, dump.read(0, COMBINE, 1, 4)[2], skip=[1])
    dump.write(out, 0, COMBINE, 1, "x")


def nan(dump):
    out = dump.read(2, COMBINE, 0, "x")
    out[1, 9] = float("nan")
    dump.write(out, 2, COMBINE, 0, "x")


def infinity(dump):
    out = dump.read(0, COMBINE, 0, "x")
    out[3, 0] = float("inf")
    dump.write(out, 0, COMBINE, 0, "x")


def sum_off(dump):
    out = dump.read(1, COMBINE, 0, "x")
    out[0, 5] *= 1.25
    dump.write(out, 1, COMBINE, 0, "x")


def sum_one_ulp_off(dump):
    out = dump.read(1, COMBINE, 0, "x")
    out.view(torch.int16)[0, 5] += 1
    dump.write(out, 1, COMBINE, 0, "x")


def truncated(dump):
    file = dump.file(2, DISPATCH, 0, "expand_x")
    file.write_bytes(file.read_bytes()[:900])


def input_truncated(dump):
    file = dump.file(2, DISPATCH, 0, 0)
    file.write_bytes(file.read_bytes()[:900])


def file_missing(dump):
    dump.file(1, DISPATCH, 1, "ep_recv_counts").unlink()


def rank_missing(dump):
    for file in dump.rank(3).rglob("*"):
        if file.is_file():
            file.unlink()


def call_missing(dump):
    dump.edit_json(2, lambda calls: calls.pop(f"NPU.{COMBINE}.1.forward"))


def same_rank_twice(dump):
    def change(calls):
        calls[f"NPU.{DISPATCH}.0.forward"]["input_kwargs"]["ep_rank_id"]["value"] = 1

    dump.edit_json(0, change)


def described(dump, rank, layer, name, value):
    """Write a tensor and describe it as it is, as msprobe would."""
    from ascend_dumps import OUTPUTS

    dump.write(value, rank, DISPATCH, layer, name)

    def change(calls):
        entry = calls[f"NPU.{DISPATCH}.{layer}.forward"]["output"][OUTPUTS[name]]
        entry |= {"dtype": str(value.dtype), "shape": [*value.shape]}

    dump.edit_json(rank, change)


def other_dtype(dump):
    described(dump, 1, 0, "expand_x", dump.read(1, DISPATCH, 0, "expand_x").short())


def other_shape(dump):
    described(dump, 3, 1, "expand_x", dump.read(3, DISPATCH, 1, "expand_x")[:2])


def statistics_only(dump):
    def change(calls):
        for name, call in calls.items():
            if name.startswith("NPU."):
                for entry in [*call["input_args"], *call["output"]]:
                    entry.pop("data_name", None)

    for rank in range(4):
        dump.edit_json(rank, change)


def output_is_none(dump):
    def change(calls):
        calls[f"NPU.{DISPATCH}.1.forward"]["output"][4] = None

    dump.edit_json(2, change)


# plan -> (edit, operator, layer, output or None for the call, words that must be in the report).
PLANTED = {
    "swapped rows": (
        swap_rows,
        (DISPATCH, 0, "expand_x"),
        ["rank 2, row 3 (token", "exchanged with row 5 (token", "2 rows differ"],
    ),
    "one scale inverted": (
        one_scale_inverted,
        (DISPATCH, 1, "dynamic_scales"),
        ["rank 3, row 2 (token", "expected", "found"],
    ),
    "code off by two": (
        code_off_by_two,
        (DISPATCH, 1, "expand_x"),
        ["rank 1, row 0 (token", "column 63", "1 of 64 elements", "shared expert 0"],
    ),
    "count": (
        count_too_large,
        (DISPATCH, 0, "ep_recv_counts"),
        ["rank 3, element 5 (expert 5, source rank 1): expected"],
    ),
    "expert_token_nums": (
        token_nums_wrong,
        (DISPATCH, 1, "expert_token_nums"),
        ["rank 2, element 3 (expert 3): expected"],
    ),
    "assist info": (
        assist_slot_wrong,
        (DISPATCH, 0, "assist_info_for_combine"),
        ["rank 1, words 12 to 14 of row 4 (token", "column 1: expected"],
    ),
    "row lost": (
        row_lost,
        (DISPATCH, 0, "expand_x"),
        ["rank 3, row 6 (token", "the row is zeros"],
    ),
    "row twice": (
        row_twice,
        (DISPATCH, 1, "expand_x"),
        ["rank 2, row 4 (token", "it holds what belongs into row 5 (token"],
    ),
    "weight order": (
        weight_order,
        (COMBINE, 1, "x"),
        ["rank 1, token 0 (experts", "with the weights of slots 0 and 1 exchanged"],
    ),
    "shared expert": (
        shared_expert_missing,
        (COMBINE, 1, "x"),
        ["rank 3, token 1 (experts", "without the row of shared expert 0"],
    ),
    "slot": (
        slot_missing,
        (COMBINE, 1, "x"),
        ["rank 0, token 2 (experts", "without the row of slot 1"],
    ),
    "NaN": (nan, (COMBINE, 0, "x"), ["rank 2, token 1 (experts", "column 9", "found nan"]),
    "infinity": (infinity, (COMBINE, 0, "x"), ["rank 0, token 3 (experts", "found inf"]),
    "sum": (sum_off, (COMBINE, 0, "x"), ["rank 1, token 0 (experts", "column 5: expected"]),
    "dtype": (
        other_dtype,
        (DISPATCH, 0, "expand_x"),
        ["rank 1: expand_x fits no documented variant: it must be torch.int8", "torch.int16"],
    ),
    "shape": (
        other_shape,
        (DISPATCH, 1, "expand_x"),
        ["rank 3: expand_x fits no documented variant", "got shape (2, 64)"],
    ),
    "truncated": (
        truncated,
        (DISPATCH, 0, "expand_x"),
        ["rank 2: compare: ", "output.0.pt must be a torch.save file"],
    ),
    "file missing": (
        file_missing,
        (DISPATCH, 1, "ep_recv_counts"),
        ["rank 1: compare: ", "output.4.pt must be a torch.save file", "no file of this name"],
    ),
    "None": (
        output_is_none,
        (DISPATCH, 1, "ep_recv_counts"),
        ["rank 2: the dump has no ep_recv_counts: the operator returned None"],
    ),
}


@pytest.mark.parametrize("plan", PLANTED)
def test_a_planted_deviation_is_found_where_it_is(dump, plan):
    edit, place, words = PLANTED[plan]
    edit(dump)
    report = compare(dump.path)
    assert report.exit_code == 1
    assert report.problems == ()
    results = outputs(report)
    bad = [key for key, output in results.items() if output.verdict > Verdict.IN_RULE]
    assert bad == [place]
    (line,) = results[place].lines
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    "edit, place, words, compared",
    [
        pytest.param(
            rank_missing,
            f"step0/NPU.{COMBINE}.1.forward",
            ["all 4 ranks are needed", "of rank 3 are missing", "rank0, rank1, rank2"],
            0,
            id="rank",
        ),
        pytest.param(
            call_missing,
            f"step0/NPU.{COMBINE}.1.forward",
            ["of rank 2 are missing"],
            11,
            id="call",
        ),
        pytest.param(
            same_rank_twice,
            f"step0/NPU.{DISPATCH}.0.forward",
            ["ep_rank_id must be another on each rank, got 1 in both rank0 and rank1"],
            7,
            id="rank-twice",
        ),
        pytest.param(
            statistics_only,
            f"step0/rank0/NPU.{DISPATCH}.0.forward",
            ["statistics only", '"task": "tensor"'],
            0,
            id="statistics",
        ),
    ],
)
def test_an_inconsistent_dump(dump, edit, place, words, compared):
    edit(dump)
    report = compare(dump.path)
    assert report.exit_code == (1 if compared else 2)
    assert len(report.outputs) == compared
    problems = dict(report.problems)
    for word in words:
        assert word in problems[place]


def test_a_broken_input_stops_one_call_alone(dump):
    input_truncated(dump)
    report = compare(dump.path)
    assert report.exit_code == 1
    (problem,) = (call.problem for call in report.calls if call.problem)
    assert "rank2" in problem
    assert "input.0.pt must be a torch.save file" in problem
    assert len(report.outputs) == 7


@pytest.mark.parametrize(
    "edit, place, deviation",
    [
        (all_scales_inverted, (DISPATCH, 1, "dynamic_scales"), INVERSE),
        (counts_instead_of_prefix_sums, (DISPATCH, 0, "ep_recv_counts"), PREFIX_SUMS),
    ],
)
def test_a_known_deviation_is_named(dump, edit, place, deviation):
    edit(dump)
    report = compare(dump.path)
    assert (report.exit_code, report.deviations) == (1, [deviation])
    assert outputs(report)[place].verdict is Verdict.KNOWN
    assert any(note.startswith(deviation) for call in report.calls for note in call.notes)
    accepted = compare(dump.path, accept=[deviation])
    assert accepted.exit_code == 0
    assert accepted.deviations == [deviation]


@pytest.mark.parametrize(
    "edit, place, off_by_one",
    [
        (code_off_by_one, (DISPATCH, 0, "expand_x"), 1),
        (sum_one_ulp_off, (COMBINE, 0, "x"), 1),
    ],
)
def test_a_small_difference_is_in_rule_and_shown(dump, edit, place, off_by_one):
    edit(dump)
    output = outputs(compare(dump.path))[place]
    assert output.errors.off_by_one == output.errors.max_step == off_by_one
    assert len(output.lines) == 1
    # One code of a rank's 512 is more than 0.1 %.
    assert (output.verdict is Verdict.IN_RULE) == (place[0] == COMBINE)
    exact = outputs(compare(dump.path, standard="exact"))[place]
    assert exact.verdict is Verdict.OUT_OF_RULE
    msprobe = outputs(compare(dump.path, standard="msprobe"))[place]
    assert msprobe.verdict is Verdict.IN_RULE


def test_garbage_in_undefined_memory_is_not_reported(dump):
    for layer in (0, 1):
        for rank in range(4):
            received = int(dump.read(rank, DISPATCH, layer, "ep_recv_counts")[-1])
            for name, start in (
                ("expand_x", received),
                ("dynamic_scales", received),
                ("assist_info_for_combine", 3 * received),
                ("expand_scales", 0),
            ):
                value = dump.read(rank, DISPATCH, layer, name)
                value[start:] = float("nan") if value.dtype.is_floating_point else -86
                dump.write(value, rank, DISPATCH, layer, name)
    for rank in range(4):
        out = dump.read(rank, COMBINE, 0, "x")
        out[4] = float("nan")  # inactive
        dump.write(out, rank, COMBINE, 0, "x")
    report = compare(dump.path)
    assert report.exit_code == 0
    assert all(output.lines == [] for output in report.outputs)


def test_json_has_no_numbers_that_json_has_not(dump):
    nan(dump)
    report = compare(dump.path)
    text = json.dumps(report.as_json(), allow_nan=False)
    value = json.loads(text)
    assert (value["exit_code"], value["compared"], value["in_rule"]) == (1, 12, 11)
    (output,) = (
        o for call in value["calls"] for o in call["outputs"] if o["verdict"] == "out of rule"
    )
    (rank,) = (r for r in output["ranks"] if r["first_difference"])
    difference = rank["first_difference"]
    assert (rank["rank"], difference["row"], difference["column"]) == (2, 1, 9)
    assert difference["found"] == "nan"


def test_unknown_choices(dump):
    with pytest.raises(ArgumentValueError, match="standard must be one of"):
        compare(dump.path, standard="none")
    with pytest.raises(ArgumentValueError, match="accept must name one of"):
        compare(dump.path, accept=["weather"])


def test_what_a_product_forbids_is_said(dump):
    from moe_triton.compare import Where

    report = compare(dump.path, where=Where(product="a3"))
    assert report.exit_code == 0
    for call in report.calls:
        assert any("the limits of a3 forbid this call" in note for note in call.notes), call.notes
