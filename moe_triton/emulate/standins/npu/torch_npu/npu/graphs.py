"""Graphs of ``torch.npu``: those of CUDA, or refused.

No call on the CPU is captured and replayed: a graph that ran its calls again in Python would hide
what breaks on an NPU. So the names are there, for annotations, and raise when they are used.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_triton.emulate import missing
from moe_triton.emulate.device import HOST

_ON_CUDA = HOST.type == "cuda"


def is_current_stream_capturing() -> bool:
    """Whether a graph is being captured; never on the CPU."""
    return _ON_CUDA and torch.cuda.is_current_stream_capturing()


def _refused(name: str) -> Any:
    """A class, so that annotations can use it, whose calls are refused."""

    def refuse(cls: type, *_: object, **__: object) -> Any:
        del cls
        return missing.refuse_call(f"torch.npu.{name}")

    doc = "Refused: graphs are not emulated on the CPU."
    return type(name, (), {"__new__": refuse, "__doc__": doc, "__module__": "torch.npu"})


NPUGraph: Any = torch.cuda.CUDAGraph if _ON_CUDA else _refused("NPUGraph")
graph: Any = torch.cuda.graph if _ON_CUDA else _refused("graph")
graph_pool_handle: Any = torch.cuda.graph_pool_handle if _ON_CUDA else _refused("graph_pool_handle")
make_graphed_callables: Any = (
    torch.cuda.make_graphed_callables if _ON_CUDA else _refused("make_graphed_callables")
)
# CUDA graphs have no tasks that are updated in place, and no events outside a graph.
ExternalEvent = _refused("ExternalEvent")
graph_task_group_begin = _refused("graph_task_group_begin")
graph_task_group_end = _refused("graph_task_group_end")
graph_task_update_begin = _refused("graph_task_update_begin")
graph_task_update_end = _refused("graph_task_update_end")


__getattr__ = missing.module_getattr("torch.npu.graphs")
