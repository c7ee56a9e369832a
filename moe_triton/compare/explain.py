"""Say where two outputs first differ, and what the difference looks like."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from ..record.operators import is_dispatch
from .metrics import differing
from .outputs import Geometry, Region
from .replay import Tensors

_MOST_SUMS = 64  # hypotheses about a sum
_CLOSE = {torch.float16: 2.0**-8, torch.bfloat16: 2.0**-6}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first differing element of an output.

    Attributes:
        rank: world rank.
        folder: of the rank in the dump.
        row: of the whole output.
        column: of the row, flat.
        place: of the row, in words.
        expected: value here.
        found: value in the dump.
        in_row: differing elements of the row.
        row_size: elements of the row.
        rows: rows with differing elements on this rank.
        hint: what the difference looks like, or "".
    """

    rank: int
    folder: str
    row: int
    column: int
    place: str
    expected: float | int | bool
    found: float | int | bool
    in_row: int
    row_size: int
    rows: int
    hint: str = ""

    def __str__(self) -> str:
        many = f"; {self.in_row} of {self.row_size} elements of the row differ"
        where = f", column {self.column}" if self.row_size > 1 else ""
        text = (
            f"rank {self.rank}, {self.place}{where}: expected {_number(self.expected)}, "
            f"found {_number(self.found)}{many if self.row_size > 1 else ''}"
        )
        if self.rows > 1:
            text += f"; {self.rows} rows differ"
        return text + (f"; {self.hint}" if self.hint else "")


def _number(value: float | bool) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def first_difference(
    rank: int, folder: str, region: Region, found: torch.Tensor, expected: torch.Tensor
) -> Difference | None:
    """The first differing element of the compared parts, [rows, ...] of one shape."""
    if found.numel() == 0:
        return None
    differs = differing(found, expected).reshape(len(found), -1)
    in_row = differs.sum(1)
    if not bool(in_row.any()):
        return None
    row = int(in_row.nonzero()[0])
    column = int(differs[row].nonzero()[0])
    values = [t.reshape(len(t), -1)[row, column] for t in (expected, found)]
    if values[0].dtype.is_floating_point:
        values = [value.float() if value.dtype.itemsize == 1 else value for value in values]
    return Difference(
        rank=rank,
        folder=folder,
        row=region.row_number(row),
        column=column,
        place=region.name(row),
        expected=values[0].item(),
        found=values[1].item(),
        in_row=int(in_row[row]),
        row_size=differs.shape[1],
        rows=int((in_row > 0).sum()),
        hint=_row_hint(region, row, found, expected),
    )


def _row_hint(region: Region, row: int, found: torch.Tensor, expected: torch.Tensor) -> str:
    """What a wrong row is, where it is another row, zeros or NaN."""
    flat, reference = (t.reshape(len(t), -1) for t in (found, expected))
    if flat.shape[1] < 2 or found.dtype == torch.bool:
        return ""
    actual = flat[row]
    if actual.dtype.is_floating_point and bool(actual.float().isnan().all()):
        return "the whole row is NaN"
    if not bool(differing(actual, torch.zeros_like(actual)).any()):
        return "the row is zeros"
    same = ~differing(reference, actual.expand_as(reference)).any(1)
    if bool(same.any()):
        other = int(same.nonzero()[0])
        swapped = not bool(differing(flat[other], reference[row]).any())
        holds = "exchanged with" if swapped else "it holds what belongs into"
        return f"{holds} {region.name(other)}"
    return ""


def sum_hint(
    geometry: Geometry, expand_x: list[torch.Tensor], difference: Difference, found: torch.Tensor
) -> str:
    """Which mistake in the weighted sum of a combine explains a token's result, or "".

    Args:
        geometry: of the call; without special experts, TP or RMSNorm.
        expand_x: of all ranks.
        difference: of the output.
        found: [BS, H] the dump's output on the rank of the difference.
    """
    rank, token = difference.rank, difference.row
    inputs = geometry.inputs[rank]
    batch, weights = geometry.batch(rank), inputs.tensor("expert_scales")
    if batch is None or weights is None or geometry.world.tp_world == 2:
        return ""
    top_k = batch.ids.shape[1]
    rows: dict[int, torch.Tensor] = {}
    for holder, received in enumerate(geometry.rows):
        mine = (received.source == rank) & (received.token == token)
        for row in mine.nonzero()[:, 0].tolist():
            rows[int(received.slot[row])] = expand_x[holder][row].double()
    factors = {slot: float(weights[token, slot]) if slot < top_k else 1.0 for slot in rows}
    actual = found[token].double()
    scale = max(float(actual.abs().max()), 1e-30)
    limit = _CLOSE.get(found.dtype, 1e-5) * scale
    added = inputs.tensor("shared_expert_x")
    rest = torch.zeros_like(actual)
    if added is not None:
        rest = added.reshape(-1, added.shape[-1])[token].double()
    for text, hypothesis in itertools.islice(_hypotheses(factors, top_k), _MOST_SUMS):
        total = rest.clone()
        for slot, factor in hypothesis.items():
            total += factor * rows[slot]
        if bool(((total - actual).abs() <= limit).all()):
            return f"the sum fits {text}"
    return ""


def _hypotheses(factors: dict[int, float], top_k: int) -> Iterator[tuple[str, dict[int, float]]]:
    routed = sorted(slot for slot in factors if slot < top_k)
    for i, j in itertools.combinations(routed, 2):
        swapped = factors | {i: factors[j], j: factors[i]}
        yield f"with the weights of slots {i} and {j} exchanged", swapped
    if len(routed) > 2:
        backwards = dict(zip(routed, reversed([factors[s] for s in routed]), strict=True))
        yield "with the weights in reverse order", factors | backwards
    for slot in sorted(factors):
        name = f"slot {slot}" if slot < top_k else f"shared expert {slot - top_k}"
        yield f"without the row of {name}", {s: f for s, f in factors.items() if s != slot}
    yield "without weights", dict.fromkeys(factors, 1.0)
    shared = [slot for slot in factors if slot >= top_k]
    if shared and routed:
        first = factors | dict.fromkeys(shared, factors[routed[0]])
        yield "with the shared experts' rows weighted like slot 0", first


def explains_sums(op: str, expected: Tensors) -> bool:
    """Whether ``sum_hint`` knows the sum of an operator."""
    return not is_dispatch(op) and set(expected) == {"x"}
