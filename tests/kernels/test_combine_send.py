"""What a rank says about the rows that it returns."""

from __future__ import annotations

import torch
from lockstep_windows import DIGEST, Case, Group

from moe_triton.layout.windows import EXTRA, SENT


def test_numbers_of_a_combine(steps, device):
    """Where the rows of a rank begin at each holder, and how many there are."""
    group = Group(Case(max_tokens=3), device)
    _, _, received = group.exchanged(steps)
    group.returned(steps, received)
    for rank, windows in enumerate(group.windows["combine"]):
        start, size = windows.ring.record(1, 0) + 3 * 16, group.layout.combine_number_bytes
        numbers = windows.own[start : start + 3 * size].view(3, size).view(torch.int32)
        for holder, rows in enumerate(received):
            starts, counts = rows.group_starts[:, rank], rows.counts[:, rank]
            assert numbers[holder, :4].tolist() == [*starts.tolist(), *counts.tolist()]


def test_data_slots_of_a_combine(steps, device):
    """Copied rows go to the slot after the last one; rows in place are in slot 0."""
    group = Group(Case(world_size=1, max_tokens=2), device, slots=4, data_slots=2)
    windows, taken = group.windows["combine"][0], []
    _, _, (received,) = group.exchanged(steps)
    for y in (received.x, received.x, None, received.x):
        steps.combine_send(
            windows, group.layout, y, received.group_starts, received.offsets[-1:], digest=DIGEST
        )
        epoch = int(windows.state[SENT])
        record = windows.own[windows.ring.record(epoch, 0) :][:16].view(torch.int32)
        taken.append(int(record[EXTRA]))
    assert taken == [1, 0, 0, 1]
