"""How far npu-run emulates the names of torch_npu around its operators, for ``docs/ascend.md``."""

from __future__ import annotations

from typing import NamedTuple


class Names(NamedTuple):
    """Names with the same extent.

    Attributes:
        names: full, as a program writes them.
        note: what holds for them.
    """

    names: tuple[str, ...]
    note: str


def _npu(*names: str) -> tuple[str, ...]:
    return tuple(f"torch.npu.{name}" for name in names)


EXACTLY = (
    Names(
        _npu("is_available", "device_count", "current_device", "set_device", "device"),
        "as many devices as `--devices` says, per thread",
    ),
    Names(("torch.Generator", "torch.Tensor.record_stream"), "they take NPUs and their streams"),
    Names(
        ("torch_npu.npu_format_cast", "torch_npu.get_npu_format", "torch_npu.Format"),
        "the format is noted on the storage, and changes no value",
    ),
    Names(("torch_npu.float8_e8m0fnu", "torch_npu.hifloat8"), "and the other dtype constants"),
    Names(("torch_npu.npu.amp.autocast", "torch_npu.npu.amp.GradScaler"), "those of the host"),
    Names(
        ("torch_npu.contrib.transfer_to_npu",),
        "the device `cuda`, `torch.cuda` and `nccl` become those of npu; `torch.jit` stays",
    ),
)

IN_PART = (
    Names(
        _npu("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state", "random"),
        "one generator for all devices, so numbers are not those of an NPU",
    ),
    Names(
        _npu("Stream", "Event", "stream", "current_stream", "default_stream", "synchronize"),
        "work is complete when a call returns; events are times of this machine",
    ),
    Names(
        _npu(
            *("memory_allocated", "max_memory_allocated", "memory_reserved", "memory_stats"),
            *("reset_peak_memory_stats", "mem_get_info", "empty_cache"),
        ),
        "on a CPU, the memory of this process and of this machine",
    ),
    Names(
        _npu("get_device_properties", "get_device_name", "get_soc_version"),
        "the product of the active profile, with the memory of this machine",
    ),
    Names(
        (*_npu("config", "matmul", "conv"), *_npu("set_option", "set_compile_mode")),
        "can be set and read, and change nothing",
    ),
    Names(
        ("torch_npu.profiler.profile", "torch_npu.profiler.tensorboard_trace_handler"),
        "over `torch.profiler`: `trace_view.json` and `kernel_details.csv`, with CANN's names of "
        "operators and collectives and the times of this machine; no counters",
    ),
    Names(
        ("torch_npu._C._distributed_c10d.ProcessGroupHCCL",),
        "its `Options` can be set, and only the time-out has an effect",
    ),
    Names(
        ("torch_npu.utils.register_asd_hook", "torch_npu.utils.collect_env.get_cann_version"),
        "do nothing, and say `not known`",
    ),
    Names(("torchair.get_npu_backend",), "compiles with aot_eager"),
)

NOT_AT_ALL = (
    Names(
        _npu(
            *("NPUGraph", "graph", "graph_pool_handle", "make_graphed_callables"),
            *("ExternalEvent", "graph_task_group_begin", "graph_task_group_end"),
            *("graph_task_update_begin", "graph_task_update_end"),
        ),
        "refused when called on a CPU; on a GPU the first four are those of CUDA",
    ),
    Names(
        ("torch_npu.npu_fusion_attention",),
        "refused when called; transformers and accelerate can import it",
    ),
)
