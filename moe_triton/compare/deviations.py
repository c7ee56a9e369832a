"""Deviations of real kernels and documents that have a name."""

from __future__ import annotations

import dataclasses

import torch

from ..ascend import op_names
from ..ascend.op_names import DISPATCH_V2
from ..record.operators import is_dispatch
from ..topology import Topology
from .layouts import received_contiguous
from .metrics import differing
from .outputs import Geometry
from .replay import RankInputs, Tensors
from .worlds import WorldCall

CONTIGUOUS = "contiguous-shared-split"
INVERSE = "inverse-scales"
PREFIX_SUMS = "prefix-sums"
NOT_FILLED = "counts-not-filled"
NOT_SATURATED = "mx-not-saturated"

DEVIATIONS: dict[str, str] = {
    CONTIGUOUS: "shared ranks keep their own tokens and get contiguous parts of the others', as "
    "the A3 kernels of 2025 deal them out; newer ones take the source rank modulo S / NS. The "
    "results of combine are the same",
    INVERSE: "dynamic_scales holds 127 / amax, by which rows were multiplied, as a formula of the "
    "API document has it; the operators return its reciprocal, by which rows are dequantised",
    PREFIX_SUMS: "prefix sums where counts were asked for, or counts where prefix sums were",
    NOT_FILLED: "dispatch_teardown of A3 (2025) leaves expert_token_nums unwritten where a rank "
    "has more than one expert",
    NOT_SATURATED: "NaN or infinity where an MX code overflows: the kernels of 950 cast without "
    "saturation, where OCP MX and the CPU reference of CANN saturate",
}


def recognise(
    world: WorldCall,
    rank: int,
    name: str,
    found: torch.Tensor,
    expected: torch.Tensor,
) -> str | None:
    """The name of the deviation that explains an output, or None.

    Args:
        world: the call.
        rank: world rank.
        name: of the output.
        found: [rows, ...] the compared part of the dump's output.
        expected: that part here.
    """
    if not found.numel():
        return None
    if name == "dynamic_scales" and found.dtype == torch.float32:
        known = expected > 0
        product = found.double() * expected.double()
        if bool(known.any()) and bool(((product - 1).abs()[known] < 2.0**-12).all()):
            return INVERSE
    if name in ("expert_token_nums", "ep_recv_counts", "expert_token_cumsum_or_count"):
        flat, reference = found.reshape(-1).long(), expected.reshape(-1).long()
        if torch.equal(flat, reference.cumsum(0)) or torch.equal(
            flat, reference.diff(prepend=reference.new_zeros(1))
        ):
            return PREFIX_SUMS
    if name == "expert_token_nums" and world.op == op_names.DISPATCH_TEARDOWN and found.numel() > 1:
        return NOT_FILLED
    if world.calls[rank].number("quant_mode") == 4 and found.dtype.itemsize == 1:
        differs = differing(found, expected)
        if name == "expand_x" and not bool(found[differs].float().isfinite().any()):
            return NOT_SATURATED
    return None


def contiguous_dispatch(
    geometry: Geometry, found: list[Tensors], expected: list[Tensors]
) -> tuple[Geometry, list[Tensors]] | None:
    """The rows and outputs of a dispatch with ``CONTIGUOUS``, or None if the dump is without it.

    The dump's rows decide: on all shared ranks they must be those that this split sends there.
    """
    world = geometry.world
    if not is_dispatch(world.op) or not _may_be_contiguous(geometry):
        return None
    topology = _topology(geometry)
    rows, outputs = list(geometry.rows), list(expected)
    # Where the row of (source, token) is in the expected outputs.
    holder = {
        (source, token): (rank, row)
        for rank in range(topology.num_shared_ranks)
        for row, (source, token, _) in enumerate(geometry.rows[rank].key().tolist())
    }
    for rank in range(topology.num_shared_ranks):
        rows[rank] = received_contiguous(topology, geometry.planes[0], rank)
        n = len(rows[rank])
        moved = dict(expected[rank])
        taken = [holder[source, token] for source, token, _ in rows[rank].key().tolist()]
        for name in ("expand_x", "dynamic_scales"):
            if name in moved and moved[name].numel():
                if n > len(moved[name]):
                    return None
                moved[name] = moved[name].clone()
                for row, (other, position) in enumerate(taken):
                    moved[name][row] = expected[other][name][position]
        actual = found[rank].get("expand_x")
        if actual is None or len(actual) < n or actual.dtype != moved["expand_x"].dtype:
            return None
        if bool(differing(actual[:n], moved["expand_x"][:n]).any()):
            return None
        counts = contiguous_counts(geometry, rank)
        for name in ("ep_recv_counts", "assist_info_for_combine"):
            if name in moved and not (name.startswith("assist") and world.op == DISPATCH_V2):
                moved[name] = moved[name].clone()
                moved[name][: len(counts)] = counts
        if world.op == DISPATCH_V2:
            moved["assist_info_for_combine"] = moved["assist_info_for_combine"].clone()
            moved["assist_info_for_combine"][: 3 * n] = rows[rank].key().reshape(-1).int()
        moved["expert_token_nums"] = torch.full_like(moved["expert_token_nums"], n)
        outputs[rank] = moved
    if all(torch.equal(a.key(), b.key()) for a, b in zip(rows, geometry.rows, strict=True)):
        return None
    return dataclasses.replace(geometry, rows=tuple(rows)), outputs


def contiguous_counts(geometry: Geometry, rank: int) -> torch.Tensor:
    """[W] ep_recv_counts of a shared rank with ``CONTIGUOUS``.

    Its own rows are counted as if ranks 0 to S - 1 had sent a part each.
    """
    topology = _topology(geometry)
    shared = topology.num_shared_ranks
    counts = []
    for source in range(topology.world_size):
        part, dealer = (source, rank) if source < shared else (rank, source)
        size = int(geometry.planes[0][dealer].tokens.sum())
        start, stop = ((part + i + dealer) * size // shared for i in (0, 1))
        counts.append(stop - start)
    return torch.tensor(counts, dtype=torch.int32).cumsum(0).int()


def regular_combine(geometry: Geometry) -> list[RankInputs] | None:
    """The inputs of a combine with ``CONTIGUOUS`` in the order of rows that is run here, or None.

    The counts decide: those of all shared ranks must be of this split, and not the expected ones.
    """
    name = "ep_send_counts"
    world = geometry.world
    if world.op not in (op_names.COMBINE, op_names.COMBINE_ADD_RMS_NORM):
        return None
    if not _may_be_contiguous(geometry):
        return None
    topology = _topology(geometry)
    regular = list(geometry.inputs)
    rows: dict[tuple[int, int], torch.Tensor] = {}
    for rank in range(topology.num_shared_ranks):
        counts, x = (regular[rank].tensor(n) for n in (name, "expand_x"))
        split = received_contiguous(topology, geometry.planes[0], rank)
        if counts is None or x is None or len(x) < len(split):
            return None
        if not torch.equal(counts.reshape(-1)[: world.ep_world], contiguous_counts(geometry, rank)):
            return None
        for row, (source, token, _) in enumerate(split.key().tolist()):
            rows[source, token] = x[row]
    differs = False
    for rank in range(topology.num_shared_ranks):
        arguments = dict(regular[rank].arguments)
        x = arguments["expand_x"].clone()
        kept = geometry.rows[rank]
        if len(x) < len(kept):
            return None
        for row, (source, token, _) in enumerate(kept.key().tolist()):
            x[row] = rows[source, token]
        counts = kept.source.bincount(minlength=world.ep_world).cumsum(0).int()
        differs |= not torch.equal(counts, arguments[name].reshape(-1)[: world.ep_world])
        regular[rank] = dataclasses.replace(
            regular[rank], arguments={**arguments, "expand_x": x, name: counts}
        )
    return regular if differs else None


def _may_be_contiguous(geometry: Geometry) -> bool:
    topology = geometry.topology
    return (
        topology is not None
        and bool(geometry.rows)
        and geometry.world.tp_world == 1
        and topology.num_shared_ranks > 1
        and topology.num_shared_experts == 1
    )


def _topology(geometry: Geometry) -> Topology:
    assert geometry.topology is not None
    return geometry.topology
