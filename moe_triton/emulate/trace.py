"""Traces in the layout of torch_npu's profiler, from those of ``torch.profiler``.

torch_npu's trace is a list of events, and has a track of what ran on the NPU, under CANN's names.
Here that track has the operators and collectives with the times that they took on this machine.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_OPERATOR = "moe_triton::npu_"
# Names of kernels that are not those of their operators.
_KERNELS = {
    "moe_init_routing_v2": "MoeInitRoutingV3",
    "moe_finalize_routing": "MoeFinalizeRoutingV2",
    "moe_gating_top_k_softmax_v2": "MoeGatingTopKSoftmaxV2",
    "moe_gating_top_k": "MoeGatingTopK",
    "swiglu": "SwiGlu",
    "swiglu_backward": "SwiGluGrad",
    "dynamic_quant": "DynamicQuant",
    "alltoallv_gmm": "AlltoAllvGroupedMatMul",
    "gmm_alltoallv": "GroupedMatMulAlltoAllv",
}
_COLLECTIVES = {
    "all_gather": "allGather",
    "all_reduce": "allReduce",
    "all_to_all": "alltoallv",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "reduce_scatter": "reduceScatter",
    "scatter": "scatter",
    "send": "send",
    "recv": "receive",
}


def kernel_name(event_name: str) -> str | None:
    """What CANN calls the operator or collective of an event; None for other events."""
    if event_name.startswith(_OPERATOR):
        name = event_name.removeprefix(_OPERATOR)
        return _KERNELS.get(name) or "".join(part.capitalize() for part in name.split("_"))
    backend, _, collective = event_name.partition(":")
    if backend in ("gloo", "nccl") and collective in _COLLECTIVES:
        return f"hcom_{_COLLECTIVES[collective]}_"
    return None


def device_events(events: list[Event]) -> list[Event]:
    """The track of the NPU: an event for each operator and collective."""
    return [
        {
            "ph": "X",
            "name": name,
            "pid": "NPU",
            "tid": "hccl" if name.startswith("hcom_") else "operators",
            "ts": event["ts"],
            "dur": event["dur"],
            "args": {"Task Type": "HCCL" if name.startswith("hcom_") else "AI_VECTOR_CORE"},
        }
        for event in events
        if event.get("ph") == "X" and (name := kernel_name(event["name"])) is not None
    ]


def convert(path: Path) -> list[Event]:
    """The events of a trace of ``torch.profiler``, and the track of the NPU."""
    events: list[Event] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events + device_events(events)


def write_folder(folder: Path, events: list[Event]) -> None:
    """Write the files that torch_npu's trace handler writes, as far as this machine has them.

    ``trace_view.json`` has all events; ``kernel_details.csv`` one row for each event of the NPU's
    track, with the columns whose values are known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trace_view.json").write_text(json.dumps(events), encoding="utf-8")
    with (folder / "kernel_details.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Name", "Type", "Accelerator Core", "Start Time(us)", "Duration(us)"])
        for event in events:
            if event.get("pid") == "NPU":
                name, core = event["name"], event["args"]["Task Type"]
                table.writerow([name, name, core, event["ts"], event["dur"]])
