"""What the README shows runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_on_four_ranks(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = tmp_path / "layer.py"
    # The example has nothing to print; what it computed can be looked at before it ends.
    expected = "2 * x.float() * weights.sum(1, True)"
    end = "torch.distributed.destroy_process_group()"
    check = f"assert torch.allclose(out.float(), {expected}, rtol=2e-2)\n{end}"
    assert end in block
    script.write_text(block.replace(end, check))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*command, "--nproc-per-node", "4", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_the_plan_of_replicas_is_as_balanced_as_it_says():
    (block,) = re.findall(r"```py\n(from moe_triton import eplb\n.*?)```", README, re.DOTALL)
    names = {"torch": torch, "ids": torch.arange(256).view(-1, 8), "rank": 5}
    exec(block, names)
    plan = names["plan"]
    before, after = re.search(r"([\d.]+) and ([\d.]+): the most", block).groups()
    assert f"{plan.balance_before:.1f} {plan.balance_after:.2f}" == f"{before} {after}"
    assert torch.equal(plan.placement[names["ids"]], torch.arange(256).view(-1, 8))
    greedy = names["eplb"].plan_greedy(names["load"], num_ranks=32, num_slots=288)
    assert f"`eplb.plan_greedy`, {greedy.balance_after:.2f} here" in README
