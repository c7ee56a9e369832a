"""Lower every launch with the compiler of triton-ascend, in the stages that need no NPU.

Two programs in one file, as two versions of Triton cannot be imported together: "record" prints a
JSON line for each distinct launch in the environment of the tests, "lower" reads these lines in an
environment where triton is triton-ascend, and prints a line for each result.

    python lowering.py record CASE | ascend/bin/python lowering.py lower
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import traceback

VECTOR_CORES = 48  # of an Ascend 910B
# triton-ascend has no memory order between devices (HCCL exchanges there), and no fp64.
UNSUPPORTED = ("windows", "fp64")


def record() -> None:
    """Print each launch: module, kernel, types of the arguments, constants."""
    from unittest import mock

    from compiling import TARGETS, Device
    from launches import launches
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from moe_triton.kernels import launch_config

    driver.set_active(Device(TARGETS["sm_90"]))
    seen = set()

    def remember(self, *args, grid, warmup, **kwargs):
        *_, backend, binder = self.device_caches[0]
        bound, specialization, options = binder(*args, **kwargs)
        packed = self._pack_args(backend, kwargs, bound, specialization, options)
        _, signature, constants, _ = packed
        names = list(signature)
        line = json.dumps(
            {
                "module": self.fn.__module__,
                "kernel": self.fn.__name__,
                "signature": {
                    name: kind for name, kind in signature.items() if kind != "constexpr"
                },
                "constants": {names[path[0]]: _plain(value) for path, value in constants.items()},
            }
        )
        if line not in seen:
            seen.add(line)
            sys.stdout.write(json.dumps({"case": case}) + "\t" + line + "\n")

    policy = launch_config.npu_policy(VECTOR_CORES)
    with (
        mock.patch.object(JITFunction, "run", remember),
        mock.patch.object(launch_config, "policy", return_value=policy),
    ):
        for case, call in launches():
            if sys.argv[2] in case and not any(word in case for word in UNSUPPORTED):
                call()


def _plain(value):
    """A constant as JSON; Triton's dtypes by name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"dtype": str(value)}


def lower() -> None:
    """Print case, kernel and length of the result, or the error, of each launch."""
    import triton.language as tl

    lowering = functools.cache(_lowering)()
    for line in sys.stdin:
        case, launch = map(json.loads, line.split("\t"))
        result = {**case, "kernel": launch["kernel"], "length": 0, "error": ""}
        try:
            kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
            constants = {
                name: getattr(tl, value["dtype"], None) or tl.dtype(value["dtype"])
                if isinstance(value, dict)
                else value
                for name, value in launch["constants"].items()
            }
            result["length"] = len(lowering(kernel, launch["signature"], constants))
        except BaseException:
            result["error"] = traceback.format_exc()[-3000:]
        sys.stdout.write(json.dumps(result) + "\n")


def _lowering():
    """The stages of triton-ascend before the one that needs CANN, as one function."""
    from triton._C.libtriton import ir
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("npu", "Ascend910B3", 0)
    backend = backends["ascend"].compiler(target)

    def lowered(kernel, signature: dict[str, str], constants: dict[str, object]) -> str:
        source = ASTSource(kernel, signature=signature, constants=constants)
        options = backend.parse_options({})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        codegen, modules = backend.get_codegen_implementation(), backend.get_module_map()
        module = source.make_ir(options, codegen, modules, context)
        metadata = {"target": target, **options.__dict__}
        stages: dict = {}
        backend.add_stages(stages, options)
        for name in ("ttir", "ttadapter"):
            module = stages[name](module, metadata)
        return str(module)

    return lowered


if __name__ == "__main__":
    {"record": record, "lower": lower}[sys.argv[1]]()
