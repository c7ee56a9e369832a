"""Groups of consecutive rows, as lists of prefix sums, counts or pairs give them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import checks

CUMSUM, COUNT, KEY_VALUE = range(3)  # group_list_type


def group_ends(
    op: str, name: str, groups: Tensor, kind: int, num_rows: int, *, exact: bool = False
) -> Tensor:
    """[n] int64: the row after the last one of each group.

    Args:
        op: for error messages.
        name: of the argument.
        groups: [n] prefix sums or counts, or [n, 2] pairs of a group and its count.
        kind: which of these; for pairs the order of the rows is theirs.
        num_rows: R, the rows that the groups divide.
        exact: whether the groups must have all rows.

    Raises:
        ArgumentValueError: on the CPU, negative counts or too many rows.
    """
    counts = groups[:, 1] if kind == KEY_VALUE else groups
    ends = counts.long() if kind == CUMSUM else counts.cumsum(0, dtype=torch.int64)
    if groups.device.type == "cpu" and len(ends):
        sizes = ends.diff(prepend=ends.new_zeros(1))
        contract = "not descend" if kind == CUMSUM else "not be negative"
        checks.value(op, name, not bool((sizes < 0).any()), contract, counts.tolist())
        last = int(ends[-1])
        fits = last == num_rows if exact else last <= num_rows
        contract = f"divide {'the' if exact else 'at most'} {num_rows} rows"
        checks.value(op, name, fits, contract, f"{last} rows")
    return ends


def expert_of_row(ends: Tensor, num_rows: int) -> Tensor:
    """[R] int64: the group of each row; n for rows after the last group."""
    row = torch.arange(num_rows, device=ends.device)
    return torch.searchsorted(ends.contiguous(), row, right=True)
