"""Asserts that the plug-in changes vLLM's MoE modules with its variable, and not without."""

from __future__ import annotations

import os

os.environ.pop("MOE_TRITON_VLLM", None)

from importlib.metadata import entry_points

from vllm.model_executor.layers.fused_moe import all2all_utils, modular_kernel
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as unquantized
from vllm.plugins import load_general_plugins

MODULES = (all2all_utils, modular_kernel, unquantized)
SYMBOL = "make_moe_prepare_and_finalize_naive_dp_ep"


def everything() -> dict[tuple[str, ...], int]:
    """The identity of all names of the modules and of their classes."""
    found: dict[tuple[str, ...], int] = {}
    for module in MODULES:
        for name, value in vars(module).items():
            found[module.__name__, name] = id(value)
            if isinstance(value, type):
                for attribute, member in vars(value).items():
                    found[module.__name__, name, attribute] = id(member)
    return found


before = everything()
(entry,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "moe_triton")
load_general_plugins()
entry.load()()
assert everything() == before

os.environ["MOE_TRITON_VLLM"] = "1"
entry.load()()
replaced = getattr(all2all_utils, SYMBOL)
assert {key for key, value in everything().items() if before.get(key) != value} == {
    (all2all_utils.__name__, SYMBOL)
}
entry.load()()
assert getattr(all2all_utils, SYMBOL) is replaced
