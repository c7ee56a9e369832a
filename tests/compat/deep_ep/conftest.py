"""Short limits, so that a rank that fails a check does not hold its peers up."""

from __future__ import annotations

import pytest

from moe_triton.compat import deep_ep


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(deep_ep.Buffer, "timeout_secs", 5.0)
