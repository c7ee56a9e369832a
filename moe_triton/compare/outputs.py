"""Which part of each output the operators define, what it holds, and what each place is called.

Outputs have fixed shapes, and kernels leave what they do not need uninitialised: rows after the
last received one, results of inactive tokens, words of ``assist_info_for_combine`` after the first
three of a row. Two runs of one program differ there, so that only the defined part is compared.
Source: the operator documents, as moe_triton.compat.torch_npu restates them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ascend import op_names
from ..record.operators import is_collective, is_dispatch
from ..topology import Topology
from .layouts import Batch, Rows, received
from .replay import RankInputs, Tensors
from .rules import Kind
from .worlds import WorldCall

_ASSIST = 3  # words of assist_info_for_combine that a row has
_RECEIVED = "received rows only; the others are not written"
_CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclasses.dataclass(frozen=True)
class Region:
    """The defined part of an output of one rank.

    Attributes:
        kind: what it holds.
        width: elements of a row; None keeps the rows of the tensor.
        rows: the rows that are compared: their number from the first, their indices, or None for
            all.
        columns: elements of each row that are compared, from the first; None for all.
        undefined: why nothing is compared, or "".
        note: what is left out, for reports.
        name: of a row by its number in the compared part, for messages.
        experts: [rows] id of the expert of each compared row, for plots, or None.
    """

    kind: Kind = Kind.EXACT
    width: int | None = None
    rows: int | torch.Tensor | None = None
    columns: int | None = None
    undefined: str = ""
    note: str = ""
    name: Callable[[int], str] = lambda row: f"element {row}"
    experts: torch.Tensor | None = None

    def take(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """[rows, ...] the defined part of ``tensor``, None if the tensor is too small for it."""
        if self.width is not None:
            tensor = tensor.reshape(-1)
            tensor = tensor[: len(tensor) // self.width * self.width].view(-1, self.width)
        elif tensor.dim() == 0:
            tensor = tensor[None]
        if self.columns is not None:
            tensor = tensor[:, : self.columns]
        if self.rows is None:
            return tensor
        if isinstance(self.rows, int):
            return tensor[: self.rows] if len(tensor) >= self.rows else None
        if self.rows.numel() and int(self.rows.max()) >= len(tensor):
            return None
        return tensor[self.rows]

    def row_number(self, row: int) -> int:
        """The row in the whole output, of a row of the compared part."""
        return int(self.rows[row]) if isinstance(self.rows, torch.Tensor) else row


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What the arguments of all ranks say about a collective call.

    Attributes:
        world: the call.
        inputs: of all world ranks.
        topology: placement of the experts; None where ``elastic_info`` renumbers the ranks.
        planes: the routing of the ranks of each EP group, by tp rank; empty without a topology.
        rows: what each world rank received from its EP group, likewise.
    """

    world: WorldCall
    inputs: Sequence[RankInputs]
    topology: Topology | None
    planes: tuple[tuple[Batch, ...], ...]
    rows: tuple[Rows, ...]

    @classmethod
    def of(cls, world: WorldCall, inputs: Sequence[RankInputs]) -> Geometry:
        """From the arguments of a collective call."""
        first = inputs[0].arguments
        elastic = inputs[0].tensor("elastic_info")
        none = cls(world, inputs, None, (), ())
        if elastic is not None and elastic.numel() and int(elastic.reshape(-1)[0]):
            return none
        number = world.calls[0].number
        shared = number("shared_expert_rank_num")
        moe_ranks = world.ep_world - shared
        if moe_ranks < 1 or number("moe_expert_num") % moe_ranks or "expert_ids" not in first:
            return none
        topology = Topology(
            world.ep_world,
            number("moe_expert_num"),
            number("shared_expert_num", 1) if shared else 0,
            shared,
        )
        if shared and (not topology.num_shared_experts or shared % topology.num_shared_experts):
            return none
        batches = []
        for rank in inputs:
            ids, mask = rank.tensor("expert_ids"), rank.tensor("x_active_mask")
            if ids is None or ids.dim() != 2:
                return none
            if mask is not None and (mask.dim() > 2 or len(mask) != len(ids)):
                return none
            batches.append(Batch.of(ids, mask))
        tp = world.tp_world
        planes = tuple(tuple(batches[q::tp]) for q in range(tp))
        rows = tuple(
            received(topology, planes[rank % tp], rank // tp) for rank in range(len(inputs))
        )
        return cls(world, inputs, topology, planes, rows)

    def batch(self, rank: int) -> Batch | None:
        """The routing of a world rank's own tokens."""
        if not self.planes:
            return None
        tp = self.world.tp_world
        return self.planes[rank % tp][rank // tp]

    def count(self, rank: int, expected: Tensors) -> int:
        """Rows that a rank received from its EP group, by its counts here."""
        if self.rows:
            return len(self.rows[rank])
        counts = expected.get("ep_recv_counts")
        return int(counts[-1]) if counts is not None and counts.numel() else 0

    def row_name(self, rank: int) -> Callable[[int], str]:
        """Names the rows that a rank received, those of its TP peer included."""
        if not self.rows:
            return lambda row: f"row {row}"
        parts = [self.rows[rank]]
        if self.world.tp_world == 2:
            parts.append(self.rows[rank ^ 1])

        def name(row: int) -> str:
            peer = ""
            index = row
            for part in parts:
                if index < len(part):
                    return f"row {row} ({part.describe(index)}{peer})"
                index -= len(part)
                peer = ", of the TP peer"
            return f"row {row}"

        return name

    def row_experts(self, rank: int) -> torch.Tensor | None:
        """The experts of these rows."""
        if not self.rows:
            return None
        own = self.rows[rank].expert
        if self.world.tp_world == 2:
            return torch.cat([own, self.rows[rank ^ 1].expert])
        return own


def region(
    world: WorldCall,
    geometry: Geometry | None,
    rank: int,
    inputs: RankInputs,
    name: str,
    expected: Tensors,
) -> Region:
    """The defined part of output ``name`` of a world rank."""
    if not is_collective(world.op):
        return _local(world.op, inputs, name, expected)
    assert geometry is not None
    if is_dispatch(world.op):
        return _dispatch(world, geometry, rank, inputs, name, expected)
    if world.op == op_names.DISPATCH_SETUP:
        return _dispatch_setup(geometry, rank, inputs, name)
    if world.op == op_names.COMBINE_SETUP:
        return Region(undefined="opaque between setup and teardown")
    return _combine(geometry, rank)


def _dispatch(
    world: WorldCall,
    geometry: Geometry,
    rank: int,
    inputs: RankInputs,
    name: str,
    expected: Tensors,
) -> Region:
    n = geometry.count(rank, expected)
    arguments, call = inputs.arguments, inputs.call
    tp = world.tp_world
    both = n
    if tp == 2 and geometry.rows:
        both += len(geometry.rows[rank ^ 1])
    by_row: dict[str, Any] = {
        "rows": both,
        "name": geometry.row_name(rank),
        "experts": geometry.row_experts(rank),
    }
    size = len(expected[name])
    beyond = "" if both == size else _RECEIVED
    prequantized = inputs.tensor("scales") is not None and call.number("quant_mode") == 0
    if name == "expand_x":
        quantized = call.number("quant_mode") != 0
        codes = quantized and expected[name].dtype in _CODES
        return Region(Kind.CODES if codes else Kind.EXACT, note=beyond, **by_row)
    if name == "dynamic_scales":
        if prequantized:
            return Region(note=beyond, **by_row)
        if call.number("quant_mode") in (0, 1):
            return Region(undefined="not written without a quantisation by row")
        exact = expected[name].dtype == torch.float8_e8m0fnu
        return Region(Kind.EXACT if exact else Kind.VALUES, note=beyond, **by_row)
    if name == "assist_info_for_combine" and world.op == op_names.DISPATCH_V2:
        row_name = by_row["name"]
        return Region(
            width=_ASSIST,
            rows=n,
            name=lambda row: f"words {3 * row} to {3 * row + 2} of {row_name(row)}",
            note=f"the first {_ASSIST} words for each received row",
        )
    if name in ("ep_recv_counts", "assist_info_for_combine"):
        return _counts(world, geometry, rank, name, expected)
    if name == "expand_idx":
        return _expand_idx(geometry, rank)
    if name == "expert_token_nums":
        return _token_nums(geometry, rank)
    if name == "tp_recv_counts":
        if tp != 2:
            return Region(undefined="not written without tensor parallelism")
        return Region(name=lambda row: f"rows of TP rank {row}")
    if name == "expand_scales":
        if arguments.get("comm_alg") != "hierarchy" or inputs.tensor("expert_scales") is None:
            return Region(undefined='kernels write it with comm_alg="hierarchy" alone')
        return Region(rows=n, name=geometry.row_name(rank), note=_RECEIVED)
    raise AssertionError(name)


def _counts(
    world: WorldCall, geometry: Geometry, rank: int, name: str, expected: Tensors
) -> Region:
    """Prefix sums by (local expert, source); behind them words that nobody defines."""
    ep, tp = world.ep_world, world.tp_world
    topology = geometry.topology
    local = 1
    if topology is not None:
        local = topology.num_local_experts(rank // tp)
    elif name == "ep_recv_counts":
        local = len(expected[name]) // (ep * tp)
    n = ep * local * tp
    first = 0 if topology is None else topology.local_experts(rank // tp).start
    shared = topology is not None and topology.is_shared_rank(rank // tp)

    def describe(row: int) -> str:
        expert = "the shared expert" if shared else f"expert {first + row % (ep * local) // ep}"
        peer = ", of the TP peer" if row >= ep * local else ""
        return f"element {row} ({expert}, source rank {row % ep}{peer})"

    size = len(expected[name])
    note = "the prefix sums; the words behind them are undefined" if size > n else ""
    return Region(width=1, rows=n, name=describe, note=note)


def _token_nums(geometry: Geometry, rank: int) -> Region:
    topology, ep_rank = geometry.topology, rank // geometry.world.tp_world
    if topology is not None and topology.is_shared_rank(ep_rank):
        return Region(name=lambda row: f"element {row} (the shared expert)")
    first = 0 if topology is None else topology.local_experts(ep_rank).start
    return Region(name=lambda row: f"element {row} (expert {first + row})")


def _expand_idx(geometry: Geometry, rank: int) -> Region:
    batch = geometry.batch(rank)
    if batch is None:
        return Region()
    active = batch.active.reshape(-1)
    top_k = batch.active.shape[1]
    ids = batch.ids.reshape(-1)

    def describe(row: int) -> str:
        slot = int(slots[row])
        return (
            f"element {slot} (token {slot // top_k}, slot {slot % top_k}, expert {int(ids[slot])})"
        )

    slots = active.nonzero()[:, 0]
    note = "" if bool(active.all()) else "slots of the mask only"
    return Region(width=1, rows=slots, name=describe, note=note, experts=ids[slots])


def _dispatch_setup(geometry: Geometry, rank: int, inputs: RankInputs, name: str) -> Region:
    if name == "comm_cmd_info":
        return Region(undefined="opaque between setup and teardown")
    if name == "expand_idx":
        return _expand_idx(geometry, rank)
    batch = geometry.batch(rank)
    x = inputs.tensor("x")
    if batch is None or x is None or inputs.call.number("quant_mode") not in (0, 2):
        return Region(undefined="rows of this quantisation are opaque")
    top_k = batch.active.shape[1]
    slots = batch.active.reshape(-1).nonzero()[:, 0]
    quantized = inputs.call.number("quant_mode") == 2

    def describe(row: int) -> str:
        slot = int(slots[row])
        return f"row {slot} (token {slot // top_k}, slot {slot % top_k})"

    return Region(
        Kind.CODES if quantized else Kind.EXACT,
        rows=slots,
        columns=x.shape[1],
        name=describe,
        note="the routed rows of the mask, without scales and padding",
        experts=batch.ids.reshape(-1)[slots],
    )


def _combine(geometry: Geometry, rank: int) -> Region:
    batch = geometry.batch(rank)
    if batch is None:
        return Region(Kind.VALUES, name=lambda row: f"token {row}")
    tokens = batch.tokens.nonzero()[:, 0]
    ids = batch.ids

    def describe(row: int) -> str:
        token = int(tokens[row])
        return f"token {token} (experts {', '.join(map(str, ids[token].tolist()))})"

    note = "" if len(tokens) == len(ids) else "tokens of the mask only; the others are not written"
    first = ids[tokens, 0] if ids.shape[1] else None
    return Region(Kind.VALUES, rows=tokens, name=describe, note=note, experts=first)


def _local(op: str, inputs: RankInputs, name: str, expected: Tensors) -> Region:
    """Operators on one device."""
    arguments = inputs.arguments
    size = len(expected[name]) if expected[name].dim() else 1
    row = Region(name=lambda i: f"row {i}")
    if op in (op_names.FINALIZE_ROUTING, op_names.TOKEN_UNPERMUTE, op_names.TOKEN_UNPERMUTE_MAP):
        return dataclasses.replace(row, kind=Kind.VALUES, name=lambda i: f"token {i}")
    if op in (
        op_names.GATING_TOP_K,
        op_names.GATING_TOP_K_SOFTMAX,
        op_names.GATING_TOP_K_SOFTMAX_V2,
    ):
        flag = {"out": "out_flag", "softmax_result": "output_softmax"}.get(name)
        if flag and not arguments.get(flag):
            return Region(undefined=f"not written without {flag}")
        values = expected[name].dtype.is_floating_point
        return Region(Kind.VALUES if values else Kind.EXACT, name=lambda i: f"token {i}")
    if op == op_names.UPDATE_EXPERT:
        if name == "balanced_active_mask" and inputs.tensor("pruning_threshold") is None:
            return Region(undefined="not written without pruning_threshold")
        return Region(name=lambda i: f"token {i}")
    if op == op_names.INIT_ROUTING_V2:
        return _init_routing(inputs, name, size)
    unscaled = op == op_names.RE_ROUTING and inputs.tensor("per_token_scales") is None
    if unscaled and name == "permute_per_token_scales":
        return Region(undefined="not written without per_token_scales")
    return row


def _init_routing(inputs: RankInputs, name: str, size: int) -> Region:
    arguments, number = inputs.arguments, inputs.call.number
    ids = inputs.tensor("expert_idx")
    assert ids is not None
    chosen = arguments.get("active_expert_range") or []
    kept = ids.numel()
    if len(chosen) == 2:
        kept = int(((ids >= chosen[0]) & (ids < chosen[1])).sum())
    rows = size if number("drop_pad_mode") else min(kept, size)
    note = "" if rows == size else "rows of copies only; the others are not written"
    quant = number("quant_mode", -1)
    if name == "expert_token_cumsum_or_count":
        if not arguments.get("expert_tokens_num_flag"):
            return Region(undefined="not written without expert_tokens_num_flag")
        return Region()
    if name == "expanded_row_idx":
        scatter = number("row_idx_type") == 1 and not number("drop_pad_mode")
        return Region(rows=min(kept, size) if scatter else None, note=note if scatter else "")
    if name == "expanded_scale":
        if quant == 0 or (quant == -1 and inputs.tensor("scale") is None):
            return Region(undefined="not written without scales")
        kind = Kind.VALUES if quant == 1 else Kind.EXACT
        return Region(kind, rows=rows, note=note, name=lambda i: f"row {i}")
    kind = Kind.EXACT if quant == -1 else Kind.CODES
    return Region(kind, rows=rows, note=note, name=lambda i: f"row {i}")
