"""Sums of rows: those of a token's experts, those of ranks that share an expert.

    out[t] = sum_k weights[t, k] * term(t, k) + sum_j row(t, K + j) + addend[t]

in fp32, multiply then add in ascending order, rounded once; term(t, k) is a row, or what a special
expert makes of the token. With a norm, a residual is added before rounding, and

    rstd[t] = 1 / sqrt(sum_h total[t, h]**2 * (1 / H) + epsilon)
    y[t]    = round(round(total[t] * rstd[t]) * gamma)

Letters: T tokens, K experts per token, NS shared experts, S = K + NS slots, H hidden size, N rows,
         b bytes of an element.
Bytes:   reads T * S * H * b, and T * H * b for each of tokens, addend and residual; writes
         T * H * b, with a norm twice that. Quantised rows have 1 byte an element and 2 a group.
Source:  the combine step of Ascend's ``npu_moe_distribute_combine`` family.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..errors import ArgumentTypeError, ArgumentValueError, MissingArgumentError
from ..layout import Norm, RowFormat, ZeroComputationExperts
from ._checks import FLOATS, INDICES, check_tensor, with_adjacent_columns
from ._common import from_float32, narrow, to_float32, widen
from .launch_config import tiles, token_tiles


@triton.jit
def _sum_columns(x, BLOCK_T: tl.constexpr):
    """Each token's sum over a tile, shaped as the tokens' numbers are."""
    if BLOCK_T == 1:
        total = tl.sum(x)
    elif len(x.shape) == 2:
        total = tl.sum(x, axis=1, keep_dims=True)
    else:
        total = tl.sum(tl.sum(x, axis=2, keep_dims=True), axis=1, keep_dims=True)
    return total


@triton.jit
def _rstd(squares, one_by_hidden, epsilon, BLOCK_T: tl.constexpr):
    """The reciprocal root mean square of each token's row, fp32."""
    mean = _sum_columns(squares, BLOCK_T).to(tl.float32) * one_by_hidden
    return 1.0 / tl.sqrt(mean + epsilon)


@triton.jit
def _row(
    rows_ptr,
    scales_ptr,
    distance,  # of the row from the first one, in units
    present,  # whether there is such a row
    start,
    here,  # the columns, start and what follows
    hidden,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    SCALES_UNIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """A part of a row, decoded; zeros without one."""
    # Products with a constant show the compiler how rows are aligned.
    x = tl.load(rows_ptr + distance * UNIT + here, mask=present & (here < hidden), other=0)
    x = widen(x, ACC)
    if GROUP:
        group = start // GROUP + tl.arange(0, BLOCK_H // GROUP)[:, None]
        mask = present & (group * GROUP < hidden)
        scale = tl.load(scales_ptr + distance * SCALES_UNIT + group, mask=mask, other=0.0)
        x = widen(narrow(x * widen(scale, ACC), DTYPE), ACC)
    return x


@triton.jit
def _special(
    term,
    present,
    expert,
    own,  # a part of the token itself
    here,
    alpha_1_ptr,
    alpha_2_ptr,
    value_ptr,
    hidden,
    first_copy,
    first_constant,
    end,
    WIDE_ALPHA: tl.constexpr,
    ACC: tl.constexpr,
):
    """The term of a slot and whether it has one, after a look at its expert."""
    copied = (expert >= first_copy) & (expert < first_constant)
    term = tl.where(copied, own, term)
    present = present | copied
    if value_ptr is not None:
        constant = (expert >= first_constant) & (expert < end)
        inside = constant & (here < hidden)
        number = (expert - first_constant).to(tl.int64)
        value = tl.load(value_ptr + number * hidden + here, mask=inside, other=0.0)
        if WIDE_ALPHA:
            alpha_1 = tl.load(alpha_1_ptr + number * hidden + here, mask=inside, other=0.0)
            alpha_2 = tl.load(alpha_2_ptr + number * hidden + here, mask=inside, other=0.0)
        else:
            alpha_1 = tl.load(alpha_1_ptr + number, mask=constant, other=0.0)
            alpha_2 = tl.load(alpha_2_ptr + number, mask=constant, other=0.0)
        made = widen(alpha_1, ACC) * own + widen(alpha_2, ACC) * widen(value, ACC)
        term = tl.where(constant, made, term)
        present = present | constant
    return term, present


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_rows",
        "row_step",
        "first_copy",
        "first_constant",
        "end",
        "across",
    ]
)
def _reduce_kernel(
    rows_ptr,  # [N, >= H] of out's dtype, or int8 if GROUP; row_step * UNIT apart
    scales_ptr,  # [N, H / GROUP] fp16 | bf16, row_step * SCALES_UNIT apart, or None
    index_ptr,  # [T, SLOTS] int64, negative where there is no row
    weights_ptr,  # [T, WEIGHTS] fp32 | fp64, or None
    ids_ptr,  # [T, IDS] int32 | int64 expert ids, or None
    tokens_ptr,  # [T, H] of out's dtype, or None; rows tokens_stride apart
    alpha_1_ptr,  # [n] or [n, H] of out's dtype, or None
    alpha_2_ptr,  # as alpha_1
    value_ptr,  # [n, H] of out's dtype, or None
    addend_ptr,  # [T, H] of out's dtype, or None
    out_ptr,  # [T, H] fp16 | bf16 | fp32 | fp64
    residual_ptr,  # [T, H] of out's dtype, or None without a norm
    gamma_ptr,  # [H] of out's dtype, or None
    y_ptr,  # [T, H] of out's dtype, or None
    rstd_ptr,  # [T] fp32, or None
    num_tokens,
    num_rows,
    hidden,
    row_step,
    tokens_stride,
    addend_stride,
    out_stride,
    residual_stride,
    y_stride,
    first_copy,
    first_constant,
    end,
    one_by_hidden,
    epsilon,
    across,  # tiles beside each other, which take the blocks of columns in turn
    SLOTS: tl.constexpr,
    WEIGHTS: tl.constexpr,  # K, or 0 without weights
    IDS: tl.constexpr,  # K, or 0 without copy and constant experts
    WIDE_ALPHA: tl.constexpr,  # the alphas are [n, H]
    GROUP: tl.constexpr,  # elements that share a scale, or 0
    UNIT: tl.constexpr,  # elements between rows, of which their distance is a multiple
    SCALES_UNIT: tl.constexpr,  # as many bytes in scales
    ACC: tl.constexpr,  # dtype of the sums
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PASSES: tl.constexpr,  # 2 if there is a norm and a row is longer than a tile, else 1
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    if GROUP:
        # Beside each other lie the columns that share a scale.
        cols = tl.arange(0, BLOCK_H // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        cols = tl.arange(0, BLOCK_H)

    num_tiles = tl.cdiv(num_tokens, BLOCK_T) * across
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        first = tile // across * BLOCK_T
        # One token is a scalar, and so is the address of its row, as hardware that copies whole
        # rows needs it. More are [BLOCK_T, 1] or [BLOCK_T, 1, 1], to meet the columns.
        if BLOCK_T == 1:
            number = first
        elif GROUP:
            number = (first + tl.arange(0, BLOCK_T))[:, None, None]
        else:
            number = (first + tl.arange(0, BLOCK_T))[:, None]
        active = number < num_tokens
        token = number.to(tl.int64)
        if PASSES == 2:
            squares = tl.zeros((active & (cols < hidden)).shape, ACC)

        # The second pass makes the sums again rather than keep a row of any length.
        for phase in tl.static_range(PASSES):
            if phase == 1:
                rstd = _rstd(squares, one_by_hidden, epsilon, BLOCK_T)
                tl.store(rstd_ptr + token, rstd, mask=active)
            for start in range(tile % across * BLOCK_H, hidden, across * BLOCK_H):
                here = start + cols
                inside = active & (here < hidden)
                total = tl.zeros(inside.shape, ACC)
                if IDS:
                    own = tl.load(tokens_ptr + token * tokens_stride + here, mask=inside, other=0.0)
                    own = widen(own, ACC)
                # Unrolled, so that several rows of a token are on their way at a time.
                for k in tl.static_range(SLOTS):
                    row = tl.load(index_ptr + token * SLOTS + k, mask=active, other=-1)
                    tl.device_assert(row < num_rows, "index out of range")
                    present = row >= 0
                    term = _row(
                        rows_ptr,
                        scales_ptr,
                        row * row_step,
                        present,
                        start,
                        here,
                        hidden,
                        GROUP,
                        UNIT,
                        SCALES_UNIT,
                        BLOCK_H,
                        DTYPE,
                        ACC,
                    )
                    if k < IDS:
                        term, present = _special(
                            term,
                            present,
                            tl.load(ids_ptr + token * IDS + k, mask=active, other=-1),
                            own,
                            here,
                            alpha_1_ptr,
                            alpha_2_ptr,
                            value_ptr,
                            hidden,
                            first_copy,
                            first_constant,
                            end,
                            WIDE_ALPHA,
                            ACC,
                        )
                    if k < WEIGHTS:
                        # 0 where there is no term, whose weight may be no number.
                        weight_ptr = weights_ptr + token * WEIGHTS + k
                        term = term * tl.load(weight_ptr, mask=present, other=0.0).to(ACC)
                    total = total + term
                if addend_ptr is not None:
                    addend = addend_ptr + token * addend_stride + here
                    total = total + widen(tl.load(addend, mask=inside, other=0.0), ACC)
                if gamma_ptr is not None:
                    residual = residual_ptr + token * residual_stride + here
                    total = total + widen(tl.load(residual, mask=inside, other=0.0), ACC)
                    if phase == 0:
                        # A weight that is no number makes columns after the end such, too.
                        part = tl.where(inside, total * total, 0.0)
                        if PASSES == 2:
                            squares = squares + part
                        else:
                            rstd = _rstd(part, one_by_hidden, epsilon, BLOCK_T)
                            tl.store(rstd_ptr + token, rstd, mask=active)
                if phase == PASSES - 1:
                    # Only now: out may be the residual or the addend.
                    out = out_ptr + token * out_stride + here
                    tl.store(out, narrow(total, DTYPE), mask=inside)
                    if gamma_ptr is not None:
                        gamma = tl.load(gamma_ptr + here, mask=here < hidden, other=0.0)
                        scaled = to_float32(narrow(total * rstd, DTYPE))
                        y = narrow(scaled * to_float32(gamma), DTYPE)
                        tl.store(y_ptr + token * y_stride + here, y, mask=inside)


def weighted_sum(
    rows: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    weights: torch.Tensor | None,
    special: ZeroComputationExperts | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    norm: Norm | None = None,
) -> None:
    """Sum the rows of each token in fp32, ascending, and round once; see ``ref.weighted_sum``.

    Args:
        rows: [N, stride] uint8; rows may overlap.
        index: [T, K + NS] int64 rows of each token, the unweighted ones last; negative for none.
        fmt: of the rows, scheme "none" or "block8".
        weights: [T, K] fp32, for float64 also float64, or None for all 1.
        special: the experts without a network, or None.
        addend: [T, H] of the dtype of ``out``, or None.
        out: [T, H] output, fp16, bf16, fp32 or fp64; sums of fp64 run in fp64.
        norm: a residual to add before rounding, and what to make of the unrounded sum, or None.

    Raises:
        ArgumentTypeError: a dtype that is not listed above.
        ArgumentValueError: a shape, stride, device or scheme that does not fit.
    """
    _check_rows("reduce", rows, index, fmt, out)
    _check_terms("reduce", index, weights, special, addend, out, norm)
    num_tokens, hidden = out.shape
    if out.numel() == 0:
        return

    slots = index.shape[1]
    payload = fmt.payload(rows)
    scales = fmt.scales(rows) if fmt.scheme == "block8" else None
    align = math.gcd(rows.stride(0), 16)
    ids = tokens = alpha_1 = alpha_2 = value = None
    first_copy = first_constant = end = 0
    if special is not None and special.tokens is not None:
        ids, first_copy, first_constant, end, tokens, alpha_1, alpha_2, value = special
        ids = ids.contiguous()
        alpha_1, alpha_2, value = map(_contiguous, (alpha_1, alpha_2, value))
        tokens = None if tokens is None else with_adjacent_columns(tokens)
    residual, gamma, epsilon, y, rstd = norm or (None, None, 0.0, None, None)
    if residual is not None:
        residual = with_adjacent_columns(residual)
    if addend is not None:
        addend = with_adjacent_columns(addend)
    launch = token_tiles(out.device, num_tokens, hidden, whole_rows=norm is not None)
    _reduce_kernel[(launch.num_programs,)](
        payload,
        scales,
        index.contiguous(),
        _contiguous(weights),
        ids,
        tokens,
        alpha_1,
        alpha_2,
        value,
        addend,
        out,
        residual,
        gamma,
        y,
        rstd,
        num_tokens,
        len(rows),
        hidden,
        rows.stride(0) // align,
        _row_stride(tokens),
        _row_stride(addend),
        _row_stride(out),
        _row_stride(residual),
        _row_stride(y),
        first_copy,
        first_constant,
        end,
        1.0 / hidden,
        epsilon,
        1 if norm is not None else triton.cdiv(hidden, launch.block),
        SLOTS=slots,
        WEIGHTS=0 if weights is None else weights.shape[1],
        IDS=0 if ids is None else ids.shape[1],
        WIDE_ALPHA=alpha_1 is not None and alpha_1.dim() == 2,
        GROUP=0 if scales is None else fmt.block,
        UNIT=align // payload.itemsize,
        SCALES_UNIT=0 if scales is None else align // scales.itemsize,
        ACC=tl.float64 if out.dtype == torch.float64 else tl.float32,
        BLOCK_T=launch.rows,
        BLOCK_H=launch.block,
        PASSES=2 if norm is not None and hidden > launch.block else 1,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _row_stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _check_rows(
    op: str, rows: torch.Tensor, index: torch.Tensor, fmt: RowFormat, out: torch.Tensor
) -> None:
    device = rows.device
    check_tensor(
        op, "out", out, dtypes=FLOATS, shape=(None, None), device=device, strided_columns=False
    )
    check_tensor(
        op,
        "rows",
        rows,
        dtypes=(torch.uint8,),
        shape=(None, fmt.stride),
        device=device,
        strided_columns=False,
    )
    check_tensor(op, "index", index, dtypes=(torch.int64,), shape=(len(out), None), device=device)
    if fmt.hidden != out.shape[1]:
        raise ArgumentValueError(op, "out", f"have {fmt.hidden} columns", tuple(out.shape))
    if fmt.scheme == "none":
        if fmt.dtype != out.dtype:
            raise ArgumentTypeError(op, "out", f"be of the rows' dtype {fmt.dtype}", out.dtype)
    elif fmt.scheme != "block8":
        raise ArgumentValueError(op, "fmt", 'be of scheme "none" or "block8"', repr(fmt.scheme))
    elif fmt.block < 1 or fmt.block & (fmt.block - 1) or fmt.hidden % fmt.block:
        contract = f"have blocks of a power of two that divides {fmt.hidden} columns"
        raise ArgumentValueError(op, "fmt", contract, fmt.block)


def _check_terms(
    op: str,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    special: ZeroComputationExperts | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    norm: Norm | None,
) -> None:
    shape, dtype, device = tuple(out.shape), out.dtype, out.device
    slots = index.shape[1]
    if weights is not None:
        dtypes = (torch.float32, torch.promote_types(dtype, torch.float32))
        check_tensor(op, "weights", weights, dtypes=dtypes, shape=(len(out), None), device=device)
        if weights.shape[1] > slots:
            contract = f"have at most {slots} columns, as index has"
            raise ArgumentValueError(op, "weights", contract, tuple(weights.shape))
    wide: dict[str, torch.Tensor | None] = {"addend": addend}
    if special is not None:
        ids = special.expert_ids
        check_tensor(
            op, "special.expert_ids", ids, dtypes=INDICES, shape=(len(out), None), device=device
        )
        if ids.shape[1] > slots:
            contract = f"have at most {slots} columns, as index has"
            raise ArgumentValueError(op, "special.expert_ids", contract, tuple(ids.shape))
        wide["special.tokens"] = special.tokens
        if special.value is not None:
            _check_constants(op, special, out)
    if norm is not None:
        wide |= {"norm.residual": norm.residual, "norm.y": norm.y}
        for name, tensor, wanted, size in (
            ("norm.gamma", norm.gamma, dtype, shape[1]),
            ("norm.rstd", norm.rstd, torch.float32, shape[0]),
        ):
            check_tensor(
                op,
                name,
                tensor,
                dtypes=(wanted,),
                shape=(size,),
                device=device,
                strided_columns=False,
            )
    for name, rows in wide.items():
        if rows is not None:
            apart = name != "norm.y"  # the one output among them
            check_tensor(
                op, name, rows, dtypes=(dtype,), shape=shape, device=device, strided_columns=apart
            )


def _check_constants(op: str, special: ZeroComputationExperts, out: torch.Tensor) -> None:
    """The tensors of constant experts."""
    number = special.end - special.first_constant
    shapes: dict[str, tuple[int, ...]] = {"value": (number, out.shape[1])}
    for name in ("alpha_1", "alpha_2"):
        tensor = getattr(special, name)
        shapes[name] = (number, out.shape[1])[: 1 if tensor is None else tensor.dim()]
    if shapes["alpha_2"] != shapes["alpha_1"]:
        raise ArgumentValueError(op, "special.alpha_2", "have the rank of alpha_1", "another")
    for name, shape in shapes.items():
        tensor = getattr(special, name)
        if tensor is None:
            raise MissingArgumentError(op, f"special.{name}", "be given beside value", None)
        check_tensor(
            op, f"special.{name}", tensor, dtypes=(out.dtype,), shape=shape, device=out.device
        )


@triton.jit(do_not_specialize=["num_rows", "across"])
def _add_rows_kernel(
    own_ptr,  # [n, H] fp16 | bf16 | fp32
    peer_ptr,  # [n, H] of own's dtype
    out_ptr,  # [n, H] of own's dtype
    num_rows,
    hidden,
    own_stride,
    peer_stride,
    out_stride,
    across,  # tiles beside each other
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    num_tiles = tl.cdiv(num_rows, BLOCK_R) * across
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = (tile // across * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
        col = (tile % across * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
        mask = (row < num_rows) & (col < hidden)
        own = tl.load(own_ptr + row * own_stride + col, mask=mask, other=0.0)
        peer = tl.load(peer_ptr + row * peer_stride + col, mask=mask, other=0.0)
        total = from_float32(to_float32(own) + to_float32(peer), DTYPE)
        tl.store(out_ptr + row * out_stride + col, total, mask=mask)


def add_rows(own: torch.Tensor, peer: torch.Tensor, out: torch.Tensor) -> None:
    """Write into ``out`` the sums of [n, H] rows, in fp32 and rounded once, as TP ranks do.

    Args:
        own: [n, H] fp16, bf16 or fp32.
        peer: as ``own``.
        out: as ``own``, output; may be one of them.

    Raises:
        ArgumentTypeError: a dtype that is not listed above, or differs.
        ArgumentValueError: a shape, stride or device that does not fit.
    """
    op, shape = "add_rows", tuple(own.shape)
    check_tensor(
        op,
        "own",
        own,
        dtypes=FLOATS[:3],
        shape=(None, None),
        device=own.device,
    )
    for name, rows in (("peer", peer), ("out", out)):
        check_tensor(
            op,
            name,
            rows,
            dtypes=(own.dtype,),
            shape=shape,
            device=own.device,
            strided_columns=name == "peer",
        )
    if own.numel() == 0:
        return
    own, peer = with_adjacent_columns(own), with_adjacent_columns(peer)
    num_rows, hidden = shape
    launch = tiles(own.device, num_rows, hidden)
    _add_rows_kernel[(launch.num_programs,)](
        own,
        peer,
        out,
        num_rows,
        hidden,
        own.stride(0),
        peer.stride(0),
        out.stride(0),
        triton.cdiv(hidden, launch.block),
        BLOCK_R=launch.rows,
        BLOCK_H=launch.block,
        num_warps=launch.num_warps,
    )
