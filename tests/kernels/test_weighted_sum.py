"""Weighted sums against their definition, bit for bit, and against numbers worked out by hand."""

from __future__ import annotations

import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from moe_triton import kernels, ref
from moe_triton.errors import MoeError
from moe_triton.kernels.launch_config import Launch
from moe_triton.layout import NOWHERE, Norm, RowFormat, ZeroComputationExperts

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN, INF = float("nan"), float("inf")
# Sums of squares are added in another order: a few last bits, rounded twice.
NORM_TOLERANCE = {BF16: 1.6e-2, FP16: 2e-3, FP32: 1e-5, FP64: 1e-5}

# Tiles of one token, as on accelerators, and tall ones, small enough to reach every edge.
NARROW = Launch(num_programs=3, rows=1, block=16, num_warps=1)
TALL = Launch(num_programs=2, rows=4, block=16, num_warps=1)


@pytest.fixture(params=[None, NARROW, TALL], ids=["own tiles", "one token", "tall tiles"])
def launch(request, monkeypatch):
    """Each shape of tile of a device."""
    if request.param is not None:
        module = importlib.import_module("moe_triton.kernels.weighted_sum")
        monkeypatch.setattr(module, "token_tiles", lambda *args, **kwargs: request.param)
        monkeypatch.setattr(module, "_plan_sum", module._plan_sum.__wrapped__)  # it remembers
    return request.param


def same_bits(actual, expected):
    """Equal bits, so that zeros have signs; all NaNs are equal."""
    assert actual.dtype == expected.dtype
    assert (actual.isnan() == expected.isnan()).all()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.itemsize]
    one, other = (x.masked_fill(x.isnan(), 0).view(integers) for x in (actual, expected))
    assert (one == other).all(), f"{int((one != other).sum())} differ"


def block8_format(dtype, hidden):
    return RowFormat.tight(torch.int8, hidden, "block8", dtype, 8)


def encoded(x, fmt):
    """[N, stride] encoded rows, NaN in their padding."""
    rows = torch.full((len(x), fmt.stride), 0xFF, dtype=torch.uint8, device=x.device)
    ref.encode(x, fmt, rows)
    return rows


class Drawn:
    """A case of random numbers for both implementations."""

    def __init__(self, seed, T, K, NS, H, dtype, N=9, *, device="cpu"):
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype, self.shape = device, dtype, (T, H)
        self.fmt = RowFormat.tight(dtype, H)
        spread = torch.exp2(torch.randint(-12, 12, (N, 1), generator=self.generator).double())
        self.x = self.numbers(N, H) * spread.to(dtype).to(device)
        self.rows = encoded(self.x, self.fmt)
        self.index = self.integers(NOWHERE, N, (T, K + NS))
        self.weights = self.numbers(T, K, dtype=torch.promote_types(dtype, FP32))
        self.zero_computation = self.addend = None
        self.norm = ()

    def numbers(self, *shape, dtype=None):
        x = torch.randn(shape, generator=self.generator, dtype=FP64)
        return x.to(dtype or self.dtype).to(self.device)

    def integers(self, low, high, shape):
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def with_zero_computation(self, wide_alpha=False):
        """Routed experts 0 to 3, zero 4 and 5, copy 6 and 7, constant 8 to 10; 11 is no expert."""
        T, H = self.shape
        K = self.weights.shape[1]
        ids = self.integers(0, 12, (T, K)).int()
        self.index[:, :K].masked_fill_(ids >= 4, NOWHERE)
        alphas = [self.numbers(*((3, H) if wide_alpha else (3,))) for _ in range(2)]
        self.zero_computation = ZeroComputationExperts(
            ids, 6, 8, 11, self.numbers(T, H), *alphas, self.numbers(3, H)
        )
        return self

    def with_norm(self):
        T, H = self.shape
        self.norm = (self.numbers(T, H), self.numbers(H), 1e-6)
        return self

    def run(self, function):
        """The outputs of ``function``: out, and with a norm y and rstd."""
        T, H = self.shape
        out, y = torch.full((2, T, H + 3), NAN, dtype=self.dtype, device=self.device)[..., :H]
        rstd = torch.full((T,), NAN, device=self.device)
        norm = Norm(*self.norm, y, rstd) if self.norm else None
        arguments = (
            self.rows,
            self.index,
            self.fmt,
            self.weights,
            self.zero_computation,
            self.addend,
        )
        function(*arguments, out, norm)
        return (out, y, rstd) if norm else (out,)

    def check(self):
        (out, *norm), (expected, *expected_norm) = (
            self.run(kernels.weighted_sum),
            self.run(ref.weighted_sum),
        )
        same_bits(out, expected)
        for actual, wanted in zip(norm, expected_norm, strict=True):
            tolerance = NORM_TOLERANCE[actual.dtype]
            torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=1e-6, equal_nan=True)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data())
def test_any_sizes(data, device):
    draw = data.draw
    dtype = draw(st.sampled_from([BF16, FP16, FP32, FP64]), "dtype")
    H = draw(st.sampled_from([1, 3, 8, 16, 24, 136, 520]), "H")
    T, K, NS = (draw(st.sampled_from(sizes)) for sizes in ([0, 1, 5, 33], [0, 1, 2, 8, 17], [0, 1]))
    case = Drawn(draw(st.integers(0, 99), "seed"), T, K, NS, H, dtype, device=device)
    if dtype in (BF16, FP16) and H % 8 == 0 and draw(st.booleans(), "quantised"):
        case.fmt = block8_format(dtype, H)
        case.rows = encoded(case.x, case.fmt)
    if draw(st.booleans(), "zero_computation"):
        case.with_zero_computation(draw(st.booleans(), "wide alpha"))
    if draw(st.booleans(), "norm"):
        case.with_norm()
    if draw(st.booleans(), "addend"):
        case.addend = case.numbers(T, H)
    if draw(st.booleans(), "unweighted"):
        case.weights = None
    case.check()


@pytest.mark.parametrize("H", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_every_shape_of_tile(H, dtype, launch, device):
    case = Drawn(0, 9, 3, 1, H, dtype, device=device).with_zero_computation().with_norm()
    case.addend = case.numbers(9, H)
    case.check()
    case.norm = ()  # tiles of a row beside each other
    case.check()


@pytest.mark.parametrize("H", [1, 24])
@pytest.mark.parametrize("T", [1, 3])
def test_no_slots(T, H, device):
    """The sum is 0, or what is added to it."""
    case = Drawn(0, T, 0, 0, H, BF16, device=device)
    case.check()
    case.addend = case.numbers(T, H)
    case.check()


@pytest.mark.parametrize("H", [8, 16, 24])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_shape_of_tile_with_block8_rows(H, dtype, launch, device):
    case = Drawn(1, 9, 3, 1, H, dtype, device=device).with_norm()
    case.fmt = block8_format(dtype, H)
    case.rows = encoded(case.x, case.fmt)
    case.check()
    case.norm = ()
    case.check()


def test_no_constant_experts(device):
    case = Drawn(4, 5, 3, 0, 16, BF16, device=device).with_zero_computation()
    none = case.numbers(0)
    case.zero_computation = case.zero_computation._replace(
        end=8, alpha_1=none, alpha_2=none, value=case.numbers(0, 16)
    )
    case.check()


@pytest.mark.parametrize("hidden", [7168, 8193, 2**17 + 3])
def test_long_rows(hidden, device):
    Drawn(2, 2, 2, 0, hidden, BF16, N=3, device=device).with_norm().check()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_subnormal_numbers(dtype, device):
    case = Drawn(3, 7, 4, 0, 24, dtype, device=device)
    case.x = case.numbers(9, 24) * torch.finfo(dtype).tiny
    case.rows = encoded(case.x, case.fmt)
    case.check()


def plain(x, index, weights=None, out=None, steps=kernels, **options):
    """Sums of plain rows."""
    fmt = RowFormat(x.dtype, x.shape[1], x.shape[1] * x.itemsize)
    index = torch.as_tensor(index, device=x.device)
    if weights is not None:
        weights = torch.tensor(weights, device=x.device)
    if out is None:
        out = torch.full((len(index), x.shape[1]), NAN, dtype=x.dtype, device=x.device)
    zero_computation, addend = options.pop("zero_computation", None), options.pop("addend", None)
    steps.weighted_sum(
        x.view(torch.uint8), index, fmt, weights, zero_computation, addend, out, **options
    )
    return out


def test_example(steps, launch, device):
    """The numbers of the docstrings of the two steps."""
    x = torch.tensor([[1.0, 2], [3, 4], [5, 6]], device=device)
    out = plain(x, [[0, 2], [1, -1], [-1, -1]], [[1.0, 2], [0.5, 8], [1, 1]], steps=steps)
    assert out.tolist() == [[11, 14], [1.5, 2], [0, 0]]
    own = torch.tensor([[1.0, 256], [2, 0.5]], dtype=BF16, device=device)
    peer = torch.tensor([[3.0, 1], [-2, 0.5]], dtype=BF16, device=device)
    steps.add_rows(own, peer, own)
    assert own.tolist() == [[4, 256], [0, 1]]


def test_multiplies_then_adds(steps, device):
    # (1 + 2**-12)**2 = 1 + 2**-11 + 2**-24 loses its last bit; a fused operation would keep it.
    x = torch.tensor([[-1.0], [1 + 2**-12]], device=device)
    assert plain(x, [[0, 1]], [[1.0, 1 + 2**-12]], steps=steps).item() == 2**-11


def test_adds_in_ascending_order(steps, device):
    x = torch.tensor([[2.0**24], [1.0]], device=device)
    out = plain(x, [[0, 1, 1], [1, 1, 0]], steps=steps)
    assert out.flatten().tolist() == [2.0**24, 2.0**24 + 2]
    # A single number, of so many slots that pairs of them would sum to more.
    assert plain(x, [[0, *[1] * 15]], steps=steps).item() == 2.0**24


def test_adds_infinities(steps, device):
    x = torch.tensor([[INF, INF], [-INF, 1.0]], device=device)
    assert str(plain(x, [[0, 1]], steps=steps).tolist()) == "[[nan, inf]]"


def test_rounds_once_and_to_even(steps, device):
    x = torch.tensor([[256.0], [1.0], [1.0]], dtype=BF16, device=device)
    out = plain(x, [[0, 1, 2], [0, 1, 1]], [[1.0, 1.0, 1.0], [1.0, 0.5, 0.5]], steps=steps)
    assert out.flatten().tolist() == [258.0, 256.0]


def test_unweighted_rows_and_the_addend_come_last(steps, device):
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0]], dtype=FP16, device=device)
    addend = torch.tensor([[0.5, 0.25]], dtype=FP16, device=device)
    assert plain(x, [[0, 1]], [[3.0]], addend=addend, steps=steps).tolist() == [[13.5, 26.25]]


def test_alphas_of_each_column(steps, launch, device):
    """Expert 0 is constant with alphas (2, 0) and (3, 1), expert 1 with (0.5, 0) and (1, 2)."""

    def fp32(*numbers):
        return torch.tensor(numbers, device=device)

    ids = torch.tensor([[0, 1, NOWHERE]], dtype=torch.int32, device=device)
    alphas = fp32([2.0, 0.0], [0.5, 0.0]), fp32([3.0, 1.0], [1.0, 2.0])
    experts = ZeroComputationExperts(
        ids, 0, 0, 2, fp32([1.0, 2.0]), *alphas, fp32([1.0, -1.0], [4.0, 6.0])
    )
    index, weights = [[NOWHERE] * 3], [[0.5, 4.0, NAN]]
    out = plain(fp32([0.0, 0.0]), index, weights, zero_computation=experts, steps=steps)
    assert out.tolist() == [[0.5 * 5 + 4 * 4.5, 0.5 * -1 + 4 * 12.0]]


def test_no_negative_zero(steps, device):
    x = torch.tensor([[-0.0]], dtype=BF16, device=device)
    assert not torch.signbit(plain(x, [[0]], steps=steps)).any()


def test_slots_without_a_row_are_left_out_whatever_their_weight(steps, launch, device):
    x = torch.tensor([[NAN], [2.0]], device=device)
    weights = [[NAN, 3.0], [2.0, INF], [1.0, NAN]]
    out = plain(x, [[NOWHERE, 1], [1, NOWHERE], [NOWHERE, NOWHERE]], weights, steps=steps)
    assert out.flatten().tolist() == [6.0, 4.0, 0.0]
    assert plain(x[:0], [[NOWHERE]], [[1.0]], steps=steps).tolist() == [[0.0]]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
def test_nan_stays_with_its_token(dtype, launch, device):
    x = torch.ones((4, 17), dtype=dtype, device=device)
    x[1, 3], x[2, 16] = NAN, -INF
    residual, gamma = torch.zeros((3, 17), dtype=dtype, device=device), x[0].clone()
    norm = Norm(residual, gamma, 0.0, torch.empty_like(residual), torch.empty(3, device=device))
    out = plain(x, [[0, 1], [3, 2], [0, 3]], [[1.0, 1.0], [1.0, 1.0], [2.0, INF]], norm=norm)
    wanted = torch.full((3, 17), 2.0, dtype=dtype)
    wanted[0, 3], wanted[1, 16], wanted[2] = NAN, -INF, INF
    same_bits(out.cpu(), wanted)
    assert norm.rstd.tolist()[1:] == [0.0, 0.0]
    assert norm.rstd[0].isnan()


def test_no_tokens_and_no_columns(device):
    assert plain(torch.ones((1, 4), device=device), torch.empty((0, 2)).long()).shape == (0, 4)
    assert plain(torch.ones((1, 0), device=device), [[0]]).shape == (1, 0)
    assert (
        plain(torch.ones((1, 3), device=device), torch.empty((2, 0)).long()).tolist()
        == [[0] * 3] * 2
    )


def test_rows_that_overlap_every_16_bytes(device):
    memory = torch.arange(64, dtype=FP32, device=device).view(torch.uint8)
    rows = memory.as_strided((12, 32), (16, 1))
    out = torch.empty((2, 8), device=device)
    index = torch.tensor([[0, 1], [2, 11]], device=device)
    kernels.weighted_sum(rows, index, RowFormat(FP32, 8, 32), None, None, None, out)
    assert out[0].tolist() == [4.0 + 2 * i for i in range(8)]
    assert out[1].tolist() == [52.0 + 2 * i for i in range(8)]


def test_columns_of_small_tensors_may_lie_apart(device):
    case = Drawn(4, 6, 3, 0, 8, BF16, device=device).with_zero_computation(wide_alpha=True)
    case.index, case.weights = (x.T.contiguous().T for x in (case.index, case.weights))
    zero_computation = case.zero_computation
    case.zero_computation = zero_computation._replace(
        expert_ids=zero_computation.expert_ids.long().T.contiguous().T,
        value=zero_computation.value.T.contiguous().T,
    )
    case.check()


def test_columns_of_large_tensors_may_lie_apart(device):
    case = Drawn(6, 6, 3, 0, 8, BF16, device=device).with_zero_computation().with_norm()
    tokens, residual, case.addend = (case.numbers(6, 16)[:, ::2] for _ in range(3))
    case.zero_computation = case.zero_computation._replace(tokens=tokens)
    case.norm = (residual, *case.norm[1:])
    case.check()
    own, peer = case.numbers(2, 5, 14)[..., ::2]
    out, expected = torch.full((2, 5, 7), NAN, dtype=BF16, device=device)
    kernels.add_rows(own, peer, out)
    ref.add_rows(own, peer, expected)
    same_bits(out, expected)


def test_addresses_have_64_bits(device, reserve):
    # Row 2 begins at byte 2**33. On a CPU the memory is only reserved: three pages are touched.
    reserve(2**33 + 2**20)
    rows = torch.empty_strided((3, 16), (2**32, 1), dtype=torch.uint8, device=device)
    fmt = RowFormat(BF16, 8, 16)
    fmt.payload(rows).copy_(torch.tensor([[1.0], [2.0], [4.0]], device=device).expand(3, 8))
    out = torch.empty((1, 8), dtype=BF16, device=device)
    kernels.weighted_sum(rows, torch.tensor([[0, 2]], device=device), fmt, None, None, None, out)
    assert out.tolist() == [[5.0] * 8]


def test_addresses_of_sums_have_64_bits(device, reserve):
    # Row 2 begins at element 2**31, and the stride has 32 bits.
    reserve(2**32 + 2**20)
    far = torch.empty_strided((3, 8), (2**30, 1), dtype=BF16, device=device)
    x = torch.tensor([[1.0], [2.0]], dtype=BF16, device=device).expand(2, 8).contiguous()
    plain(x, [[0, 0], [0, 1], [1, 1]], out=far)
    assert far.tolist() == [[2.0] * 8, [3.0] * 8, [4.0] * 8]
    kernels.add_rows(far, far, far)
    assert far.tolist() == [[4.0] * 8, [6.0] * 8, [8.0] * 8]


def test_the_output_may_be_the_residual(launch, device):
    case = Drawn(5, 5, 2, 0, 40, BF16, device=device).with_norm()
    wanted, wanted_y, _ = case.run(ref.weighted_sum)
    residual, gamma, epsilon = case.norm
    y, rstd = torch.empty_like(residual), torch.empty(5, device=device)
    norm = Norm(residual, gamma, epsilon, y, rstd)
    kernels.weighted_sum(case.rows, case.index, case.fmt, case.weights, None, None, residual, norm)
    same_bits(residual, wanted)
    torch.testing.assert_close(y, wanted_y, rtol=NORM_TOLERANCE[BF16], atol=1e-6)


@pytest.mark.parametrize(
    "dtype, decoded",
    [
        (BF16, [1.0078125, -2.015625, 0.50390625, 4, 2.984375, -0.1259765625, 0, 2.484375]),
        (FP16, [1.0078125, -2.015625, 0.50390625, 4, 2.9921875, -0.1259765625, 0, 2.48828125]),
    ],
)
def test_worked_example_of_block8_rows(dtype, decoded, steps, launch, device):
    fmt = block8_format(dtype, 16)
    rows = torch.zeros((1, fmt.stride), dtype=torch.uint8, device=device)
    q = torch.tensor([32, -64, 16, 127, 95, -4, 0, 79] + [0] * 8, dtype=torch.int8)
    fmt.payload(rows)[0] = q.to(device)
    fmt.scales(rows)[0] = torch.tensor([0.031494140625, 0], dtype=dtype, device=device)
    out = torch.full((1, 16), NAN, dtype=dtype, device=device)
    weights = torch.ones((1, 1), device=device)
    steps.weighted_sum(
        rows, torch.zeros((1, 1), dtype=torch.int64, device=device), fmt, weights, None, None, out
    )
    assert out.tolist() == [decoded + [0] * 8]


@pytest.mark.parametrize(
    "x, ids, weights, rows, index, wanted",
    [
        (
            [[1, 2], [3, 4], [5, 6]],
            [[0, 1], [1, 2], [3, NOWHERE]],
            [[0.5, 0.5], [0.5, 0.5], [0.25, 1]],
            [[10, 20], [10, 20], [30, 40]],
            [[0, 1], [2, NOWHERE], [NOWHERE, NOWHERE]],
            [[10, 20], [15, 20], [1.25, 1.5]],
        ),
        (
            [[7, 8], [9, 10], [11, 12]],
            [[4, 0], [NOWHERE, 0], [NOWHERE, NOWHERE]],
            [[2.0, 1], [0.5, 0.5], [1, 1]],
            [[70, 80], [90, 100]],
            [[NOWHERE, 0], [NOWHERE, 1], [NOWHERE, NOWHERE]],
            [[104, 106], [45, 50], [0, 0]],
        ),
    ],
    ids=["rank 0", "rank 1"],
)
def test_worked_example_of_zero_computation_experts(
    x, ids, weights, rows, index, wanted, steps, launch, device
):
    # Expert 2 is zero, 3 copies, 4 is 2 * token + 3 * [1, -1]; masked slots have no expert.
    def bf16(*numbers):
        return torch.tensor(numbers, dtype=BF16, device=device)

    expert_ids = torch.tensor(ids, dtype=torch.int32, device=device)
    zero_computation = ZeroComputationExperts(
        expert_ids, 3, 4, 5, bf16(*x), bf16(2), bf16(3), bf16([1, -1])
    )
    out = plain(bf16(*rows), index, weights, zero_computation=zero_computation, steps=steps)
    assert out.tolist() == wanted


def test_zero_experts_alone_need_no_tokens(device):
    ids = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    zero_computation = ZeroComputationExperts(ids, 2, 2, 2, None, None, None, None)
    x = torch.tensor([[3.0]], device=device)
    assert plain(x, [[0, NOWHERE]], [[2.0, NAN]], zero_computation=zero_computation).item() == 6.0


def test_worked_example_of_residual_and_norm(steps, launch, device):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=BF16, device=device)
    residual = torch.tensor([[1.0, 1.0, -1.0, 0.0]], dtype=BF16, device=device)
    gamma = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=BF16, device=device)
    norm = Norm(residual, gamma, 1e-6, torch.empty_like(x), torch.empty(1, device=device))
    assert plain(x, [[0]], [[1.0]], norm=norm, steps=steps).tolist() == [[2, 3, 2, 4]]
    assert norm.rstd.item() == pytest.approx(0.34815528988838196, rel=1e-6)
    assert norm.y.tolist() == [[0.6953125, 0.5234375, 1.390625, 1.390625]]


def test_norm_rounds_before_gamma_and_after(launch, device):
    # With rstd = 1 / 2 the scaled sum is 1 / 2 + 3 * 2**-11, which rounds to 1 / 2.
    total = 1 + 3 * 2.0**-10
    x = torch.tensor([[1.0]], dtype=BF16, device=device)
    residual, gamma = torch.full_like(x, total - 1), torch.full_like(x[0], 3.0)
    norm = Norm(residual, gamma, 4 - total**2, torch.empty_like(x), torch.empty(1, device=device))
    plain(x, [[0]], norm=norm)
    assert norm.rstd.item() == pytest.approx(0.5, rel=1e-6)
    assert norm.y.item() == 1.5


def test_norm_is_that_of_the_unrounded_sum(launch, device):
    # With rstd = 3 / 4 it is 3 / 4 + 9 * 2**-12, past half a step of 2**-8; that of 1 is 3 / 4.
    total = 1 + 3 * 2.0**-10
    x = torch.tensor([[1.0]], dtype=BF16, device=device)
    residual, gamma = torch.full_like(x, total - 1), torch.ones_like(x[0])
    epsilon = 16 / 9 - total**2
    norm = Norm(residual, gamma, epsilon, torch.empty_like(x), torch.empty(1, device=device))
    assert plain(x, [[0]], norm=norm).item() == 1.0
    assert norm.y.item() == 0.75 + 2**-8


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("n, H", [(0, 4), (1, 1), (5, 17), (33, 8193)])
def test_add_rows(n, H, dtype, device):
    own, peer = (
        torch.randn((n, H + apart)).to(device=device, dtype=dtype)[:, :H] for apart in (1, 3)
    )
    out, expected = torch.full((2, n, H), NAN, dtype=dtype, device=device)
    kernels.add_rows(own, peer, out)
    ref.add_rows(own, peer, expected)
    same_bits(out, expected)
    kernels.add_rows(own, peer, own)
    same_bits(own, expected)


def test_an_index_past_the_rows_is_an_error(asserting, device):
    with pytest.raises(Exception, match="index out of range"):
        plain(torch.ones((2, 4), device=device), [[2]])


ROWS = torch.ones((2, 4))
ARGUMENTS = {
    "rows": ROWS.view(torch.uint8),
    "index": torch.zeros((1, 2), dtype=torch.int64),
    "fmt": RowFormat(FP32, 4, 16),
    "weights": torch.ones((1, 2)),
    "zero_computation": None,
    "addend": None,
    "out": torch.empty((1, 4)),
    "norm": None,
}
NORM = Norm(torch.ones((1, 4)), torch.ones(4), 1e-6, torch.ones((1, 4)), torch.ones(1))
CONSTANT = ZeroComputationExperts(
    torch.zeros((1, 2), dtype=torch.int32),
    2,
    3,
    4,
    torch.ones((1, 4)),
    torch.ones(1),
    torch.ones(1),
    torch.ones((1, 4)),
)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"rows": ROWS}, TypeError, "rows must be one of .*uint8"),
        ({"rows": torch.ones((2, 32), dtype=torch.uint8)}, ValueError, r"rows must have the shape"),
        ({"rows": torch.ones((16, 2), dtype=torch.uint8).T}, ValueError, "rows must be contiguous"),
        ({"index": torch.zeros((1, 2)).int()}, TypeError, "index must be one of"),
        ({"index": torch.zeros((2, 2)).long()}, ValueError, r"index must have the shape \(1, \*\)"),
        ({"fmt": RowFormat(BF16, 4, 16)}, TypeError, "out must be of the rows' dtype"),
        ({"fmt": RowFormat(FP32, 3, 16)}, ValueError, "out must have 3 columns"),
        ({"fmt": RowFormat(FP32, 4, 16, "per_row")}, ValueError, "fmt must be of scheme"),
        (
            {"fmt": RowFormat(torch.int8, 4, 16, "block8", 8, BF16, 8)},
            ValueError,
            "fmt must have blocks of a power of two that divides 4",
        ),
        ({"weights": torch.ones((1, 2)).half()}, TypeError, "weights must be one of"),
        ({"weights": torch.ones((1, 3))}, ValueError, "weights must have at most 2 columns"),
        ({"weights": torch.ones((1, 2), device="meta")}, ValueError, "weights must be on cpu"),
        ({"addend": torch.ones((2, 4))}, ValueError, "addend must have the shape"),
        ({"addend": torch.ones((1, 4)).half()}, TypeError, "addend must be one of"),
        ({"out": torch.empty((4, 1)).int()}, TypeError, "out must be one of"),
        ({"out": torch.empty((4, 2)).T}, ValueError, "out must be contiguous"),
        ({"norm": NORM._replace(gamma=torch.ones(3))}, ValueError, "norm.gamma must have"),
        ({"norm": NORM._replace(y=torch.ones((1, 4)).half())}, TypeError, "norm.y must be"),
        ({"norm": NORM._replace(rstd=torch.ones(2)[::2].double())}, TypeError, "norm.rstd must"),
        (
            {"zero_computation": CONSTANT._replace(tokens=torch.ones((1, 3)))},
            ValueError,
            "zero_computation.tokens",
        ),
        (
            {
                "zero_computation": CONSTANT._replace(expert_ids=torch.zeros((1, 3)).int()),
                "weights": None,
            },
            ValueError,
            "zero_computation.expert_ids must have at most 2 columns",
        ),
        (
            {"zero_computation": CONSTANT._replace(expert_ids=torch.zeros((1, 1)).int())},
            ValueError,
            r"zero_computation.expert_ids must have the shape \(1, 2\)",
        ),
        (
            {"zero_computation": CONSTANT._replace(value=torch.ones((2, 4)))},
            ValueError,
            "zero_computation.value",
        ),
        (
            {"zero_computation": CONSTANT._replace(alpha_1=None)},
            TypeError,
            "zero_computation.alpha_1",
        ),
        (
            {"zero_computation": CONSTANT._replace(alpha_2=torch.ones((1, 4)))},
            ValueError,
            r"zero_computation.alpha_2 must have as many dimensions as alpha_1 \(1\), got 2",
        ),
    ],
)
def test_weighted_sum_rejects(changed, error, message):
    with pytest.raises(error, match=f"weighted_sum: {message}") as caught:
        kernels.weighted_sum(**ARGUMENTS | changed)
    assert isinstance(caught.value, MoeError)


@pytest.mark.parametrize(
    "own, peer, error, message",
    [
        (ROWS.double(), ROWS.double(), TypeError, "own must be one of"),
        (ROWS, ROWS.half(), TypeError, "peer must be one of"),
        (ROWS, ROWS[:1], ValueError, "peer must have the shape"),
        (ROWS.T, ROWS.T, ValueError, "out must be contiguous"),
    ],
)
def test_add_rows_rejects(own, peer, error, message):
    with pytest.raises(error, match=f"add_rows: {message}") as caught:
        kernels.add_rows(own, peer, torch.empty_like(own))
    assert isinstance(caught.value, MoeError)
