"""Broken files of every kind, drawn: each is read, or an error with three parts."""

from __future__ import annotations

import copy
import json
import re
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from ascend_dumps import DATA, DISPATCH

from moe_triton.compare import compare
from moe_triton.compare.readers.safe_files import read_json, read_tensor, read_yaml
from moe_triton.compare.timing import compare_times
from moe_triton.compare.timing.files import read_bench
from moe_triton.record import record
from moe_triton.record.calls import FileError
from moe_triton.record.files import read_calls

MESSAGE = re.compile(r"compare: .+ must .+, got .*", re.DOTALL)
TIMING = DATA / "timing"
EXAMPLE = DATA / "msprobe_dump"


@st.composite
def broken(draw, content: bytes) -> bytes:
    """``content`` cut off, with bytes changed, or with bytes put in."""
    how = draw(st.sampled_from(["cut", "change", "insert", "other"]))
    place = draw(st.integers(0, len(content)))
    if how == "cut":
        return content[:place]
    if how == "other":
        return draw(st.binary(max_size=64))
    bytes_ = draw(st.binary(min_size=1, max_size=8))
    return content[:place] + bytes_ + content[place + (len(bytes_) if how == "change" else 0) :]


def check_error(error) -> None:
    assert MESSAGE.fullmatch(str(error)), str(error)


def torch_file(path):
    torch.save(torch.arange(12, dtype=torch.int32).view(3, 4), path)


def numpy_file(path):
    np.save(path, np.arange(12, dtype=np.float32))


def yaml_file(path):
    path.write_text("defaults: {ep_world_size: 2}\ncalls:\n  - op: a\n    inputs: {x: 'x.pt'}\n")


def json_file(path):
    path.write_bytes((EXAMPLE / "step0/rank0/dump.json").read_bytes())


READERS = {
    "x.pt": (torch_file, read_tensor),
    "x.npy": (numpy_file, read_tensor),
    "x.yaml": (yaml_file, read_yaml),
    "dump.json": (json_file, read_json),
    "bench.jsonl": (
        lambda path: path.write_text('{"bench": "layer", "dispatch_us": 1.5}\n'),
        read_bench,
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_is_read_or_refused(tmp_path, name):
    write, read = READERS[name]
    path = tmp_path / name
    write(path)
    content = path.read_bytes()
    read(path)

    @hypothesis.given(broken(content))
    def check(data):
        path.write_bytes(data)
        try:
            value = read(path)
        except FileError as error:
            check_error(error)
        else:
            assert not isinstance(value, torch.Tensor) or value.layout == torch.strided

    check()


@pytest.mark.parametrize("name", ["npu", "json", "environment"])
def test_a_record_is_read_or_refused(tmp_path, name):
    """The tensors, the description and the environment of a call."""
    from moe_triton.compat import torch_npu

    with record(tmp_path):
        torch_npu.npu_moe_token_permute(torch.ones(2, 4).bfloat16(), torch.tensor([[0, 1], [1, 0]]))
    folder = tmp_path / "rank0"
    pattern = {"npu": "*.safetensors", "json": "*.npu_*.json"}.get(name, "environment.json")
    (path,) = folder.glob(pattern)
    content = path.read_bytes()

    @hypothesis.given(broken(content))
    def check(data):
        path.write_bytes(data)
        problems = []
        for call in read_calls(folder, read_json, lambda _, problem: problems.append(problem)):
            for value in (*call.arguments.values(), *call.outputs.values()):
                if hasattr(value, "load"):
                    try:
                        value.load()
                    except FileError as error:
                        check_error(error)
        for problem in problems:
            check_error(problem)

    check()


@pytest.mark.parametrize("file", sorted(TIMING.iterdir()), ids=lambda file: file.name)
def test_a_profiler_file_is_read_or_refused(tmp_path, file):
    path = tmp_path / file.name
    content = file.read_bytes()

    @hypothesis.given(broken(content))
    def check(data):
        path.write_bytes(data)
        report = compare_times([path])
        json.dumps(report.as_json(), allow_nan=False)
        assert report.measured or report.problems

    check()


# Entries of dump.json: any value in place of any other, at any depth.

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([[], {}, [[]], {"type": "torch.Tensor"}, {"type": "int", "value": -1}, ".."]),
)


def places(value, path=()):
    """The paths of all values of a tree."""
    yield path
    items = enumerate(value) if isinstance(value, list) else ()
    for key, child in value.items() if isinstance(value, dict) else items:
        yield from places(child, (*path, key))


def replaced(value, path, junk):
    if not path:
        return junk
    result = copy.copy(value)
    result[path[0]] = replaced(value[path[0]], path[1:], junk)
    return result


def test_a_dump_with_junk_in_it_is_compared_or_refused(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "dump")
    path = tmp_path / "dump/step0/rank0/dump.json"
    description = json.loads(path.read_text())
    names = [name for name in description["data"] if DISPATCH in name]
    calls = {name: description["data"][name] for name in names}

    @hypothesis.given(st.sampled_from([*places(calls)]), JUNK)
    def check(place, junk):
        data = {**description, "data": replaced(calls, place, junk)}
        path.write_text(json.dumps(data))
        try:
            report = compare(tmp_path / "dump")
        except FileError as error:
            check_error(error)
            return
        json.dumps(report.as_json(), allow_nan=False)
        for call in report.calls:
            assert "root:" not in call.problem

    check()
