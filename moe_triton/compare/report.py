"""What a comparison found, in numbers and words."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

from .explain import Difference
from .metrics import ULP_BINS, Errors, merged
from .rules import Verdict

VERSION = 1  # of the JSON object


@dataclasses.dataclass(frozen=True)
class RankResult:
    """One output on one rank.

    Attributes:
        rank: world rank.
        folder: of the rank in the dump.
        verdict: of this tensor alone.
        errors: of its defined part, None where nothing was compared.
        rows: compared rows, and those of them that differ.
        by_expert: expert -> (rows, differing rows), where rows belong to experts.
        difference: the first one, or None.
        problem: why it could not be compared, or "".
        deviation: its name, or "".
    """

    rank: int
    folder: str
    verdict: Verdict
    errors: Errors | None = None
    rows: tuple[int, int] = (0, 0)
    by_expert: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    difference: Difference | None = None
    problem: str = ""
    deviation: str = ""


@dataclasses.dataclass(frozen=True)
class OutputResult:
    """One output of a call, on all ranks.

    Attributes:
        name: of the output.
        dtype: of the output.
        rule: that it follows.
        note: what is left out as undefined.
        ranks: the results by rank.
    """

    name: str
    dtype: str
    rule: str
    note: str
    ranks: tuple[RankResult, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of all ranks."""
        return max(rank.verdict for rank in self.ranks)

    @property
    def errors(self) -> Errors:
        """Of all ranks together."""
        return merged(rank.errors for rank in self.ranks if rank.errors is not None)

    @property
    def lines(self) -> list[str]:
        """Problems, deviations and first differences, one for each rank that has any."""
        lines = []
        for rank in self.ranks:
            if rank.problem:
                lines.append(f"rank {rank.rank}: {rank.problem}")
            if rank.difference is not None:
                lines.append(str(rank.difference))
        return lines

    @property
    def deviations(self) -> set[str]:
        """Names of the recognised deviations."""
        return {rank.deviation for rank in self.ranks} - {""}


@dataclasses.dataclass(frozen=True)
class CallResult:
    """One call of all ranks.

    Attributes:
        op: the operator.
        name: of the call in the dump.
        step: folder of the step.
        world: W, and T where it is 2, in words.
        sizes: of the workload, in words.
        outputs: the results; empty where the call was not compared.
        notes: assumptions, deviations and limits.
        problem: why the call was not compared, or "".
    """

    op: str
    name: str
    step: str
    world: str
    sizes: str
    outputs: tuple[OutputResult, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""

    @property
    def place(self) -> str:
        """Step and name."""
        return f"{self.step}/{self.name}".lstrip("/")

    @property
    def verdict(self) -> Verdict:
        """The worst of all outputs."""
        return max((output.verdict for output in self.outputs), default=Verdict.UNDEFINED)


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole comparison.

    Attributes:
        path: what was read.
        source: the kind of files, in words.
        standard: the standard of the rules.
        where: where calls were run, in words.
        calls: in the order of the dump.
        problems: (place, text) of what could not be used.
        accepted: names of deviations that count as in rule.
        ranks: W of the first collective call, or None.
        experts: E of that call, or None.
    """

    path: str
    source: str
    standard: str
    where: str
    calls: tuple[CallResult, ...]
    problems: tuple[tuple[str, str], ...]
    accepted: tuple[str, ...] = ()
    ranks: int | None = None
    experts: int | None = None

    @property
    def outputs(self) -> list[OutputResult]:
        """All compared outputs."""
        return [
            output
            for call in self.calls
            for output in call.outputs
            if output.verdict is not Verdict.UNDEFINED
        ]

    @property
    def deviations(self) -> list[str]:
        """Names of the recognised deviations."""
        return sorted({name for output in self.outputs for name in output.deviations})

    @property
    def exit_code(self) -> int:
        """0 in rule; 1 if an output is out of its rule, or cannot be used; 2 if none was compared.

        A broken part of a dump counts as out of rule only where another part was compared.
        """
        if not self.outputs:
            return 2
        bad = any(output.verdict >= Verdict.KNOWN for output in self.outputs)
        return int(bad or bool(self.problems) or any(call.problem for call in self.calls))

    def as_json(self) -> dict[str, Any]:
        """An object of JSON's types, whose layout docs/comparing.md describes."""
        outputs = self.outputs
        return {
            "version": VERSION,
            "path": self.path,
            "source": self.source,
            "standard": self.standard,
            "where": self.where,
            "exit_code": self.exit_code,
            "compared": len(outputs),
            "in_rule": sum(output.verdict <= Verdict.WARNING for output in outputs),
            "deviations": self.deviations,
            "problems": [{"place": place, "problem": text} for place, text in self.problems],
            "calls": [_call_json(call) for call in self.calls],
        }


def _call_json(call: CallResult) -> dict[str, Any]:
    return {
        "op": call.op,
        "name": call.name,
        "step": call.step,
        "world": call.world,
        "sizes": call.sizes,
        "verdict": call.verdict.words,
        "problem": call.problem,
        "notes": [*call.notes],
        "outputs": [_output_json(output) for output in call.outputs],
    }


def _output_json(output: OutputResult) -> dict[str, Any]:
    return {
        "name": output.name,
        "dtype": output.dtype,
        "rule": output.rule,
        "verdict": output.verdict.words,
        "note": output.note,
        **_errors_json(output.errors),
        "ranks": [
            {
                "rank": rank.rank,
                "folder": rank.folder,
                "verdict": rank.verdict.words,
                "problem": rank.problem,
                "deviation": rank.deviation,
                "rows": rank.rows[0],
                "rows_differing": rank.rows[1],
                "by_expert": {str(expert): [*rows] for expert, rows in rank.by_expert.items()},
                **(_errors_json(rank.errors) if rank.errors is not None else {}),
                "first_difference": _difference_json(rank.difference),
            }
            for rank in output.ranks
        ],
    }


def _difference_json(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    values = dataclasses.asdict(difference)
    return {
        name: _number(value) if isinstance(value, float) else value
        for name, value in values.items()
    } | {"text": str(difference)}


def _number(value: float) -> float | str | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else str(value)


def _errors_json(errors: Errors) -> dict[str, Any]:
    return {
        "elements": errors.elements,
        "exact": errors.exact,
        "off_by_one": errors.off_by_one,
        "nan_mismatches": errors.nan_mismatches,
        "max_step": errors.max_step,
        "steps": dict(zip(bin_names(), errors.histogram, strict=True)),
        "cosine": _number(errors.cosine),
        "max_abs_err": _number(errors.max_abs),
        "max_relative_err": _number(errors.max_relative),
        "one_thousandth_err_ratio": errors.share(errors.below_thousandth),
        "five_thousandths_err_ratio": errors.share(errors.below_five_thousandths),
        "mere": _number(errors.mere),
        "mare": _number(errors.mare),
    }


def bin_names() -> list[str]:
    """Names of the bins of the ULP histogram."""
    names = ["0"]
    for low, high in itertools.pairwise(ULP_BINS):
        names.append(str(high) if high == low + 1 else f"{low + 1}-{high}")
    return [*names, f">{ULP_BINS[-1]}"]


def count(verdicts: Iterable[Verdict]) -> str:
    """How often each verdict comes, in words."""
    numbers: dict[Verdict, int] = {}
    for verdict in verdicts:
        numbers[verdict] = numbers.get(verdict, 0) + 1
    return ", ".join(f"{numbers[v]} {v.words}" for v in sorted(numbers, reverse=True))
