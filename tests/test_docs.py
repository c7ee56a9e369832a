"""docs/ascend.md is what the code's tables make it, and says what the documents say."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest

from moe_triton import profile
from moe_triton.cli import doctor, main
from moe_triton.compat import aclnn, torch_npu

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "ascend.md").read_text(encoding="utf-8")


def section(op):
    """The part of the page about an op."""
    return PAGE.split(f"\n### {op}\n", 1)[1].split("\n### ")[0].split("\n## ")[0]


def rows(text):
    """Each row of the tables in a text, as cells."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [re.split(r" (?<!\\)\| ", line[2:-2]) for line in lines]


def test_the_page_is_current():
    written = runpy.run_path(str(DOCS / "ascend.py"))["page"]()
    assert written == PAGE, "run `make pages`"


@pytest.mark.parametrize("op", torch_npu.__all__)
def test_every_argument_has_a_row(op):
    (head, _, *actual) = rows(section(op).split("\n#### Returns")[0])
    products = [name for name in profile.PROFILES if name in head]
    named = {cells[0].strip("`"): cells for cells in actual}
    parameters = inspect.signature(getattr(torch_npu, op)).parameters
    assert [*named] == [*parameters]
    for name, cells in named.items():
        assert len(cells) == 3 + len(products)
        assert cells[2], f"{name} is not described"
        default = parameters[name].default
        assert cells[1] == ("" if default is inspect.Parameter.empty else f"`{default!r}`")


# Taken from the operator documents by hand.
CELLS = [
    ("dispatch", "x", "a2", "BS in [1, 256], H in [32, 7168] in steps of 32, no float8"),
    ("dispatch", "x", "950", "BS in [1, 512]"),
    ("dispatch", "ep_world_size", "a3", "one of [8, 16, 32, 64, 128, 144, 256, 288]"),
    ("dispatch", "moe_expert_num", "a2", "in [1, 512], L in [1, 24]; hierarchy: any L"),
    ("dispatch", "expert_scales", "a3", "None"),
    ("dispatch", "quant_mode", "950", ""),
    ("combine", "comm_quant_mode", "a2", "equal to 0; hierarchy: one of [0, 2]"),
    ("combine", "expert_scales", "a3", ""),
    ("combine", "expand_scales", "a2", "needed"),
    ("combine", "shared_expert_x", "a3", "None, if S > 0"),
    ("dispatch_v2", "expert_ids", "a3", "K in [1, 16]; fullmesh_v2: K in [1, 12]"),
    ("dispatch_v2", "comm_alg", "a2", '"", "fullmesh", "hierarchy"'),
    ("combine_v2", "comm_alg", "a3", '"", "hierarchy"'),
    ("combine_v2", "const_expert_num", "a2", "equal to 0"),
    ("combine_add_rms_norm", "expand_x", "a3", "H in [1024, 8192], bfloat16"),
    ("dispatch_setup", "comm_type", "950", "equal to 2"),
    ("dispatch_setup", "x_active_mask", "a3", "number of dimensions equal to 1"),
    ("dispatch_teardown", "expert_token_nums_type", "950", "equal to 1"),
    ("dispatch_teardown", "ep_world_size", "a3", "in [2, 384]"),
]


@pytest.mark.parametrize("op, argument, product, cell", CELLS)
def test_what_a_product_takes(op, argument, product, cell):
    head, _, *actual = rows(section(f"npu_moe_distribute_{op}").split("\n#### Returns")[0])
    (cells,) = [cells for cells in actual if cells[0] == f"`{argument}`"]
    assert cells[head.index(product)] == cell


def test_products_functions_and_links():
    head = ["operator", "a2", "a3", "950"]
    actual = rows(PAGE)
    start = actual.index(head)
    listed = {cells[0].split("`")[1]: cells[1:] for cells in actual[start + 2 : start + 12]}
    assert listed["npu_moe_distribute_dispatch_v2"] == ["yes", "yes", "yes"]
    assert listed["npu_moe_distribute_combine_teardown"] == ["–", "yes", "yes"]
    assert listed["npu_moe_update_expert"] == ["–", "yes", "–"]
    for name in aclnn.__all__:
        if name.endswith("GetWorkspaceSize"):
            assert f"| `{name.removesuffix('GetWorkspaceSize')}` |" in PAGE
        elif name.endswith("CalcOutputSize"):
            (cells,) = [cells for cells in actual if cells[0] == f"`{name}`"]
            assert [one.strip("`") for one in cells[1].split(", ")] == [
                *inspect.signature(getattr(aclnn, name)).parameters
            ]
            assert cells[2].startswith("A status; ")
    for target in re.findall(r"\]\(#(\w*)\)", PAGE):
        assert f"\n### {target}\n" in PAGE


def test_what_the_first_op_of_replicas_takes():
    """It is not in torch_npu, and takes less than its successor there."""
    assert "on a3, `expert_ids` BS in [1, 512], K in [1, 16], " in PAGE
    assert "`eplb_table` E in [1, 512], `world_size` in [2, 384].\n" in PAGE


def test_environment_variables_are_those_of_doctor():
    """The page, ``doctor`` and what the code reads are one list."""
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    table = page.split("| --- | --- |\n", 1)[1].split("\n\n", 1)[0]
    shown = {name.strip("`"): meaning for name, meaning in rows(table)}
    assert shown == doctor.ENVIRONMENT


# PYTHONPATH is Python's own.
READ = re.compile(r'environ(?:\.get\(|\[)"(\w+)"|"(\w+)" (?:not )?in os\.environ|ENV\w* = "(\w+)"')


def test_every_variable_that_the_package_reads_is_in_the_table():
    for path in (DOCS.parent / "moe_triton").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        names = {name for match in READ.findall(text) for name in match if name}
        names |= set(re.findall(r'"((?:MOE_TRITON|HCCL|TRITON)_[A-Z_]+)"', text))
        missing = names - doctor.ENVIRONMENT.keys() - {"PYTHONPATH"}
        assert not missing, f"{path} reads {missing}"


def test_doctor_prints_every_variable(capsys, monkeypatch):
    monkeypatch.setenv("HCCL_BUFFSIZE", "400")
    monkeypatch.delenv("SEED", raising=False)
    assert main(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in doctor.ENVIRONMENT:
        assert f" {name} " in text
    assert "HCCL_BUFFSIZE 400; MB of a group's communication buffer" in text
    assert "SEED not set; " in text
