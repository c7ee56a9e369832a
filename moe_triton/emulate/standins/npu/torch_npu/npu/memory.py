"""Memory statistics of ``torch.npu``: those of the host device.

On CUDA they are PyTorch's. PyTorch does not count the memory of CPU tensors, so there the device
is this machine, and what is allocated is what is resident of this process.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_triton.emulate import host_memory, missing
from moe_triton.emulate.device import HOST, on_host

_ON_CUDA = HOST.type == "cuda"


def empty_cache() -> None:
    """Free cached memory."""
    if _ON_CUDA:
        torch.cuda.empty_cache()


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes."""
    if _ON_CUDA:
        return torch.cuda.mem_get_info(on_host(device))
    return host_memory.free_and_total()


def memory_stats(device: Any = None) -> dict[str, Any]:
    """PyTorch's statistics; on the CPU only current and peak bytes, allocated and reserved."""
    if _ON_CUDA:
        return torch.cuda.memory_stats(on_host(device))
    current, peak = host_memory.resident_and_peak()
    return {
        f"{kind}_bytes.all.{when}": value
        for kind in ("allocated", "reserved")
        for when, value in (("current", current), ("peak", max(current, peak)))
    }


def memory_allocated(device: Any = None) -> int:
    """Bytes of tensors; on the CPU, resident bytes of this process."""
    return memory_stats(device).get("allocated_bytes.all.current", 0)


def max_memory_allocated(device: Any = None) -> int:
    """The most that ``memory_allocated`` has been since ``reset_peak_memory_stats``."""
    return memory_stats(device).get("allocated_bytes.all.peak", 0)


def memory_reserved(device: Any = None) -> int:
    """Bytes of PyTorch's allocator; on the CPU as ``memory_allocated``."""
    return memory_stats(device).get("reserved_bytes.all.current", 0)


def max_memory_reserved(device: Any = None) -> int:
    """The most that ``memory_reserved`` has been since ``reset_peak_memory_stats``."""
    return memory_stats(device).get("reserved_bytes.all.peak", 0)


def reset_peak_memory_stats(device: Any = None) -> None:
    """Let the peaks begin at what is allocated now."""
    if _ON_CUDA:
        torch.cuda.reset_peak_memory_stats(on_host(device))
    else:
        host_memory.reset_peak()


reset_max_memory_allocated = reset_peak_memory_stats


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    """Limit PyTorch's allocator on CUDA; nothing on the CPU."""
    if _ON_CUDA:
        torch.cuda.set_per_process_memory_fraction(fraction, on_host(device))


__getattr__ = missing.module_getattr("torch.npu.memory")
