"""``ExpertParallel``: dispatch and combine for the layers of a model, with gradients."""

from __future__ import annotations

from .layer import ExpertParallel
from .results import CombinePending, Dispatched, DispatchPending, Handle

__all__ = ["CombinePending", "DispatchPending", "Dispatched", "ExpertParallel", "Handle"]
