"""Dispatch and combine as custom ops under the schemas of torch_npu."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
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
from ..quant_modes import dtype_number
from . import fake_outputs, split_phase
from .combine import check_combine, distribute_combine
from .dispatch import DispatchOutput, check_dispatch, distribute_dispatch
from .groups import checked_ahead
from .split_phase import CombineTeardown, DispatchTeardown

Arguments = dict[str, Any]
CheckedAhead = contextlib.AbstractContextManager[Callable[[], object]]


def _group_name(group: object) -> object:
    return group.group_name if isinstance(group, dist.ProcessGroup) else group


_BY_SCHEMA: dict[str, Callable[[object], object]] = {
    **dict.fromkeys(("group_ep", "group_tp"), _group_name),
    **dict.fromkeys(("y_dtype", "x_dtype", "scales_dtype"), dtype_number),
}


class CheckedOperator(Operator):
    """An op whose arguments can also be checked before it runs.

    Args:
        args: of ``Operator``.
        run: of ``Operator``; a result that a call does not compute may be None with ``allocate``.
        outputs: of ``Operator``, likewise.
        checking: with all arguments of ``run`` by name, returns a context manager as
            ``groups.checked_ahead`` does; a tensor without values comes on the meta device.
        allocate: replaces each None in the results, its first argument, by a tensor; takes the
            arguments of ``run``, too.

    Attributes:
        compute: ``run`` as given.
        computed: ``outputs`` as given.
    """

    def __init__(
        self,
        *args: Any,
        run: Callable[..., Any],
        outputs: Callable[..., Any],
        checking: Callable[..., CheckedAhead],
        allocate: Callable[..., Any] | None = None,
    ) -> None:
        def complete(function: Callable[..., Any]) -> Callable[..., Any]:
            if allocate is None:
                return function
            return lambda **arguments: allocate(function(**arguments), **arguments)

        super().__init__(*args, run=complete(run), outputs=complete(outputs))
        self.compute, self.computed = run, outputs
        self.checking = checking
        self.warned = False

    def __call__(self, **arguments: Any) -> Any:
        """Call the op; a process group goes by its name, a torch dtype by torch_npu's number.

        An eager call of an op that communicates warns once where inputs require gradients.
        """
        if not self.warned and "group_ep" in arguments and not torch.compiler.is_compiling():
            self._warn_of_gradients(arguments)
        return super().__call__(
            **{
                name: _BY_SCHEMA[name](value) if name in _BY_SCHEMA else value
                for name, value in arguments.items()
            }
        )

    def _warn_of_gradients(self, arguments: dict[str, Any]) -> None:
        needing = [
            name
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value.requires_grad
        ]
        if needing and torch.is_grad_enabled():
            self.warned = True
            warnings.warn(
                f"{self.name}: outputs have no gradients, got inputs that require them: "
                f"{', '.join(needing)}; moe_triton.ExpertParallel has gradients, and "
                "torch.no_grad() says that none are needed",
                stacklevel=4,
            )


_GROUP_FIELDS = {field.name for field in dataclasses.fields(GroupArguments)}

_GROUP = "str group_ep, int ep_world_size, int ep_rank_id, int moe_expert_num"
_SHARED = "int expert_shard_type=0, int shared_expert_num=1, int shared_expert_rank_num=0"
_PLACEMENT = f'str group_tp="", int tp_world_size=0, int tp_rank_id=0, {_SHARED}'
_ZERO_COMPUTATION = "int zero_expert_num=0, int copy_expert_num=0, int const_expert_num=0"


def _grouped(schema: Arguments) -> Arguments:
    """Arguments of a schema, with those of the group as one, ``arguments``."""
    group = {name: value for name, value in schema.items() if name in _GROUP_FIELDS}
    others = {name: value for name, value in schema.items() if name not in _GROUP_FIELDS}
    return others | {"arguments": GroupArguments(**group)}


def _indexed(op: str, schema: Arguments) -> Arguments:
    """Arguments of a combine's schema, with the location of the rows as ``index``."""
    name = "assist_info_for_combine" if op == COMBINE_V2 else "expand_idx"
    return _grouped({"index" if key == name else key: value for key, value in schema.items()})


def _grouped_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under a schema."""
    return lambda **schema: function(**_grouped(schema))


def _checking(
    op: str, check: Callable[..., object], kind: str | None, *, tp: bool = False
) -> Callable[..., CheckedAhead]:
    return lambda **schema: checked_ahead(op, check, kind, tp, **_grouped(schema))


def _checking_combine(op: str) -> Callable[..., CheckedAhead]:
    return lambda **schema: checked_ahead(
        op, check_combine, "combine", True, **_indexed(op, schema)
    )


def _dispatch(op: str) -> dict[str, Callable[..., Any]]:
    """The functions of a dispatch."""

    def run(*, performance_info: Tensor | None = None, **schema: Any) -> tuple[Tensor | None, ...]:
        out = distribute_dispatch(op, performance_info=performance_info, **_grouped(schema))
        if performance_info is not None:
            performance_info.add_(out.waited)
        return _ordered(out)

    def outputs(**schema: Any) -> tuple[Tensor | None, ...]:
        return _ordered(fake_outputs.dispatch_outputs(op, **_grouped(schema)))

    checking = _checking(op, check_dispatch, "dispatch", tp=True)
    return {"run": run, "outputs": outputs, "checking": checking, "allocate": _allocated}


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


def _allocated(outputs: tuple[Any, ...], *, tp_world_size: int, **_: object) -> tuple[Tensor, ...]:
    """Dispatch's outputs with zeros for those that it does not compute.

    Source: the allocations of npu_moe_distribute_dispatch and ..._v2 in op-plugin.
    """
    x, dynamic_scales, *others, tp_counts, weights = outputs
    if tp_counts is None:
        tp_counts = x.new_zeros(max(tp_world_size, 0), dtype=torch.int32)
    if weights is None:
        weights = x.new_zeros(x.shape[0] // max(tp_world_size, 1), dtype=torch.float32)
    return x, _scales_or_zeros(x, dynamic_scales), *others, tp_counts, weights


def _scales_or_zeros(x: Tensor, scales: Tensor | None) -> Tensor:
    """dynamic_scales, or a zero for each row of expand_x."""
    return x.new_zeros(x.shape[0], dtype=torch.float32) if scales is None else scales


def _allocated_teardown(
    outputs: tuple[Tensor, Tensor | None, Tensor, Tensor], **_: object
) -> tuple[Tensor, ...]:
    """A teardown's outputs with zeros for dynamic_scales that it does not compute."""
    x, dynamic_scales, *others = outputs
    return x, _scales_or_zeros(x, dynamic_scales), *others


def _combine(op: str) -> dict[str, Callable[..., Any]]:
    """The functions of a combine."""

    def run(*, performance_info: Tensor | None = None, **schema: Any) -> Tensor:
        arguments = _indexed(op, schema)
        out = distribute_combine(op, performance_info=performance_info, **arguments)
        if performance_info is not None:
            performance_info.add_(out.waited)
        return out.x

    outputs = fake_outputs.combine_output
    return {"run": run, "outputs": outputs, "checking": _checking_combine(op)}


def _combine_add_rms_norm(**schema: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = distribute_combine(COMBINE_ADD_RMS_NORM, **_indexed(COMBINE_ADD_RMS_NORM, schema))
    assert out.norm is not None
    return out.norm.y[:, None], out.norm.rstd[:, None, None], out.x[:, None]


def _combine_add_rms_norm_outputs(**schema: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = fake_outputs.combine_output(**schema)[:, None]
    return torch.empty_like(x), x.new_empty((len(x), 1, 1), dtype=torch.float32), x


def _checking_alone(op: str) -> Callable[..., CheckedAhead]:
    """The check of an op on one rank, which has no peers to abort."""
    return lambda **schema: contextlib.nullcontext(lambda: check_update_expert(op=op, **schema))


_DISPATCH_RESULTS = (
    "(Tensor expand_x, Tensor dynamic_scales, Tensor {}, "
    "Tensor expert_token_nums, Tensor ep_recv_counts, Tensor tp_recv_counts, Tensor expand_scales)"
)

dispatch = CheckedOperator(
    DISPATCH,
    f"Tensor x, Tensor expert_ids, {_GROUP}, *, Tensor? scales=None, Tensor? x_active_mask=None, "
    f"Tensor? expert_scales=None, {_PLACEMENT}, int quant_mode=0, int global_bs=0, "
    "int expert_token_nums_type=1",
    _DISPATCH_RESULTS.format("expand_idx"),
    **_dispatch(DISPATCH),
)

dispatch_v2 = CheckedOperator(
    DISPATCH_V2,
    f"Tensor x, Tensor expert_ids, {_GROUP}, *, Tensor? scales=None, Tensor? x_active_mask=None, "
    "Tensor? expert_scales=None, Tensor? elastic_info=None, Tensor(b!)? performance_info=None, "
    f"{_PLACEMENT}, int quant_mode=0, int global_bs=0, int expert_token_nums_type=1, "
    f'str comm_alg="", {_ZERO_COMPUTATION}, int? y_dtype=None, int? x_dtype=None, '
    "int? scales_dtype=None",
    _DISPATCH_RESULTS.format("assist_info_for_combine"),
    **_dispatch(DISPATCH_V2),
)

combine = CheckedOperator(
    COMBINE,
    "Tensor expand_x, Tensor expert_ids, Tensor expand_idx, Tensor ep_send_counts, "
    f"Tensor expert_scales, {_GROUP}, *, Tensor? tp_send_counts=None, Tensor? x_active_mask=None, "
    "Tensor? activation_scale=None, Tensor? weight_scale=None, Tensor? group_list=None, "
    f"Tensor? expand_scales=None, Tensor? shared_expert_x=None, {_PLACEMENT}, int global_bs=0, "
    "int out_dtype=0, int comm_quant_mode=0, int group_list_type=0",
    "Tensor",
    **_combine(COMBINE),
)

_ZERO_COMPUTATION_TENSORS = (
    "Tensor? elastic_info=None, Tensor? ori_x=None, Tensor? const_expert_alpha_1=None, "
    "Tensor? const_expert_alpha_2=None, Tensor? const_expert_v=None"
)

combine_v2 = CheckedOperator(
    COMBINE_V2,
    "Tensor expand_x, Tensor expert_ids, Tensor assist_info_for_combine, Tensor ep_send_counts, "
    f"Tensor expert_scales, {_GROUP}, *, Tensor? tp_send_counts=None, Tensor? x_active_mask=None, "
    f"Tensor? expand_scales=None, Tensor? shared_expert_x=None, {_ZERO_COMPUTATION_TENSORS}, "
    f"Tensor(b!)? performance_info=None, {_PLACEMENT}, int global_bs=0, int comm_quant_mode=0, "
    f'str comm_alg="", {_ZERO_COMPUTATION}',
    "Tensor",
    **_combine(COMBINE_V2),
)

combine_add_rms_norm = CheckedOperator(
    COMBINE_ADD_RMS_NORM,
    "Tensor expand_x, Tensor expert_ids, Tensor expand_idx, Tensor ep_send_counts, "
    f"Tensor expert_scales, Tensor residual_x, Tensor gamma, {_GROUP}, *, "
    "Tensor? tp_send_counts=None, Tensor? x_active_mask=None, Tensor? activation_scale=None, "
    "Tensor? weight_scale=None, Tensor? group_list=None, Tensor? expand_scales=None, "
    f"Tensor? shared_expert_x=None, {_ZERO_COMPUTATION_TENSORS}, {_PLACEMENT}, int global_bs=0, "
    "int out_dtype=0, int comm_quant_mode=0, int group_list_type=0, "
    f'str comm_alg="", float norm_eps=1e-06, {_ZERO_COMPUTATION}',
    "(Tensor y, Tensor rstd_out, Tensor x)",
    run=_combine_add_rms_norm,
    outputs=_combine_add_rms_norm_outputs,
    checking=_checking_combine(COMBINE_ADD_RMS_NORM),
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
    checking=_checking_alone(UPDATE_EXPERT),
)

eplb_update_expert = CheckedOperator(
    EPLB_UPDATE_EXPERT,
    "Tensor expert_ids, Tensor eplb_table, int local_rank_id, int world_size, int balance_mode",
    "Tensor balanced_expert_ids",
    run=lambda **schema: run_update_expert(op=EPLB_UPDATE_EXPERT, **schema)[0],
    outputs=lambda *, expert_ids, **_: torch.empty_like(expert_ids),
    checking=_checking_alone(EPLB_UPDATE_EXPERT),
)

_COMBINE_HALF = (
    f'{_SHARED}, int global_bs=0, int comm_quant_mode=0, int comm_type=0, str comm_alg=""'
)

dispatch_setup = CheckedOperator(
    DISPATCH_SETUP,
    f"Tensor x, Tensor expert_ids, {_GROUP}, *, Tensor? scales=None, Tensor? x_active_mask=None, "
    f"{_SHARED}, int quant_mode=0, int global_bs=0, int comm_type=0, "
    'str comm_alg="", int? y_dtype=None',
    "(Tensor y, Tensor expand_idx, Tensor comm_cmd_info)",
    run=_grouped_call(split_phase.dispatch_setup),
    outputs=_grouped_call(fake_outputs.dispatch_setup_outputs),
    checking=_checking(DISPATCH_SETUP, split_phase.check_dispatch_setup, "dispatch"),
)

dispatch_teardown = CheckedOperator(
    DISPATCH_TEARDOWN,
    f"Tensor x, Tensor y, Tensor expert_ids, Tensor comm_cmd_info, {_GROUP}, "
    f"{_SHARED}, int quant_mode=0, int global_bs=0, int expert_token_nums_type=1, "
    'int comm_type=0, str comm_alg=""',
    "(Tensor expand_x, Tensor dynamic_scales, Tensor assist_info_for_combine, "
    "Tensor expert_token_nums)",
    run=_grouped_call(lambda **inputs: DispatchTeardown(**inputs).run()),
    outputs=_grouped_call(fake_outputs.dispatch_teardown_outputs),
    checking=_checking(
        DISPATCH_TEARDOWN,
        lambda op, groups, **inputs: DispatchTeardown(**inputs).check(op, groups),
        None,
    ),
    allocate=_allocated_teardown,
)

combine_setup = CheckedOperator(
    COMBINE_SETUP,
    f"Tensor expand_x, Tensor expert_ids, Tensor assist_info_for_combine, {_GROUP}, *, "
    f"{_COMBINE_HALF}",
    "(Tensor quant_expand_x, Tensor comm_cmd_info)",
    run=_grouped_call(split_phase.combine_setup),
    outputs=_grouped_call(fake_outputs.combine_setup_outputs),
    checking=_checking(COMBINE_SETUP, split_phase.check_combine_setup, "combine"),
)

combine_teardown = CheckedOperator(
    COMBINE_TEARDOWN,
    "Tensor expand_x, Tensor quant_expand_x, Tensor expert_ids, Tensor expand_idx, "
    f"Tensor expert_scales, Tensor comm_cmd_info, {_GROUP}, *, Tensor? x_active_mask=None, "
    f"Tensor? shared_expert_x=None, {_COMBINE_HALF}",
    "Tensor",
    run=_grouped_call(lambda **inputs: CombineTeardown(**inputs).run()),
    outputs=fake_outputs.combine_output,
    checking=_checking(
        COMBINE_TEARDOWN,
        lambda op, groups, **inputs: CombineTeardown(**inputs).check(op, groups),
        None,
    ),
)
