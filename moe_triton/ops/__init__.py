"""Shared by all public interfaces: argument checks, device steps, custom ops, layer sizes.

checks          arguments of public calls, checked once
layer_config    sizes of an expert-parallel layer, and the bytes of its windows
device_steps    the device steps of each back end, as one typed table
compile_once    kernels compiled and loaded once, although several threads launch them
quantization    scales and factors of quantised rows
custom_op       ops as torch.library registers them for compilers
"""

from __future__ import annotations

from .device_steps import steps_on
from .layer_config import layer_config, window_bytes

__all__ = ["layer_config", "steps_on", "window_bytes"]
