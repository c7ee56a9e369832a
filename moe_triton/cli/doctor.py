"""``moe-triton doctor``: devices, versions, what works here, and the memory of windows."""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import __version__, backend
from ..comm import atomics, symm_mem
from ..comm.local import LocalMemory
from ..comm.memory import Memory
from ..comm.shm import MemfdMemory, PosixMemory
from . import window_sizes
from .terminal import Terminal, plural, size

_PACKAGES = ("torch", "triton", "numpy", "torch_npu", "triton-ascend", "nvidia-ml-py")
# Device file of a driver -> device, and whether this build of PyTorch can use it.
DRIVERS: dict[str, tuple[str, Callable[[], bool]]] = {
    "/dev/nvidiactl": ("an NVIDIA GPU", lambda: torch.version.cuda is not None),
    "/dev/kfd": ("an AMD GPU", lambda: torch.version.hip is not None),
    "/dev/davinci_manager": ("an Ascend NPU", lambda: hasattr(torch, "npu")),
}
_SHM = Path("/dev/shm")
# Every variable that the package, its tests or its benches read, with its meaning.
# docs/environment.md shows the same table, and a test compares both.
ENVIRONMENT: dict[str, str] = {
    "MOE_TRITON_BACKEND": "back end of all calls: cpu, interpret, cuda, rocm, npu; unset, the "
    "device of the tensors chooses; set_backend() overrides it",
    "MOE_TRITON_PROFILE": "product whose limits the npu_ operators apply: portable (the default), "
    "a2, a3, 950; set_profile() overrides it",
    "TRITON_INTERPRET": "1 imports Triton as its interpreter; the interpret back end sets it while "
    "Triton is not imported yet",
    "WORLD_SIZE": "set by torchrun: above 1, ExpertParallel without a group raises until "
    "torch.distributed is initialised",
    "LOCAL_RANK": "set by torchrun: the GPU of a rank of `moe-triton bench layer`",
    "RANK": "set by torchrun: folder of a record whose calls do not say their rank",
    "HCCL_BUFFSIZE": "MB of a group's communication buffer on Ascend; the profiles a2, a3 and 950 "
    "check it where it is set",
    "HCCL_INTRA_PCIE_ENABLE": "1, together with HCCL_INTRA_ROCE_ENABLE=0: hierarchical algorithm "
    "of the profile a2",
    "HCCL_INTRA_ROCE_ENABLE": "0, together with HCCL_INTRA_PCIE_ENABLE=1: hierarchical algorithm "
    "of the profile a2",
    "NO_COLOR": "set to any value: demo and doctor print without colours",
    "SEED": "seed of the test cases of torch_npu.testing under npu-run; 666 by default",
    "SET_NPU_DEVICE": "NPU of the test cases of torch_npu.testing under npu-run; 0 by default",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "npu-run sets 0, so that torch does not load a broken "
    "torch_npu",
    "MOE_TRITON_NPU_HOST": "set by npu-run: device that stands for the NPUs, cpu or cuda",
    "MOE_TRITON_NPU_DEVICES": "set by npu-run: number of NPUs",
    "MOE_TRITON_NPU_MISSING": "set by npu-run --list-missing: file of missing names",
    "MOE_TRITON_RUN_FAILURES": "set by npu-run and deep-ep-run: file of failed children",
    "MOE_TRITON_RECORD": "set by moe-triton record: what its processes record, as JSON",
    "MOE_TRITON_VLLM": "1: vLLM's expert-parallel layers go through this library",
    "MOE_TRITON_SGLANG": "1: SGLang's expert-parallel layers go through this library",
    "MOE_TRITON_TEST_PROFILE": "tests: default, or full for 500 examples a property",
    "MOE_TRITON_ASCEND": "tests: environment with triton-ascend; by default .venv/ascend",
    "MOE_TRITON_MSPROBE": "tests: environment with msprobe; by default .venv/msprobe",
    "MOE_TRITON_REVISION": "benches: revision to record where there is no git checkout",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    window_sizes.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; returns 0, or ends the program with 2 for sizes that do not fit."""
    facts: dict[str, Any] = {"windows": window_sizes.examine(arguments)}
    warnings = _import_torch_npu()
    facts |= {
        "versions": _versions(),
        "devices": _devices(),
        "backends": _answers(
            {name: backend.unavailable_because(name) for name in backend.BACKENDS}
        ),
        "transports": _answers(_transports()),
        "limits": _limits(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "warnings": warnings + _warnings(),
    }
    terminal = Terminal()
    if arguments.json:
        terminal.line(json.dumps(facts))
    else:
        _show(terminal, facts, arguments)
    return 0


# Facts. None is a package that is not installed, or the cause of what works.


def _versions() -> dict[str, str | None]:
    versions = {"moe_triton": __version__, "python": platform.python_version()}
    return versions | {name: _version(name) for name in _PACKAGES}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _import_torch_npu() -> list[str]:
    """Import torch_npu, which adds the device to torch; returns the import error, if any."""
    if importlib.util.find_spec("torch_npu") is not None:
        try:
            importlib.import_module("torch_npu")
        except Exception as error:  # noqa: BLE001 (without its driver it raises any error)
            return [f"torch_npu is installed and cannot be imported: {error}"]
    return []


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {
            "kind": "cpu",
            "name": _cpu_name(),
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        }
    ]
    for name in ("cuda", "xpu", "npu"):
        module = getattr(torch, name, None)
        if module is None or not module.is_available():
            continue
        kind = "rocm" if name == "cuda" and torch.version.hip else name
        for index in range(module.device_count()):
            memory = getattr(module.get_device_properties(index), "total_memory", None)
            device = {"kind": kind, "name": module.get_device_name(index), "memory_bytes": memory}
            devices.append(device)
    return devices


def _cpu_name() -> str:
    name = _proc_value("cpuinfo", "model name")
    return name or platform.processor() or platform.machine()


def _proc_value(file: str, key: str) -> str | None:
    """The first value of a key in a file of /proc."""
    path = Path("/proc") / file
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(values, None)


def _answers(causes: dict[str, str | None]) -> dict[str, dict[str, Any]]:
    return {name: {"works": cause is None, "cause": cause} for name, cause in causes.items()}


def _transports() -> dict[str, str | None]:
    between_processes = None
    if not atomics.BETWEEN_PROCESSES:
        between_processes = "libstdc++ is missing, whose atomics order memory between processes"
    return {
        "local": _memory_problem(LocalMemory()),
        "shm (memfd)": between_processes or _memory_problem(MemfdMemory()),
        "shm (posix)": between_processes or _memory_problem(PosixMemory()),
        "symm_mem": symm_mem.unavailable_because(),
        "collective (gloo)": _gloo_problem(),
        "collective (nccl)": _nccl_problem(),
        "collective (hccl)": backend.unavailable_because("npu"),
    }


def _memory_problem(memory: Memory) -> str | None:
    """Why a rank cannot write into memory that another rank allocates."""
    try:
        block = memory.allocate(4096)
        try:
            memory.open(block.handle).data.fill_(7)
        finally:
            block.release()
    except (OSError, AttributeError) as error:  # some systems have no memfd_create
        return str(error)
    return None if int(block.data.sum()) == 7 * 4096 else "writes of a peer are not visible"


def _gloo_problem() -> str | None:
    if not dist.is_gloo_available():
        return "this PyTorch was built without gloo"
    try:
        # Even a group of one looks for a network interface, which some hosts lack.
        dist.ProcessGroupGloo(dist.HashStore(), 0, 1, dt.timedelta(seconds=10))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _nccl_problem() -> str | None:
    if not dist.is_nccl_available():
        return "this PyTorch was built without NCCL"
    return backend.unavailable_because("rocm" if torch.version.hip else "cuda")


def _limits() -> dict[str, int | None]:
    shm = shutil.disk_usage(_SHM) if _SHM.is_dir() else None
    available = _proc_value("meminfo", "MemAvailable")
    return {
        "dev_shm_bytes": shm.total if shm else None,
        "dev_shm_free_bytes": shm.free if shm else None,
        "memory_available_bytes": int(available.split()[0]) * 1024 if available else None,
    }


def _warnings() -> list[str]:
    warnings = []
    providers = sorted(set(metadata.packages_distributions().get("triton", [])))
    if len(providers) > 1:
        warnings.append(
            f"{' and '.join(providers)} all install the package triton, and the last one has "
            "overwritten files of the others: uninstall all, then install the one for your device"
        )
    for path, (device, usable) in DRIVERS.items():
        if Path(path).exists() and not usable():
            warnings.append(f"{path} indicates {device}, which this PyTorch cannot use")
    return warnings


# Printed output.


def _show(terminal: Terminal, facts: dict[str, Any], arguments: argparse.Namespace) -> None:
    terminal.line(terminal.styled("moe-triton doctor", "bold"))
    _heading(terminal, "versions")
    versions = facts["versions"].items()
    installed = [f"{name} {version}" for name, version in versions if version is not None]
    terminal.wrapped("  ", ", ".join(installed), indent=2)
    missing = [name for name, version in versions if version is None]
    if missing:
        terminal.wrapped("  ", f"not installed: {', '.join(missing)}", indent=2)

    _heading(terminal, "devices")
    for device in facts["devices"]:
        text = device["name"]
        if device["kind"] == "cpu":
            text += f" ({device['machine']}), {plural(device['cores'], 'core')}"
        if device["memory_bytes"]:
            text += f", {size(device['memory_bytes'])}"
        terminal.wrapped(f"  {device['kind']:<11}", text, indent=13)

    _heading(terminal, "back ends")
    _show_answers(terminal, facts["backends"], {"cpu": "the reference, in PyTorch"})
    _heading(terminal, "transports")
    _show_answers(terminal, facts["transports"], _transport_notes(facts["limits"]))
    ranks, tokens = plural(arguments.world_size, "rank"), plural(arguments.tokens, "token")
    _heading(terminal, "windows", f"memory of each of {ranks}, for {tokens} per rank")
    window_sizes.show(terminal, facts["windows"])
    _heading(terminal, "environment", "variables, their values and meanings")
    for name, value in facts["environment"].items():
        text = f"{'not set' if value is None else value}; {ENVIRONMENT[name]}"
        terminal.wrapped(f"  {name:<31}", text, indent=33)
    for warning in facts["warnings"]:
        terminal.line()
        terminal.wrapped(terminal.styled("warning: ", "bad"), warning, indent=9)


def _heading(terminal: Terminal, text: str, note: str = "") -> None:
    terminal.line()
    terminal.line(f"{terminal.styled(text, 'bold')}  {note}".rstrip())


def _show_answers(
    terminal: Terminal, answers: dict[str, dict[str, Any]], notes: dict[str, str]
) -> None:
    width = max(map(len, answers)) + 2
    for name, answer in answers.items():
        works = answer["works"]
        text = terminal.styled("yes", "good") if works else "no "
        note = notes.get(name, "") if works else answer["cause"]
        terminal.wrapped(f"  {name:<{width}}{text}  ", note, indent=width + 7)


def _transport_notes(limits: dict[str, int | None]) -> dict[str, str]:
    """Notes on transports that work."""
    memfd, posix = "processes of one host", "processes of one host without memfd"
    available, free = limits["memory_available_bytes"], limits["dev_shm_free_bytes"]
    if available is not None:
        memfd += f"; {size(available)} of memory available"
    if free is not None:
        posix += f"; /dev/shm has {size(free)} free"
    return {
        "local": "threads of one process",
        "shm (memfd)": memfd,
        "shm (posix)": posix,
        "symm_mem": "processes of one host with a GPU each; not yet tested",
        "collective (gloo)": "any processes, through torch.distributed",
        "collective (nccl)": "any processes, through torch.distributed; not yet tested",
        "collective (hccl)": "any processes, through torch.distributed; not yet tested",
    }
