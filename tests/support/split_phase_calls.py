"""The four split-phase ops of one rank, each with what the ones before returned."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import torch

from moe_triton.ascend.quant_modes import dtype_number
from moe_triton.compat import torch_npu

# Worker processes import the package, not the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

_AGREED = (
    "ep_world_size",
    "moe_expert_num",
    "shared_expert_num",
    "shared_expert_rank_num",
    "global_bs",
)


class Halves:
    """Setups and teardowns of one rank's call, of :func:`harness.make_calls`.

    Args:
        ctx: of the rank.
        call: its arguments.
        record: keep the name, arguments and outputs of each op in ``made``.
    """

    def __init__(self, ctx: Any, call: dict, *, record: bool = False) -> None:
        self.call, self.made = call, [] if record else None
        dispatch = call["dispatch"]
        self._agreed = {name: dispatch[name] for name in _AGREED}
        self._agreed |= {"group_ep": ctx.ep_group, "ep_rank_id": ctx.ep_rank}
        self._ids = {"expert_ids": dispatch["expert_ids"]}

    def _op(self, half: str, given: dict, changes: dict) -> Any:
        name = f"npu_moe_distribute_{half}"
        given = {**self._agreed, **self._ids, **given, **changes}
        outputs = getattr(torch_npu, name)(**given)
        if self.made is not None:
            self.made.append((name, given, outputs))
        return outputs

    def dispatch_setup(self, **changes: Any) -> tuple:
        """dispatch_setup."""
        call = self.call["dispatch"]
        names = ("x", "scales", "x_active_mask", "quant_mode")
        given = {name: call[name] for name in names}
        if "y_dtype" in call:
            given["y_dtype"] = dtype_number(call["y_dtype"])
        return self._op("dispatch_setup", given, changes)

    def dispatch_teardown(self, sent: tuple, **changes: Any) -> tuple:
        """dispatch_teardown."""
        call = self.call["dispatch"]
        names = ("x", "quant_mode", "expert_token_nums_type")
        given = {name: call[name] for name in names} | {"y": sent[0], "comm_cmd_info": sent[2]}
        return self._op("dispatch_teardown", given, changes)

    def no_setup(self) -> tuple:
        """What looks like the outputs of a setup."""
        rows = torch.zeros(6, 256).bfloat16()
        return rows, None, torch.zeros(160, dtype=torch.int32)

    def combine_setup(self, received: tuple, **changes: Any) -> tuple:
        """combine_setup."""
        call = self.call["combine"]
        given = {"expand_x": call["expand_x"], "comm_quant_mode": call["comm_quant_mode"]}
        given["assist_info_for_combine"] = received[2]
        return self._op("combine_setup", given, changes)

    def combine_teardown(self, sent: tuple, returned: tuple, **changes: Any) -> torch.Tensor:
        """combine_teardown."""
        call = self.call["combine"]
        names = ("expand_x", "expert_scales", "x_active_mask", "shared_expert_x", "comm_quant_mode")
        given = {name: call[name] for name in names}
        given |= {"quant_expand_x": returned[0], "comm_cmd_info": returned[1]}
        return self._op("combine_teardown", given | {"expand_idx": sent[1]}, changes)

    def round_trip(self) -> dict[str, Any]:
        """All four, and what each returned."""
        sent = self.dispatch_setup()
        received = self.dispatch_teardown(sent)
        returned = self.combine_setup(received)
        combined = self.combine_teardown(sent, returned)
        return {"sent": sent, "received": received, "returned": returned, "combined": combined}


def round_trip(ctx: Any, calls: list[dict]) -> dict[str, Any]:
    """All four ops on this rank."""
    return Halves(ctx, calls[ctx.rank]).round_trip()
