"""Distinct launches of the kernels on an NPU, as JSON lines.

A line has what a compiler needs: module and kernel, types of the arguments, constants. Two ways to
make lines, both without an NPU and with the tiles that one gets:

    python recording.py --cores CORES              launches of launches.py, none of which runs
    pytest -p recording --launches FILE TEST       launches of tests, in the interpreter

The file is ``launches.jsonl``, and tests say when it is out of date. To make it again, or the
lines of the kernels that some test files are about:

    python tests/kernels/ascend/recording.py [test_quantize.py ...]
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import hypothesis
import pytest

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parent))  # compiling.py, launches.py
FILE = FOLDER / "launches.jsonl"
# A 910B3, an A3 and a 950: tiles of few rows depend on the number of cores.
CORES = (40, 48, 64)
# Files of tests whose launches are not of an NPU: steps over windows, which need an order of memory
# between devices, graphs, and other policies.
LEFT_OUT = ("window", "_send", "_recv.py", "records", "captured", "graphs", "compiled", "launch")
KERNELS = "moe_triton.kernels."
EXAMPLES = 6  # of each drawn test
# Kernels whose results give the sizes of launches. Others do not run, which saves most of the time.
INDEX_KERNELS = ("_groups", "routing_plan", "row_index", "recv_permutation", "local_permutation")


def plain(value: object) -> object:
    """A constant as JSON; Triton's dtypes by name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"dtype": str(value)}


def described(kernel, arguments: tuple, options: dict) -> tuple[dict, dict]:
    """What a compiler needs of a launch of a ``JITFunction``, as JSON; and its arguments."""
    *_, backend, binder = kernel.device_caches[0]
    bound, specialization, compiled = binder(*arguments, **options)
    packed = kernel._pack_args(backend, options, bound, specialization, compiled)
    _, signature, constants, _ = packed
    names = list(signature)
    launch = {
        "module": kernel.fn.__module__,
        "kernel": kernel.fn.__name__,
        "signature": {name: kind for name, kind in signature.items() if kind != "constexpr"},
        "constants": {names[path[0]]: plain(value) for path, value in constants.items()},
    }
    return launch, bound


def as_compiled(interpreted):
    """The ``JITFunction`` of an interpreted one, on a device that need not be there."""
    from compiling import TARGETS, Device
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Device(TARGETS["sm_90"]))
    options = interpreted.kwargs.get("do_not_specialize")
    return JITFunction(interpreted.fn, do_not_specialize=options)


def draw_few(examples: int) -> None:
    """Let drawn tests take few examples, the same in every run."""
    hypothesis.settings.register_profile(
        "few", max_examples=examples, deadline=None, derandomize=True
    )
    hypothesis.settings.load_profile("few")


def lowered(launch: dict) -> bool:
    """Whether triton-ascend takes the types of a launch, and its scheme exists."""
    if launch["constants"].get("SCHEME") == "per_column":  # of a test of errors
        return False
    return not any(kind.endswith("fp64") for kind in launch["signature"].values())


def of_launches(cores: int) -> Iterator[dict]:
    """The launches of ``launches.py``, none of which runs."""
    from compiling import TARGETS, Device
    from launches import launches, small_launches
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from moe_triton.kernels import launch_config

    driver.set_active(Device(TARGETS["sm_90"]))
    found: list[dict] = []

    def remember(self, *arguments, grid, warmup, **options):
        found.append(described(self, arguments, options)[0])

    policy = launch_config.npu_policy(cores)
    with (
        mock.patch.object(JITFunction, "run", remember),
        mock.patch.object(launch_config, "policy", return_value=policy),
    ):
        for case, call in itertools.chain(launches(), small_launches()):
            if "windows" not in case and "fp64" not in case:
                call()
                yield from found
                found.clear()


def use_npu_tiles() -> Callable[[], bool]:
    """Launch kernels with the tiles of an NPU; returns whether a test has not patched that."""
    from moe_triton.kernels import launch_config

    # Few programs, as each costs the interpreter time; the grid is not recorded.
    limits = dataclasses.replace(launch_config.npu_policy(CORES[0]), num_programs=2)

    def policy(device):
        return limits

    launch_config.policy = policy
    shapes = {name: getattr(launch_config, name) for name in ("tiles", "token_tiles")}

    def unpatched() -> bool:
        modules = [sys.modules[name] for name in sys.modules if name.startswith(KERNELS)]
        return launch_config.policy is policy and all(
            getattr(module, name, shape) is shape
            for module in modules
            for name, shape in shapes.items()
        )

    return unpatched


class Recorder:
    """Writes the launches of the tests of a run to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: set[str] = set()

    def install(self) -> None:
        """Patch the interpreter."""
        from triton.runtime.interpreter import InterpretedFunction

        run = InterpretedFunction.run
        has_npu_tiles = use_npu_tiles()

        @functools.cache
        def compiled(interpreted):
            return as_compiled(interpreted)

        def record(interpreted, *arguments, grid, warmup, **options):
            if interpreted.fn.__module__.startswith(KERNELS) and has_npu_tiles():
                kernel = compiled(interpreted)
                launch, _ = described(kernel, arguments, {"debug": False, **options})
                if lowered(launch):
                    self.lines.add(json.dumps(launch))
            if interpreted.fn.__module__.endswith(INDEX_KERNELS):
                run(interpreted, *arguments, grid=grid, warmup=warmup, **options)

        InterpretedFunction.run = record

    def pytest_sessionfinish(self) -> None:
        self.path.write_text("".join(f"{line}\n" for line in sorted(self.lines)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--launches", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    draw_few(EXAMPLES)
    recorder = Recorder(config.getoption("--launches"))
    recorder.install()
    config.pluginmanager.register(recorder)


def read() -> list[dict]:
    """The recorded launches."""
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def fits(launch: dict) -> bool:
    """Whether the kernel of a launch has the parameters that the launch names."""
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"], None)
    names = set(launch["signature"]) | set(launch["constants"])
    return kernel is not None and names == set(kernel.arg_names)


def files() -> list[str]:
    """Test files whose launches are recorded."""
    names = sorted(path.name for path in FOLDER.parent.glob("test_*.py"))
    return [name for name in names if not any(word in name for word in LEFT_OUT)]


def of_file(name: str) -> set[str]:
    """The launches of a test file with the tiles of an NPU; its tests may fail without results."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "launches"
        command = [
            sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider",
            "-p", "recording", f"--launches={into}", FOLDER.parent / name,
        ]  # fmt: skip
        paths = f"{FOLDER}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.exit(f"{name}:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
        return set(into.read_text().splitlines())


def of_cores(cores: int) -> set[str]:
    """The launches of ``launches.py`` on an NPU of that many cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "--cores", str(cores)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def main() -> None:
    if sys.argv[1:2] == ["--cores"]:
        for launch in of_launches(int(sys.argv[2])):
            sys.stdout.write(f"{json.dumps(launch)}\n")
        return
    wanted = sys.argv[1:]
    lines = {json.dumps(launch) for launch in read() if wanted and fits(launch)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines.update(*pool.map(of_file, wanted or files()), *pool.map(of_cores, CORES))
    FILE.write_text("".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
