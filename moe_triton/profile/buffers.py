"""Sizes of the communication buffers of a product's ops, and the check of the environment.

The first line of each docstring is the formula in bytes; rows have 2-byte elements.
Letters: BS largest batch of a rank, H length of a token, K experts a token, W ranks, E routed
experts, L of them on each rank that has any, NS shared experts, itemsize bytes of an element of
``x``; AlignN(b) is b rounded up to a multiple of N.
Source: the constraint sections of the aclnnMoeDistribute* operator documents.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from ..errors import ArgumentValueError

ENVIRONMENT = "HCCL_BUFFSIZE"  # MB of a group's communication buffer; checked where it is set

MB = 2**20


class Sizes(NamedTuple):
    """The sizes that determine a communication buffer.

    Attributes:
        world: W.
        experts: E.
        local: L.
        top_k: K.
        hidden: H.
        tokens: BS.
        shared: NS, 0 without ranks reserved for them.
        tp: ranks of the TP group; 0 or 1 without one.
        itemsize: of ``x``; 4 for int4 packed in int32.
        vector_cores: of the device, or None if unknown.
    """

    world: int
    experts: int
    local: int
    top_k: int
    hidden: int
    tokens: int
    shared: int = 0
    tp: int = 0
    itemsize: int = 2
    vector_cores: int | None = None


def megabytes(num_bytes: int) -> int:
    """Bytes in MB, rounded up."""
    return -(-num_bytes // MB)


def check(op: str, formula: Callable[[Sizes], int] | None, sizes: Sizes | None, where: str) -> None:
    """Check that the buffer of the environment variable, if it is set, is large enough.

    Raises:
        ArgumentValueError: it is too small, or not a number.
    """
    value = os.environ.get(ENVIRONMENT)
    if value is None or formula is None or sizes is None:
        return
    least = megabytes(formula(sizes))
    if not value.isdecimal() or int(value) < least:
        raise ArgumentValueError(op, ENVIRONMENT, f"be at least {least} MB {where}", value)


def _align(number: int, to: int) -> int:
    return -(-number // to) * to


def a2_fullmesh(s: Sizes) -> int:
    """2 * (BS * W * min(L, K) * H * 2 + 2 MB).

    Rows of packed int4 (v2 only) have 32 bytes more, and 4-byte elements.
    """
    row = s.hidden * s.itemsize + (32 if s.itemsize == 4 else 0)
    return 2 * (s.tokens * s.world * min(s.local, s.top_k) * row + 2 * MB)


def _hierarchy(s: Sizes) -> int:
    return s.experts * s.tokens * (s.itemsize * s.hidden + 4 * _align(s.top_k, 8) * 4)


def a2_v1_hierarchy(s: Sizes) -> int:
    """E * BS * (H * itemsize + 4 * Align8(K) * 4) + 104 MB."""
    return _hierarchy(s) + 104 * MB


def a2_v2_hierarchy(s: Sizes) -> int:
    """(E + W / 4) * Align512(BS * (H * itemsize + 16 * Align8(K))) + 8 MB."""
    row = s.itemsize * s.hidden + 16 * _align(s.top_k, 8)
    return (s.experts + s.world // 4) * _align(s.tokens * row, 512) + 8 * MB


def a3_v1(s: Sizes) -> int:
    """2 * (BS * 2 * (H + 128) * (W * L + K + 1)) + 2 MB.

    With T = 2 the buffer of the TP group needs as much, and by newer documents
    2 * A * (Align512(Align32(2 * H) + 44) + Align512(2 * H)) with A = BS * W, which is more. The
    variable sizes the buffers of both groups.
    """
    half = s.tokens * 2 * (s.hidden + 128) * (s.world * s.local + s.top_k + 1)
    pair = 0
    if s.tp == 2:
        rows = s.tokens * s.world * min(s.local, s.top_k)
        pair = 2 * rows * (_align(_align(2 * s.hidden, 32) + 44, 512) + _align(2 * s.hidden, 512))
    return max(2 * half + 2 * MB, pair)


def _rows(s: Sizes, row_bytes: int) -> int:
    """Dispatched rows of ``row_bytes``, and returned rows."""
    returned = (s.top_k + s.shared) * s.tokens * _align(2 * s.hidden, 512)
    return 2 * (s.local * s.tokens * s.world * row_bytes + returned)


def a3_v2(s: Sizes) -> int:
    """2 * (L * BS * W * Align512(Align32(2 * H) + 64) + (K + NS) * BS * Align512(2 * H))."""
    return _rows(s, _align(_align(2 * s.hidden, 32) + 64, 512))


def a3_fullmesh_v2(s: Sizes) -> int:
    """As without fullmesh_v2, with ceil((Align32(2 * H) + 64) / 480) * 512 for a dispatched row."""
    return _rows(s, -(-(_align(2 * s.hidden, 32) + 64) // 480) * 512)


def a3_v2_hierarchy(s: Sizes) -> int:
    """E * BS * (H * itemsize + 4 * Align8(K) * 4) + 404 MB."""
    return _hierarchy(s) + 404 * MB


def _split_rows(s: Sizes) -> int:
    return _rows(s, _align(_align(2 * s.hidden, 32) + 44, 512))


def a3_split(s: Sizes) -> int:
    """As v2, with Align512(Align32(2 * H) + 44) for a dispatched row, and 2 MB at least."""
    return max(_split_rows(s), 2 * MB)


def a950_v1(s: Sizes) -> int:
    """vector_cores * 32 + 2 * W * BS * H * 2 * L.

    The documents do not give the number of cores of a device; unknown ones add nothing.
    """
    return 32 * (s.vector_cores or 0) + 2 * s.world * s.tokens * s.hidden * 2 * s.local


def a950_split(s: Sizes) -> int:
    """As on a3, with the factor 4 instead of 2."""
    return max(2 * _split_rows(s), 2 * MB)
