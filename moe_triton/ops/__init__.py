"""What every door to the library shares: argument checks, device steps, custom ops, layer sizes.

checks          arguments of public calls, checked once
layer_config    sizes of an expert-parallel layer, and the window memory they need
device_steps    the steps of each back end
quantization    scales and factors of quantised rows
custom_op       ops as compilers see them
"""

from __future__ import annotations

from .device_steps import steps_on
from .layer_config import layer_config, window_bytes

__all__ = ["layer_config", "steps_on", "window_bytes"]
