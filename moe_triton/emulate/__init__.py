"""Ascend scripts where there is no NPU: ``moe-triton npu-run``.

``launch`` starts a script with ``standins`` on its path, which holds packages named torch_npu and
torchair. They are thin; the other modules here are what they install when they are imported.
"""
