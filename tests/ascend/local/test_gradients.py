"""The gradients that are operators: each gives what autograd gives for its forward, bit for bit."""

from __future__ import annotations

import compilers
import pytest
import torch

from moe_triton import MoeError
from moe_triton.compat import torch_npu

gating, gating_backward = torch_npu.npu_moe_gating_top_k, torch_npu.npu_moe_gating_top_k_backward
permute, permute_grad = torch_npu.npu_moe_token_permute, torch_npu.npu_moe_token_permute_grad
unpermute, unpermute_grad = (
    torch_npu.npu_moe_token_unpermute,
    torch_npu.npu_moe_token_unpermute_grad,
)
permute_map = torch_npu.npu_moe_token_permute_with_routing_map
permute_map_grad = torch_npu.npu_moe_token_permute_with_routing_map_grad
unpermute_map = torch_npu.npu_moe_token_unpermute_with_routing_map
unpermute_map_index = torch_npu._npu_moe_token_unpermute_with_routing_map
unpermute_map_grad = torch_npu.npu_moe_token_unpermute_with_routing_map_grad

int32 = torch.int32
MAP = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)


def gradients(outputs, inputs, gradient_of_outputs):
    return torch.autograd.grad(outputs, inputs, gradient_of_outputs)


@pytest.mark.parametrize("norm_type", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gating(norm_type, dtype):
    """The gradient of the definition in float64, and of both ways alike."""
    x = torch.randn(4, 8).to(dtype).requires_grad_()
    bias = torch.randn(8).to(dtype)
    options = {"norm_type": norm_type, "routed_scaling_factor": 2.5, "eps": 1e-3}
    y, ids, p = gating(x, 3, bias=bias, **options)
    assert not ids.requires_grad
    assert not p.requires_grad
    gradient = torch.randn(y.shape).to(dtype)
    (of_x,) = gradients(y, x, gradient)
    assert of_x.dtype == dtype
    assert torch.equal(gating_backward(p, gradient, ids, **options), of_x)
    leaf = x.detach().double().requires_grad_()
    scores = leaf.sigmoid() if norm_type else leaf.softmax(1)
    weights = scores.gather(1, ids.long())
    if norm_type:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-3)
    (wanted,) = gradients(weights * 2.5, leaf, gradient.double())
    torch.testing.assert_close(of_x, wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("number", [None, 5])
def test_permute(dtype, number):
    tokens = torch.randn(4, 6).to(dtype).requires_grad_()
    indices = torch.randint(0, 3, (4, 2))
    out, position = permute(tokens, indices, number)
    gradient = torch.randn(out.shape).to(dtype)
    (wanted,) = gradients(out, tokens, gradient)
    assert torch.equal(permute_grad(tokens.detach(), gradient, indices, position), wanted)


@pytest.mark.parametrize("probs_dtype", [None, torch.float32, torch.bfloat16])
def test_unpermute(probs_dtype):
    top_k = 1 if probs_dtype is None else 2
    rows = torch.randn(4 * top_k, 6).bfloat16().requires_grad_()
    probs = None if probs_dtype is None else torch.rand(4, 2).to(probs_dtype).requires_grad_()
    position = torch.randperm(4 * top_k).to(int32)
    out = unpermute(rows, position, probs)
    gradient = torch.randn(out.shape).bfloat16()
    to_rows, to_probs = unpermute_grad(rows.detach(), gradient, position, probs)
    inputs = [rows] if probs is None else [rows, probs]
    wanted = gradients(out, inputs, gradient)
    assert torch.equal(to_rows, wanted[0])
    assert (to_probs is None) == (probs is None)
    if to_probs is not None:
        assert torch.equal(to_probs, wanted[1])
        assert to_probs.dtype == probs_dtype


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_probs", [False, True])
def test_permute_with_a_map(padded, with_probs):
    tokens = torch.randn(4, 6, requires_grad=True)
    probs = torch.rand(4, 3, requires_grad=True) if with_probs else None
    out, of_rows, index = permute_map(
        tokens, MAP, probs=probs, num_out_tokens=6 if padded else 8, drop_and_pad=padded
    )
    gradient = torch.randn_like(out)
    of_probs = torch.randn_like(of_rows) if with_probs else None
    to_tokens, to_probs = permute_map_grad(gradient, of_probs, index, MAP, 3, 4, padded)
    if not with_probs:
        assert torch.equal(to_tokens, gradients(out, tokens, gradient)[0])
        assert to_probs is None
        return
    wanted = gradients([out, of_rows], [tokens, probs], [gradient, of_probs])
    assert torch.equal(to_tokens, wanted[0])
    assert torch.equal(to_probs, wanted[1])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_probs", [False, True])
def test_unpermute_with_a_map(padded, with_probs):
    number = 6 if padded else 8
    *_, index = permute_map(torch.zeros(4, 6), MAP, num_out_tokens=number, drop_and_pad=padded)
    rows = torch.randn(number, 6, requires_grad=True)
    probs = torch.rand(4, 3, requires_grad=True) if with_probs else None
    options = {"probs": probs, "routing_map": MAP, "drop_and_pad": padded}
    out, order, token, of_rows = unpermute_map_index(rows, index, [4, 6], **options)
    assert torch.equal(out, unpermute_map(rows, index, [4, 6], **options))
    if padded:
        assert torch.equal(index[order.long()], token)
        assert token.tolist() == sorted(index.tolist())
    else:
        assert torch.equal(order, index)
        assert token.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    gradient = torch.randn_like(out)
    given = (rows.detach(), probs.detach()) if with_probs else (None, None)
    to_rows, to_probs = unpermute_map_grad(gradient, order, token, MAP, *given, padded, [4, 6])
    wanted = gradients(out, [rows, probs] if with_probs else [rows], gradient)
    assert torch.equal(to_rows, wanted[0])
    if not with_probs:
        assert to_probs is None
        assert of_rows is None
        return
    assert torch.equal(to_probs, wanted[1])
    if padded:
        expert = torch.arange(number) // 2
        assert torch.equal(of_rows, probs[index.long(), expert])
    else:
        assert torch.equal(of_rows, probs[MAP])


G, I8, I6 = torch.zeros(8, 6), torch.arange(8, dtype=int32), torch.arange(6, dtype=int32)
P = torch.rand(4, 8)
REFUSED = [
    (gating_backward, (P.half(), P[:, :2], I8.view(4, 2)), 161002, "x_norm must be float32"),
    (gating_backward, (P, P[:2, :2], I8.view(4, 2)), 561002, "grad_y must have shape"),
    (gating_backward, (P, P[:, :2], 2 * I8.view(4, 2)), 561002, "expertIdx must be in"),
    (permute_grad, (G[:4], G, I8.view(4, 2), I6), 561002, "sorted_indices must have shape"),
    (permute_grad, (G[:4], G.half(), I8.view(4, 2), I8), 161002, "grad_permuted_tokens must be"),
    (permute_grad, (G[:4], G, I8.view(4, 2), I8, True), 561002, "padded_mode must be False"),
    (unpermute_grad, (G, G[:4], I8), 561002, "sorted_indices must have shape"),
    (unpermute_grad, (G, None, I8), 161001, "grad_unpermuted_tokens must be given"),
    (permute_map_grad, (G, None, I8, MAP, 3, 5, False), 561002, "routing_map must have shape"),
    (permute_map_grad, (G, G[0], I8, MAP, 3, 4, False), 561002, "probs_grad must have shape"),
    (permute_map_grad, (G[:7], None, I8[:7], MAP, 3, 4, False), 561002, "be a multiple of N"),
    (
        unpermute_map_grad,
        (G[:4], I8, I8, None, G, torch.rand(4, 3), False, [4, 6]),
        561002,
        "routing_map must be given with probs",
    ),
    (
        unpermute_map_grad,
        (G[:4], I8, I8, MAP, None, torch.rand(4, 3), False, [4, 6]),
        561002,
        "permuted_tokens must be given with probs",
    ),
    (
        unpermute_map_grad,
        (G[:4], I8, I8, None, None, None, False, [4]),
        561002,
        "restore_shape must be",
    ),
]


@pytest.mark.parametrize("call, arguments, code, message", REFUSED)
def test_refusals(call, arguments, code, message):
    with pytest.raises(MoeError, match=f"{call.__name__}: .*{message}") as raised:
        call(*arguments)
    assert raised.value.code == code


@compilers.usual
def test_compiled():
    x = torch.randn(4, 8, requires_grad=True)
    ids = torch.tensor([[0, 1], [2, 7], [3, 1], [5, 4]], dtype=int32)
    compilers.check(lambda x: gating(x, 2)[0], x)
    compilers.check(lambda p, g: gating_backward(p, g, ids), P, P[:, :2])
    compilers.check(lambda g: permute_grad(g[:4], g, ids, I8), G)
    compilers.check(lambda g, p: unpermute_grad(g, g[:4], I8, p), G, P[:, :2])
    compilers.check(lambda g, p: permute_map_grad(g, p, I8, MAP, 3, 4, False), G, torch.rand(8))
    probs = torch.rand(4, 3)
    compilers.check(
        lambda g, p: unpermute_map_grad(g[:4], I8, I8, MAP, g, p, False, [4, 6]), G, probs
    )
    compilers.check(
        lambda g, p: unpermute_map_index(g, I8, [4, 6], probs=p, routing_map=MAP)[:3],
        G.clone().requires_grad_(),
        probs.clone().requires_grad_(),
    )
