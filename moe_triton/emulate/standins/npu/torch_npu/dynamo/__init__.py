"""``torch_npu.dynamo``, where torch_npu keeps its copy of torchair."""

import torchair

from moe_triton.emulate import missing

__all__ = ["torchair"]


__getattr__ = missing.module_getattr("torch_npu.dynamo")
