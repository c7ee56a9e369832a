"""``torch_npu.contrib.transfer_to_npu``: on import, a program for CUDA uses NPUs."""

from moe_triton.emulate import cuda_names, missing

cuda_names.install()


__getattr__ = missing.module_getattr("torch_npu.contrib.transfer_to_npu")
