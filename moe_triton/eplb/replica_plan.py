"""The result of a planner: a table, a placement, and the load of each rank."""

from __future__ import annotations

import dataclasses

import torch

from ..errors import ArgumentTypeError, ArgumentValueError


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Placement and use of the replicas of experts, of one layer or several stacked.

    Letters: E logical experts, S physical slots, W ranks, F columns of the table. With several
    layers, every tensor has a leading dimension for them. Tensors are on the CPU.

    Attributes:
        eplb_table: [E, F] int32 for ``npu_moe_update_expert``: the number n of used columns, n
            physical experts, then -1. A replica occurs in proportion to its part of the load, and
            not at all without a part.
        placement: [S] int64, the logical expert whose weights each physical expert holds. Physical
            expert s is on rank s // (S / W), as in dispatch.
        num_ranks: W.
        balance_mode: 0 for a table read by rank, 1 for one read by token.
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
        """[E] int64, the number of physical experts of each logical one."""
        counts = self.eplb_table.new_zeros(self.eplb_table.shape[:-1], dtype=torch.int64)
        return counts.scatter_add_(-1, self.placement, torch.ones_like(self.placement))

    def logical_load(self, load: torch.Tensor) -> torch.Tensor:
        """Sum a load of physical experts per logical expert, for the next plan.

        Args:
            load: [S] of any dtype and on any device.

        Returns:
            [E] of that dtype, on that device.

        Raises:
            ArgumentTypeError: the load is not a tensor.
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
        """[] float64, maximum over mean of the ranks' load without replicas; 1 is best."""
        return _balance(self.load_before)

    @property
    def balance_after(self) -> torch.Tensor:
        """[] float64, the same with the table."""
        return _balance(self.load_after)


def _balance(load: torch.Tensor) -> torch.Tensor:
    mean = load.mean(-1)
    # Without load every placement is balanced.
    return torch.where(mean > 0, load.amax(-1) / mean, 1.0)
