"""The table of invalid calls of the split-phase ops, for every interface."""

from __future__ import annotations

import torch

# Invalid calls of rank 1 of the worked example: arguments, status code, argument at fault.
SETUPS = ("dispatch_setup", "combine_setup")
TEARDOWNS = ("dispatch_teardown", "combine_teardown")
INVALID = {
    "dispatch_setup": {
        "x None": ({"x": None}, 161001, "x"),
        "x float8": ({"x": torch.ones(3, 2).to(torch.float8_e5m2)}, 161002, "x"),
        "ids int64": ({"expert_ids": torch.zeros(3, 2, dtype=torch.int64)}, 161002, "expert_ids"),
        "y_dtype HiFloat8": ({"y_dtype": 290, "quant_mode": 2}, 161002, "y_dtype"),
        "comm_type text": ({"comm_type": "0"}, 161002, "comm_type"),
        "comm_type 3": ({"comm_type": 3}, 561002, "comm_type"),
        "comm_alg": ({"comm_alg": "fullmesh"}, 561002, "comm_alg"),
        "row 14": ({"quant_mode": 2, "scales": torch.ones(6, 2)}, 561002, "scales"),
    },
    "dispatch_teardown": {
        "y None": ({"y": None}, 161001, "y"),
        "info int64": (
            {"comm_cmd_info": torch.zeros(8, dtype=torch.int64)},
            161002,
            "comm_cmd_info",
        ),
        "x of another shape": ({"x": torch.ones(2, 2).bfloat16()}, 561002, "x"),
        "y of another dtype": ({"y": torch.zeros(6, 256).char()}, 561002, "y"),
        "quant_mode": ({"quant_mode": 2}, 561002, "quant_mode"),
        "global_bs": ({"global_bs": 6}, 561002, "global_bs"),
        "moe_expert_num": ({"moe_expert_num": 8}, 561002, "moe_expert_num"),
        "token_nums_type": ({"expert_token_nums_type": 2}, 561002, "expert_token_nums_type"),
    },
    "combine_setup": {
        "assist None": ({"assist_info_for_combine": None}, 161001, "assist_info_for_combine"),
        "assist short": (
            {"assist_info_for_combine": torch.zeros(9, dtype=torch.int32)},
            561002,
            "assist_info_for_combine",
        ),
        "assist wrong": (
            {"assist_info_for_combine": torch.full((1536,), -1, dtype=torch.int32)},
            561002,
            "assist_info_for_combine",
        ),
        "expand_x rows": ({"expand_x": torch.ones(3, 2).bfloat16()}, 561002, "expand_x"),
        "mode 1": ({"comm_quant_mode": 1}, 561002, "comm_quant_mode"),
    },
    "combine_teardown": {
        "weights None": ({"expert_scales": None}, 161001, "expert_scales"),
        "weights half": ({"expert_scales": torch.ones(3, 2).half()}, 161002, "expert_scales"),
        "idx of other ids": (
            {"expand_idx": torch.full((6,), 5, dtype=torch.int32)},
            561002,
            "expand_idx",
        ),
        "mask rows": ({"x_active_mask": torch.ones(2, dtype=torch.bool)}, 561002, "x_active_mask"),
        "addend": ({"shared_expert_x": torch.ones(2, 2).bfloat16()}, 561002, "shared_expert_x"),
    },
}
