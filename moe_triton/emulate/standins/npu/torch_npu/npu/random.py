"""Random numbers of ``torch.npu``: one generator, that of the host device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_triton.emulate import missing
from moe_triton.emulate.device import HOST, on_host

from .devices import device_count

_ON_CUDA = HOST.type == "cuda"
# One for each NPU, all the same on the CPU.
default_generators = (
    torch.cuda.default_generators if _ON_CUDA else (torch.default_generator,) * device_count()
)


def manual_seed(seed: int) -> None:
    """Seed the generator of the host device."""
    if _ON_CUDA:
        torch.cuda.manual_seed(seed)
    else:
        # Not torch.manual_seed, which calls this function for every kind of device.
        torch.default_generator.manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seed the generators of all devices."""
    if _ON_CUDA:
        torch.cuda.manual_seed_all(seed)
    else:
        manual_seed(seed)


def get_rng_state(device: Any = "npu") -> Tensor:
    """State of the generator, uint8."""
    return torch.cuda.get_rng_state(on_host(device)) if _ON_CUDA else torch.get_rng_state()


def set_rng_state(new_state: Tensor, device: Any = "npu") -> None:
    """Set the state of the generator."""
    if _ON_CUDA:
        torch.cuda.set_rng_state(new_state, on_host(device))
    else:
        torch.set_rng_state(new_state)


def get_rng_state_all() -> list[Tensor]:
    """The state for each NPU: all have the same generator."""
    return [get_rng_state()] * device_count()


def set_rng_state_all(new_states: list[Tensor]) -> None:
    """Set the state of the generator to the first of the states."""
    set_rng_state(new_states[0])


def initial_seed() -> int:
    """The seed of the generator."""
    return torch.cuda.initial_seed() if _ON_CUDA else torch.initial_seed()


def seed() -> None:
    """Seed the generator with a random number."""
    manual_seed(torch.seed())


seed_all = seed


__getattr__ = missing.module_getattr("torch.npu.random")
