"""A pytest plugin for vllm-ascend's unit tests in place of its conftest, which mocks torch_npu.

Its conftest also needs a newer vLLM. The tests need no more of it than the product.
"""

import sys
import types
from importlib.machinery import ModuleSpec

info = types.ModuleType("vllm_ascend._build_info")
info.__device_type__ = "A2"
info.__spec__ = ModuleSpec(info.__name__, None)
sys.modules[info.__name__] = info

# Its patches of vLLM's workers are for a newer vLLM, too, and of no use to the tests.
sys.modules["vllm_ascend.patch.worker"] = types.ModuleType("vllm_ascend.patch.worker")
