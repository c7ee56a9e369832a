"""Where scripts import ``compiler_config`` from."""

from moe_triton.emulate import missing

__getattr__ = missing.module_getattr("torchair.configs")
