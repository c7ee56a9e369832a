"""Formats of rows in windows: the payload, and the scales of its quantisation.

Letters: H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import torch

_Bytes = TypeVar("_Bytes", int, np.ndarray)

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Quant(NamedTuple):
    """Quantisation of dispatched tokens.

    Attributes:
        scheme: as in ``RowFormat``.
        dtype: of the payload.
        scale_dtype: of the scales, for the schemes that have scales.
        block: elements that share a scale, or 0 where the whole row has one.
    """

    scheme: str
    dtype: torch.dtype
    scale_dtype: torch.dtype = torch.float32
    block: int = 0


# By the names that ``ExpertParallel`` takes. MX scales are e8m0, which travels as its bytes.
QUANTS = {
    "int8_static": Quant("static", torch.int8),
    "int8": Quant("per_row", torch.int8),
    "e4m3": Quant("per_row", torch.float8_e4m3fn),
    "e5m2": Quant("per_row", torch.float8_e5m2),
    "group_e4m3": Quant("group", torch.float8_e4m3fn, block=128),
    "group_e5m2": Quant("group", torch.float8_e5m2, block=128),
    "pow2_e4m3": Quant("group_pow2", torch.float8_e4m3fn, block=128),
    "mx_e4m3": Quant("mx", torch.float8_e4m3fn, torch.uint8, 32),
    "mx_e5m2": Quant("mx", torch.float8_e5m2, torch.uint8, 32),
}


def align(num_bytes: _Bytes, to: int = 16) -> _Bytes:
    """``num_bytes`` rounded up to a multiple of ``to``."""
    return -(-num_bytes // to) * to


class RowFormat(NamedTuple):
    """Layout of one token row in a window: H elements, then the scales that its scheme has.

    Attributes:
        dtype: of the payload.
        hidden: H.
        stride: bytes from row to row, a multiple of 16.
        scheme: quantisation of the payload: "none"; "static" with the caller's factors; "per_row",
            "group" and "mx" with scales made from the row; "group_pow2" as "group", with scales
            rounded up to powers of two; "per_row_div" as "per_row", but divides the row by its
            scale; "block8" divides too, for combine.
        scale_offset: byte offset of the first scale, a multiple of 16, or None.
        scale_dtype: of the scales.
        block: elements that share a scale, or 0 where the whole row has one.
    """

    dtype: torch.dtype
    hidden: int
    stride: int
    scheme: str = "none"
    scale_offset: int | None = None
    scale_dtype: torch.dtype = torch.float32
    block: int = 0

    @classmethod
    def tight(
        cls,
        dtype: torch.dtype,
        hidden: int,
        scheme: str = "none",
        scale_dtype: torch.dtype = torch.float32,
        block: int = 0,
    ) -> RowFormat:
        """The format whose scales and next row begin at the next multiple of 16 bytes."""
        size = align(hidden * dtype.itemsize)
        if scheme in ("none", "static"):
            return cls(dtype, hidden, size, scheme)
        fmt = cls(dtype, hidden, 0, scheme, size, scale_dtype, block)
        return fmt._replace(stride=align(size + fmt.num_scales * scale_dtype.itemsize))

    @classmethod
    def quantized(cls, quant: str | None, dtype: torch.dtype, hidden: int) -> RowFormat:
        """The format of tokens of ``dtype`` after a quantisation of ``QUANTS``, or without one."""
        if quant is None:
            return cls.tight(dtype, hidden)
        scheme, payload, scale_dtype, block = QUANTS[quant]
        return cls.tight(payload, hidden, scheme, scale_dtype, block)

    @property
    def num_scales(self) -> int:
        """Scales of a row; MX scales come in pairs."""
        if not self.block:
            return 1
        scales = -(-self.hidden // self.block)
        return scales + scales % 2 if self.scheme == "mx" else scales

    def scale_shape(self, num_rows: int) -> tuple[int, ...]:
        """Shape of scales in a tensor of their own: one dimension where a row has one scale."""
        return (num_rows, self.num_scales) if self.block else (num_rows,)

    def payload(self, rows: torch.Tensor) -> torch.Tensor:
        """[.., stride] uint8 -> [.., H] of ``dtype``, a view."""
        return rows.view(self.dtype).narrow(-1, 0, self.hidden)

    def scales(self, rows: torch.Tensor) -> torch.Tensor:
        """[.., stride] uint8 -> [.., num_scales] of ``scale_dtype``, a view."""
        assert self.scale_offset is not None
        first = self.scale_offset // self.scale_dtype.itemsize
        return rows.view(self.scale_dtype)[..., first : first + self.num_scales]
