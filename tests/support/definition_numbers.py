"""Numbers of the definition: floats of 16 and 8 bits as their bits, every quantisation, equality.

16-bit floats travel as uint16 arrays, so that a comparison also sees the sign of a zero and the
payload of a NaN; arithmetic happens in numpy float32, one rounding per operation.
"""

from __future__ import annotations

import numpy as np
import torch

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
COMM_QUANT_BLOCK = 8
GROUP, MX_BLOCK = 128, 32
ROW_DTYPES = {
    "int8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


def finite_values(exponent_bits: int, mantissa_bits: int, count: int) -> np.ndarray:
    """The values of the first ``count`` codes of an 8-bit float, which ascend."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(count):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        if exponent == 0:
            values.append(fraction * 2.0 ** (1 - bias))
        else:
            values.append((1 + fraction) * 2.0 ** (exponent - bias))
    return np.array(values)


# The positive finite values, and the exponent of the largest.
FLOAT8 = {"e4m3": (finite_values(4, 3, 0x7F), 8), "e5m2": (finite_values(5, 2, 0x7C), 15)}


def encode_float8(values: np.ndarray, name: str) -> np.ndarray:
    """Codes (uint8) of finite values, to the nearest, ties to the even code, saturating."""
    table, _ = FLOAT8[name]
    size = np.abs(np.asarray(values, np.float64))
    above = np.minimum(np.searchsorted(table, size), len(table) - 1)
    below = np.maximum(above - 1, 0)
    up, down = table[above] - size, size - table[below]
    even = np.where(above % 2 == 0, above, below)
    code = np.where(up < down, above, np.where(down < up, below, even))
    return (code | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


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


def quantise_static(row: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, None]:
    """int8 codes of one row with given factors."""
    return np.clip(np.rint(row * factors), -128, 127).astype(np.int8), None


def quantise_float8(
    row: np.ndarray, smooth: np.ndarray | None, name: str, tile: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of one row, and the factor of each of its tiles."""
    largest_code = np.float32(FLOAT8[name][0][-1])
    scaled = row if smooth is None else row * smooth
    codes, factors = [], []
    for start in range(0, len(row), tile):
        part = scaled[start : start + tile]
        largest = np.max(np.abs(part))
        if largest == 0:
            codes.append(encode_float8(part, name))
            factors.append(np.float32(0))
            continue
        factor = largest_code / largest
        codes.append(encode_float8(part * factor, name))
        factors.append(np.float32(1) / factor)
    return np.concatenate(codes), np.array(factors, np.float32)


def quantise_mx(row: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes of one row, and the e8m0 codes of its blocks, as many as is even."""
    _, largest_exponent = FLOAT8[name]
    codes, scales = [], []
    for start in range(0, len(row), MX_BLOCK):
        part = row[start : start + MX_BLOCK]
        exponent = int((part.view(np.uint32) >> 23 & 0xFF).max())
        scale = max(exponent - largest_exponent, 0)
        codes.append(encode_float8(np.ldexp(part.astype(np.float64), 127 - scale), name))
        scales.append(scale)
    scales += [0] * (len(scales) % 2)
    return np.concatenate(codes), np.array(scales, np.uint8)


def quantise(
    row: np.ndarray, factors: np.ndarray | None, mode: int, name: str
) -> tuple[np.ndarray, np.ndarray | np.float32 | None]:
    """Codes and scales of one row in a quant_mode of dispatch.

    Args:
        row: float32 values.
        factors: what they are multiplied with before, or None.
        mode: 1 to 4.
        name: of the codes' dtype, of ``ROW_DTYPES``.
    """
    if mode == 1:
        return quantise_static(row, factors)
    if mode == 4:
        return quantise_mx(row, name)
    if name == "int8":
        return quantise_int8(row, factors)
    codes, scales = quantise_float8(row, factors, name, len(row) if mode == 2 else GROUP)
    return codes, scales[0] if mode == 2 else scales


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
    """Assert equality bit for bit; ``expected`` is the bits of a float of 16 bits or 8."""
    if actual.dtype in TORCH_DTYPES.values():
        found, wanted = to_bits(actual), expected
    elif actual.is_floating_point() and actual.element_size() == 1:
        found, wanted = actual.view(torch.uint8).numpy(), expected.view(np.uint8)
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
