"""Gather rows from windows into the outputs of dispatch.

    x[i] = payload of rows[index[i]];  scales[i] = its scale;  zeros where index[i] is NOWHERE

Rows are moved in words of 4 bytes where sizes allow it, in accesses of 16 bytes. The tensor of rows
may span many windows, with overlapping rows every 16 bytes: addresses are 64-bit, and only indexed
rows are read.

Shapes: N rows that can be indexed, n rows gathered, H hidden size, A rows of the output.
Bytes:  2 * n * (H * b + scale bytes), b bytes an element.
Source: ``moe_triton.ref.gather_rows``.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError
from ..layout import RowFormat
from . import launch_config
from ._checks import INDICES, check_tensor
from ._common import WORDS, load_rows


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_sources",
        "width_units",
        "source_units",
        "x_units",
        "source_scale_stride",
    ]
)
def _gather_rows_kernel(
    source_ptr,  # [N, width] words of payload
    index_ptr,  # [n] int32 | int64, negative for none
    count_ptr,  # [1] int32 rows to gather, or None for n
    source_scale_ptr,  # [N, C] integers as wide as a scale, or None
    x_ptr,  # [A, width] words
    scale_ptr,  # [A] integers as wide as a scale, or None
    num_rows,
    num_sources,
    # Sizes and strides of words count UNITs: the compiler sees how wide an access may be.
    width_units,
    source_units,
    x_units,
    source_scale_stride,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gather words of rows, and one scale a row.

    Example: source [[1, 2], [3, 4], [5, 6]], scales [0.5, 0.25, 2], index [2, -1, 0, 1], count 3:
        x [[5, 6], [0, 0], [1, 2], untouched], scale [2, 0, 0.5, untouched].
    """
    width = width_units * UNIT
    across = tl.cdiv(width, BLOCK)
    if count_ptr is not None:
        num_rows = tl.minimum(num_rows, tl.load(count_ptr))
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS) * across, tl.num_programs(0)):
        first = (tile // across) * ROWS
        row = first.to(tl.int64) + tl.arange(0, ROWS)
        active = row < num_rows
        source = load_rows(index_ptr, first, 1, num_rows, -1, ROWS)
        tl.device_assert(source < num_sources, "index out of range")
        present = active & (source >= 0)
        cols = (tile % across) * BLOCK + tl.arange(0, BLOCK)
        inside = (cols < width)[None, :]
        at = (source * source_units * UNIT)[:, None] + cols[None, :]
        words = tl.load(source_ptr + at, mask=present[:, None] & inside, other=0)
        at = (row * x_units * UNIT)[:, None] + cols[None, :]
        tl.store(x_ptr + at, words, mask=active[:, None] & inside)
        if scale_ptr is not None:
            once = tile % across == 0
            at = source_scale_ptr + source * source_scale_stride
            scale = tl.load(at, mask=present & once, other=0)
            tl.store(scale_ptr + row, scale, mask=active & once)


def gather_rows(
    rows: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    x: torch.Tensor,
    scales: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """Gather payload and scales of rows into the outputs of dispatch.

    Arguments as in ``ref.gather_rows``; ``count`` stays on the device.

    Raises:
        ArgumentTypeError: a wrong dtype.
        ArgumentValueError: a wrong shape, stride or device.
    """
    num_rows = index.numel()
    check = functools.partial(check_tensor, "gather_rows", device=rows.device)
    check("rows", rows, dtypes=(torch.uint8,), shape=(None, None), strided_columns=False)
    check("index", index, dtypes=INDICES, shape=(None,))
    if count is not None:
        check("count", count, dtypes=(torch.int32,), shape=(1,))
    shape: tuple[int, ...] = (num_rows, fmt.hidden)
    check("x", x[:num_rows], dtypes=(fmt.dtype,), shape=shape, strided_columns=False)
    if scales is not None:
        shape, dtypes = fmt.scale_shape(num_rows), (fmt.scale_dtype,)
        check("scales", scales[:num_rows], dtypes=dtypes, shape=shape, strided_columns=False)
    if num_rows == 0:
        return
    source_scales = None if scales is None else fmt.scales(rows)
    if scales is not None and source_scales is not None and scales.dim() == 2:
        # Several scales of a row are gathered as a row of their own.
        _gather(source_scales, index, count, scales)
        source_scales = scales = None
    _gather(fmt.payload(rows), index, count, x, source_scales, scales)


def _gather(
    source: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor | None,
    x: torch.Tensor,
    source_scales: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> None:
    """Gather rows of [N, C] ``source`` into [A, C] ``x``, with one scale a row or none."""
    num_rows, num_sources, device = index.numel(), len(source), source.device
    word = math.gcd(4, *(_alignment(tensor) for tensor in (source, x)))
    source, x = source.view(WORDS[word]), x.view(WORDS[word])
    scale_step = 0
    if source_scales is not None and scales is not None:
        bits = WORDS[scales.element_size()]
        source_scales, scales = source_scales.view(bits), scales.view(bits)
        scale_step = source_scales.stride(0)
    width = source.shape[1]
    tiles = launch_config.tiles(device, num_rows, width, indexed=True)
    unit = math.gcd(16, width, source.stride(0), x.stride(0))
    _gather_rows_kernel[(tiles.num_programs,)](
        source,
        index.contiguous(),
        count,
        source_scales,
        x,
        scales,
        num_rows,
        num_sources,
        width // unit,
        source.stride(0) // unit,
        x.stride(0) // unit,
        scale_step,
        UNIT=unit,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        num_warps=tiles.num_warps,
    )


@triton.jit(do_not_specialize=["num_rows", "width_units", "x_units"])
def _zero_padding_kernel(
    x_ptr,  # [A, width] words
    index_ptr,  # [n] int32 | int64
    count_ptr,  # [1] int32, or None
    num_rows,
    width_units,
    x_units,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Zero the words of rows with a negative index.

    Example: x [[1, 2], [3, 4], [5, 6], [7, 8]], index [0, -1, 5, -1], count 3:
        [[1, 2], [0, 0], [5, 6], [7, 8]].
    """
    width = width_units * UNIT
    across = tl.cdiv(width, BLOCK)
    if count_ptr is not None:
        num_rows = tl.minimum(num_rows, tl.load(count_ptr))
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS) * across, tl.num_programs(0)):
        first = (tile // across) * ROWS
        row = first.to(tl.int64) + tl.arange(0, ROWS)
        empty = load_rows(index_ptr, first, 1, num_rows, 0, ROWS) < 0
        cols = (tile % across) * BLOCK + tl.arange(0, BLOCK)
        at = (row * x_units * UNIT)[:, None] + cols[None, :]
        mask = empty[:, None] & (cols < width)[None, :]
        tl.store(x_ptr + at, tl.zeros([ROWS, BLOCK], x_ptr.dtype.element_ty), mask=mask)


def zero_padding(x: torch.Tensor, index: torch.Tensor, count: torch.Tensor | None = None) -> None:
    """Zero the rows of [A, C] ``x`` whose index is negative.

    Arguments as in ``ref.zero_padding``; ``count`` stays on the device.

    Raises:
        ArgumentTypeError: a wrong dtype.
        ArgumentValueError: a wrong shape, stride or device, or fewer rows than indices.
    """
    op, num_rows = "zero_padding", index.numel()
    check = functools.partial(check_tensor, op, device=x.device)
    check("index", index, dtypes=INDICES, shape=(None,))
    check("x", x, dtypes=(x.dtype,), shape=(None, None), strided_columns=False)
    if len(x) < num_rows:
        raise ArgumentValueError(op, "x", f"have a row for each of {num_rows} indices", len(x))
    if count is not None:
        check("count", count, dtypes=(torch.int32,), shape=(1,))
    if num_rows == 0 or x.numel() == 0:
        return
    words = x.view(WORDS[math.gcd(4, _alignment(x))])
    tiles = launch_config.tiles(x.device, num_rows, words.shape[1], indexed=True)
    unit = math.gcd(16, words.shape[1], words.stride(0))
    _zero_padding_kernel[(tiles.num_programs,)](
        words,
        index.contiguous(),
        count,
        num_rows,
        words.shape[1] // unit,
        words.stride(0) // unit,
        UNIT=unit,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        num_warps=tiles.num_warps,
    )


def _alignment(rows: torch.Tensor) -> int:
    """Common divisor of the first bytes and the sizes of rows."""
    elements = math.gcd(rows.shape[1], rows.stride(0), rows.storage_offset())
    return elements * rows.element_size()
