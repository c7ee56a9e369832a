"""Every example runs by the commands of its docstring and prints the output there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def shown(script: str) -> tuple[list[str], list[str]]:
    """The commands and outputs in an example's docstring, indented by 4."""
    text = ast.get_docstring(ast.parse((EXAMPLES / script).read_text(encoding="utf-8")))
    blocks = [
        re.sub("^ {4}", "", block, flags=re.MULTILINE)
        for block in text.split("\n\n")
        if block.startswith("    ")
    ]
    commands = [line for line in blocks[0].splitlines() if script in line]
    return commands, blocks[1:]


def output_of(script: str, arguments: list[str], folder: Path) -> str:
    """The output of ``python arguments``, which name the script as its docstring does."""
    # Link the package alone: transformers would take the root's link `kernels` for a distribution.
    (folder / "moe_triton").symlink_to(ROOT / "moe_triton")
    arguments = [word.replace(f"examples/{script}", f"{EXAMPLES / script}") for word in arguments]
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.rstrip()


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.full)])
def test_transformers_generate(number, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    commands, outputs = shown("transformers_generate.py")
    assert len(commands) == len(outputs) == 2
    torchrun, *arguments = shlex.split(commands[number])
    assert torchrun == "torchrun"
    arguments = ["-m", "torch.distributed.run", "--standalone", *arguments]
    assert output_of("transformers_generate.py", arguments, tmp_path) == outputs[number]


@pytest.mark.parametrize(
    "script, number",
    [
        pytest.param("aclnn_dispatch_combine.py", 0, id="aclnn-threads"),
        pytest.param("aclnn_dispatch_combine.py", 1, id="aclnn-processes", marks=pytest.mark.full),
        pytest.param("eplb_chain.py", 0, id="eplb-threads"),
        pytest.param("eplb_chain.py", 1, id="eplb-processes"),
    ],
)
def test_on_16_ranks(script, number, tmp_path):
    commands, (output,) = shown(script)
    assert len(commands) == 2
    python, *arguments = shlex.split(commands[number])
    assert python == "python"
    assert output_of(script, arguments, tmp_path) == output


def test_train(tmp_path):
    (command,), (output,) = shown("train.py")
    torchrun, *arguments = shlex.split(command)
    assert torchrun == "torchrun"
    arguments = ["-m", "torch.distributed.run", "--standalone", *arguments]
    assert output_of("train.py", arguments, tmp_path) == output
