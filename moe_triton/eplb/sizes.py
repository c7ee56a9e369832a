"""What a load is planned for, and the checks of both."""

from __future__ import annotations

import dataclasses
import numbers

import torch

from ..errors import ArgumentTypeError, ArgumentValueError


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The arguments of ``plan``, where they are described, and E from the load."""

    num_experts: int
    num_ranks: int
    num_slots: int
    num_nodes: int
    num_groups: int | None
    balance_mode: int

    def check(self, op: str) -> None:
        """Integers that fit together, or an error of ``op``."""
        for name, value in dataclasses.asdict(self).items():
            if name == "num_groups" and value is None:
                continue
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise ArgumentTypeError(op, name, "be an integer", repr(value))
        experts, ranks, slots = self.num_experts, self.num_ranks, self.num_slots
        nodes, groups = self.num_nodes, self.num_groups
        _check(op, "num_ranks", ranks >= 1, "be positive", ranks)
        contract = f"be a positive divisor of num_ranks = {ranks}"
        _check(op, "num_nodes", nodes >= 1 and ranks % nodes == 0, contract, nodes)
        homes = ranks
        if groups is not None:
            contract = (
                f"be a multiple of num_nodes = {nodes} and a divisor of the {experts} experts"
            )
            fits = groups >= 1 and groups % nodes == 0 and experts % groups == 0
            _check(op, "num_groups", fits, contract, groups)
            homes = ranks // nodes
        fits = slots % ranks == 0 and experts <= slots <= experts * homes
        contract = (
            f"be a multiple of num_ranks = {ranks} from {-(-experts // ranks) * ranks} to "
            f"{experts * homes} ({experts} experts, each on at most {homes} ranks)"
        )
        _check(op, "num_slots", fits, contract, slots)
        contract = "be 0 (by rank) or 1 (by token)"
        _check(op, "balance_mode", self.balance_mode in (0, 1), contract, self.balance_mode)


def check_load(op: str, load: torch.Tensor) -> None:
    """A load as ``plan`` takes it, or an error of ``op``."""
    if not isinstance(load, torch.Tensor):
        raise ArgumentTypeError(op, "load", "be a tensor", type(load).__name__)
    if load.is_complex() or load.dtype == torch.bool:
        raise ArgumentTypeError(op, "load", "be of a real dtype", load.dtype)
    if load.dim() not in (1, 2) or load.numel() == 0:
        contract = "have shape (E,) or (layers, E), and something in it"
        raise ArgumentValueError(op, "load", contract, f"shape {tuple(load.shape)}")
    values = load.detach().double()
    if not (values >= 0).all() or not values.sum(-1).isfinite().all():
        worst = values[~(values >= 0)].flatten()
        got = f"{worst[0].item()}" if len(worst) else "an infinite sum"
        raise ArgumentValueError(op, "load", "be finite and not negative", got)


def _check(op: str, name: str, holds: bool, contract: str, got: object) -> None:
    if not holds:
        raise ArgumentValueError(op, name, contract, got)
