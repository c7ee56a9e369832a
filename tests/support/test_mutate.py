"""The list of mutants fits the kernels, and the runner tells the noticed from the others."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import mutate
import pytest

MUTANTS = mutate.read_lists()
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in mutate.KERNEL_FILES}


def id_of(mutant):
    return f"{mutant.file}: {mutant.what}"


def test_every_kernel_has_mutants():
    assert {mutant.file for mutant in MUTANTS} == set(TEXTS)
    assert len(MUTANTS) >= 100
    names = [id_of(mutant) for mutant in MUTANTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("mutant", MUTANTS, ids=id_of)
def test_every_mutant_changes_its_file(mutant):
    assert mutant.applied(TEXTS[mutant.file]) != TEXTS[mutant.file]
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = str(test).partition("::")
        text = (mutate.ROOT / file).read_text(encoding="utf-8")
        function = name.partition("[")[0]
        assert not name or re.search(rf"^def {function}\(", text, re.MULTILINE), test


EXAMPLE = """\
# Adds where it should
# subtract
@ test_plan.py::test_example
 first = 1
-second = first - 1
+second = first + 1

# No more
= nobody looks
-last = 0
"""


def test_the_form_of_a_list():
    added, removed = mutate.mutants_of("plan", EXAMPLE)
    assert added.what == "Adds where it should subtract"
    assert added.killer == "test_plan.py::test_example"
    assert added.applied("first = 1\nsecond = first - 1\n") == "first = 1\nsecond = first + 1\n"
    assert not added.excuse
    assert removed.excuse == "nobody looks"
    assert removed.applied("last = 0\n") == ""


@pytest.mark.parametrize(
    "text, message",
    [
        ("# Nothing goes", "no line that goes"),
        ("-a line", "no sentence"),
        ("# Odd\n>a line", "begins with '>'"),
    ],
)
def test_a_list_of_another_form_is_refused(text, message):
    with pytest.raises(mutate.ListError, match=message):
        list(mutate.mutants_of("plan", text))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("absent\n", "x\n", "is there 0 times"),
        ("ce\n", "x\n", "is there 0 times"),
        ("twice\n", "x\n", "is there 2 times"),
        ("once  # a\n", "once  # b\n", "changes nothing"),
        ("once  # a\n", "once(\n", "was never closed"),
    ],
)
def test_a_mutant_that_makes_no_sense_is_refused(old, new, message):
    with pytest.raises(mutate.ListError, match=message):
        mutate.Mutant("plan", "Odd", old, new).applied("twice\ntwice\nonce  # a\n")


def result(outcome):
    return mutate.Result(outcome, "", 0.0)


@pytest.mark.parametrize("busy, outcome", [(False, mutate.CAUGHT), (True, mutate.BROKEN)])
def test_a_busy_machine_notices_nothing(busy, outcome, monkeypatch):
    mutant = mutate.Mutant("launch_config", "Example", "        rows *= 2\n", "        rows *= 4\n")

    def run_tests(folder, tests):
        changed = mutant.new in (folder / mutant.path).read_text(encoding="utf-8")
        return (1, "Timeout (0:04:00)!\n") if changed or busy else (0, "")

    monkeypatch.setattr(mutate, "run_tests", run_tests)
    actual = mutate.try_mutant(mutant)
    assert actual.outcome == outcome
    assert "a test did not end" in actual.why
    assert ("also without the mutant" in actual.why) == busy


def test_what_the_runner_complains_of():
    actual = {mutant: result(mutate.CAUGHT) for mutant in MUTANTS if not mutant.excuse}
    assert not mutate.complaints(actual)
    first, second = list(actual)[:2]
    assert mutate.complaints(actual | {first: result(mutate.SURVIVED)}) == [
        f"no test noticed: {id_of(first)}"
    ]
    assert "broken" in mutate.complaints(actual | {second: result(mutate.BROKEN)})[0]
    *_, example = mutate.mutants_of("plan", EXAMPLE)
    assert not mutate.complaints(actual | {example: result(mutate.SURVIVED)})
    assert "none can" in mutate.complaints(actual | {example: result(mutate.CAUGHT)})[0]
    assert mutate.complaints({first: result(mutate.CAUGHT), example: result(mutate.SURVIVED)}) == [
        "only 1 of 2 noticed, 95% must be"
    ]


def test_the_page_names_survivors():
    caught, survivor = mutate.mutants_of("plan", EXAMPLE)
    page = mutate.page({caught: result(mutate.CAUGHT), survivor: result(mutate.SURVIVED)}, 3)
    assert "1 of 2 mutants turned a test red, in 3 s" in page
    assert "| plan.py | 2 | 1 | 1 |" in page
    assert "- plan.py: No more: nobody looks" in page


RUN = r"""
import mutate

mutate.start_server()
for old, new in (
    ("        rows *= 2\n", "        rows *= 4\n"),
    ("@functools.lru_cache(maxsize=64)\n", "@functools.lru_cache(maxsize=65)\n"),
):
    print(mutate.try_mutant(mutate.Mutant("launch_config", "Example", old, new)))
"""


def test_the_runner_tells_what_is_noticed():
    run = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=Path(mutate.__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    noticed, survived = run.stdout.splitlines()
    assert "Result(outcome='caught', why='test_launch_config.py::test_" in noticed
    assert "Result(outcome='survived', why=''" in survived
