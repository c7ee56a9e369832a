"""What the README promises about itself, and that what it and docs/architecture.md name exists."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import moe_triton
from moe_triton import testing

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moe_triton"
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_it_is_short_and_says_first_what_has_run():
    lines = README.splitlines()
    assert len(lines) <= 140
    first_screen = "\n".join(lines[:24])
    for device in ("CPU", "GPU", "NPU"):
        assert device in first_screen


def test_it_links_to_every_page():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README, f"README.md does not link to {page.name}"


def test_the_files_of_the_tree_exist():
    tree = README.rsplit("```text\n", 1)[1].split("```", 1)[0]
    folder = ROOT
    actual = 0
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        for name in re.findall(r"[\w-]+(?:/|\.py\b)", line):
            if name.endswith("/"):
                parent = ROOT if indent == 0 else PACKAGE
                folder = parent / name if name != "moe_triton/" else PACKAGE
            path = folder if name.endswith("/") else folder / name
            assert path.exists(), f"README.md names {path.relative_to(ROOT)}"
            actual += 1
    assert actual > 40


# Rows of the page's tables that begin with a question or a hop: a file, and a name in it.
NAMED = re.findall(r"^\| [^|]*\| `([\w/]+\.py)` \| (?:`(\w+)`)? *\|", ARCHITECTURE, re.MULTILINE)


@pytest.mark.parametrize("file, name", NAMED)
def test_the_names_of_the_architecture_exist(file, name):
    path = PACKAGE / file
    assert path.exists(), f"docs/architecture.md names {file}"
    code = path.read_text(encoding="utf-8")
    defined = rf"^\s*(?:def|class) {name}\b|^{name} ="
    assert re.search(defined, code, re.MULTILINE), f"docs/architecture.md: no {name} in {file}"


def test_a_row_travels_in_12_hops():
    hops = re.findall(r"^\| (\d+) \|", ARCHITECTURE, re.MULTILINE)
    assert hops == [str(hop) for hop in range(1, 13)]
    assert len(NAMED) >= 12 + 10


def layer(ctx):
    """What the first rank calls in this package during one round over windows, in order."""
    calls = []

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and "moe_triton" in path.parts:
            calls.append((path.parent.name, frame.f_code.co_name))

    sizes = {"num_experts": 4, "top_k": 2, "hidden": 64, "max_tokens": 4}
    with moe_triton.ExpertParallel(ctx.ep_group, **sizes, quant="int8") as ep:
        x, ids = testing.tokens(4, 64, torch.bfloat16), testing.routing_uniform(4, 4, 2)
        sys.setprofile(note if ctx.rank == 0 else None)
        try:
            received = ep.dispatch(x, ids)
            ep.combine(received.x.bfloat16(), received.handle)
        finally:
            sys.setprofile(None)
    return calls


def test_the_hops_come_in_this_order():
    hops = re.findall(r"^\| \d+ \| `([\w/]+)/\w+\.py` \| `(\w+)` \|", ARCHITECTURE, re.MULTILINE)
    calls = iter(testing.run_local(2, layer)[0])
    for folder, name in hops:
        # On the CPU the definitions run, which have the names of the kernels.
        hop = ("ref" if folder == "kernels" else folder, name)
        # Looked for after the hop before it.
        assert hop in calls, f"docs/architecture.md: {hop} does not follow the hop before it"


def test_the_folders_and_files_of_the_architecture_exist():
    tables = [line for line in ARCHITECTURE.splitlines() if line.startswith("|")]
    for path in re.findall(r"`((?:tests|moe_triton)?/?[\w/]+(?:/|\.py))`", "\n".join(tables)):
        if "NAME" not in path:
            assert (PACKAGE / path).exists() or (ROOT / path).exists(), path


def test_the_pictures_are_current():
    for name, content in runpy.run_path(str(ROOT / "docs/layer.py"))["pictures"]().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == content, "run `make pages`"
