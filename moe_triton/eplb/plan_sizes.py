"""Sizes of a plan, and checks of the arguments of ``eplb``."""

from __future__ import annotations

import dataclasses
import numbers

import torch

from ..errors import ArgumentTypeError, ArgumentValueError


@dataclasses.dataclass(frozen=True)
class PlanSizes:
    """The sizes that ``plan`` takes and documents, and E from the load."""

    num_experts: int
    num_ranks: int
    num_slots: int
    num_nodes: int
    num_groups: int | None
    balance_mode: int

    def check(self, op: str) -> None:
        """Raise an error of ``op`` unless the sizes are integers that fit together."""
        for name, value in dataclasses.asdict(self).items():
            if name == "num_groups" and value is None:
                continue
            _check_integer(op, name, value)
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
        _check_mode(op, self.balance_mode)


def check_load(op: str, load: torch.Tensor) -> None:
    """Raise an error of ``op`` unless ``load`` is valid for ``plan``."""
    if not isinstance(load, torch.Tensor):
        raise ArgumentTypeError(op, "load", "be a tensor", type(load).__name__)
    if load.is_complex() or load.dtype == torch.bool:
        raise ArgumentTypeError(op, "load", "be of a real dtype", load.dtype)
    if load.dim() not in (1, 2) or load.numel() == 0:
        contract = "have shape (E,) or (layers, E), not empty"
        raise ArgumentValueError(op, "load", contract, f"shape {tuple(load.shape)}")
    values = load.detach().double()
    if not (values >= 0).all() or not values.sum(-1).isfinite().all():
        worst = values[~(values >= 0)].flatten()
        got = f"{worst[0].item()}" if len(worst) else "an infinite sum"
        raise ArgumentValueError(op, "load", "be finite and not negative", got)


def check_table(
    op: str,
    load: torch.Tensor,
    eplb_table: torch.Tensor,
    num_ranks: int,
    num_slots: int,
    balance_mode: int,
) -> None:
    """Raise an error of ``op`` unless the arguments are valid for ``rank_load``."""
    check_load(op, load)
    _check(op, "load", load.dim() == 1, "have shape (E,)", f"shape {tuple(load.shape)}")
    if not isinstance(eplb_table, torch.Tensor) or eplb_table.dtype != torch.int32:
        got = getattr(eplb_table, "dtype", type(eplb_table).__name__)
        raise ArgumentTypeError(op, "eplb_table", "be a tensor of int32", got)
    shape = tuple(eplb_table.shape)
    fits = len(shape) == 2 and shape[0] == len(load) and shape[1] > 1
    contract = f"have shape (E, F) with E = {len(load)} and F > 1"
    _check(op, "eplb_table", fits, contract, f"shape {shape}")
    sizes = {"num_ranks": num_ranks, "num_slots": num_slots, "balance_mode": balance_mode}
    for name, value in sizes.items():
        _check_integer(op, name, value)
    _check(op, "num_ranks", num_ranks >= 1, "be positive", num_ranks)
    fits = num_slots >= 1 and num_slots % num_ranks == 0
    contract = f"be a positive multiple of num_ranks = {num_ranks}"
    _check(op, "num_slots", fits, contract, num_slots)
    _check_mode(op, balance_mode)
    rows = eplb_table.cpu()
    count, slots = rows[:, :1], rows[:, 1:]
    used = torch.arange(slots.shape[1]) < count
    wrong = ((count < 1) | (count >= shape[1])).any(1)
    wrong |= (used & ((slots < 0) | (slots >= num_slots))).any(1)
    if wrong.any():
        expert = int(wrong.nonzero()[0])
        contract = f"have a count in [1, {shape[1]}) in each row, then slots in [0, {num_slots})"
        got = f"{rows[expert].tolist()} for expert {expert}"
        raise ArgumentValueError(op, "eplb_table", contract, got)


def _check_mode(op: str, balance_mode: int) -> None:
    contract = "be 0 (by rank) or 1 (by token)"
    _check(op, "balance_mode", balance_mode in (0, 1), contract, balance_mode)


def _check_integer(op: str, name: str, value: object) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ArgumentTypeError(op, name, "be an integer", repr(value))


def _check(op: str, name: str, holds: bool, contract: str, got: object) -> None:
    if not holds:
        raise ArgumentValueError(op, name, contract, got)
