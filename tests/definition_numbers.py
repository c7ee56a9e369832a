"""Numbers of the definition: 16-bit floats as their bits, the two int8 formats, equality of bits.

16-bit floats travel as uint16 arrays, so that a comparison also sees the sign of a zero and the
payload of a NaN; arithmetic happens in numpy float32, one rounding per operation.
"""

from __future__ import annotations

import numpy as np
import torch

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
COMM_QUANT_BLOCK = 8


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Bits (uint16) of float32 values rounded to ``dtype``, half to even."""
    values = np.asarray(values, dtype=np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    wide = values.view(np.uint32).astype(np.uint64)
    kept_is_odd = (wide >> 16) & 1
    bits = ((wide + 0x7FFF + kept_is_odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), bits)


def decode(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values behind the bits; exact."""
    bits = np.ascontiguousarray(bits, dtype=np.uint16)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    """Bits (uint16) of a bf16 or fp16 tensor of any strides."""
    return tensor.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def to_tensor(bits: np.ndarray, dtype: str) -> torch.Tensor:
    """A fresh bf16 or fp16 tensor with these bits."""
    owned = np.array(bits, dtype=np.uint16, order="C")
    return torch.from_numpy(owned.view(np.int16)).view(TORCH_DTYPES[dtype])


def quantise_int8(row: np.ndarray, smooth: np.ndarray | None) -> tuple[np.ndarray, np.float32]:
    """int8 codes and dequantisation factor of one row of float32 values, for dispatch."""
    scaled = row if smooth is None else row * smooth
    largest = np.max(np.abs(scaled))
    if largest == 0:
        return np.zeros(len(row), np.int8), np.float32(0)
    factor = np.float32(127) / largest
    codes = np.rint(scaled * factor).astype(np.int8)
    return codes, np.float32(1) / factor


def through_int8_blocks(bits: np.ndarray, dtype: str) -> np.ndarray:
    """One (H,) row of combine after its way through int8 with comm_quant_mode 2.

    The codes are made with the factor of a block in float32, and read with that factor rounded to
    ``dtype``, which is all that travels.
    """
    arrived = []
    for start in range(0, len(bits), COMM_QUANT_BLOCK):
        block = decode(bits[start : start + COMM_QUANT_BLOCK], dtype)
        assert len(block) == COMM_QUANT_BLOCK
        factor = np.max(np.abs(block)) * (np.float32(1) / np.float32(127))
        if factor == 0:
            codes = np.zeros(COMM_QUANT_BLOCK, np.int8)
        else:
            codes = np.rint((block / factor).astype(np.float16)).astype(np.int8)
        sent_factor = decode(encode(factor, dtype), dtype)
        arrived.append(encode(codes.astype(np.float32) * sent_factor, dtype))
    return np.concatenate(arrived)


def same_bits(actual: torch.Tensor, expected: np.ndarray, what: str) -> None:
    """Assert equality bit for bit; ``expected`` is uint16 bits for a 16-bit float tensor."""
    if actual.dtype in TORCH_DTYPES.values():
        found, wanted = to_bits(actual), expected
    else:
        found, wanted = actual.detach().cpu().contiguous().numpy(), np.asarray(expected)
        if found.dtype == np.float32:
            wanted = wanted.astype(np.float32)
            found, wanted = found.view(np.uint32), wanted.view(np.uint32)
    assert found.shape == wanted.shape, f"{what}: shape {found.shape}, expected {wanted.shape}"
    if not np.array_equal(found, wanted):
        place = tuple(int(axis[0]) for axis in np.nonzero(found != wanted))
        raise AssertionError(
            f"{what} differs first at {place}: got {found[place]}, expected {wanted[place]}\n"
            f"got      {found.tolist()}\nexpected {wanted.tolist()}"
        )
