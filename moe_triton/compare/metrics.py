"""How far two tensors are apart: in elements, in steps of their format, and in msprobe's columns.

msprobe's columns, for found x and expected y, over all elements:

    Cosine             x . y / (|x| |y|), in float64
    MaxAbsErr          max |x - y|
    MaxRelativeErr     max |x - y| / |y|; both get eps added where y is 0, in the dtype, or float32
    One Thousandth Err Ratio, Five Thousandths Err Ratio
                       share of the elements whose relative error is below 0.001, 0.005

NaN and infinity at the same places of both are taken for zeros; elsewhere no column is defined.
Source: the compare instructions of Ascend/msprobe; checked against version 26.2.0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch

# Upper ends of the bins of the ULP histogram; the last bin has no end.
ULP_BINS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 1024)
# Small denominator of the community standard's relative error.
_COMMUNITY_EPS = 1e-7
_INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class Errors:
    """The distance of two tensors of one shape and dtype.

    Attributes:
        elements: compared.
        exact: elements with equal bits, or both NaN, or zeros of either sign.
        off_by_one: elements whose codes or ULPs are 1 apart.
        nan_mismatches: elements that are NaN or infinite on one side only, or of another sign.
        max_step: largest distance in codes of an integer, in ULP of a float.
        histogram: elements by distance, bins of ``ULP_BINS``.
        max_abs: msprobe's MaxAbsErr; NaN if undefined.
        max_relative: msprobe's MaxRelativeErr.
        below_thousandth: elements with a relative error below 0.001.
        below_five_thousandths: likewise below 0.005.
        products: sums of x * y, x * x and y * y in float64, for Cosine.
        mere_sum: sum of |x - y| / (|y| + 1e-7), of the community standard.
        mare: its maximum.
    """

    elements: int = 0
    exact: int = 0
    off_by_one: int = 0
    nan_mismatches: int = 0
    max_step: int = 0
    histogram: tuple[int, ...] = (0,) * (len(ULP_BINS) + 1)
    max_abs: float = 0.0
    max_relative: float = 0.0
    below_thousandth: int = 0
    below_five_thousandths: int = 0
    products: tuple[float, float, float] = (0.0, 0.0, 0.0)
    mere_sum: float = 0.0
    mare: float = 0.0

    @property
    def cosine(self) -> float:
        """Msprobe's Cosine: 1 for zeros on both sides, NaN for zeros on one."""
        xy, xx, yy = self.products
        eps = torch.finfo(torch.float64).eps
        if not self.elements or math.sqrt(xx) <= eps >= math.sqrt(yy):
            return 1.0
        if math.sqrt(xx) <= eps or math.sqrt(yy) <= eps:
            return math.nan
        return xy / (math.sqrt(xx) * math.sqrt(yy))

    @property
    def mere(self) -> float:
        """Mean relative error of the community standard."""
        return self.mere_sum / max(self.elements, 1)

    def share(self, count: int) -> float:
        """``count`` of all elements; 1 without elements."""
        return count / self.elements if self.elements else 1.0


def merged(parts: Iterable[Errors]) -> Errors:
    """The errors of several tensors together."""
    total = Errors()
    for part in parts:
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(Errors):
            a, b = getattr(total, field.name), getattr(part, field.name)
            if isinstance(a, tuple):
                changes[field.name] = tuple(x + y for x, y in zip(a, b, strict=True))
            elif field.name.startswith("ma"):
                changes[field.name] = math.nan if math.isnan(a + b) else max(a, b)
            else:
                changes[field.name] = a + b
        total = Errors(**changes)
    return total


def differing(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Which elements differ: not equal, and not both NaN."""
    if found.dtype.is_floating_point:
        x, y = _values(found), _values(expected)
        return (x != y) & ~(x.isnan() & y.isnan())
    return found != expected


def _values(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.dtype.itemsize > 1 else x.float().double()


def steps(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Distance of each element in codes of an integer or ULP of a float, int64.

    Neighbouring floats are 1 apart, across zero too; NaN is beyond infinity.
    """
    return (_ordinal(found) - _ordinal(expected)).abs()


def _ordinal(x: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the values, without gaps."""
    if not x.dtype.is_floating_point:
        return x.long()
    bits = x.contiguous().view(_INTEGER_OF[x.dtype.itemsize]).long()
    if x.dtype == torch.float8_e8m0fnu:
        return bits  # no sign
    half = 1 << (8 * x.dtype.itemsize - 1)
    magnitude = bits & (half - 1)
    negative = (bits & half) != 0 if x.dtype.itemsize == 1 else bits < 0
    return torch.where(negative, -magnitude, magnitude)


def errors(found: torch.Tensor, expected: torch.Tensor) -> Errors:
    """Measure the distance of ``found`` from ``expected``, of one shape and dtype."""
    n = found.numel()
    if n == 0:
        return Errors()
    found, expected = found.reshape(-1), expected.reshape(-1)
    differs = differing(found, expected)
    distance = torch.where(differs, steps(found, expected).clamp_min(1), 0)
    x, y = _values(found), _values(expected)
    finite = x.isfinite() & y.isfinite()
    mismatches = int((~finite & differs).sum())
    bounds = torch.tensor(ULP_BINS)
    bins = torch.bucketize(distance, bounds).bincount(minlength=len(ULP_BINS) + 1)
    result = Errors(
        elements=n,
        exact=n - int(differs.sum()),
        off_by_one=int((distance == 1).sum()),
        nan_mismatches=mismatches,
        max_step=int(distance.max()),
        histogram=tuple(bins.tolist()),
    )
    if mismatches:
        nan = math.nan
        return dataclasses.replace(
            result, max_abs=nan, max_relative=nan, products=(nan, nan, nan), mere_sum=nan, mare=nan
        )
    x, y = x.where(finite, 0.0), y.where(finite, 0.0)
    gap = (x - y).abs()
    community = gap / (y.abs() + _COMMUNITY_EPS)
    relative = _relative(x, y, found.dtype)
    return dataclasses.replace(
        result,
        max_abs=float(gap.max()),
        max_relative=float(relative.max()),
        below_thousandth=int((relative < 0.001).sum()),
        below_five_thousandths=int((relative < 0.005).sum()),
        products=(float(x @ y), float(x @ x), float(y @ y)),
        mere_sum=float(community.sum()),
        mare=float(community.max()),
    )


def _relative(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Msprobe's relative error: floats of up to 32 bits in float32, integers in float64."""
    kind = torch.float32 if dtype.is_floating_point and dtype.itemsize < 8 else torch.float64
    a, b = x.to(kind), y.to(kind)
    eps = torch.finfo(kind).eps
    zero = b == 0
    a, b = torch.where(zero, a + eps, a), torch.where(zero, b + eps, b)
    return ((a - b) / b).abs()
