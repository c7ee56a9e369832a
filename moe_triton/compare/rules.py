"""The rules by which an output is in order, and the standards that choose among them.

cann      integers, counts, indices and moved rows: equal bits ("binary consistency"); quantised
          codes: at most 1 apart, on less than 0.1 % of them; scales and sums: the community
          standard, mean relative error < T and the largest < 10 T
msprobe   the Result column of msprobe compare, for outputs whose inputs are equal: error where NaN
          or infinity is on one side only or the one-thousandth ratio is below 0.6, warning where
          Cosine is below 0.9
exact     equal bits everywhere, to compare two machines that run this library

Source: the precision standards of Ascend/msprobe and CANN, as docs/comparing.md quotes them.
"""

from __future__ import annotations

import enum
import math
from typing import Literal, NamedTuple

import torch

from .metrics import Errors

Standard = Literal["cann", "msprobe", "exact"]
STANDARDS: tuple[Standard, ...] = ("cann", "msprobe", "exact")

# T of the community standard, as powers of two.
_COMMUNITY = {
    torch.float16: -10,
    torch.bfloat16: -7,
    torch.float32: -13,
    torch.float8_e4m3fn: -3,
    torch.float8_e5m2: -2,
}
_MOST_OFF_BY_ONE = 0.001
_THOUSANDTH = 0.6
_COSINE = 0.9


class Kind(enum.Enum):
    """What an output holds, which decides its rule."""

    EXACT = "exact"  # integers, counts, indices, moved rows
    CODES = "codes"  # quantised rows
    VALUES = "values"  # scales and sums


class Verdict(enum.IntEnum):
    """In the order in which the worst one counts."""

    UNDEFINED = 0  # nothing that the operators define
    IN_RULE = 1
    WARNING = 2
    KNOWN = 3  # a deviation with a name
    OUT_OF_RULE = 4

    @property
    def words(self) -> str:
        """For reports."""
        return self.name.lower().replace("_", " ")


class Judgement(NamedTuple):
    """A verdict and the rule that it follows, with its numbers."""

    verdict: Verdict
    rule: str


def judge(standard: Standard, kind: Kind, dtype: torch.dtype, errors: Errors) -> Judgement:
    """Apply the rule of ``standard`` for an output of this kind and dtype."""
    if standard == "msprobe":
        return _msprobe(errors)
    if standard == "exact" or kind is Kind.EXACT or (kind is Kind.VALUES and not _has_t(dtype)):
        return Judgement(_in_rule(errors.exact == errors.elements), "binary consistency")
    if kind is Kind.CODES:
        differing = errors.elements - errors.exact
        holds = errors.max_step <= 1 and (
            differing == 0 or errors.share(differing) < _MOST_OFF_BY_ONE
        )
        return Judgement(_in_rule(holds), "codes at most 1 apart, on < 0.1 %")
    exponent = _COMMUNITY[dtype]
    t = 2.0**exponent
    holds = not errors.nan_mismatches and errors.mere < t and errors.mare < 10 * t
    rule = f"CANN community: MERE < 2^{exponent}, MARE < 10 * 2^{exponent}"
    return Judgement(_in_rule(holds), rule)


def _has_t(dtype: torch.dtype) -> bool:
    return dtype in _COMMUNITY


def _in_rule(holds: bool) -> Verdict:
    return Verdict.IN_RULE if holds else Verdict.OUT_OF_RULE


def _msprobe(errors: Errors) -> Judgement:
    ratio = errors.share(errors.below_thousandth)
    rule = f"msprobe: no NaN or inf on one side, one-thousandth ratio >= {_THOUSANDTH}"
    if errors.nan_mismatches or ratio < _THOUSANDTH:
        return Judgement(Verdict.OUT_OF_RULE, rule)
    if math.isnan(errors.cosine) or errors.cosine < _COSINE:
        return Judgement(Verdict.WARNING, f"msprobe: Cosine of the output >= {_COSINE}")
    return Judgement(Verdict.IN_RULE, rule)
