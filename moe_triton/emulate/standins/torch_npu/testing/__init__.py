"""``torch_npu.testing``: what the tests of operators use."""
