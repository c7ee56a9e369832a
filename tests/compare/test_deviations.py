"""Deviations with a name, planted into records of calls that ran here."""

from __future__ import annotations

import pytest
import torch

from moe_triton import testing
from moe_triton.compare import Verdict, compare
from moe_triton.compare.deviations import NOT_FILLED, NOT_SATURATED
from moe_triton.compat import torch_npu
from moe_triton.record import record

pytest.importorskip("safetensors", reason="records are an extra")

TEARDOWN = "npu_moe_distribute_dispatch_teardown"
DISPATCH = "npu_moe_distribute_dispatch_v2"


def change(folder, op, output, edit):
    """Apply ``edit`` to an output of the call of ``op`` on every rank."""
    from safetensors.torch import load_file, save_file

    for file in sorted(folder.glob(f"rank*/*.{op}.safetensors")):
        tensors = load_file(file)
        tensors[f"output.{output}"] = edit(tensors[f"output.{output}"])
        save_file(tensors, file)


def verdicts(report):
    return {(call.op, o.name): o.verdict for call in report.calls for o in call.outputs}


def split_dispatch(ctx, experts):
    x = testing.tokens(3, 64, torch.bfloat16, seed=ctx.rank)
    ids = testing.routing_uniform(3, experts, 2, seed=ctx.rank)
    common = (ctx.ep_group, 2, ctx.rank, experts)
    y, _, command = torch_npu.npu_moe_distribute_dispatch_setup(x, ids, *common)
    torch_npu.npu_moe_distribute_dispatch_teardown(x, y, ids, command, *common)


@pytest.mark.parametrize("experts", [8, 2])
def test_counts_that_a_teardown_leaves_unwritten(tmp_path, experts):
    """A rank of one expert gets its count: garbage there is no known deviation."""
    with record(tmp_path):
        testing.run_local(2, lambda ctx: split_dispatch(ctx, experts))
    assert compare(tmp_path).exit_code == 0
    change(tmp_path, TEARDOWN, "expert_token_nums", lambda counts: torch.full_like(counts, -86))
    report = compare(tmp_path)
    results = verdicts(report)
    known = experts > 2
    place = (TEARDOWN, "expert_token_nums")
    assert results.pop(place) is (Verdict.KNOWN if known else Verdict.OUT_OF_RULE)
    assert report.deviations == ([NOT_FILLED] if known else [])
    assert {v for v in results.values() if v is not Verdict.UNDEFINED} == {Verdict.IN_RULE}
    assert compare(tmp_path, accept=[NOT_FILLED]).exit_code == (0 if known else 1)


def mx_dispatch(ctx):
    # The shared exponent of each block is that of 1.96875: its code would be 504, above 448.
    x = testing.tokens(3, 64, torch.bfloat16, seed=ctx.rank).clamp(-1, 1)
    x[:, ::32] = 1.96875
    ids = testing.routing_uniform(3, 8, 2, seed=ctx.rank)
    torch_npu.npu_moe_distribute_dispatch_v2(
        x, ids, ctx.ep_group, 2, ctx.rank, 8, quant_mode=4, y_dtype=torch.float8_e4m3fn
    )


def unsaturated(codes):
    """NaN for the largest code, as a cast without saturation gives."""
    codes = codes.view(torch.uint8).clone()
    assert (codes == 0x7E).any()
    codes[codes == 0x7E] = 0x7F
    return codes


def one_wrong_code(codes):
    codes = unsaturated(codes)
    codes[0, 5] ^= 0x10
    return codes


def test_mx_codes_that_were_not_saturated(tmp_path):
    with record(tmp_path):
        testing.run_local(2, mx_dispatch)
    assert compare(tmp_path).exit_code == 0
    change(tmp_path, DISPATCH, "expand_x", unsaturated)
    report = compare(tmp_path)
    assert (report.exit_code, report.deviations) == (1, [NOT_SATURATED])
    assert verdicts(report)[DISPATCH, "expand_x"] is Verdict.KNOWN
    assert compare(tmp_path, accept=[NOT_SATURATED]).exit_code == 0


def test_a_wrong_code_beside_them_is_found(tmp_path):
    with record(tmp_path):
        testing.run_local(2, mx_dispatch)
    change(tmp_path, DISPATCH, "expand_x", one_wrong_code)
    report = compare(tmp_path, accept=[NOT_SATURATED])
    assert report.exit_code == 1
    (output,) = (o for o in report.outputs if o.verdict is Verdict.OUT_OF_RULE)
    assert output.name == "expand_x"
