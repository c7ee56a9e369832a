"""Recorded calls: what is written, its limits, unmodified scripts, and records beside dumps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ascend_dumps import COMBINE, DISPATCH, Dump

from moe_triton import testing
from moe_triton.cli import main
from moe_triton.compare import Verdict, compare
from moe_triton.compat import torch_npu
from moe_triton.record import record


def layer(ctx, dump=None, tokens=4):
    """Dispatch and combine: the calls of the dump of msprobe, or of random tokens."""
    common = {"group_ep": ctx.ep_group, "ep_world_size": ctx.ep_world_size}
    common |= {"ep_rank_id": ctx.ep_rank, "moe_expert_num": 8}
    if dump is not None:
        rank = ctx.rank
        common |= {"shared_expert_num": 1, "shared_expert_rank_num": 2}
        mask = dump.read(rank, DISPATCH, 0, "x_active_mask")
        x, ids = (dump.read(rank, DISPATCH, 0, i) for i in (0, 1))
        torch_npu.npu_moe_distribute_dispatch_v2(x, ids, quant_mode=2, x_active_mask=mask, **common)
        inputs = [dump.read(rank, COMBINE, 0, i) for i in range(5)]
        torch_npu.npu_moe_distribute_combine_v2(*inputs, x_active_mask=mask, **common)
        return
    x = testing.tokens(tokens, 32, torch.bfloat16, seed=ctx.rank)
    ids = testing.routing_uniform(tokens, 8, 2, seed=ctx.rank)
    outputs = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, **common)
    torch_npu.npu_moe_distribute_combine_v2(
        outputs[0], ids, outputs[2], outputs[4], torch.rand(tokens, 2), **common
    )


def test_a_record_is_what_was_called(tmp_path):
    with record(tmp_path):
        testing.run_local(4, layer)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"rank{r}" for r in range(4)]
    environment = json.loads((tmp_path / "rank0" / "environment.json").read_text())
    assert environment["versions"]["torch"]
    report = compare(tmp_path, standard="exact")
    assert (report.exit_code, report.problems) == (0, ())
    assert [call.op for call in report.calls] == [DISPATCH, COMBINE]
    assert torch_npu.npu_moe_distribute_dispatch_v2.__module__.startswith("moe_triton.compat")


def test_rows_that_were_not_received_are_not_written(tmp_path):
    with record(tmp_path):
        testing.run_local(1, lambda ctx: layer(ctx, tokens=3))
        testing.run_local(4, lambda ctx: layer(ctx, tokens=3))
    (file,) = (tmp_path / "rank2").glob("*.npu_moe_distribute_dispatch_v2.json")
    value = json.loads(file.read_text())["outputs"]
    received = value["expand_x"]["rows"]
    assert received < value["expand_x"]["shape"][0] == 3 * 4 * 2
    assert value["assist_info_for_combine"]["rows"] == 3 * received


def test_a_record_beside_a_dump(tmp_path):
    """The calls of the dump, recorded here, have the bits of the dump, in either order."""
    dump = Dump(tmp_path)
    with record(tmp_path / "record"):
        testing.run_local(4, lambda ctx: layer(ctx, dump))
    recorded, dumped = compare(tmp_path / "record"), compare(dump.path)
    assert recorded.exit_code == dumped.exit_code == 0
    for mine, theirs in zip(
        recorded.calls, [c for c in dumped.calls if ".0." in c.name], strict=True
    ):
        assert (mine.op, mine.sizes) == (theirs.op, theirs.sizes)
        for a, b in zip(mine.outputs, theirs.outputs, strict=True):
            assert (a.name, a.verdict, a.errors) == (b.name, b.verdict, b.errors)


def test_a_changed_record_is_found(tmp_path):
    from safetensors.torch import load_file, save_file

    with record(tmp_path):
        testing.run_local(2, layer)
    (file,) = (tmp_path / "rank1").glob("*.npu_moe_distribute_dispatch_v2.safetensors")
    tensors = load_file(file)
    tensors["output.expand_x"][2, 5] += 1
    save_file(tensors, file)
    report = compare(tmp_path)
    (output,) = (o for o in report.outputs if o.verdict is Verdict.OUT_OF_RULE)
    (line,) = output.lines
    assert line.startswith("rank 1, row 2 (token")
    assert "column 5" in line


@pytest.mark.parametrize(
    "options, calls",
    [
        pytest.param({"calls": 2}, [2, 2], id="calls"),
        pytest.param({"skip": 4}, [1, 1], id="skip"),
        pytest.param({"ops": (COMBINE,)}, [0, 5], id="ops"),
        pytest.param({"max_bytes": 4000}, None, id="bytes"),
    ],
)
def test_limits(tmp_path, caplog, options, calls):
    with record(tmp_path, **options):
        testing.run_local(2, lambda ctx: [layer(ctx) for _ in range(5)])
    files = [*(tmp_path / "rank1").glob("*.json")]
    if calls is None:
        size = sum(f.stat().st_size for f in (tmp_path / "rank1").glob("*.safetensors"))
        assert 0 < size < 8000
        assert "would exceed 4000" in caplog.text
        return
    assert [sum(op in f.name for f in files) for op in (DISPATCH, COMBINE)] == calls
    assert compare(tmp_path).exit_code == 0


def test_a_new_record_replaces_an_old_one(tmp_path):
    for number in (3, 1):
        with record(tmp_path):
            testing.run_local(2, lambda ctx: [layer(ctx) for _ in range(number)])  # noqa: B023
    assert len([*(tmp_path / "rank0").glob("*.safetensors")]) == 2


@pytest.mark.parametrize(
    "break_file, words",
    [
        (lambda p: p.write_bytes(b""), "be a safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "be a safetensors file"),
        (lambda p: p.write_bytes(b"\xff" * 64), "be a safetensors file"),
        (lambda p: p.unlink(), "be a safetensors file"),
    ],
)
def test_a_broken_record(tmp_path, break_file, words):
    with record(tmp_path):
        testing.run_local(2, layer)
    (file,) = (tmp_path / "rank1").glob("*.npu_moe_distribute_combine_v2.safetensors")
    break_file(file)
    report = compare(tmp_path)
    (call,) = (call for call in report.calls if call.problem)
    assert (call.op, report.exit_code) == (COMBINE, 1)
    assert words in call.problem


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 9, "op": "x"}'])
def test_a_broken_description(tmp_path, capsys, text):
    with record(tmp_path):
        testing.run_local(2, layer)
    (file,) = (tmp_path / "rank1").glob("*.npu_moe_distribute_combine_v2.json")
    file.write_text(text)
    assert main(["compare", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "those of rank 1 are missing" in " ".join(captured.out.split())


SCRIPT_TEXT = """
import os, sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
import torch_npu

def run(rank):
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", rank=rank, world_size=2, init_method="tcp://127.0.0.1:{port}")
    group = dist.distributed_c10d._get_default_group()
    name = group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    x = torch.full((3, 32), rank + 1.0, dtype=torch.bfloat16).npu()
    ids = torch.tensor([[0, 1], [2, 3], [3, 0]], dtype=torch.int32).npu()
    common = (name, 2, rank, 4)
    out = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, *common, quant_mode=2)
    y = out[0].bfloat16()
    torch.ops.npu.npu_moe_distribute_combine_v2(y, ids, out[2], out[4], torch.ones(3, 2), *common)
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(run, nprocs=2)
    print("arguments", sys.argv[1:])
    sys.exit(3)
"""


def test_an_unmodified_script_and_its_processes(tmp_path):
    """Under npu-run, where torch_npu is a stand-in; the exit status is the script's."""
    script, target = tmp_path / "script.py", tmp_path / "record"
    script.write_text(SCRIPT_TEXT.replace("{port}", str(29700 + os.getpid() % 200)))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('own sitecustomize')\n")
    command = [sys.executable, "-m", "moe_triton", "npu-run", "-m", "moe_triton.record"]
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*command, "-o", str(target), str(script), "--flag", "7"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 3, result.stderr
    assert "arguments ['--flag', '7']" in result.stdout
    assert "own sitecustomize" in result.stdout
    report = compare(target)
    assert (report.exit_code, report.problems) == (0, ())
    assert [call.world for call in report.calls] == ["2 ranks", "2 ranks"]
    assert [call.op for call in report.calls] == [DISPATCH, COMBINE]


def special(ctx):
    """A rank without tokens, prefix sums, and an addend, by version 1."""
    tokens = 3 * ctx.rank
    x = testing.tokens(tokens, 16, torch.float16, seed=1)
    ids = testing.routing_uniform(tokens, 4, 2, seed=1)
    common = {"group_ep": ctx.ep_group, "ep_world_size": 2, "ep_rank_id": ctx.rank}
    common |= {"moe_expert_num": 4, "global_bs": 6}
    out = torch_npu.npu_moe_distribute_dispatch(x, ids, expert_token_nums_type=0, **common)
    torch_npu.npu_moe_distribute_combine(
        out[0], ids, out[2], out[4], torch.rand(tokens, 2), shared_expert_x=x, **common
    )


def pairs(ctx):
    """Tensor parallelism."""
    x = testing.tokens(3, 16, torch.bfloat16, seed=ctx.rank)
    ids = testing.routing_uniform(3, 2, 1, seed=ctx.rank)
    common = {"group_ep": ctx.ep_group, "ep_world_size": 2, "ep_rank_id": ctx.ep_rank}
    common |= {"moe_expert_num": 2, "group_tp": ctx.tp_group}
    common |= {"tp_world_size": 2, "tp_rank_id": ctx.tp_rank}
    out = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, quant_mode=2, **common)
    rows = out[0].bfloat16()
    torch_npu.npu_moe_distribute_combine_v2(
        rows, ids, out[2], out[4], torch.rand(3, 1), tp_send_counts=out[5], **common
    )


def split(ctx):
    """Two phases; the teardown of the dump gets the setup that is run here."""
    x = testing.tokens(3, 64, torch.bfloat16, seed=ctx.rank)
    ids = testing.routing_uniform(3, 8, 2, seed=ctx.rank)
    common = (ctx.ep_group, 2, ctx.rank, 8)
    y, index, command = torch_npu.npu_moe_distribute_dispatch_setup(x, ids, *common, quant_mode=2)
    out = torch_npu.npu_moe_distribute_dispatch_teardown(x, y, ids, command, *common, quant_mode=2)
    rows = torch.ones(out[0].shape, dtype=torch.bfloat16)
    sent, command = torch_npu.npu_moe_distribute_combine_setup(rows, ids, out[2], *common)
    torch_npu.npu_moe_distribute_combine_teardown(
        rows, sent, ids, index, torch.rand(3, 2), command, *common
    )


@pytest.mark.parametrize("fn, tp, calls", [(special, 1, 2), (pairs, 2, 2), (split, 1, 4)])
def test_other_members_of_the_family(tmp_path, fn, tp, calls):
    with record(tmp_path):
        testing.run_local(2 * tp, fn, tp_world_size=tp)
    report = compare(tmp_path, standard="exact")
    assert (report.exit_code, report.problems) == (0, ())
    assert [call.problem for call in report.calls] == [""] * calls


def test_operators_of_one_device(tmp_path):
    logits = torch.randn(6, 8)
    with record(tmp_path):
        y, ids, _ = torch_npu.npu_moe_gating_top_k_softmax(logits, k=2)
        x = torch.randn(6, 16).bfloat16()
        rows, index = torch_npu.npu_moe_token_permute(x, ids)
        torch_npu.npu_moe_token_unpermute(rows, index, y.bfloat16())
        torch_npu.npu_moe_init_routing_v2(
            x,
            ids,
            expert_num=8,
            quant_mode=1,
            expert_tokens_num_type=1,
            expert_tokens_num_flag=True,
        )
    report = compare(tmp_path)
    assert (report.exit_code, len(report.calls)) == (0, 4)
    assert {output.verdict for output in report.outputs} == {Verdict.IN_RULE}
