"""Balance the load of experts: replicate hot experts, place the replicas, assign ranks to them.

    plan = eplb.plan(load, num_ranks=32, num_slots=288)  # load: rows per logical expert
    ids, _ = npu_moe_update_expert(ids, plan.eplb_table, local_rank_id=rank, world_size=32)

No function here communicates or needs a device: plan beside the model, once in many steps.
"""

from __future__ import annotations

from .planner import plan, plan_greedy
from .plot import plot_load
from .replica_plan import Plan
from .table import rank_load

__all__ = ["Plan", "plan", "plan_greedy", "plot_load", "rank_load"]
