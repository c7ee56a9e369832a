"""Stand-in for deep_ep under ``moe-triton deep-ep-run``; the import replaces it."""

from __future__ import annotations

from moe_triton.compat import deep_ep
from moe_triton.emulate import children, settings

settings.check_started_by("deep-ep-run", __name__)
children.install()
deep_ep.install(replace=True)
