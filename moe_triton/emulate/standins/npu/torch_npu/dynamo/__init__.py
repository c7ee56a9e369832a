"""``torch_npu.dynamo``, where torch_npu keeps its copy of torchair."""

import torchair

__all__ = ["torchair"]
