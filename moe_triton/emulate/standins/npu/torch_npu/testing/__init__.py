"""``torch_npu.testing``, as far as tests of operators use it."""

from moe_triton.emulate import missing

__getattr__ = missing.module_getattr("torch_npu.testing")
