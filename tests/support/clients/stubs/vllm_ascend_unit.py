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

from vllm.v1.worker import lora_model_runner_mixin  # noqa: E402 - not before the product is known

# vLLM 0.32.0 has the class under its older name.
if not hasattr(lora_model_runner_mixin, "GPUInputBatch"):
    lora_model_runner_mixin.GPUInputBatch = lora_model_runner_mixin.InputBatch
