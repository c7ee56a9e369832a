"""Broken and hostile files give an error with its three parts, and nothing else."""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from ascend_dumps import COMBINE, DATA, DISPATCH, Dump

from moe_triton.cli import main
from moe_triton.compare import compare
from moe_triton.record.calls import FileError


class Hostile:
    """A pickle that would create a file."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.fixture
def dump(tmp_path):
    return Dump(tmp_path)


def huge(path):
    """One number on disk that is said to be 2**50 of them."""
    torch.save(torch.zeros(1, dtype=torch.int8).expand(2**50), path)


@pytest.mark.parametrize(
    "break_file, words",
    [
        pytest.param(lambda p: p.write_bytes(b""), "an empty file", id="empty"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:1000]), "", id="truncated"),
        pytest.param(lambda p: p.write_bytes(b"PK\x03\x04" + b"\0" * 99), "", id="no-archive"),
        pytest.param(lambda p: p.write_text("hello"), "", id="text"),
        pytest.param(
            lambda p: p.write_bytes(pickle.dumps(Hostile(p.with_name("owned")))), "", id="pickle"
        ),
        pytest.param(
            lambda p: torch.save(Hostile(p.with_name("owned")), p), "", id="pickle-in-archive"
        ),
        pytest.param(lambda p: torch.save([1, 2], p), "got list", id="list"),
        pytest.param(lambda p: torch.save(torch.zeros(9), p), "torch.float32", id="dtype"),
        pytest.param(lambda p: torch.save(torch.zeros(2, 2).to_sparse(), p), "", id="sparse"),
        pytest.param(huge, "got shape", id="huge"),
        pytest.param(lambda p: (p.unlink(), p.mkdir()), "a folder", id="folder"),
    ],
)
def test_a_broken_tensor(dump, capsys, break_file, words):
    file = dump.file(1, DISPATCH, 0, "expand_x")
    break_file(file)
    assert main(["compare", str(dump.path), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    assert not file.with_name("owned").exists()
    outputs = [o for call in json.loads(captured.out)["calls"] for o in call["outputs"]]
    ((name, problems),) = [
        (o["name"], [r["problem"] for r in o["ranks"] if r["problem"]])
        for o in outputs
        if o["verdict"] == "out of rule"
    ]
    assert name == "expand_x"
    (line,) = problems
    assert "compare: " in line
    assert " must " in line
    assert ", got " in line
    assert words in line


def test_nothing_is_said_to_be_equal_where_nothing_was_read(dump, capsys):
    for rank in range(4):
        dump.file(rank, DISPATCH, 0, "expand_x").write_bytes(b"x")
    assert main(["compare", str(dump.path)]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "expand_x " in line]
    assert rows[0] == ["expand_x", "0", "-", "-", "-", "out", "of", "rule"]


@pytest.mark.parametrize(
    "text, words",
    [
        pytest.param("", "an empty file", id="empty"),
        pytest.param('{"data": {', "be a JSON file", id="truncated"),
        pytest.param("[" * 100_000, "nesting", id="deep"),
        pytest.param('{"data": []}', "under 'data'", id="list"),
        pytest.param("[1]", "under 'data'", id="no-object"),
        pytest.param('{"data": ' + "9" * 5000 + "}", "be a JSON file", id="number"),
        pytest.param("\x00\x01", "be a JSON file", id="bytes"),
    ],
)
def test_a_broken_dump_json(dump, capsys, text, words):
    (dump.rank(2) / "dump.json").write_text(text)
    assert main(["compare", str(dump.path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    out = " ".join(captured.out.split())
    assert "step0/rank2: compare: " in out
    assert words in out
    assert "those of rank 2 are missing" in out


HOSTILE = [
    {"input_args": 5},
    {"input_args": [], "input_kwargs": []},
    {"input_args": [[[[]]]], "output": "x"},
    {"input_args": [{"type": "torch.Tensor", "data_name": "../../../../etc/passwd"}]},
    {"input_args": [{"type": "torch.Tensor", "data_name": "/etc/passwd", "shape": [-1]}]},
    {"input_args": [{"type": "torch.Tensor", "data_name": {"a": 1}, "shape": "x", "dtype": 3}]},
    {"input_kwargs": {"ep_world_size": {"type": "int", "value": 10**40}}},
    {"input_kwargs": {"ep_world_size": {"type": "float", "value": float("nan")}}},
    {"input_kwargs": {"group_ep": {"type": "str", "value": ["a", {}]}}},
    {"output": [{"type": "torch.Tensor"}] * 50},
    7,
    None,
    [],
]


@pytest.mark.parametrize("change", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_entries(dump, capsys, change):
    """Of one call on one rank; the others are still compared."""

    def edit(calls):
        name = f"NPU.{DISPATCH}.0.forward"
        if not isinstance(change, dict):
            calls[name] = change
            return
        for key, value in change.items():
            if isinstance(value, dict):
                calls[name][key] |= value
            else:
                calls[name][key] = value

    dump.edit_json(3, edit)
    assert main(["compare", str(dump.path), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "root:" not in captured.out
    calls = json.loads(captured.out)["calls"]
    whole = [call for call in calls if call["outputs"] and not call["problem"]]
    # A call of another group shifts the count of its rank.
    assert len(whole) >= (2 if "group_ep" in str(change) else 3)


@pytest.mark.parametrize(
    "name, value, words",
    [
        (
            "moe_expert_num",
            2**27,
            "the experts must be at most 65536 to be run here, got 134217728",
        ),
        ("global_bs", 2**30, "must fit in 34359738368 bytes to be run here, got up to"),
        ("global_bs", 2**70, "must fit in 34359738368 bytes to be run here, got up to"),
    ],
)
def test_sizes_that_would_exhaust_the_machine(dump, name, value, words):
    """Refused before anything of that size is allocated."""

    def edit(calls):
        arguments = calls[f"NPU.{DISPATCH}.0.forward"]["input_kwargs"]
        arguments[name] = {"type": "int", "value": value}

    for rank in range(4):
        dump.edit_json(rank, edit)
    report = compare(dump.path)
    assert report.exit_code == 1
    (problem,) = (call.problem for call in report.calls if call.problem)
    assert words in problem


@pytest.mark.parametrize("path", ["missing", "empty", "text"])
def test_nothing_to_read(tmp_path, capsys, path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    assert main(["compare", str(tmp_path / path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"moe-triton compare: {tmp_path / path} must be an msprobe dump")
    assert ", got " in captured.err


# torch.save files described by YAML


@pytest.fixture
def described(dump, tmp_path):
    """The tensors of layer 0 as plain files, and a YAML file that names them."""
    folder = tmp_path / "plain"
    dispatch, combine = {}, {}
    for rank in range(4):
        target = folder / f"rank{rank}"
        target.mkdir(parents=True)
        inputs = {"x": dump.read(rank, DISPATCH, 0, 0), "ids": dump.read(rank, DISPATCH, 0, 1)}
        torch.save(inputs, target / "inputs.pt")
        torch.save(dump.read(rank, DISPATCH, 0, "x_active_mask"), target / "mask.pt")
        for name in ("expand_x", "dynamic_scales", "ep_recv_counts"):
            value = dump.read(rank, DISPATCH, 0, name)
            if name == "ep_recv_counts":
                np.save(target / f"{name}.npy", value.numpy())
            else:
                torch.save(value, target / f"{name}.pt")
        for i in range(5):
            torch.save(dump.read(rank, COMBINE, 0, i), target / f"combine{i}.pt")
        torch.save(dump.read(rank, COMBINE, 0, "x"), target / "out.pt")
    dispatch = {
        "op": DISPATCH,
        "ranks": 4,
        "arguments": {"quant_mode": 2},
        "inputs": {
            "x": "rank{rank}/inputs.pt:x",
            "expert_ids": "rank{rank}/inputs.pt:ids",
            "x_active_mask": "rank{rank}/mask.pt",
        },
        "outputs": {
            "expand_x": "rank{rank}/expand_x.pt",
            "dynamic_scales": "rank{rank}/dynamic_scales.pt",
            "ep_recv_counts": "rank{rank}/ep_recv_counts.npy",
        },
    }
    names = ["expand_x", "expert_ids", "assist_info_for_combine", "ep_send_counts", "expert_scales"]
    combine = {
        "op": COMBINE,
        "ranks": [0, 1, 2, 3],
        "inputs": {name: f"rank{{rank}}/combine{i}.pt" for i, name in enumerate(names)}
        | {"x_active_mask": "rank{rank}/mask.pt"},
        "outputs": {"x": "rank{rank}/out.pt"},
    }
    defaults = {"ep_world_size": 4, "moe_expert_num": 8, "shared_expert_num": 1}
    defaults |= {"shared_expert_rank_num": 2}
    value = {"defaults": defaults, "calls": [dispatch, combine]}
    return folder, value


def write_yaml(folder, value):
    import yaml

    file = folder / "calls.yaml"
    file.write_text(yaml.safe_dump(value))
    return file


def test_described_files(described):
    folder, value = described
    write_yaml(folder, value)
    report = compare(folder)  # the one YAML file of the folder
    assert (report.exit_code, report.problems) == (1, ())
    compared = {o.name: o.verdict.words for o in report.outputs}
    assert compared["expand_x"] == compared["x"] == compared["ep_recv_counts"] == "in rule"


@pytest.mark.parametrize(
    "text, words",
    [
        pytest.param("", "an empty file", id="empty"),
        pytest.param("calls: [", "be a YAML file", id="truncated"),
        pytest.param("a: 1", "have a list under 'calls'", id="no-calls"),
        pytest.param("calls: !!python/object/apply:os.system ['touch owned']", "YAML", id="tag"),
        pytest.param("a: &a [x]\ncalls: [*a]", "aliases are not read", id="alias"),
        pytest.param("[" * 1500, "be a YAML file", id="deep"),
        pytest.param("\x00", "be a YAML file", id="bytes"),
    ],
)
def test_broken_yaml(tmp_path, capsys, text, words):
    file = tmp_path / "calls.yaml"
    file.write_text(text)
    with pytest.raises(FileError) as error:
        compare(file)
    assert words in str(error.value)
    assert main(["compare", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"moe-triton compare: {file} must ")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"op": "npu_other"}, "call 0: op must be one of"),
        ({"op": ["x"]}, "call 0: op must be one of"),
        ({"ranks": 10**9}, "call 0: ranks must be a number of ranks"),
        ({"ranks": {}}, "call 0: ranks must be a number of ranks"),
        ({"inputs": {"x": "/etc/passwd"}}, "must name a file below"),
        ({"inputs": {"x": "../x.pt"}}, "must name a file below"),
        ({"inputs": {"y": "x.pt"}}, "arguments must be those of"),
        ({"outputs": {"y": "x.pt"}}, "outputs must be of"),
        ({"arguments": {"quant_mode": {"a": 1}}}, "quant_mode must be a number or a text"),
        ({"unknown": 1}, "must have keys of"),
        ({"arguments": [1]}, "arguments must be a mapping by names"),
    ],
)
def test_wrong_descriptions(described, change, words):
    folder, value = described
    value["calls"][0] |= change
    report = compare(write_yaml(folder, value))
    ((place, problem),) = set(report.problems)
    assert place == "calls.yaml, call 0"
    assert words in problem
    assert [call.op for call in report.calls] == [COMBINE]


# Converted kernel dumps


def as_kernel_dump(dump, folder, layer=1):
    """The calls of a layer as files of msaccucmp: bfloat16 widened to float32."""
    for rank in range(4):
        target = folder / "20260701120000" / str(rank)
        target.mkdir(parents=True)
        for kind, op, task, outputs in (
            ("Dispatch", DISPATCH, 12, range(5)),
            ("Combine", COMBINE, 15, range(1)),
        ):
            kernel = f"MoeDistribute{kind}V2"
            name = f"{kernel}.aclnn{kernel}_{kernel}_{kernel}.{task}.2.17900000000001{task}"
            inputs = [dump.read(rank, op, layer, i) for i in range(2 if kind == "Dispatch" else 5)]
            if kind == "Dispatch":
                inputs.append(dump.read(rank, op, layer, "scales"))
            names = ["expand_x", "dynamic_scales", "assist_info_for_combine", "expert_token_nums"]
            names.append("ep_recv_counts")
            if kind == "Combine":
                names = ["x"]
            for side, tensors in (
                ("input", inputs),
                ("output", [dump.read(rank, op, layer, names[i]) for i in outputs]),
            ):
                for i, tensor in enumerate(tensors):
                    value = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
                    np.save(target / f"{name}.{side}.{i}.npy", value.numpy())


def test_kernel_dumps(dump, tmp_path, capsys):
    folder = tmp_path / "kernels"
    as_kernel_dump(dump, folder)
    shared = ["--set", "shared_expert_rank_num=2", "--set", "shared_expert_num=1"]
    assert main(["compare", str(folder), *shared, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["source"] == "converted kernel dumps"
    assert [call["op"] for call in value["calls"]] == [DISPATCH, COMBINE]
    assert value["compared"] == value["in_rule"] == 6
    notes = value["calls"][0]["notes"]
    assert any("moe_expert_num = 8 is taken from the shapes" in note for note in notes)
    assert any("quant_mode = 2 is taken from the shapes" in note for note in notes)


def test_a_broken_npy(dump, tmp_path):
    folder = tmp_path / "kernels"
    as_kernel_dump(dump, folder)
    (file,) = folder.glob("*/2/MoeDistributeDispatch*.output.0.npy")
    file.write_bytes(file.read_bytes()[:100])
    settings = {"shared_expert_rank_num": 2, "shared_expert_num": 1}
    report = compare(folder, settings=settings)
    assert report.exit_code == 1
    assert any("be a .npy file with numbers only" in text for _, text in report.problems)
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    report = compare(folder, settings=settings)
    assert any("be a .npy file with numbers only" in text for _, text in report.problems)


def test_settings_must_be_pairs(capsys):
    assert main(["compare", str(DATA / "msprobe_dump"), "--set", "x"]) == 2
    assert "--set must be NAME=VALUE, got x" in capsys.readouterr().err


def test_a_zip_bomb_is_no_tensor(dump):
    file = dump.file(0, COMBINE, 0, "x")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**24)
    report = compare(dump.path)
    assert report.exit_code == 1
