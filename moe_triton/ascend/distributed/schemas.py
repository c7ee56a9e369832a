"""Dispatch and combine under the schemas of torch_npu, translated to the ops of this library."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.custom_op import Operator
from ..group_arguments import GroupArguments
from ..local.update_expert import check_update_expert
from ..local.update_expert import update_expert as run_update_expert
from ..op_names import (
    COMBINE,
    COMBINE_ADD_RMS_NORM,
    COMBINE_SETUP,
    COMBINE_TEARDOWN,
    COMBINE_V2,
    DISPATCH,
    DISPATCH_SETUP,
    DISPATCH_TEARDOWN,
    DISPATCH_V2,
    EPLB_UPDATE_EXPERT,
    UPDATE_EXPERT,
)
from . import fake_outputs, split_phase
from .combine import check_combine, distribute_combine
from .dispatch import DispatchOutput, check_dispatch, distribute_dispatch
from .fake_outputs import combine_output, dispatch_outputs
from .groups import checking


class CheckedOperator(Operator):
    """An op that can also be checked before it runs.

    Args:
        checking: what ``ranks.checking`` returns for the arguments of ``run``; tensors on the meta
            device stand for such that have no values yet.
        args: of ``Operator``.
        kwargs: likewise.
    """

    def __init__(
        self,
        *args: Any,
        checking: Callable[..., contextlib.AbstractContextManager[Callable[[], object]]],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.checking = checking


_GROUP_FIELDS = {field.name for field in dataclasses.fields(GroupArguments)}

_GROUP = "str group_ep, int ep_world_size, int ep_rank_id, int moe_expert_num"
_PLACEMENT = (
    'str group_tp="", int tp_world_size=0, int tp_rank_id=0, int expert_shard_type=0, '
    "int shared_expert_num=1, int shared_expert_rank_num=0"
)
_SPECIAL = "int zero_expert_num=0, int copy_expert_num=0, int const_expert_num=0"


def _grouped(given: dict[str, Any]) -> dict[str, Any]:
    """``given``, with the arguments that describe the group as one, ``arguments``."""
    group = {name: value for name, value in given.items() if name in _GROUP_FIELDS}
    rest = {name: value for name, value in given.items() if name not in _GROUP_FIELDS}
    return rest | {"arguments": GroupArguments(**group)}


def _indexed(op: str, given: dict[str, Any]) -> dict[str, Any]:
    """``given`` to a combine, with what says where rows belong as ``index``."""
    name = "assist_info_for_combine" if op == COMBINE_V2 else "expand_idx"
    rest = {key: value for key, value in given.items() if key != name}
    return _grouped(rest | {"index": given[name]})


def _checking_combine(op: str, **given: Any) -> contextlib.AbstractContextManager[Any]:
    return checking(op, check_combine, ("combine", "gather"), **_indexed(op, given))


def _checking(
    op: str, check: Callable[..., object], kind: str | None, tp_kind: str | None = None
) -> Callable[..., contextlib.AbstractContextManager[Any]]:
    return lambda **given: checking(op, check, (kind, tp_kind), **_grouped(given))


def _dispatch(
    op: str, *, performance_info: Tensor | None = None, **given: Any
) -> tuple[Tensor | None, ...]:
    out = distribute_dispatch(op, performance_info=performance_info, **_grouped(given))
    if performance_info is not None:
        performance_info.add_(out.waited)
    return _ordered(out)


def _ordered(out: DispatchOutput) -> tuple[Tensor | None, ...]:
    """The seven outputs, the third of which differs between the versions."""
    return (
        out.expand_x,
        out.dynamic_scales,
        out.expand_idx if out.assist_info is None else out.assist_info,
        out.expert_token_nums,
        out.ep_recv_counts,
        out.tp_recv_counts,
        out.expand_scales,
    )


def _combine(op: str, *, performance_info: Tensor | None = None, **given: Any) -> Tensor:
    arguments = _indexed(op, given)
    out = distribute_combine(op, performance_info=performance_info, **arguments)
    if performance_info is not None:
        performance_info.add_(out.waited)
    return out.x


def _combine_add_rms_norm(op: str, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = distribute_combine(op, **_indexed(op, given))
    assert out.norm is not None
    return out.norm.y[:, None], out.norm.rstd[:, None, None], out.x[:, None]


def _dispatch_outputs(op: str, **given: Any) -> tuple[Tensor | None, ...]:
    names = ["x", "expert_ids", "arguments", "scales", "expert_scales", "quant_mode"]
    names += ["y_dtype", "x_dtype", "scales_dtype"]
    arguments = _grouped(given)
    known = {name: arguments[name] for name in names if name in arguments}
    return _ordered(dispatch_outputs(op, **known))


def _combine_outputs(*, expand_x: Tensor, expert_ids: Tensor, **_: object) -> Tensor:
    return combine_output(expand_x, expert_ids)


def _combine_add_rms_norm_outputs(
    *, expand_x: Tensor, expert_ids: Tensor, **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    x = combine_output(expand_x, expert_ids)[:, None]
    return torch.empty_like(x), x.new_empty((len(x), 1, 1), dtype=torch.float32), x


def _dispatch_setup_outputs(**given: Any) -> tuple[Tensor, ...]:
    names = ("x", "expert_ids", "arguments", "quant_mode", "y_dtype")
    arguments = _grouped(given)
    return fake_outputs.dispatch_setup_outputs(**{name: arguments[name] for name in names})


def _dispatch_teardown_outputs(**given: Any) -> tuple[Tensor | None, ...]:
    names = ("x", "y", "expert_ids", "arguments", "quant_mode")
    arguments = _grouped(given)
    return fake_outputs.dispatch_teardown_outputs(**{name: arguments[name] for name in names})


def _combine_setup_outputs(**given: Any) -> tuple[Tensor, Tensor]:
    names = ("expand_x", "expert_ids", "arguments")
    arguments = _grouped(given)
    return fake_outputs.combine_setup_outputs(**{name: arguments[name] for name in names})


dispatch = CheckedOperator(
    DISPATCH,
    f"Tensor x, Tensor expert_ids, {_GROUP}, *, Tensor? scales=None, Tensor? x_active_mask=None, "
    f"Tensor? expert_scales=None, {_PLACEMENT}, int quant_mode=0, int global_bs=0, "
    "int expert_token_nums_type=1",
    "(Tensor expand_x, Tensor dynamic_scales, Tensor expand_idx, "
    "Tensor expert_token_nums, Tensor ep_recv_counts, Tensor tp_recv_counts, Tensor expand_scales)",
    run=functools.partial(_dispatch, DISPATCH),
    outputs=functools.partial(_dispatch_outputs, DISPATCH),
    checking=_checking(DISPATCH, check_dispatch, "dispatch", "gather"),
)

dispatch_v2 = CheckedOperator(
    DISPATCH_V2,
    f"Tensor x, Tensor expert_ids, {_GROUP}, *, Tensor? scales=None, Tensor? x_active_mask=None, "
    "Tensor? expert_scales=None, Tensor? elastic_info=None, Tensor(b!)? performance_info=None, "
    f"{_PLACEMENT}, int quant_mode=0, int global_bs=0, int expert_token_nums_type=1, "
    f'str comm_alg="", {_SPECIAL}, int? y_dtype=None, int? x_dtype=None, int? scales_dtype=None',
    "(Tensor expand_x, Tensor dynamic_scales, Tensor assist_info_for_combine, "
    "Tensor expert_token_nums, Tensor ep_recv_counts, Tensor tp_recv_counts, Tensor expand_scales)",
    run=functools.partial(_dispatch, DISPATCH_V2),
    outputs=functools.partial(_dispatch_outputs, DISPATCH_V2),
    checking=_checking(DISPATCH_V2, check_dispatch, "dispatch", "gather"),
)

combine = CheckedOperator(
    COMBINE,
    "Tensor expand_x, Tensor expert_ids, Tensor expand_idx, Tensor ep_send_counts, "
    f"Tensor expert_scales, {_GROUP}, *, Tensor? tp_send_counts=None, Tensor? x_active_mask=None, "
    "Tensor? activation_scale=None, Tensor? weight_scale=None, Tensor? group_list=None, "
    f"Tensor? expand_scales=None, Tensor? shared_expert_x=None, {_PLACEMENT}, int global_bs=0, "
    "int out_dtype=0, int comm_quant_mode=0, int group_list_type=0",
    "Tensor",
    run=functools.partial(_combine, COMBINE),
    outputs=_combine_outputs,
    checking=functools.partial(_checking_combine, COMBINE),
)

combine_v2 = CheckedOperator(
    COMBINE_V2,
    "Tensor expand_x, Tensor expert_ids, Tensor assist_info_for_combine, Tensor ep_send_counts, "
    f"Tensor expert_scales, {_GROUP}, *, Tensor? tp_send_counts=None, Tensor? x_active_mask=None, "
    "Tensor? expand_scales=None, Tensor? shared_expert_x=None, Tensor? elastic_info=None, "
    "Tensor? ori_x=None, Tensor? const_expert_alpha_1=None, Tensor? const_expert_alpha_2=None, "
    f"Tensor? const_expert_v=None, Tensor(b!)? performance_info=None, {_PLACEMENT}, "
    f'int global_bs=0, int comm_quant_mode=0, str comm_alg="", {_SPECIAL}',
    "Tensor",
    run=functools.partial(_combine, COMBINE_V2),
    outputs=_combine_outputs,
    checking=functools.partial(_checking_combine, COMBINE_V2),
)

combine_add_rms_norm = CheckedOperator(
    COMBINE_ADD_RMS_NORM,
    "Tensor expand_x, Tensor expert_ids, Tensor expand_idx, Tensor ep_send_counts, "
    f"Tensor expert_scales, Tensor residual_x, Tensor gamma, {_GROUP}, *, "
    "Tensor? tp_send_counts=None, Tensor? x_active_mask=None, Tensor? activation_scale=None, "
    "Tensor? weight_scale=None, Tensor? group_list=None, Tensor? expand_scales=None, "
    "Tensor? shared_expert_x=None, Tensor? elastic_info=None, Tensor? ori_x=None, "
    "Tensor? const_expert_alpha_1=None, Tensor? const_expert_alpha_2=None, "
    f"Tensor? const_expert_v=None, {_PLACEMENT}, int global_bs=0, int out_dtype=0, "
    'int comm_quant_mode=0, int group_list_type=0, str comm_alg="", float norm_eps=1e-06, '
    f"{_SPECIAL}",
    "(Tensor y, Tensor rstd_out, Tensor x)",
    run=functools.partial(_combine_add_rms_norm, COMBINE_ADD_RMS_NORM),
    outputs=_combine_add_rms_norm_outputs,
    checking=functools.partial(_checking_combine, COMBINE_ADD_RMS_NORM),
)

update_expert = CheckedOperator(
    UPDATE_EXPERT,
    "Tensor expert_ids, Tensor eplb_table, *, Tensor? expert_scales=None, "
    "Tensor? pruning_threshold=None, Tensor? active_mask=None, int local_rank_id=-1, "
    "int world_size=-1, int balance_mode=0",
    "(Tensor balanced_expert_ids, Tensor balanced_active_mask)",
    run=run_update_expert,
    outputs=lambda *, expert_ids, **_: (
        torch.empty_like(expert_ids),
        torch.empty_like(expert_ids, dtype=torch.bool),
    ),
    # On this rank alone: there is nobody to tell.
    checking=lambda **given: contextlib.nullcontext(
        functools.partial(check_update_expert, **given)
    ),
)

eplb_update_expert = CheckedOperator(
    EPLB_UPDATE_EXPERT,
    "Tensor expert_ids, Tensor eplb_table, int local_rank_id, int world_size, int balance_mode",
    "Tensor balanced_expert_ids",
    run=lambda **given: run_update_expert(op=EPLB_UPDATE_EXPERT, **given)[0],
    outputs=lambda *, expert_ids, **_: torch.empty_like(expert_ids),
    checking=lambda **given: contextlib.nullcontext(
        functools.partial(check_update_expert, op=EPLB_UPDATE_EXPERT, **given)
    ),
)

_SPLIT = (
    "int expert_shard_type=0, int shared_expert_num=1, int shared_expert_rank_num=0, "
    "int quant_mode=0, int global_bs=0"
)
_SPLIT_BACK = (
    "int expert_shard_type=0, int shared_expert_num=1, int shared_expert_rank_num=0, "
    'int global_bs=0, int comm_quant_mode=0, int comm_type=0, str comm_alg=""'
)

dispatch_setup = CheckedOperator(
    DISPATCH_SETUP,
    f"Tensor x, Tensor expert_ids, {_GROUP}, *, Tensor? scales=None, Tensor? x_active_mask=None, "
    f'{_SPLIT}, int comm_type=0, str comm_alg="", int? y_dtype=None',
    "(Tensor y, Tensor expand_idx, Tensor comm_cmd_info)",
    run=lambda **given: split_phase.dispatch_setup(**_grouped(given)),
    outputs=_dispatch_setup_outputs,
    checking=_checking(DISPATCH_SETUP, split_phase.check_dispatch_setup, "dispatch"),
)

dispatch_teardown = CheckedOperator(
    DISPATCH_TEARDOWN,
    f"Tensor x, Tensor y, Tensor expert_ids, Tensor comm_cmd_info, {_GROUP}, "
    f'{_SPLIT}, int expert_token_nums_type=1, int comm_type=0, str comm_alg=""',
    "(Tensor expand_x, Tensor dynamic_scales, Tensor assist_info_for_combine, "
    "Tensor expert_token_nums)",
    run=lambda **given: split_phase.dispatch_teardown(**_grouped(given)),
    outputs=_dispatch_teardown_outputs,
    checking=_checking(DISPATCH_TEARDOWN, split_phase.check_dispatch_teardown, None),
)

combine_setup = CheckedOperator(
    COMBINE_SETUP,
    f"Tensor expand_x, Tensor expert_ids, Tensor assist_info_for_combine, {_GROUP}, *, "
    f"{_SPLIT_BACK}",
    "(Tensor quant_expand_x, Tensor comm_cmd_info)",
    run=lambda **given: split_phase.combine_setup(**_grouped(given)),
    outputs=_combine_setup_outputs,
    checking=_checking(COMBINE_SETUP, split_phase.check_combine_setup, "combine"),
)

combine_teardown = CheckedOperator(
    COMBINE_TEARDOWN,
    "Tensor expand_x, Tensor quant_expand_x, Tensor expert_ids, Tensor expand_idx, "
    f"Tensor expert_scales, Tensor comm_cmd_info, {_GROUP}, *, Tensor? x_active_mask=None, "
    f"Tensor? shared_expert_x=None, {_SPLIT_BACK}",
    "Tensor",
    run=lambda **given: split_phase.combine_teardown(**_grouped(given)),
    outputs=_combine_outputs,
    checking=_checking(COMBINE_TEARDOWN, split_phase.check_combine_teardown, None),
)
