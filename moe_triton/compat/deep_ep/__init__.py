"""The interface of DeepEP, the module that clients import as ``deep_ep``, on any device.

    from moe_triton.compat import deep_ep
    deep_ep.install()
    import deep_ep

``Buffer`` is its first version: high-throughput calls with one row per token and rank, and
low-latency calls with one row per token and expert in a fixed shape. ``ElasticBuffer`` is its
second, and ``EPBuffer`` that of version 2.5. Names, layouts, dtypes and the order of rows and sums
are those of the original; sizes are free. docs/deep_ep.md says what differs.

Source: the Python files and tests of github.com/deepseek-ai/DeepEP (2.1.0), and version 2.5's
``EPBuffer``.
"""

from __future__ import annotations

from . import utils
from .buffer import Buffer
from .config import Config, topk_idx_t
from .elastic import ElasticBuffer
from .ep_buffer import EPBuffer
from .handle import EPHandle
from .install import install
from .utils import EventHandle, EventOverlap, get_logical_domain_size, get_physical_domain_size

__all__ = [
    "Buffer",
    "Config",
    "EPBuffer",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "install",
    "topk_idx_t",
    "utils",
]
