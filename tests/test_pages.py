"""Every code block of the README and of the pages under docs/ runs, and prints what stands there.

A ``python`` block with a title is a file, which the page's commands run. One without continues the
blocks before it on its page. A ``text`` block right after a ``python`` block without a title or
after commands is their output; the lines of several ranks come in any order.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import moe_triton

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```\n", re.MULTILINE)
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
# Programs that blocks run; other commands install or build. Those of examples/ run in
# test_examples.py, the demo in test_cli.py, and the benches in tests/bench.
PROGRAMS = {
    "python": [sys.executable],
    # Into files: ranks that share a pipe write into each other's lines.
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--log-dir", "ranks", "--redirects", "1"),
    ],
    "moe-triton": [sys.executable, "-m", "moe_triton"],
}
ELSEWHERE = ("examples/", "bench", "docs/", "tests/", "demo")


class Block(NamedTuple):
    """A fenced block, with the text block that follows at once, or None."""

    language: str
    title: str | None
    text: str
    output: str | None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, those that are output left out."""
    text = (ROOT / page).read_text(encoding="utf-8")
    actual: list[Block] = []
    end = -1
    for match in FENCE.finditer(text):
        language, _, options = match[1].partition(" ")
        follows = end >= 0 and not text[end : match.start()].strip()
        if language == "text" and follows and actual[-1].output is None:
            actual[-1] = actual[-1]._replace(output=match[2])
        else:
            title = re.fullmatch(r'title="(\S+)"', options)
            actual.append(Block(language, title and title[1], match[2], None))
        end = match.end()
    return actual


BLOCKS = {page: blocks(page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(FENCE.findall(text)), "a fence is not closed"
    for block in BLOCKS[page]:
        assert block.language in ("python", "sh", "text"), block


def pages_with(wanted) -> list[str]:
    return [page for page, actual in BLOCKS.items() if any(map(wanted, actual))]


def is_inline(block: Block) -> bool:
    return block.language == "python" and block.title is None


@pytest.fixture
def own_logging():
    """Takes back what a page sets up."""
    log = logging.getLogger("moe_triton")
    handlers, level = [*log.handlers], log.level
    yield
    log.handlers[:] = handlers
    log.setLevel(level)


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize("page", pages_with(is_inline))
def test_python(page):
    names = {"__name__": "__main__"}
    try:
        for block in filter(is_inline, BLOCKS[page]):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.text, page, "exec"), names)
            if block.output is not None:
                assert printed.getvalue() == block.output
    finally:
        moe_triton.set_profile(None)
        moe_triton.set_backend(None)
        moe_triton.comm.close_all()


def commands(block: Block) -> list[list[str]]:
    """The commands of a block that are run here, as words."""
    joined = block.text.replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [
        words
        for words in lines
        if words and words[0] in PROGRAMS and not any(word.startswith(ELSEWHERE) for word in words)
    ]


def is_commands(block: Block) -> bool:
    return block.language == "sh" and bool(commands(block))


@pytest.mark.parametrize("page", pages_with(is_commands))
def test_commands(page, tmp_path):
    # This copy of the package, and no other folder of the root: `kernels` hides a distribution.
    (tmp_path / "moe_triton").symlink_to(ROOT / "moe_triton")
    # Unbuffered, processes would write parts of lines in between each other.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for block in BLOCKS[page]:
        if "transformers" in block.text:
            pytest.importorskip("transformers", reason="transformers is not installed")
        if block.title is not None:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        if not is_commands(block):
            continue
        printed = ""
        for program, *arguments in commands(block):
            run = subprocess.run(
                [*PROGRAMS[program], *arguments],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert run.returncode == 0, run.stderr
            printed += run.stdout
            for log in tmp_path.glob("ranks/**/stdout.log"):
                printed += log.read_text(encoding="utf-8")
                log.unlink()
        assert "False" not in printed, "a check that the page prints failed"
        if block.output is not None:
            assert sorted(printed.splitlines()) == sorted(block.output.splitlines())


@pytest.mark.parametrize("page", PAGES)
def test_files_are_run(page):
    """A titled block that no command names would never run."""
    run = {word for block in BLOCKS[page] if block.language == "sh" for word in block.text.split()}
    titles = [block.title for block in BLOCKS[page] if block.title is not None]
    for title in titles:
        imported = any(f"from {title.removesuffix('.py')} " in b.text for b in BLOCKS[page])
        assert title in run or imported, f"{page} shows {title} and does not run it"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r'(?:\]\(|src="|srcset=")([^)"#\s]+)', FENCE.sub("", text)):
        if not target.startswith(("http", "mailto:")):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:bench|docs|examples|moe_triton|tests)/[\w./-]+)`", text):
        if "NAME" not in path and "_build" not in path:
            assert (ROOT / path).exists(), f"{page} names {path}"
