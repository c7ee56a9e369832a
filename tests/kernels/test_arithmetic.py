"""Quantising with a GPU's arithmetic: its fma and conversions, modelled in numpy.

That inline PTX means what the model says shows only a GPU, where the special rows run it.
"""

from __future__ import annotations

import dataclasses

import gpu_arithmetic
import numpy as np
import pytest
import torch

from moe_triton import kernels, ref
from moe_triton.kernels import launch_config, quantize
from moe_triton.layout import RowFormat

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NAN, INF, SMALLEST = float("nan"), float("inf"), 2.0**-149
HIDDEN = 64

FORMATS = {
    "int8": (torch.int8, "per_row"),
    "e4m3": (E4M3, "per_row"),
    "per_row_div": (torch.int8, "per_row_div"),
    "group e4m3": (E4M3, "group", torch.float32, 16),
    "group_pow2 e4m3": (E4M3, "group_pow2", torch.float32, 16),
    "group int8": (torch.int8, "group", torch.float32, 16),
    "mx e4m3": (E4M3, "mx", torch.uint8, 32),
    "mx e5m2": (E5M2, "mx", torch.uint8, 32),
    "block8 bf16": (torch.int8, "block8", torch.bfloat16, 8),
    "block8 fp16": (torch.int8, "block8", torch.float16, 8),
}


@pytest.fixture(params=["fma", "ptx"])
def arithmetic(request, monkeypatch, device):
    """The interpreter with the arithmetic of a GPU, or a GPU with its own."""
    if device.type != "cpu":
        if request.param != launch_config.policy(device).arithmetic:
            pytest.skip("this GPU has other arithmetic")
        return
    policy = dataclasses.replace(launch_config.INTERPRETER, arithmetic=request.param)
    monkeypatch.setattr(launch_config, "policy", lambda _: policy)
    monkeypatch.setattr(quantize, "_PTX_TILE", 1)
    gpu_arithmetic.install(monkeypatch)


def special_rows() -> torch.Tensor:
    """Rows of one kind each: ties, zeros, tiny and huge numbers, inf, NaN."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((14, HIDDEN), generator=generator)
    x[0] = torch.arange(HIDDEN) % 255 / 2 - 16
    x[0, ::8] = 127.0
    x[1], x[2] = 0.0, -0.0
    x[3], x[4] = 1e-40, -SMALLEST
    # 190 / 127 of the smallest numbers is one of them; 60 / 127 is none.
    x[5], x[6] = 190 * SMALLEST, 60 * SMALLEST
    x[5, 1::2] *= -1
    x[6, ::3] = 0.0
    x[7, 5], x[8, 9], x[9, 60] = INF, -INF, NAN
    x[10] *= 2.0**-110
    x[11] *= 2.0**120
    x[12] *= 2.0**-70
    # Quotients on and beside the middle of two codes.
    middles = (torch.arange(HIDDEN) + 0.5).float().view(torch.int32)
    x[13] = (middles + torch.arange(HIDDEN, dtype=torch.int32) % 3 - 1).view(torch.float32)
    return torch.cat([x, middles_of_rounded_divisors()])


def middles_of_rounded_divisors() -> torch.Tensor:
    """Rows whose divisors were rounded, with quotients beside the middle of two codes.

    Each group of 8 has the same divisor. Numbers where a product with a reciprocal is not the
    quotient come first.
    """
    codes = torch.arange(-126, 127).float() + 0.5
    rows = []
    for largest in (0.7, 3.0, 9.7, 77.0, 100.0):
        divisor = torch.tensor(largest) / 127
        near = (codes * divisor).view(torch.int32)[:, None] + torch.arange(-1, 2, dtype=torch.int32)
        near = near.view(torch.float32).flatten()
        off = (near * (1 / divisor)).round() != (near / divisor).round()
        assert off.any()
        row = near[off.int().argsort(descending=True, stable=True)[:HIDDEN]]
        row[::8] = largest
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_special_rows(name, dtype, arithmetic, device):
    payload, *rest = FORMATS[name]
    fmt = RowFormat.tight(payload, HIDDEN, *rest)
    x = special_rows().to(device, dtype)
    actual, expected = (
        torch.full((len(x), fmt.stride), 0xA5, dtype=torch.uint8, device=device) for _ in "ab"
    )
    kernels.encode(x, fmt, actual)
    ref.encode(x, fmt, expected)
    # A tile takes the way of rare divisors if one of its rows does.
    for row, together in zip(x.split(1), actual.split(1), strict=True):
        alone = torch.full_like(together, 0xA5)
        kernels.encode(row, fmt, alone)
        assert torch.equal(alone, together)
    for part in (fmt.payload, fmt.scales):
        found, wanted = part(actual), part(expected)
        if found.dtype.is_floating_point:
            found, wanted = found.float().nan_to_num(7e37), wanted.float().nan_to_num(7e37)
        assert torch.equal(found, wanted), (found != wanted).nonzero().tolist()[:9]
    if payload == E4M3:
        signs = fmt.payload(actual).view(torch.uint8)[2] >> 7
        assert torch.equal(signs, fmt.payload(expected).view(torch.uint8)[2] >> 7)


def test_fma_rounds_once():
    one, tiny = np.float32(1.0), np.float32(2.0**-24)
    a = np.array([1 + 2.0**-12, 1 + 2.0**-12, 3.0, INF], dtype=np.float32)
    c = np.array([0.0, 2.0**-60, -9.0, 1.0], dtype=np.float32)
    # (1 + 2**-12)**2 lies in the middle of two numbers; what is added decides.
    expected = [1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-23, 0.0, INF]
    assert gpu_arithmetic.fma(a, a, c).tolist() == expected
    assert gpu_arithmetic.fma(one[None], one[None], tiny[None]).tolist() == [1.0]


# The middles of quotients in [1/2, 1) are M / 2**25 for odd M of 25 bits. With the mantissas m of a
# divisor and T of t, both in [2**23, 2**24), t / divisor lies e / 2**48 / divisor from a middle if
# M * m = T * 2**k + e, k being 24 or 25. The proof of ``quotient`` leaves |e| up to 7.
NEAR = 8


def hard_cases(mantissas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each t and divisor in [1, 2) whose quotient lies almost in the middle of two numbers."""
    found = []
    # With more zeros at its end m divides no e.
    for zeros in range(NEAR.bit_length()):
        m = mantissas[mantissas & ((2 << zeros) - 1) == 1 << zeros]
        odd = m >> zeros
        inverse = odd.copy()  # modulo 2**3, and twice as many bits with each step
        for _ in range(4):
            inverse = inverse * (2 - odd * inverse) % 2**32
        for k in (24, 25):
            period = 1 << (k - zeros)
            for e in range(-NEAR, NEAR + 1):
                if e == 0 or e % (1 << zeros):
                    continue
                first = 2**24 + ((e >> zeros) * inverse - 2**24) % period
                for middle in (first + turn * period for turn in range(2**24 // period or 1)):
                    t = (middle * m - e) >> k
                    valid = (middle < 2**25) & (middle % 2 == 1) & (t >= 2**23) & (t < 2**24)
                    found.append(np.stack([t[valid] * 2.0 ** (k - 48), m[valid] * 2.0**-23]))
    t, divisor = np.concatenate(found, axis=1).astype(np.float32)
    return t, divisor


def check_quotients(t, divisor, reciprocal):
    actual, expected = gpu_arithmetic.quotient(t, divisor, reciprocal), t / divisor
    wrong = actual != expected
    assert not wrong.any(), f"{wrong.sum()} of {len(t)}: {t[wrong][:3]!r} / {divisor[wrong][:3]!r}"


@pytest.mark.parametrize(
    "mantissas",
    [
        pytest.param(range(2**23, 2**24, 2**8 + 1), id="some"),
        pytest.param(range(2**23, 2**24), id="all", marks=pytest.mark.full),
    ],
)
def test_hard_quotients_are_rounded_right(mantissas):
    """The proof of ``_common.quotient``, for reciprocals that are rounded right."""
    for begin in range(mantissas.start, mantissas.stop, 2**20):
        part = range(begin, min(begin + 2**20, mantissas.stop), mantissas.step)
        t, divisor = hard_cases(np.array(part, dtype=np.int64))
        assert len(t) > 4 * len(part)
        check_quotients(t, divisor, np.float32(1.0) / divisor)


def test_hard_cases_are_near_the_middle():
    t, divisor = hard_cases(np.array([2**23 + 1, 2**23 + 6, 2**24 - 1, 9140713], dtype=np.int64))
    exact = t.astype(np.float64) / divisor
    assert (exact > 0.5).all() and (exact < 1).all()
    off = np.abs(exact * 2**24 % 1 - 0.5)
    assert 0 < off.max() < NEAR * 2.0**-24
    # Without the correction most are wrong, and with a neighbour of the reciprocal some.
    assert (t * (np.float32(1.0) / divisor) != t / divisor).mean() > 0.2


def test_half_quotients_of_approximate_reciprocals():
    """Reciprocals within 2**-43 of a middle, which an approximation may put on its other side."""
    mantissas = np.arange(2**23 + 1, 2**24, dtype=np.int64)
    middles = 2**48 // mantissas
    middles += 1 - middles % 2
    near = np.zeros(len(mantissas), dtype=bool)
    for step in (-2, 0, 2):
        near |= np.abs((middles + step) * mantissas - 2**48) <= 4 * NEAR
    assert near.sum() > 50
    t, divisor = hard_cases(mantissas[near])
    exact, wrong = t / divisor, 0
    for approximation in gpu_arithmetic.reciprocals(divisor):
        reciprocal = gpu_arithmetic.refined(approximation, divisor)
        wrong += (reciprocal != np.float32(1.0) / divisor).sum()
        actual = gpu_arithmetic.quotient(t, divisor, reciprocal)
        for scale in np.float32([1.0, 2.0**-3, 2.0**5]):
            assert ((actual * scale).astype(np.float16) == (exact * scale).astype(np.float16)).all()
    assert wrong > 0


def test_quotients_of_any_numbers():
    generator = np.random.default_rng(5)
    for scale in (2.0**-60, 1.0, 2.0**100):
        divisor = (generator.uniform(1, 2, 2**16) * scale).astype(np.float32)
        t = (divisor * generator.uniform(-128, 128, 2**16)).astype(np.float32)
        check_quotients(t, divisor, np.float32(1.0) / divisor)
