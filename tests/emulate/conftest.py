"""Running scripts through ``moe-triton npu-run``."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import pytest

from moe_triton.cli import main

SCRIPTS = Path(__file__).parent / "scripts"


@dataclasses.dataclass(frozen=True)
class Run:
    """A script's exit status, and the output of it and its children."""

    status: int
    out: str
    err: str


@pytest.fixture
def npu_run(capfd):
    """``npu_run(*arguments)`` runs the command; a bare file name is one of ``scripts``."""

    def run(*arguments) -> Run:
        named = [SCRIPTS / a if (SCRIPTS / a).is_file() else a for a in arguments]
        status = main(["npu-run", *map(str, named)])
        return Run(status, *capfd.readouterr())

    return run


@pytest.fixture
def port():
    """A free port for the rendezvous of the scripts."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
