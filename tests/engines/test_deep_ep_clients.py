"""Clients of DeepEP, unmodified, over this library's interface, in their own environments."""

from __future__ import annotations

import engine_jobs
import pytest

pytestmark = pytest.mark.engines

CLIENTS = {
    "megatron": "megatron_manager.py",
    "vllm": "vllm_prepare_finalize.py",
    "sglang": "sglang_dispatcher.py",
}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("engine", CLIENTS)
def test_client(engine, ranks, tmp_path):
    script = engine_jobs.FOLDER / "deep_ep_clients" / CLIENTS[engine]
    job = {"cases": [], "port": engine_jobs.free_ports(1)}
    environment = engine_jobs.SGLANG_AIDS if engine == "sglang" else {}
    engine_jobs.run([engine_jobs.python(engine), script], ranks, job, tmp_path, **environment)
