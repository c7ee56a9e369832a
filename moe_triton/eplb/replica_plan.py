"""What a planner returns: a table, a placement, and the load that they give."""

from __future__ import annotations

import dataclasses

import torch

from ..errors import ArgumentTypeError, ArgumentValueError


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Where replicas of experts live and who uses which; for one layer, or for several stacked.

    Letters: E logical experts, S physical slots, W ranks, F columns of the table. With several
    layers, every tensor begins with a dimension for them. Tensors are on the CPU.

    Attributes:
        eplb_table: [E, F] int32, what ``npu_moe_update_expert`` takes: how many columns of the row
            count, then a physical expert in each, then -1. A replica stands there as often as its
            part of the load asks, and not at all if it gets none.
        placement: [S] int64, the logical expert whose weights each physical expert holds. Physical
            expert s is on rank s // (S / W), as dispatch has it.
        num_ranks: W.
        balance_mode: 0 if the table is made for the choice by rank, 1 for that by token.
        load_before: [W] float64, rows per rank without replicas: the experts in order, E / W on
            each rank (expert e on rank e * W // E).
        load_after: [W] float64, the same with the table; ``rank_load`` says when this is exact.
    """

    eplb_table: torch.Tensor
    placement: torch.Tensor
    num_ranks: int
    balance_mode: int
    load_before: torch.Tensor
    load_after: torch.Tensor

    @property
    def ranks(self) -> torch.Tensor:
        """[S] int64, the rank of each physical expert."""
        slots = torch.arange(self.placement.shape[-1])
        return slots // (len(slots) // self.num_ranks)

    @property
    def replicas(self) -> torch.Tensor:
        """[E] int64, how many physical experts hold each logical one."""
        counts = self.eplb_table.new_zeros(self.eplb_table.shape[:-1], dtype=torch.int64)
        return counts.scatter_add_(-1, self.placement, torch.ones_like(self.placement))

    def logical_load(self, load: torch.Tensor) -> torch.Tensor:
        """Add up what was counted for physical experts, to plan the next table from.

        Args:
            load: [S] of any dtype and on any device.

        Returns:
            [E] of that dtype, on that device.

        Raises:
            ArgumentTypeError: the load is no tensor.
            ArgumentValueError: its shape is not that of ``placement``.
        """
        op = "eplb.Plan.logical_load"
        if not isinstance(load, torch.Tensor):
            raise ArgumentTypeError(op, "load", "be a tensor", type(load).__name__)
        if load.shape != self.placement.shape:
            contract = f"have the shape of placement, {tuple(self.placement.shape)}"
            raise ArgumentValueError(op, "load", contract, f"shape {tuple(load.shape)}")
        total = load.new_zeros(self.eplb_table.shape[:-1])
        return total.scatter_add_(-1, self.placement.to(load.device), load)

    @property
    def balance_before(self) -> torch.Tensor:
        """[] float64, the most that a rank receives without replicas over the mean; 1 is best."""
        return _balance(self.load_before)

    @property
    def balance_after(self) -> torch.Tensor:
        """[] float64, the same with the table."""
        return _balance(self.load_after)


def _balance(load: torch.Tensor) -> torch.Tensor:
    mean = load.mean(-1)
    # Without any load every placement is as good as any other.
    return torch.where(mean > 0, load.amax(-1) / mean, 1.0)
