"""Clients of DeepEP, unmodified, over this interface.

Each runs in an environment of its own, as a test of tests/engines/ does; the test skips where there
is none.
"""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import engine_jobs
import pytest

CLIENTS = Path(__file__).with_name("clients")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "engine, script",
    [("megatron", "megatron_manager.py"), ("vllm", "vllm_prepare_finalize.py")],
)
def test_client(engine, script, ranks, tmp_path):
    python = engine_jobs.python(engine)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    logs = [tmp_path / str(rank) for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w", encoding="utf-8") as file:
            command = [python, CLIENTS / script, str(rank), str(ranks), str(port)]
            processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, "\n".join(log.read_text()[-3000:] for log in logs)
