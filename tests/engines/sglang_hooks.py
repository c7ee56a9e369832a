"""Asserts that the plug-in adds hooks to SGLang with its variable, and none without."""

from __future__ import annotations

import os

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
os.environ.pop("MOE_TRITON_SGLANG", None)

from importlib.metadata import entry_points

from sglang.srt.layers.moe import utils
from sglang.srt.layers.moe.ep_moe import layer as ep_layer
from sglang.srt.layers.moe.fused_moe_triton import layer
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry

FUNCTIONS = (
    (layer, "create_moe_dispatcher"),
    (ep_layer, "get_moe_impl_class"),
    (utils, "post_experts_output_is_complete"),
)


def identities() -> list[int]:
    return [id(getattr(module, name)) for module, name in FUNCTIONS]


before = identities()
(entry,) = (e for e in entry_points(group="sglang.srt.plugins") if e.name == "moe_triton")
load_plugins()
HookRegistry.apply_hooks()
assert identities() == before
assert not any("moe" in target for target in HookRegistry._hooks)

os.environ["MOE_TRITON_SGLANG"] = "1"
for _ in range(2):
    entry.load()()
HookRegistry.apply_hooks()
hooked = {target: len(hooks) for target, hooks in HookRegistry._hooks.items() if hooks}
assert hooked == {f"{module.__name__}.{name}": 1 for module, name in FUNCTIONS}, hooked
assert all(now != then for now, then in zip(identities(), before, strict=True))
