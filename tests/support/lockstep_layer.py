"""One layer on all ranks, driven by one thread, and experts that multiply by their number."""

from __future__ import annotations

import sys

import cloudpickle
import torch

from moe_triton import ExpertParallel

# Worker processes import the package, not the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def experts(received) -> torch.Tensor:
    """Each row times the number of its expert on its rank, from 1; NaN after the last row."""
    rows = torch.arange(len(received.x), device=received.x.device)
    number = torch.searchsorted(received.offsets, rows, right=True)
    y = received.x.to(torch.bfloat16) * (number[:, None] + 1)
    return y.masked_fill_((rows >= received.offsets[-1])[:, None], float("nan"))


def drive(ranks: list[ExpertParallel], batches) -> tuple[list, list]:
    """Received rows and sums of each rank for its arguments of dispatch."""
    pending = [ep.dispatch_setup(*batch) for ep, batch in zip(ranks, batches, strict=True)]
    received = [ep.dispatch_teardown(pending[rank]) for rank, ep in enumerate(ranks)]
    pending = [
        ep.combine_setup(experts(received[r]), received[r].handle) for r, ep in enumerate(ranks)
    ]
    return received, [ep.combine_teardown(pending[rank]) for rank, ep in enumerate(ranks)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)
