"""Storage formats of NPUs: noted on the tensor's storage, whose bytes stay in rows.

A format changes where an NPU keeps an element, never its value, index or shape.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from torch import Tensor

from ..errors import ArgumentValueError


class Format(IntEnum):
    """``torch_npu.Format``, the numbers of ACL."""

    UNDEFINED = -1
    NCHW = 0
    NHWC = 1
    ND = 2
    NC1HWC0 = 3
    FRACTAL_Z = 4
    NC1HWC0_C04 = 12
    HWCN = 16
    NDHWC = 27
    FRACTAL_NZ = 29
    NCDHW = 30
    NDC1HWC0 = 32
    FRACTAL_Z_3D = 33
    NC = 35
    NCL = 47


def npu_format_cast(
    self: Tensor,
    acl_format: int | Tensor,
    customize_dtype: Any = None,  # noqa: ARG001 - the signature of torch_npu
    **_: Any,
) -> Tensor:
    """A copy of a tensor, in another storage format.

    Args:
        self: any tensor.
        acl_format: the number of the format, or a tensor that has it.
        customize_dtype: of the elements that an NPU packs; ignored.

    Raises:
        ArgumentValueError: no format has the number.
    """
    return npu_format_cast_(self.clone(), acl_format)


def npu_format_cast_(self: Tensor, acl_format: int | Tensor) -> Tensor:
    """Change the storage format of a tensor in place; returns the tensor. Arguments as above."""
    name = "npu_format_cast"
    number = get_npu_format(acl_format) if isinstance(acl_format, Tensor) else acl_format
    if number not in list(Format):
        raise ArgumentValueError(name, "acl_format", "be a number of torch_npu.Format", number)
    self.untyped_storage()._npu_format = Format(number)  # type: ignore[attr-defined]
    return self


def get_npu_format(self: Tensor) -> Format:
    """The storage format of a tensor; ND unless it was cast."""
    return getattr(self.untyped_storage(), "_npu_format", Format.ND)
