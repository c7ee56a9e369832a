"""Run a test script of a DeepEP checkout, unmodified, on the CPU.

    moe-triton deep-ep-run tests/support/deep_ep_suite.py CHECKOUT SCRIPT ARGS

The script's tensors "on cuda" are on the CPU, its NCCL groups are gloo groups, and its timers call
what they would measure once. ``deep_ep.utils.math``, ``gate``, ``refs`` and ``semantic``, by which
the script checks results, are those of the checkout.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CHECKING = ("semantic", "math", "gate", "refs")  # modules of the checkout, in order of imports
_CHECKOUT, _SCRIPT = "DEEP_EP_SUITE_CHECKOUT", "DEEP_EP_SUITE_SCRIPT"
_BURNER = (8192, 8192)  # matrices whose product keeps a GPU busy while a timer runs


class OnCpu(TorchFunctionMode):
    """Make tensors for "cuda" on the CPU."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.randn and args and tuple(args[0]) == _BURNER:
            args = ((8, 8),)
        return func(*args, **kwargs)


_seeds = {"global": 0}


def init_seed(seed: int) -> None:
    _seeds["global"] = seed
    torch.manual_seed(seed + dist.get_rank())
    random.seed(seed + dist.get_rank())


def init_dist(local_rank: int, num_local_ranks: int, seed: int = 0) -> tuple:
    torch.set_num_threads(1)
    port = os.environ["MASTER_PORT"]
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        world_size=num_local_ranks,
        rank=local_rank,
    )
    torch.set_default_dtype(torch.bfloat16)
    init_seed(seed)
    group = dist.new_group(list(range(num_local_ranks)))
    return dist.get_rank(), dist.get_world_size(), group


def dist_print(text: str = "", once_in_node: bool = False) -> None:
    if not once_in_node or dist.get_rank() == 0:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    dist.barrier()


def bench(fn: Callable[[], Any], *_: Any, **__: Any) -> tuple[float, float, float]:
    fn()
    return 1.0, 1.0, 1.0


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: str | tuple[str, ...],
    *_: Any,
    num_kernels_per_period: int = 1,
    **__: Any,
) -> Any:
    fn()
    time = 1.0 if num_kernels_per_period == 1 else [1.0] * num_kernels_per_period
    return time if isinstance(kernel_names, str) else (time,) * len(kernel_names)


def all_to_all_single(output, input, *args, **kwargs):  # noqa: A002 - torch's name
    """torch's, for dtypes that gloo does not know: as bytes."""

    def raw(x):
        return x.contiguous().view(torch.uint8) if x.dim() > 1 and x.dtype.itemsize == 1 else x

    return _all_to_all_single(raw(output), raw(input), *args, **kwargs)


def all_gather_into_tensor(output, input, *args, **kwargs):  # noqa: A002 - torch's name
    """torch's, also where the output stacks the inputs, which gloo refuses."""
    return _all_gather_into_tensor(output.view(-1, *input.shape[1:]), input, *args, **kwargs)


_all_to_all_single = dist.all_to_all_single
_all_gather_into_tensor = dist.all_gather_into_tensor


def _module(name: str, values: dict[str, Any]) -> None:
    module = types.ModuleType(name)
    vars(module).update(values)
    sys.modules[name] = module


def prepare(checkout: Path) -> None:
    """Replace what needs a GPU, in every process of the script."""
    torch._dynamo.config.disable = True
    OnCpu().__enter__()
    torch.cuda.synchronize = lambda *_: None
    dist.all_to_all_single = all_to_all_single
    dist.all_gather_into_tensor = all_gather_into_tensor
    import deep_ep.utils  # noqa: F401 - puts the package there

    seed = {"get_global_seed": lambda: _seeds["global"]}
    own = {"init_dist": init_dist, "init_seed": init_seed, "dist_print": dist_print}
    _module("deep_ep.utils.envs", own | seed)
    _module("deep_ep.utils.testing", {"bench": bench, "bench_kineto": bench_kineto})
    for name in _CHECKING:
        path = checkout / "deep_ep" / "utils" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"deep_ep.utils.{name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)


def load() -> None:
    """Run the script under this module's name, so that its processes find its functions."""
    if __name__ == "__main__":
        # Children get these from the environment; the script reads the rest of the arguments.
        os.environ[_CHECKOUT], os.environ[_SCRIPT], *arguments = sys.argv[1:]
        sys.argv[1:] = arguments
    script = Path(os.environ[_SCRIPT])
    prepare(Path(os.environ[_CHECKOUT]))
    sys.path.insert(0, str(script.parent))
    # In this module, which is what multiprocessing imports in children.
    exec(compile(script.read_text(), str(script), "exec"), globals())


if __name__ in ("__main__", "__mp_main__"):
    load()
