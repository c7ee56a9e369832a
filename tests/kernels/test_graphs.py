"""Launches that are captured once and replayed with other inputs, as serving engines do.

On a GPU each case is a CUDA graph. Launchers do not run in a replay: values that they read on the
host, or copy to the device, are those of the capture.
"""

from __future__ import annotations

import pytest
import torch
from lockstep_windows import DIGEST, Case, Group

from moe_triton import kernels, ref
from moe_triton.layout import NOWHERE, Norm, RowFormat
from moe_triton.layout.windows import RECEIVED, SENT

BF16 = torch.bfloat16
T, K, E, H, W = 37, 4, 24, 128, 3
DRAWS = range(1, 4)  # of inputs after the recording
EPSILON = 1e-6


def tensor(draw, low, high, shape, seed, device):
    generator = torch.Generator().manual_seed(100 * draw + seed)
    return torch.randint(low, high, shape, generator=generator).to(device)


def numbers(draw, shape, seed, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 * draw + seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def poison(*tensors):
    for one in tensors:
        one.view(torch.uint8).fill_(0xA5)


def bits(x):
    return x.contiguous().view(torch.uint8)


def expert_ids(draw, device, tokens=T):
    return tensor(draw, NOWHERE, E, (tokens, K), 0, device).int()


@pytest.mark.parametrize("tokens", [T, 5000], ids=["few", "many"])
def test_plan(tokens, captured, device):
    ids, results = expert_ids(0, device, tokens), {}
    replay = captured(lambda: results.update(plan=kernels.routing_plan(ids, E)))
    for draw in DRAWS:
        ids.copy_(expert_ids(draw, device, tokens))
        replay()
        for one, other in zip(results["plan"], ref.routing_plan(ids, E), strict=True):
            assert torch.equal(one, other)


def test_recv_permutation(captured, device):
    counts = torch.zeros((E // W, W), dtype=torch.int32, device=device)
    capacity, results = 1000, {}
    replay = captured(lambda: results.update(actual=kernels.recv_permutation(counts, 8, capacity)))
    for draw in DRAWS:
        counts.copy_(tensor(draw, 0, 9, counts.shape, 0, device))
        replay()
        expected = ref.recv_permutation(counts, 8)
        n = len(expected.source)
        assert torch.equal(results["actual"].source[:n], expected.source)
        assert (results["actual"].source[n:] == NOWHERE).all()
        assert torch.equal(results["actual"].offsets, expected.offsets)


@pytest.mark.parametrize("quant", [None, "int8", "group_e4m3", "mx_e4m3"])
def test_gather_quant(quant, captured, device):
    fmt = RowFormat.quantized(quant, BF16, H)
    x, ids = numbers(0, (T, H), 0, device, BF16), expert_ids(0, device)
    index = torch.arange(T * K, device=device).view(T, K)
    smooth_scales = 0.5 + torch.rand((E, H), device=device) if quant == "int8" else None
    out = torch.zeros((T * K, H), dtype=fmt.dtype, device=device)
    scales = None
    if fmt.scale_offset is not None:
        scales = torch.zeros(fmt.scale_shape(T * K), dtype=fmt.scale_dtype, device=device)
    outputs = [out] if scales is None else [out, scales]
    replay = captured(lambda: kernels.gather_quant(x, index, fmt, smooth_scales, ids, out, scales))
    for draw in DRAWS:
        x.copy_(numbers(draw, (T, H), 0, device))
        ids.copy_(expert_ids(draw, device))
        index.copy_(torch.randperm(T * K, device=device).view(T, K))
        poison(*outputs)
        replay()
        expected = [torch.zeros_like(one) for one in outputs]
        ref.gather_quant(x, index, fmt, smooth_scales, ids, *expected)
        for one, other in zip(outputs, expected, strict=True):
            assert torch.equal(bits(one), bits(other))


def test_encode_and_gather_rows(captured, device):
    fmt = RowFormat.quantized("int8", BF16, H)
    x, index = numbers(0, (T, H), 0, device, BF16), torch.arange(T, device=device)

    def outputs():
        rows = torch.zeros((T, fmt.stride), dtype=torch.uint8, device=device)
        gathered = torch.zeros((T, H), dtype=torch.int8, device=device)
        return rows, gathered, torch.zeros(T, device=device)

    def work(steps, rows, gathered, scales):
        steps.encode(x, fmt, rows)
        steps.gather_rows(rows, index, fmt, gathered, scales)

    ours = outputs()
    replay = captured(lambda: work(kernels, *ours))
    for draw in DRAWS:
        x.copy_(numbers(draw, (T, H), 0, device))
        index.copy_(torch.randperm(T, device=device))
        for one in ours:  # memory between rows stays untouched
            one.zero_()
        replay()
        expected = outputs()
        work(ref, *expected)
        for one, other in zip(ours, expected, strict=True):
            assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("normalised", [False, True], ids=["sum", "norm"])
def test_weighted_sum(normalised, captured, device):
    fmt = RowFormat.tight(BF16, H)
    y, index = numbers(0, (T * K, H), 0, device, BF16), torch.zeros((T, K), dtype=torch.int64)
    index, weights = index.to(device), torch.rand((T, K), device=device)
    residual, gamma = numbers(0, (T, H), 1, device, BF16), numbers(0, (H,), 2, device, BF16)

    def outputs():
        out, scaled = torch.zeros((2, T, H), dtype=BF16, device=device)
        norm = Norm(residual, gamma, EPSILON, scaled, torch.zeros(T, device=device))
        return out, norm if normalised else None

    def work(steps, out, norm):
        steps.weighted_sum(y.view(torch.uint8), index, fmt, weights, None, None, out, norm)

    out, norm = outputs()
    replay = captured(lambda: work(kernels, out, norm))
    for draw in DRAWS:
        y.copy_(numbers(draw, (T * K, H), 0, device))
        index.copy_(tensor(draw, NOWHERE, T * K, (T, K), 3, device))
        residual.copy_(numbers(draw, (T, H), 1, device))
        poison(out)
        replay()
        expected, expected_norm = outputs()
        work(ref, expected, expected_norm)
        assert torch.equal(out, expected)
        if normalised:
            torch.testing.assert_close(norm.y, expected_norm.y, rtol=1.6e-2, atol=1e-6)
            torch.testing.assert_close(norm.rstd, expected_norm.rstd, rtol=1e-5, atol=1e-6)


def test_gating_replicas_and_kept_slots(captured, device):
    logits, results = torch.zeros((T, E), device=device), {}
    table = torch.tensor([[2, e, E + e] for e in range(E)], dtype=torch.int32, device=device)
    threshold = torch.zeros(K, device=device)

    def work(steps):
        weights, ids, _ = steps.top_k_gating(logits, K, scoring="sigmoid")
        return {
            "ids": ids,
            "weights": weights,
            "replicas": steps.eplb_map(ids, table, rank=5, world_size=8),
            "keep": steps.keep_experts(weights, threshold, None),
        }

    replay = captured(lambda: results.update(work(kernels)))
    for draw in DRAWS:
        # Logits in steps that survive exp, and thresholds between them.
        logits.copy_(torch.argsort(numbers(draw, (T, E), 0, device), dim=1) / 4.0 - 3)
        threshold.fill_(0.24 + 0.005 * draw)
        replay()
        expected = work(ref)
        torch.testing.assert_close(results["weights"], expected["weights"], rtol=2e-6, atol=1e-30)
        for name in ("ids", "replicas", "keep"):
            assert torch.equal(results[name], expected[name]), name


def test_rounds_move_through_the_ring(captured, device):
    """The epoch, and so the slot, comes from device memory; it wraps around on its way."""
    group = Group(Case(world_size=2, max_tokens=4), device, slots=4, epoch=2**31 - 4)
    dispatch, layout, tokens = group.windows["dispatch"], group.layout, group.draw()
    received = {}

    def exchange():
        for windows, mine in zip(dispatch, tokens, strict=True):
            kernels.dispatch_send(
                windows, layout, mine.x, mine.ids, mine.weights, None, None, digest=DIGEST
            )
        for windows in dispatch:
            received[windows.rank] = kernels.dispatch_recv(
                windows, layout, 24, None, totals_dtype=torch.int64, digest=DIGEST, timeout=5.0
            )

    replay = captured(exchange)
    before = int(dispatch[0].state[SENT])
    for step in range(1, 7):
        for mine in tokens:
            mine.x.neg_()
        replay()
        wanted = (before + step + 2**31) % 2**32 - 2**31
        for windows in dispatch:
            assert windows.state[[SENT, RECEIVED]].tolist() == [wanted] * 2
            group.check_received(received[windows.rank], tokens, windows.rank, 24)
