"""Invalid updates of experts through the aclnn interface: row 28 of the table of constraints."""

from __future__ import annotations

import aclnn_calls
import pytest
import replica_calls
import torch


def update_expert(function: str, changes: dict) -> dict:
    """How an update of experts ends, with edited arguments."""
    given = {"expert_ids": replica_calls.IDS, "eplb_table": replica_calls.TABLE}
    given |= {"local_rank_id": 3, "world_size": 8} | changes
    ids = changes.get("expert_ids", replica_calls.IDS)
    shape = (3, 2) if ids is None else tuple(ids.shape)
    outputs = [torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)]
    count = 1 if "EPLB" in function else 2
    return aclnn_calls.ending(function, given, outputs[:count])


SUCCESSOR_ONLY = ("expert_scales", "pruning_threshold", "active_mask")
CASES = [
    (function, name)
    for name, (changes, *_) in replica_calls.BAD.items()
    for function in ("aclnnMoeEPLBUpdateExpert", "aclnnMoeUpdateExpert")
    if function == "aclnnMoeUpdateExpert"
    or not any(argument in changes for argument in SUCCESSOR_ONLY)
]
IN_VALUES = ("id E", "id negative", "no replicas", "more than F")


@pytest.mark.parametrize("function, name", CASES)
def test_refused(function, name):
    changes, code, argument = replica_calls.BAD[name]
    ending = update_expert(function, changes)
    (parameter,) = (
        name
        for name in aclnn_calls.parameters(function)
        if aclnn_calls.keyword(function, name) == argument
    )
    assert ending["status"] == code, ending
    assert f": {parameter} must" in ending["sentence"], ending
    assert ending["phase"] == (2 if name in IN_VALUES else 1), ending
