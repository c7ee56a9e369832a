"""Run tests of kernels over Ascend's own IR on this CPU: a plugin of pytest.

    PYTHONPATH=tests/kernels/ascend pytest -p executor --level linalg tests/kernels/test_affine.py

Launches have the tiles of an NPU. Every launch is compiled by ``cpu.py`` and its programs run one
after the other. The memory of each argument is copied between addresses that cannot be touched, its
last byte just before them: a kernel that reads or writes past its arguments raises OSError.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import hashlib
import json
import mmap
import os
import struct
import subprocess
import tempfile
from pathlib import Path

import hypothesis
import pytest
import recording
import torch
import triton_ascend_env

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
EXAMPLES = 3  # of each drawn test: most compile kernels of their own
LEVELS = ("linalg", "hfusion")
GUARD = 2**26  # bytes of addresses on each side of an argument, which take no memory
LARGEST = 2**26  # bytes of an argument that is copied; tests of 64-bit addresses take gigabytes

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Guarded:
    """A copy of a tensor's memory between addresses that cannot be touched."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.bytes = storage.nbytes()
        room = -(-self.bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.size = room + 2 * GUARD
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.start = libc.mmap(None, self.size, 0, private, -1, 0)
        libc.mprotect(self.start + GUARD, room, mmap.PROT_READ | mmap.PROT_WRITE)
        self.address = self.start + GUARD + room - self.bytes
        ctypes.memmove(self.address, storage.data_ptr(), self.bytes)

    def take_back(self) -> None:
        """Copy the memory to the tensor, and free it."""
        ctypes.memmove(self.storage.data_ptr(), self.address, self.bytes)
        libc.munmap(self.start, self.size)


class Libraries:
    """Compiles launches, each once."""

    def __init__(self, level: str) -> None:
        self.level = level
        self.folder = tempfile.TemporaryDirectory()
        self.compiler: subprocess.Popen | None = None
        self.entries: dict[str, object] = {}

    def entry(self, launch: dict):
        """The function that runs the programs of a launch."""
        text = json.dumps(launch)
        if text not in self.entries:
            name = hashlib.sha256(text.encode()).hexdigest()[:16]
            into = Path(self.folder.name) / f"{name}.so"
            error = self._ask({"launch": launch, "level": self.level, "into": str(into)})
            if error:
                raise RuntimeError(f"{text}:\n{error}")
            function = ctypes.CDLL(str(into)).entry
            function.restype = ctypes.c_long
            self.entries[text] = function
        return self.entries[text]

    def _ask(self, job: dict) -> str:
        if self.compiler is None:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            self.compiler = subprocess.Popen(
                [triton_ascend_env.python(), FOLDER / "cpu.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment | {"PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}"},
            )
        self.compiler.stdin.write(f"{json.dumps(job)}\n")
        self.compiler.stdin.flush()
        return json.loads(self.compiler.stdout.readline())

    def close(self) -> None:
        if self.compiler is not None:
            self.compiler.stdin.close()
            self.compiler.wait()
        self.folder.cleanup()


def leave_out(reason: str) -> None:
    """Skip the test, or of a drawn one this example."""
    if hypothesis.currently_in_test_context():
        hypothesis.reject()
    pytest.skip(reason)


def _word(value: object, kind: str) -> int:
    """A number as the 8 bytes of an argument."""
    if kind == "fp32":
        return struct.unpack("<i", struct.pack("<f", value))[0]
    return int(value)


class Executor:
    """Takes the place of Triton's interpreter for launches of an NPU."""

    def __init__(self, level: str) -> None:
        self.level = level
        self.libraries = Libraries(level)
        self.launched: collections.Counter[str] = collections.Counter()

    def install(self) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        has_npu_tiles = recording.use_npu_tiles()
        executor = self

        @functools.cache
        def compiled(interpreted):
            return recording.as_compiled(interpreted)

        def run(interpreted, *arguments, grid, warmup, **options):
            if has_npu_tiles():
                executor.run(compiled(interpreted), arguments, grid, options)
            else:
                leave_out("tiles that no NPU has")

        InterpretedFunction.run = run

    def run(self, kernel, arguments: tuple, grid, options: dict) -> None:
        """Run all programs of a launch."""
        launch, bound = recording.described(kernel, arguments, {"debug": False, **options})
        if not recording.lowered(launch):
            leave_out("triton-ascend takes no float64")
        entry = self.libraries.entry(launch)
        copies: dict[int, Guarded] = {}
        words = []
        for name, kind in launch["signature"].items():
            value = bound[name]
            if not kind.startswith("*"):
                words.append(_word(value, kind))
                continue
            storage = value.untyped_storage()
            if storage.nbytes() == 0 or storage.nbytes() > LARGEST:
                words.append(value.data_ptr())
                continue
            key = storage.data_ptr()
            if key not in copies:
                copies[key] = Guarded(storage)
            words.append(copies[key].address + value.data_ptr() - key)
        sizes = grid(bound) if callable(grid) else grid
        touched = entry((ctypes.c_int64 * len(words))(*words), *(*sizes, 1, 1)[:3])
        for copy in copies.values():
            copy.take_back()
        if touched:
            kinds = launch["signature"].items()
            pointers = [
                (abs(touched - word), touched - word, name)
                for word, (name, kind) in zip(words, kinds, strict=True)
                if kind.startswith("*")
            ]
            _, offset, name = min(pointers)
            raise OSError(
                f"{launch} touches memory outside its arguments, about {offset} bytes from {name}"
            )
        self.launched[launch["kernel"]] += 1

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        drops = pytest.mark.skip(reason="triton-ascend drops device_assert")
        folds = pytest.mark.xfail(
            reason="ascendnpu-ir takes 0.0 + x for x, also for -0.0", strict=True
        )
        for item in items:
            if "asserting" in getattr(item, "fixturenames", ()):
                item.add_marker(drops)
            if item.name == "test_no_negative_zero[kernels]" and self.level == "hfusion":
                item.add_marker(folds)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.write_line(f"launches: {json.dumps(self.launched)}")
        terminalreporter.write_line(f"distinct: {len(self.libraries.entries)}")

    def pytest_unconfigure(self) -> None:
        self.libraries.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--level", choices=LEVELS, required=True)


def pytest_configure(config: pytest.Config) -> None:
    recording.draw_few(EXAMPLES)
    executor = Executor(config.getoption("--level"))
    executor.install()
    config.pluginmanager.register(executor)
