"""The ops: arguments are checked once, at this door, then a transport runs the device steps.

Which files are for what:

    between ranks      dispatch, combine, split; behind them inputs, shapes, places, ranks,
                       tensor_parallel, returned, under_way, messages
    on one device      gating, replicas, permute, routing_map, init_routing, finalize,
                       expert_order; behind them rows, gradients
    their arguments    checks, arguments, names, formats, sizes, buffsize
    for compilers      custom_op
    for back ends      steps
"""

from __future__ import annotations

from .arguments import GroupArguments
from .buffsize import required_buffsize_mb
from .combine import distribute_combine
from .dispatch import distribute_dispatch
from .sizes import layer_config, window_bytes
from .steps import device_steps

__all__ = [
    "GroupArguments",
    "device_steps",
    "distribute_combine",
    "distribute_dispatch",
    "layer_config",
    "required_buffsize_mb",
    "window_bytes",
]
