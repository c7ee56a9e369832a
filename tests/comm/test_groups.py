"""Groups by name, and the errors for a wrong name or rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_triton import (
    ArgumentNameError,
    ArgumentTypeError,
    ArgumentValueError,
    ExpertParallel,
    comm,
    testing,
)
from moe_triton.comm import groups
from moe_triton.compat.torch_npu import npu_moe_distribute_dispatch

OP = "test_op"


@pytest.fixture
def name():
    """An in-process group of three ranks, to which this thread is not bound."""
    comm.register_group("three", dist.HashStore(), 3, in_process=True)
    yield "three"
    comm.unregister_group("three")
    getattr(groups._bound, "ranks", {}).pop("three", None)


@pytest.mark.parametrize("rank", [0, 2, np.int64(1)])
def test_a_rank_is_an_argument_or_bound(name, rank):
    actual = comm.resolve(OP, name, rank)
    assert (actual.name, actual.rank, actual.size, actual.in_process) == (name, rank, 3, True)
    comm.bind_rank(name, 2)
    assert comm.resolve(OP, name).rank == 2


RANKS = {
    "none": (None, ArgumentValueError, "be in [0, 3) for 'three', got None"),
    "negative": (-1, ArgumentValueError, "be in [0, 3) for 'three', got -1"),
    "too large": (3, ArgumentValueError, "be in [0, 3) for 'three', got 3"),
    "text": ("1", ArgumentTypeError, "be an integer, got '1'"),
    "float": (1.0, ArgumentTypeError, "be an integer, got 1.0"),
    "truth": (True, ArgumentTypeError, "be an integer, got True"),
}
ranks = pytest.mark.parametrize("rank, kind, text", RANKS.values(), ids=RANKS)


@ranks
@pytest.mark.parametrize("argument", ["rank", "ep_rank_id"])
def test_a_wrong_rank_is_named_as_the_caller_does(name, rank, kind, text, argument):
    with pytest.raises(kind) as caught:
        comm.resolve(OP, name, rank, rank_argument=argument)
    assert str(caught.value) == f"{OP}: {argument} must {text}"
    assert caught.value.argument == argument


@ranks
def test_a_wrong_rank_of_an_op(name, rank, kind, text):
    x, ids = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(kind) as caught:
        npu_moe_distribute_dispatch(x, ids, name, 3, rank, 3)
    assert str(caught.value) == f"npu_moe_distribute_dispatch: ep_rank_id must {text}"


@pytest.mark.parametrize("group, got", [(5, "int"), (["three"], "list")])
def test_a_group_of_the_wrong_type(group, got):
    with pytest.raises(ArgumentTypeError) as caught:
        comm.resolve(OP, group, argument="group_ep")
    text = f"{OP}: group_ep must be a group's name or a process group, got {got}"
    assert str(caught.value) == text


OUTSIDE = (
    "group{} must be a group of this rank, got GroupMember.NON_GROUP_MEMBER (-100), which "
    "torch.distributed.new_group() returns to ranks outside the new group; only its members may "
    "call"
)


def test_a_group_of_other_ranks():
    """The functional ops, the object, the exchange and the settings."""

    def fn(ctx):
        group = dist.new_group([0])  # collective, also on the ranks outside
        x, ids = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int32)
        sizes = {"num_experts": 2, "top_k": 1, "hidden": 8, "max_tokens": 2}
        calls = {
            "set_transport": lambda: comm.set_transport(group, "auto"),
            "recover": lambda: comm.recover(group),
            "all_to_all_v": lambda: comm.all_to_all_v(x, [2], group=group),
            "ExpertParallel": lambda: ExpertParallel(group, **sizes).close(),
            "npu_moe_distribute_dispatch": lambda: npu_moe_distribute_dispatch(
                x, ids, group, 1, 0, 2
            ),
        }
        actual = {}
        for name, call in calls.items():
            try:
                call()
            except ArgumentValueError as error:
                actual[name] = str(error)
        return actual

    member, other = testing.run_processes(2, fn)
    assert member == {}
    assert other == {
        name: f"{name}: {OUTSIDE.format('_ep' if name.startswith('npu') else '')}"
        for name in (
            "set_transport",
            "recover",
            "all_to_all_v",
            "ExpertParallel",
            "npu_moe_distribute_dispatch",
        )
    }


def test_an_unknown_name():
    with pytest.raises(ArgumentNameError, match="name a registered or torch process group"):
        comm.resolve(OP, "nobody")


REGISTRATIONS = {
    "taken": ({"in_process": True, "name": "three"}, ArgumentNameError, "not be registered"),
    "no rank": ({}, ArgumentValueError, "rank must be given between processes"),
    "text": ({"rank": "0"}, ArgumentTypeError, "rank must be an integer, got '0'"),
    "too large": ({"rank": 2}, ArgumentValueError, "rank must be in [0, 2) for 'new', got 2"),
    "transport": ({"rank": 0, "transport": "mail"}, ArgumentValueError, "transport must be one"),
}


@pytest.mark.parametrize("options, kind, text", REGISTRATIONS.values(), ids=REGISTRATIONS)
def test_wrong_arguments_of_register_group(name, options, kind, text):
    options = {"name": "new", "store": dist.HashStore(), "size": 2, **options}
    with pytest.raises(kind) as caught:
        comm.register_group(**options)
    assert str(caught.value).startswith("register_group: ")
    assert text in str(caught.value)
    assert "new" not in groups._registered


def test_an_unknown_transport():
    with pytest.raises(ArgumentValueError, match="set_transport: transport must be one of"):
        comm.set_transport("any", "mail")
