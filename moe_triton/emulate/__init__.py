"""Run Ascend scripts on machines without NPUs: ``moe-triton npu-run``.

``bootstrap`` starts a script with ``standins`` on its path: thin packages named torch_npu and
torchair, which install the other modules here on import.
"""
