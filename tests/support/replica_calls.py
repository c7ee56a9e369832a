"""Calls of npu_moe_update_expert: the arguments of the worked example, and invalid ones."""

from __future__ import annotations

import torch

TABLE = torch.tensor([[1, 5, 0, 0], [2, 0, 4, 0], [3, 1, 3, 6], [2, 7, 2, 0]], dtype=torch.int32)
IDS = torch.tensor([[0, 1], [2, 3], [1, 2]], dtype=torch.int32)
WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]])


def _without_replicas() -> torch.Tensor:
    """A table with an expert that has no replica."""
    table = TABLE.clone()
    table[2, 0] = 0
    return table


# name -> arguments, status code, argument that the refusal names
BAD = {
    "ids None": ({"expert_ids": None}, 161001, "expert_ids"),
    "table None": ({"eplb_table": None}, 161001, "eplb_table"),
    "ids float": ({"expert_ids": IDS.float()}, 161002, "expert_ids"),
    "table int64": ({"eplb_table": TABLE.long()}, 161002, "eplb_table"),
    "weights double": ({"expert_scales": WEIGHTS.double()}, 161002, "expert_scales"),
    "mask int": ({"active_mask": IDS[:, 0]}, 161002, "active_mask"),
    "world size text": ({"world_size": "8"}, 161002, "world_size"),
    "ids 1-D": ({"expert_ids": IDS[0]}, 561002, "expert_ids"),
    "table 1-D": ({"eplb_table": TABLE[0]}, 561002, "eplb_table"),
    "K above E": ({"expert_ids": IDS.repeat(1, 3)}, 561002, "expert_ids"),
    "F 1": ({"eplb_table": TABLE[:, :1]}, 561002, "eplb_table"),
    "F above W + 1": ({"world_size": 2, "local_rank_id": 1}, 561002, "eplb_table"),
    "rank W": ({"local_rank_id": 8}, 561002, "local_rank_id"),
    "no rank": ({"local_rank_id": -1}, 561002, "local_rank_id"),
    "no world": ({"world_size": -1}, 561002, "world_size"),
    "mode 2": ({"balance_mode": 2}, 561002, "balance_mode"),
    "id E": ({"expert_ids": IDS + 1}, 561002, "expert_ids"),
    "id negative": ({"expert_ids": IDS - 1}, 561002, "expert_ids"),
    "no replicas": ({"eplb_table": _without_replicas()}, 561002, "eplb_table"),
    "more than F": ({"eplb_table": TABLE[:, :3]}, 561002, "eplb_table"),
    "weights alone": ({"expert_scales": WEIGHTS}, 561002, "pruning_threshold"),
    "threshold alone": ({"pruning_threshold": torch.ones(2)}, 561002, "expert_scales"),
    "threshold K + 1": (
        {"pruning_threshold": torch.ones(3), "expert_scales": WEIGHTS},
        561002,
        "pruning_threshold",
    ),
    "mask 2-D": ({"active_mask": WEIGHTS > 0}, 561002, "active_mask"),
}
