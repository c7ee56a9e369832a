"""``torch_npu.testing``, as far as tests of operators use it."""
