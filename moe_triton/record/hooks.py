"""Wrap the operators so that each call of them is recorded, and take the wrappers off again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..ascend import op_names
from ..compat import torch_npu as compat
from . import files
from .operators import OUTPUTS, bind, is_collective, is_dispatch, received_rows

SETTINGS = "MOE_TRITON_RECORD"  # options as JSON, for the processes of a script

_LOG = logging.getLogger("moe_triton")
_PACKAGES = ("torch", "torch_npu", "triton", "triton-ascend", "moe_triton", "numpy")
_VARIABLES = ("HCCL_", "ASCEND_", "MOE_TRITON_", "CUDA_VISIBLE", "NCCL_")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is recorded.

    Attributes:
        path: folder of the record; a folder below it for each rank.
        ops: names of the operators; empty for the whole family.
        skip: calls of each operator to leave out first, such as those of a warm-up.
        calls: the most calls of each operator that are recorded on a rank.
        max_bytes: the most bytes of tensors that are recorded on a rank.
    """

    path: str
    ops: tuple[str, ...] = ()
    skip: int = 0
    calls: int = 8
    max_bytes: int = 2 * 2**30

    @classmethod
    def of_environment(cls) -> Options | None:
        """The options that ``moe-triton record`` passed to this process, or None."""
        text = os.environ.get(SETTINGS)
        if not text:
            return None
        values = json.loads(text)
        return cls(**values | {"ops": tuple(values["ops"])})

    def as_json(self) -> str:
        """For the environment variable ``SETTINGS``."""
        return json.dumps(dataclasses.asdict(self))


class Recorder:
    """Records the calls of one process; its ranks are threads or the process itself."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._ranks: dict[str, _Rank] = {}
        self._inside = threading.local()

    def wrap(self, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with a recording of its calls."""

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            # A wrapper may call another one: torch_npu's stand-in is a function of compat.
            if getattr(self._inside, "value", False) or not self._can_record():
                return function(*args, **kwargs)
            self._inside.value = True
            try:
                return self._record(op, function, args, kwargs)
            finally:
                self._inside.value = False

        return recorded

    def _can_record(self) -> bool:
        if torch.compiler.is_compiling():
            return False
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        return not capturing

    def _record(
        self, op: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        arguments, unknown = bind(op, args, kwargs)
        rank = self._rank(op, arguments)
        numbers = rank.next(op, self._options)
        if numbers is None:
            return function(*args, **kwargs)
        # performance_info is added to, and a caller may reuse its buffers.
        before = {k: _copied(v) for k, v in arguments.items()}
        results = function(*args, **kwargs)
        values = (results,) if isinstance(results, torch.Tensor) else tuple(results)
        outputs = dict(zip(OUTPUTS[op], map(_copied, values), strict=False))
        before |= {k: str(v) for k, v in unknown.items() if v is not None}
        try:
            rank.write(numbers, op, before, outputs, self._options)
        except OSError as error:
            rank.stop(f"cannot write: {error}")
        return results

    def _rank(self, op: str, arguments: Mapping[str, Any]) -> _Rank:
        if dist.is_available() and dist.is_initialized():
            rank = dist.get_rank()
        elif is_collective(op) and "ep_rank_id" in arguments:
            pair = max(int(arguments.get("tp_world_size") or 0), 1)
            rank = (
                int(arguments["ep_rank_id"]) * pair + int(arguments.get("tp_rank_id") or 0) % pair
            )
        else:
            rank = int(os.environ.get("RANK", "0"))
        name = f"rank{rank}"
        with self._lock:
            if name not in self._ranks:
                self._ranks[name] = _Rank(Path(self._options.path) / name)
            return self._ranks[name]


class _Rank:
    """The calls of one rank, and what is left of its limits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, int] = {}
        self._written = 0
        self._bytes = 0
        self._stopped = False

    def next(self, op: str, options: Options) -> tuple[int, int] | None:
        """Numbers of the next call among the recorded and of its operator; None to leave out."""
        seen = self._seen.get(op, 0)
        self._seen[op] = seen + 1
        if self._stopped or not options.skip <= seen < options.skip + options.calls:
            return None
        if self._written == 0:
            try:
                files.write_environment(self._folder, _environment(options))
            except OSError as error:
                self.stop(f"cannot write: {error}")
                return None
        self._written += 1
        return self._written - 1, seen

    def write(
        self,
        numbers: tuple[int, int],
        op: str,
        arguments: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor | None],
        options: Options,
    ) -> None:
        rows = _kept_rows(op, arguments, outputs)
        tensors = {f"input.{k}": v for k, v in arguments.items()}
        tensors |= {f"output.{k}": v for k, v in outputs.items()}
        size = 0
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor):
                share = rows[name] / max(len(value), 1) if name in rows else 1
                size += int(value.numel() * value.element_size() * share)
        if self._bytes + size > options.max_bytes:
            self.stop(f"the next call of {size} bytes would exceed {options.max_bytes}")
            return
        self._bytes += files.write_call(
            self._folder, numbers[0], op, arguments, outputs, rows, numbers[1]
        )

    def stop(self, reason: str) -> None:
        """End the recording of this rank; the calls go on."""
        self._stopped = True
        _LOG.warning("record: %s stops after %d calls: %s", self._folder, self._written, reason)


def _kept_rows(
    op: str, arguments: Mapping[str, Any], outputs: Mapping[str, torch.Tensor | None]
) -> dict[str, int]:
    """Leading rows to keep of tensors with one for each received row; others are whole."""
    dispatch = is_dispatch(op)
    if not dispatch and "expand_x" not in arguments:
        return {}
    side, tensors = ("output", outputs) if dispatch else ("input", arguments)
    rows = received_rows(op, tensors, arguments)
    if rows is None:
        return {}
    kept = {f"{side}.expand_x": rows}
    if op in (op_names.DISPATCH_V2, op_names.COMBINE_V2):
        kept[f"{side}.assist_info_for_combine"] = 3 * rows  # the words that a row has
    if dispatch:
        kept["output.dynamic_scales"] = rows
        kept["output.expand_scales"] = rows
    result = {}
    for key, n in kept.items():
        value = tensors.get(key.partition(".")[2])
        if isinstance(value, torch.Tensor):
            result[key] = min(n, len(value))
    return result


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _environment(options: Options) -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    device = "cpu"
    for kind in ("npu", "cuda"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            device = str(module.get_device_name(module.current_device()))
            break
    return {
        "versions": versions,
        "device": device,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "variables": {
            name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)
        },
        "options": dataclasses.asdict(options),
    }


def _targets(name: str) -> list[Any]:
    """Namespaces of a module that hold operators."""
    module = sys.modules.get(name)
    if module is None:
        return []
    namespaces: list[Any] = [module]
    if name == "torch_npu" and hasattr(torch.ops, "npu"):
        namespaces.append(torch.ops.npu)
    return namespaces


MODULES = ("torch_npu", compat.__name__)
_of_process: _Hooks | None = None


class _Hooks:
    """Wrappers in the modules that are loaded, and in those that will be."""

    def __init__(self, recorder: Recorder, ops: tuple[str, ...]) -> None:
        self._recorder = recorder
        self._ops = ops or tuple(OUTPUTS)
        self._replaced: list[tuple[Any, str, Any]] = []

    def install(self, module: str) -> None:
        for namespace in _targets(module):
            for op in self._ops:
                try:
                    function = getattr(namespace, op)
                except AttributeError:
                    continue
                wrapped = self._recorder.wrap(op, function)
                for name in ("default", "overloads"):
                    if hasattr(function, name):
                        setattr(wrapped, name, wrapped if name == "default" else function.overloads)
                self._replaced.append((namespace, op, function))
                setattr(namespace, op, wrapped)

    def remove(self) -> None:
        for namespace, op, function in reversed(self._replaced):
            setattr(namespace, op, function)
        self._replaced.clear()


@contextlib.contextmanager
def record(
    path: str | Path,
    *,
    ops: tuple[str, ...] = (),
    skip: int = 0,
    calls: int = 8,
    max_bytes: int = 2 * 2**30,
) -> Iterator[None]:
    """Record the calls of the family that are made inside, by any thread of this process.

    Functions of ``torch_npu``, ``torch.ops.npu`` and ``moe_triton.compat.torch_npu`` are recorded;
    names that were imported from them before are not. Calls under ``torch.compile`` and in CUDA
    graphs are not recorded. A recorded call is copied to the host, and so waits for the device.

    Args:
        path: folder for the record, a folder below it for each rank.
        ops: names of the operators; empty for the whole family.
        skip: calls of each operator to leave out first.
        calls: the most calls of each operator that are recorded on a rank.
        max_bytes: the most bytes of tensors that are recorded on a rank.

    Raises:
        UnavailableError: safetensors is not installed.
    """
    options = Options(str(Path(path).absolute()), tuple(ops), skip, calls, max_bytes)
    hooks = _Hooks(Recorder(options), options.ops)
    for module in MODULES:
        hooks.install(module)
    try:
        yield
    finally:
        hooks.remove()


def record_imported(module: str) -> None:
    """Record the calls of ``module`` from now on, with the options of ``moe-triton record``.

    ``startup/sitecustomize.py`` calls it when a script has imported one of ``MODULES``.
    """
    global _of_process
    options = Options.of_environment()
    if options is None:
        return
    if _of_process is None:
        _of_process = _Hooks(Recorder(options), options.ops)
    _of_process.install(module)
