"""Run a recorded call here: its arguments, on as many local ranks as it had."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .. import backend, profile
from ..ascend import op_names
from ..compat import torch_npu
from ..errors import MoeError
from ..record.calls import RankCall, StoredTensor
from ..record.operators import OUTPUTS, is_collective, signature
from ..testing import RankContext, run_local
from .worlds import WorldCall

Tensors = dict[str, torch.Tensor]

# Of outputs here; real layers are far below.
_MOST_EXPERTS = 2**16
_MOST_BYTES = 2**35

# What a setup here returns replaces what the setup of the dump returned: it is opaque.
_OPAQUE = {
    op_names.DISPATCH_TEARDOWN: ("y", "comm_cmd_info"),
    op_names.COMBINE_TEARDOWN: ("quant_expand_x", "comm_cmd_info"),
}


@dataclasses.dataclass(frozen=True)
class RankInputs:
    """A rank's call with its tensors read.

    Attributes:
        call: the recorded call.
        arguments: by name, tensors on the CPU.
    """

    call: RankCall
    arguments: Mapping[str, Any]

    @classmethod
    def load(cls, call: RankCall) -> RankInputs:
        """Read the input tensors.

        Raises:
            FileError: one cannot be read.
        """
        return cls(
            call,
            {
                name: value.load() if isinstance(value, StoredTensor) else value
                for name, value in call.arguments.items()
            },
        )

    def tensor(self, name: str) -> torch.Tensor | None:
        """A tensor argument, or None."""
        value = self.arguments.get(name)
        return value if isinstance(value, torch.Tensor) else None


@dataclasses.dataclass(frozen=True)
class Where:
    """Where calls are run.

    Attributes:
        device: of all ranks.
        backend: of the device steps, a name of ``backend.BACKENDS``, or None for the device's.
        product: whose limits are applied first, a name of ``profile.PROFILES``, or None.
    """

    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    backend: str | None = None
    product: str | None = None

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """The back end, for the calls inside."""
        if self.backend is not None:
            backend.set_backend(self.backend)
        try:
            yield
        finally:
            if self.backend is not None:
                backend.set_backend(None)


def check_product(world: WorldCall, inputs: list[RankInputs], where: Where) -> str:
    """Why the product's limits forbid the call, or "".

    The call is run with the limits of ``where.product``; what it computes is dropped.
    """
    if where.product is None:
        return ""
    before = profile.get_profile()
    profile.set_profile(where.product)
    try:
        run(world, inputs, where)
    except MoeError as error:
        return str(error)
    finally:
        profile.set_profile(before)
    return ""


def too_large(world: WorldCall, inputs: list[RankInputs]) -> str:
    """Why the sizes that a dump names could exhaust this machine, or "".

    Outputs have room for them whatever the dump itself holds.
    """
    for call in inputs:
        number = call.call.number
        experts = max(number("moe_expert_num"), number("expert_num"), number("num_experts"))
        if experts > _MOST_EXPERTS:
            return f"the experts must be at most {_MOST_EXPERTS} to be run here, got {experts}"
    rows, hidden = _most_rows(world, inputs), max(map(_hidden, inputs), default=1)
    if rows * hidden * 2 > _MOST_BYTES:
        return (
            f"the rows of a rank must fit in {_MOST_BYTES} bytes to be run here, got up to {rows} "
            f"rows of {hidden}"
        )
    return ""


def _hidden(rank: RankInputs) -> int:
    tensors = (rank.tensor(name) for name in ("x", "expand_x", "tokens", "permuted_tokens"))
    return max((t.shape[-1] for t in tensors if t is not None and t.dim()), default=1)


def _most_rows(world: WorldCall, inputs: list[RankInputs]) -> int:
    """Rows that an output may have, by the arguments alone."""
    if is_collective(world.op):
        ids = [
            i for rank in inputs if (i := rank.tensor("expert_ids")) is not None and i.dim() == 2
        ]
        tokens = max(map(len, ids), default=0) * world.ep_world
        top_k = max((i.shape[1] for i in ids), default=1)
        return max(tokens, *(call.number("global_bs") for call in world.calls)) * max(top_k, 1)
    most = 0
    for rank in inputs:
        number, shape = rank.call.number, rank.arguments.get("restore_shape")
        padded = number("expert_num") * number("expert_capacity")
        most = max(most, padded, number("active_num"), number("num_out_tokens"))
        if isinstance(shape, list) and all(isinstance(size, int) for size in shape):
            most = max(most, *shape[:1])
    return most


def run(world: WorldCall, inputs: list[RankInputs], where: Where) -> list[Tensors]:
    """The outputs of a call here, by rank and name, on the CPU.

    Raises:
        MoeError: the call is refused.
        FileError: an input of a setup cannot be read.
    """
    if not is_collective(world.op):
        return [_results(world.op, _call(world.op, rank.arguments, where)) for rank in inputs]
    setups = [RankInputs.load(call) for call in world.setups]

    def on_rank(context: RankContext) -> Tensors:
        groups = {"group_ep": context.ep_group, "group_tp": context.tp_group}
        arguments = dict(inputs[context.rank].arguments)
        if setups:
            setup = setups[context.rank]
            sent = _results(
                setup.call.op, _call(setup.call.op, {**setup.arguments, **groups}, where)
            )
            arguments |= {name: sent[name] for name in _OPAQUE[world.op]}
        return _results(world.op, _call(world.op, {**arguments, **groups}, where))

    return run_local(
        world.ep_world * world.tp_world, on_rank, tp_world_size=world.tp_world, device=where.device
    )


def _call(op: str, arguments: Mapping[str, Any], where: Where) -> Any:
    parameters = signature(op).parameters
    given = {
        name: value.to(where.device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
        if name in parameters
    }
    with torch.no_grad():
        return getattr(torch_npu, op)(**given)


def _results(op: str, values: Any) -> Tensors:
    if isinstance(values, torch.Tensor):
        values = (values,)
    pairs = zip(OUTPUTS[op], values, strict=True)
    return {name: value.cpu() for name, value in pairs if isinstance(value, torch.Tensor)}
