"""``torch_npu.contrib.transfer_to_npu``: on import, a program for CUDA uses NPUs."""

from moe_triton.emulate import cuda_names

cuda_names.install()
