"""Break the kernels on purpose, one small change at a time: each change must turn a test red.

    python tests/support/mutate.py [--jobs N] [--evidence PAGE] [WORD ...]

The changes, mutants, are in ``mutants/NAME.diff`` for ``moe_triton/kernels/NAME.py``:

    # what is broken, in a sentence
    @ test_reduce.py::test_multiplies_then_adds
     a line that stays
    -a line of the kernel as it is
    +the line as it becomes

The body is that of a diff without its line numbers: what it takes away must be in the file once. A
line with ``@`` names the test that ought to notice, which runs first; then come all tests of the
kernel, or for helpers of that test's file. A line with ``=`` says why no test can notice, and is
itself an error once one does. Blank lines end a mutant.

Each mutant is made in a copy of the package and its tests, where tests run until one fails. Without
a mutant, the tests that are named must pass. Exits with 1 if a mutant that ought to be noticed is
not, too small a share of them is, or a mutant makes no sense: the text is not there once,
nothing changes, no test can be collected, or tests do not end without it either. With words, only
mutants are tried that have one of them in their file name or sentence.
"""

from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import provenance

ROOT = Path(__file__).resolve().parents[2]
LISTS = ROOT / "tests/mutants"
KERNELS = Path("moe_triton/kernels")
KERNEL_FILES = sorted(set((ROOT / KERNELS).glob("*.py")) - {ROOT / KERNELS / "__init__.py"})
TESTS = Path("tests/kernels")
SHARE = 0.95  # of the mutants, which tests must notice
SECONDS_OF_A_TEST = 240  # a mutant may wait for ever; the slowest test compiles for a minute
SECONDS = 600

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "MOE_TRITON_TEST_PROFILE": "mutants",
    "PYTHONDONTWRITEBYTECODE": "1",
    "COLUMNS": "200",  # errors are cut to the width of the terminal
}

# Tests start sooner as forks of a process that has imported the libraries, but none of ours.
SERVER = multiprocessing.get_context("forkserver")
LIBRARIES = ["torch", "triton", "triton.language", "hypothesis", "pytest"]

CAUGHT, SURVIVED, BROKEN = "caught", "survived", "broken"


class ListError(ValueError):
    """A mutant is not written as it should be, or does not fit its file any more."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A change of one kernel file.

    Attributes:
        file: name of the file, without a suffix.
        what: is broken.
        old: text that is there once.
        new: what takes its place.
        killer: the test that ought to notice, below tests/kernels, or "".
        excuse: why no test can, or "".
    """

    file: str
    what: str
    old: str
    new: str
    killer: str = ""
    excuse: str = ""

    @property
    def path(self) -> Path:
        return KERNELS / f"{self.file}.py"

    @property
    def tests(self) -> list[Path]:
        """What to run: the test that is named, then all of the file that ought to notice."""
        # Helpers have no tests of their own.
        mirror = self.killer.split("::")[0] if self.file[0] == "_" else f"test_{self.file}.py"
        return [*([TESTS / self.killer] if self.killer else []), TESTS / mirror]

    def applied(self, text: str) -> str:
        """The file's text after the change; ListError if that is no change of one place."""
        lines = re.compile(rf"^{re.escape(self.old)}", re.MULTILINE)
        changed, count = lines.subn(lambda _: self.new, text)
        if count != 1:
            raise ListError(f"{self.file}: {self.what}: the old text is there {count} times")
        if _code(self.old) == _code(self.new):
            raise ListError(f"{self.file}: {self.what}: changes nothing")
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise ListError(f"{self.file}: {self.what}: {error}") from error
        return changed


def _code(text: str) -> str:
    """Lines without comments and blanks."""
    return re.sub(r"\s|#.*", "", text)


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a mutant: an outcome, the test or text that explains it, and seconds."""

    outcome: str
    why: str
    seconds: float


def mutants_of(file: str, text: str) -> Iterator[Mutant]:
    """The mutants in the text of a list; the module's docstring describes it."""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        said: dict[str, list[str]] = collections.defaultdict(list)
        for line in block.splitlines():
            mark, content = line[0], line[1:]
            if mark not in "#@= -+":
                raise ListError(f"{file}: a line begins with {mark!r}: {line}")
            if mark in "#@=":
                said[mark].append(content.strip())
            else:
                said["old"] += [content] if mark != "+" else []
                said["new"] += [content] if mark != "-" else []
        if not (said["#"] and said["old"]):
            raise ListError(f"{file}: no sentence, or no line that goes:\n{block}")
        old, new = ("".join(f"{line}\n" for line in said[side]) for side in ("old", "new"))
        yield Mutant(file, " ".join(said["#"]), old, new, "".join(said["@"]), " ".join(said["="]))


def read_lists() -> list[Mutant]:
    """All mutants, file by file."""
    return [
        mutant
        for path in sorted(LISTS.glob("*.diff"))
        for mutant in mutants_of(path.stem, path.read_text(encoding="utf-8"))
    ]


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """A folder with the package, its tests and their settings."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        for part in ("moe_triton", "tests"):
            without = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, folder / part, ignore=without)
        shutil.copy(ROOT / "pyproject.toml", folder)
        yield folder


def start_server() -> None:
    """Have tests run in what the environment is to be, before anything imports Triton."""
    os.environ |= ENVIRONMENT
    SERVER.set_forkserver_preload(LIBRARIES)


def run_tests(folder: Path, tests: Iterable[str | Path]) -> tuple[int, str]:
    """The exit status of pytest in ``folder``, less than 0 for a signal, and what it printed."""
    output = folder / "output.txt"
    process = SERVER.Process(target=_pytest, args=(folder, output, [*map(str, tests)]))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        # With the processes of its tests.
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode, output.read_text(encoding="utf-8")


def _pytest(folder: Path, output: Path, tests: list[str]) -> None:
    os.setsid()
    os.chdir(folder)
    # Before an installed package, and not the caller's copy either.
    sys.path.insert(0, str(folder))
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import hypothesis
    import pytest

    # That a test fails is enough to know; the simplest input for it is not looked for.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    default = {"max_examples": 25, "deadline": None, "derandomize": True}
    hypothesis.settings.register_profile("mutants", **default, phases=phases)
    limit = ["-o", f"faulthandler_timeout={SECONDS_OF_A_TEST}", "-p", "no:cacheprovider"]
    sys.exit(pytest.main(["-x", "-q", "-rf", "--tb=line", "--no-header", *limit, *tests]))


def try_mutant(mutant: Mutant) -> Result:
    """Make the mutant and run tests until one fails."""
    start = time.monotonic()
    outcome, why = SURVIVED, ""
    with copied() as folder:
        path = folder / mutant.path
        text = path.read_text(encoding="utf-8")
        try:
            changed = mutant.applied(text)
        except ListError as error:
            return Result(BROKEN, str(error), 0.0)
        path.write_text(changed, encoding="utf-8")
        for tests in mutant.tests:
            status, printed = run_tests(folder, [tests])
            if status == 0:
                continue
            outcome, why = CAUGHT, reason(status, printed)
            if not why:
                outcome, why = BROKEN, printed[-1000:]
            elif not failed_test(printed):
                # On a busy machine tests may not end in time without the mutant either.
                path.write_text(text, encoding="utf-8")
                status, printed = run_tests(folder, [tests])
                if status != 0:
                    outcome, why = BROKEN, f"also without the mutant: {reason(status, printed)}"
            break
    return Result(outcome, why, time.monotonic() - start)


def reason(status: int, printed: str) -> str:
    """Why a run of tests is red: the test and its error; "" if no test ran, or none failed."""
    if failed := failed_test(printed):
        return failed
    if status < 0:
        return f"ended by signal {-status}"
    return "a test did not end" if re.search(r"^Timeout \(", printed, re.MULTILINE) else ""


def failed_test(printed: str) -> str:
    """The test that failed in what pytest printed, and its error; or ""."""
    failed = re.search(r"^FAILED tests/kernels/(.*)", printed, re.MULTILINE)
    return failed.group(1) if failed else ""


def check_unchanged(mutants: Iterable[Mutant]) -> None:
    """Raise unless the tests that mutants name pass without any."""
    killers = sorted({TESTS / mutant.killer for mutant in mutants if mutant.killer})
    with copied() as folder:
        status, printed = run_tests(folder, killers) if killers else (0, "")
    if status != 0:
        raise SystemExit(f"without a mutant tests must pass:\n{printed}")


def try_all(mutants: list[Mutant], jobs: int) -> dict[Mutant, Result]:
    """What became of each, said as soon as it is known; raise if tests are red without any."""
    actual: dict[Mutant, Result] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        unchanged = pool.submit(check_unchanged, mutants)
        waiting = {pool.submit(try_mutant, mutant): mutant for mutant in mutants}
        for done in concurrent.futures.as_completed([unchanged, *waiting]):
            if done is unchanged:
                if done.exception():
                    pool.shutdown(cancel_futures=True)
                done.result()
                continue
            mutant, result = waiting[done], done.result()
            actual[mutant] = result
            sys.stdout.write(
                f"{len(actual):3}/{len(mutants)} {result.outcome:8} {result.seconds:5.1f} s  "
                f"{mutant.file}: {mutant.what}\n{'':26}{result.why}\n"
            )
            sys.stdout.flush()
    return {mutant: actual[mutant] for mutant in mutants}


def complaints(actual: dict[Mutant, Result]) -> list[str]:
    """What is wrong with the tests or with the list."""
    wrong = []
    for mutant, result in actual.items():
        name = f"{mutant.file}: {mutant.what}"
        if result.outcome == BROKEN:
            wrong.append(f"broken: {name}\n{result.why}")
        elif result.outcome == SURVIVED and not mutant.excuse:
            wrong.append(f"no test noticed: {name}")
        elif result.outcome == CAUGHT and mutant.excuse:
            wrong.append(f"a test noticed what none can: {name}")
    caught = sum(result.outcome == CAUGHT for result in actual.values())
    if caught < SHARE * len(actual):
        wrong.append(f"only {caught} of {len(actual)} noticed, {SHARE:.0%} must be")
    return wrong


def page(actual: dict[Mutant, Result], seconds: float) -> str:
    """The results in Markdown."""
    outcomes = collections.Counter(result.outcome for result in actual.values())
    lines = [
        "# Mutants of the kernels",
        "",
        "Written by `make mutants`: kernels broken on purpose, as `tests/mutants/` lists it, and",
        "whether their tests noticed.",
        "",
        f"- {outcomes[CAUGHT]} of {len(actual)} mutants turned a test red, in {seconds:.0f} s",
        f"- {time.strftime('%Y-%m-%d')}",
        *(f"- {fact}" for fact in provenance.environment()),
        "",
        "| file | mutants | caught | survived |",
        "| --- | ---: | ---: | ---: |",
    ]
    for file in sorted({mutant.file for mutant in actual}):
        counts = collections.Counter(
            result.outcome for mutant, result in actual.items() if mutant.file == file
        )
        row = f"| {file}.py | {counts.total()} | {counts[CAUGHT]} | {counts[SURVIVED]} |"
        lines.append(row)
    survivors = [mutant for mutant, result in actual.items() if result.outcome == SURVIVED]
    if survivors:
        lines += ["", "## Survivors", ""]
        lines += [f"- {m.file}.py: {m.what}: {m.excuse or 'no excuse'}" for m in survivors]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="try only mutants with one of these")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--evidence", type=Path, metavar="PAGE", help="write the results here")
    arguments = parser.parse_args()
    mutants = [
        mutant
        for mutant in read_lists()
        if not arguments.words
        or any(word in f"{mutant.file}: {mutant.what}" for word in arguments.words)
    ]
    if not mutants:
        parser.error(f"no mutant has one of {arguments.words}")
    start = time.monotonic()
    start_server()
    actual = try_all(mutants, arguments.jobs)
    if arguments.evidence is not None:
        text = page(actual, time.monotonic() - start)
        arguments.evidence.write_text(text, encoding="utf-8")
    wrong = complaints(actual)
    for complaint in wrong:
        sys.stdout.write(complaint + "\n")
    outcomes = collections.Counter(result.outcome for result in actual.values())
    sys.stdout.write(f"{outcomes[CAUGHT]} of {len(actual)} mutants turned a test red\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
