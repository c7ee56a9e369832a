"""Write a rank's tokens into its own window, and its header into every rank's window.

The kernel of ``quantize`` writes the rows, each token once. A second kernel writes the headers,
through a table of addresses:

    [num_tokens, counts, slot_ids, weights, role] of each rank, int64

where role is the number m of a MoE rank, or -1 - j for the rank of shared expert j. The slots for
MoE rank m are a range of the plan's sorted slot ids; those for a shared expert are all active
tokens. Every program counts what comes before its part, so no program waits for another.

Shapes: T tokens, K experts and NS shared experts of a token, H hidden size, E experts, W ranks.
Bytes:  reads T * H * x.itemsize, writes T * stride, or T * (K + NS) * stride with smooth factors
        for each expert; headers of 4 * (1 + E) for each rank, and 4 or 8 for each slot.
Source: ``moe_triton.ref.stage_tokens``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError, UnavailableError
from ..layout import NOWHERE, DispatchHeader, RoutingPlan, RowFormat
from . import launch_config
from ._checks import FLOATS, INDICES, check_tensor
from ._common import TRITON_DTYPES, divide
from .quantize import encode_slots, split_rows

_NO_ROLE = tl.constexpr(-(2**31))  # of a rank whose shared expert serves other ranks
_TABLE_COLUMNS = tl.constexpr(5)
_NOWHERE = tl.constexpr(NOWHERE)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "top_k",
        "num_shared",
        "num_experts",
        "experts_per_rank",
        "num_slot_ids",
    ]
)
def _write_headers_kernel(
    table_ptr,  # [W, 5] int64
    expert_ids_ptr,  # [T, K] int32
    counts_ptr,  # [E] int32
    sorted_slot_ids_ptr,  # [T * K] int32
    weights_ptr,  # [T * K] fp32 | fp64 | bf16 | fp16, or None
    num_tokens,
    top_k,
    num_shared,
    num_experts,
    experts_per_rank,
    num_slot_ids,
    WEIGHT: tl.constexpr,  # dtype of the headers' weights, or None
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,  # K rounded up to a power of two
):
    """Write this rank's header for each rank.

    Example: expert_ids [[0, 2], [2, 1], [-1, -1]], E = 4, weights [[0.5, 0.25], [0.75, 1], [0, 0]],
        three ranks: a shared expert, experts 0 and 1, experts 2 and 3. All get num_tokens 2 and
        counts [1, 1, 2, 0]. slot_ids and weights: [2, 5] and [1, 1]; [0, 4] and [0.5, 1];
        [1, 3] and [0.25, 0.75].
    """
    rank, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    record = table_ptr + rank * _TABLE_COLUMNS
    num_tokens_out = tl.load(record).to(tl.pointer_type(tl.int32))
    counts_out = tl.load(record + 1).to(tl.pointer_type(tl.int32))
    slot_ids_out = tl.load(record + 2).to(tl.pointer_type(tl.int32))
    if WEIGHT is not None:
        weights_out = tl.load(record + 3).to(tl.pointer_type(WEIGHT))
    role = tl.load(record + 4).to(tl.int32)
    first_part = part == 0

    # Count the slots before those of the rank's experts, and the slots of its experts.
    first_expert = role * experts_per_rank
    start, count = 0, 0
    for begin in range(0, num_experts, BLOCK):
        expert = begin + tl.arange(0, BLOCK)
        counts = tl.load(counts_ptr + expert, mask=expert < num_experts, other=0)
        tl.store(counts_out + expert, counts, mask=(expert < num_experts) & first_part)
        mine = (expert >= first_expert) & (expert < first_expert + experts_per_rank)
        start += tl.sum(tl.where(expert < first_expert, counts, 0))
        count += tl.sum(tl.where(mine, counts, 0))
    # Clamp: duplicate expert ids must not overflow the slot list.
    count = tl.where(role >= 0, tl.minimum(count, num_slot_ids), 0)
    for begin in range(part * BLOCK, count, parts * BLOCK):
        position = begin + tl.arange(0, BLOCK)
        mask = position < count
        slot_id = tl.load(sorted_slot_ids_ptr + start + position, mask=mask, other=0)
        # t * K + k becomes t * (K + NS) + k.
        shared_before = divide(slot_id, top_k) * num_shared
        tl.store(slot_ids_out + position, slot_id + shared_before, mask=mask)
        if WEIGHT is not None and weights_ptr is not None:
            weight = tl.load(weights_ptr + slot_id, mask=mask, other=0.0)
            tl.store(weights_out + position, weight.to(WEIGHT), mask=mask)

    # A token is active if any of its slots is.
    is_shared = (role < 0) & (role != _NO_ROLE)
    slot = tl.arange(0, SLOTS)
    num_active = 0
    for begin in range(0, tl.where(first_part, num_tokens, 0), TOKENS):
        token = begin + tl.arange(0, TOKENS)
        mask = (token < num_tokens)[:, None] & (slot < top_k)[None, :]
        at = (token * top_k)[:, None] + slot[None, :]
        ids = tl.load(expert_ids_ptr + at, mask=mask, other=_NOWHERE)
        active = tl.max((ids != _NOWHERE).to(tl.int32), axis=1)
        position = num_active + tl.cumsum(active, axis=0) - active
        shared_id = token * (top_k + num_shared) + top_k - 1 - role
        tl.store(slot_ids_out + position, shared_id, mask=(active > 0) & is_shared)
        if WEIGHT is not None:
            ones = tl.full([TOKENS], 1.0, WEIGHT)
            tl.store(weights_out + position, ones, mask=(active > 0) & is_shared)
        num_active += tl.sum(active)
    tl.store(num_tokens_out, num_active, mask=first_part)


def stage_tokens(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    smooth_scales: torch.Tensor | None,
    fmt: RowFormat,
    plan: RoutingPlan,
    rows: torch.Tensor,
    headers: Sequence[DispatchHeader],
    *,
    experts_per_rank: int,
    shared_targets: Sequence[int],
    num_shared_ranks: int,
) -> None:
    """Write this rank's tokens into its own window, and its header into every rank's window.

    Arguments as in ``ref.stage_tokens``.

    Raises:
        ArgumentTypeError: a wrong dtype.
        ArgumentValueError: a wrong shape, stride or device.
    """
    op, device = "stage_tokens", x.device
    check_tensor(op, "expert_ids", expert_ids, dtypes=INDICES, shape=(len(x), None), device=device)
    if weights is not None:
        shape = tuple(expert_ids.shape)
        check_tensor(op, "weights", weights, dtypes=FLOATS, shape=shape, device=device)
    num_tokens, top_k = expert_ids.shape
    per_expert = smooth_scales is not None and smooth_scales.dim() == 2
    num_slots = top_k + len(shared_targets) if per_expert else 1
    num_rows = num_tokens * num_slots
    check_tensor(op, "rows", rows, dtypes=(torch.uint8,), shape=(None, None), device=device)
    if len(rows) < num_rows:
        raise ArgumentValueError(op, "rows", f"have at least {num_rows} rows", len(rows))
    payload, scales = split_rows(fmt, rows[:num_rows])
    per_slot = expert_ids if per_expert else None
    encode_slots(
        op, x, fmt, payload, scales, smooth_scales, expert_ids=per_slot, num_slots=num_slots
    )

    weight_dtype = None if headers[0].weights is None else headers[0].weights.dtype
    num_experts = len(plan.counts)
    work = max(num_tokens * top_k, num_experts)
    line = launch_config.line(device, work, others=len(headers))
    slots = triton.next_power_of_2(top_k)
    _write_headers_kernel[(len(headers), line.num_programs)](
        _header_table(headers, tuple(shared_targets), num_shared_ranks, device),
        expert_ids.contiguous(),
        plan.counts,
        plan.sorted_slot_ids,
        None if weights is None else weights.contiguous(),
        num_tokens,
        top_k,
        len(shared_targets),
        num_experts,
        experts_per_rank,
        headers[0].slot_ids.numel(),
        WEIGHT=None if weight_dtype is None else TRITON_DTYPES[weight_dtype],
        BLOCK=line.block,
        TOKENS=max(line.block // slots, 1),
        SLOTS=slots,
        num_warps=line.num_warps,
    )


def _header_table(
    headers: Sequence[DispatchHeader],
    shared_targets: tuple[int, ...],
    num_shared_ranks: int,
    device: torch.device,
) -> torch.Tensor:
    addresses = tuple(
        (
            header.num_tokens.data_ptr(),
            header.counts.data_ptr(),
            header.slot_ids.data_ptr(),
            0 if header.weights is None else header.weights.data_ptr(),
        )
        for header in headers
    )
    return _table_of(addresses, shared_targets, num_shared_ranks, device)


# Cached by the addresses of windows, which do not move: a table is copied to the device once.
# Cached forever: a graph that replays a launch does not keep the tensor alive.
@functools.cache
def _table_of(
    addresses: tuple[tuple[int, int, int, int], ...],
    shared_targets: tuple[int, ...],
    num_shared_ranks: int,
    device: torch.device,
) -> torch.Tensor:
    roles = [_NO_ROLE.value] * num_shared_ranks + [*range(len(addresses) - num_shared_ranks)]
    for shared, rank in enumerate(shared_targets):
        roles[rank] = -1 - shared
    records = [(*record, role) for record, role in zip(addresses, roles, strict=True)]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnavailableError(
            "stage_tokens",
            "a graph capture cannot copy addresses of new windows to the device: before it, make "
            "the same calls once for every slot of the ring",
        )
    return torch.tensor(records, dtype=torch.int64, device=device)
