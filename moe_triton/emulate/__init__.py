"""Run scripts without the packages that they import: ``moe-triton npu-run`` and ``deep-ep-run``.

``bootstrap`` starts a script with a folder of ``standins`` on its path: thin packages named
torch_npu and torchair, which install the other modules here on import, or deep_ep, which installs
``moe_triton.compat.deep_ep``.
"""
