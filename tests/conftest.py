"""Shared by all tests: hypothesis profiles, poisoned memory, and the evidence report."""

from __future__ import annotations

import collections
import functools
import gc
import importlib.util
import os
import sys
import time
from pathlib import Path

import provenance
import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:
    import hypothesis_fallback as hypothesis

    # Test files import it, too.
    sys.modules["hypothesis"] = hypothesis
    sys.modules["hypothesis.strategies"] = hypothesis.strategies

# Without a GPU the kernels' tests run in Triton's interpreter, which must be enabled before Triton
# is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Ranks are threads or processes, often more than the cores: torch's thread pools would only make
# them wait for one another.
torch.set_num_threads(1)

# A test without a number of examples takes the profile's. The small profile draws the same examples
# in every run, so that only a change can make CI fail.
hypothesis.settings.register_profile(
    "default", max_examples=25, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile(
    "full",
    max_examples=500,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
PROFILE = os.environ.get("MOE_TRITON_TEST_PROFILE", "default")
hypothesis.settings.load_profile(PROFILE)

_PACKAGE_DIR = (
    str(Path(importlib.util.find_spec("moe_triton").submodule_search_locations[0])) + os.sep
)

# Every byte 0xAA, as each integer dtype reads it. Floats get NaN, which no later sum can hide.
POISON = {
    torch.uint8: 0xAA,
    torch.int8: -0x56,
    torch.int16: -0x5556,
    torch.int32: -0x5555_5556,
    torch.int64: -0x5555_5555_5555_5556,
    torch.bool: True,
}


def _poisoned(allocate):
    """Wrap an allocator of uninitialised memory to poison what it returns to moe_triton."""

    @functools.wraps(allocate)
    def allocate_and_poison(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        # Dynamo must not trace the frame lookup, and a traced program allocates for itself.
        if torch.compiler.is_compiling():
            return tensor
        if sys._getframe(1).f_code.co_filename.startswith(_PACKAGE_DIR):
            dtype = tensor.dtype
            value = float("nan") if dtype.is_floating_point else POISON.get(dtype)
            if value is not None:
                tensor.detach().fill_(value)
        return tensor

    return allocate_and_poison


@pytest.fixture(scope="session", autouse=True)
def poison():
    """Poison moe_triton's uninitialised memory, so that an unwritten row shows.

    Set once for the whole run: the wrappers keep no state, so that ranks in threads, and threads
    that outlive a test, may call them at any time. Memory of other callers is not touched; tests of
    64-bit addresses rely on untouched buffers of many gigabytes.
    """
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture
def fresh_compiler():
    """Reset the compiler after a test."""
    yield
    torch.compiler.reset()


_EVIDENCE = "evidence"  # the property of a test's report that holds a record


class Evidence:
    """Collects results of the run and records of tests, for a page to be committed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.monotonic()
        self.records = collections.defaultdict(list)
        self.outcomes = collections.defaultdict(collections.Counter)
        self.seconds = collections.Counter()
        self.skipped = []

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.partition("::")[0]
        self.seconds[file] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[file][report.outcome] += 1
        if report.when == "teardown":
            for key, record in report.user_properties:
                if key == _EVIDENCE:
                    self.records[record[0]].append(record[1])
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.skipped.append((report.nodeid, str(reason)))

    def pytest_sessionfinish(self, exitstatus):
        """Write the page of a green run; one that failed leaves the page alone, to be repeated."""
        if exitstatus == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self.page(), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter, exitstatus):
        if exitstatus != 0:
            terminalreporter.write_line(f"{self.path} is not written: the run failed")

    def page(self) -> str:
        total = sum(self.outcomes.values(), collections.Counter())
        lines = [
            "# Full test run",
            "",
            "Written by `pytest --evidence`, which is what `make test-full` runs.",
            "",
            f"- {_counts(total)} in {time.monotonic() - self.start:.0f} s",
            f"- test profile {PROFILE}, {time.strftime('%Y-%m-%d')}",
            *(f"- {fact}" for fact in provenance.environment()),
            "",
            "| file | passed | skipped | seconds |",
            "| --- | ---: | ---: | ---: |",
        ]
        for file in sorted(self.outcomes):
            count = self.outcomes[file]
            lines.append(
                f"| {file} | {count['passed']} | {count['skipped']} | {self.seconds[file]:.1f} |"
            )
        if self.skipped:
            lines += ["", "## Skipped", "", *(f"- `{node}`: {why}" for node, why in self.skipped)]
        for name, texts in sorted(self.records.items()):
            lines += ["", f"## {name}", "", "\n\n".join(sorted(texts))]
        return "\n".join(lines) + "\n"


def _counts(count) -> str:
    return ", ".join(f"{count[outcome]} {outcome}" for outcome in ("passed", "skipped"))


def pytest_collection_finish():
    """Keep the garbage collector from walking torch and all tests again and again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item):
    """Let an asynchronous launch fail in its own test, and end a process that lost its device.

    Every later test on the device would fail as well. Other processes of the run go on.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{item.nodeid}: the device is lost to this process: {error}"
        if "PYTEST_XDIST_WORKER" in os.environ:
            sys.__stderr__.write(f"\n{message}\n")
            sys.__stderr__.flush()
            os._exit(1)  # a new worker takes its place
        pytest.exit(message, returncode=1)


def pytest_addoption(parser):
    parser.addoption(
        "--evidence",
        metavar="PATH",
        type=Path,
        help="write results, versions and records of tests to this Markdown file",
    )


def pytest_configure(config):
    path = config.getoption("--evidence")
    if path and not hasattr(config, "workerinput"):  # a worker of xdist reports to the main process
        config.pluginmanager.register(Evidence(path), "moe_triton-evidence")


@pytest.fixture
def record_evidence(request):
    """``record_evidence(name, text)`` adds Markdown to the page of ``--evidence``, under a heading.

    Without the option it is dropped.
    """

    def record(name: str, text: str) -> None:
        request.node.user_properties.append((_EVIDENCE, (name, text)))

    return record
