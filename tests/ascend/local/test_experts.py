"""What experts compute: swiglu and RMSNorm, their gradients, refusals and compiled calls."""

from __future__ import annotations

import compilers
import pytest
import torch
from torch.nn import functional

from moe_triton import MoeError
from moe_triton.compat import torch_npu

swiglu, swiglu_backward = torch_npu.npu_swiglu, torch_npu.npu_swiglu_backward
rms_norm, rms_norm_backward = torch_npu.npu_rms_norm, torch_npu.npu_rms_norm_backward

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_swiglu(dtype, dim):
    """Rounded once; its gradient is that of the definition."""
    x = torch.randn(4, 6, 8).to(dtype).requires_grad_()
    leaf = wide(x.detach()).requires_grad_()
    gate, up = leaf.chunk(2, dim)
    wanted = functional.silu(gate) * up
    out = swiglu(x, dim)
    assert torch.equal(out, wanted.to(dtype))
    gradient = torch.randn(out.shape).to(dtype)
    out.backward(gradient)
    wanted.backward(wide(gradient))
    torch.testing.assert_close(x.grad, leaf.grad.to(dtype))  # sigmoid may differ in the last bit
    assert torch.equal(swiglu_backward(gradient, x.detach(), dim), x.grad)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("own", [True, False], ids=["gamma of x", "gamma in float32"])
def test_rms_norm(dtype, dims, own):
    if dtype == torch.float64 and not own:
        return
    x = torch.randn(3, 4, 8).to(dtype)
    gamma = torch.randn(x.shape[-dims:]).to(dtype if own else torch.float32)
    y, rstd = rms_norm(x, gamma, 1e-5)
    axes = [*range(-dims, 0)]
    root = (wide(x).square().mean(axes, keepdim=True) + 1e-5).rsqrt()
    normal = wide(x) * root
    if own:
        normal = wide(normal.to(dtype))
    assert torch.equal(y, (normal * wide(gamma)).to(dtype))
    assert torch.equal(rstd, root)
    assert rstd.shape == (3, *[1] * 2) if dims == 2 else (3, 4, 1)


@pytest.mark.parametrize("dims", [1, 2])
def test_gradients(dims):
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(x.shape[-dims:], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, gamma: rms_norm(x, gamma)[0], (x, gamma))
    assert torch.autograd.gradgradcheck(lambda x, gamma: rms_norm(x, gamma)[0], (x, gamma))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x,))
    assert torch.autograd.gradgradcheck(swiglu, (x,))


def test_the_gradients_of_the_norm_as_an_operator():
    x, gamma = torch.randn(4, 8).bfloat16().requires_grad_(), torch.rand(8).requires_grad_()
    y, rstd = rms_norm(x, gamma)
    gradient = torch.randn(4, 8).bfloat16()
    y.backward(gradient)
    dx, dgamma = rms_norm_backward(gradient, x.detach(), gamma.detach(), rstd)
    assert torch.equal(dx, x.grad)
    assert torch.equal(dgamma, gamma.grad)
    assert dgamma.dtype == torch.float32


X, GAMMA = torch.zeros(4, 8), torch.ones(8)
REFUSED = [
    (swiglu, (X.int(),), 161002, "self must be float16"),
    (swiglu, (X, 2), 561002, "dim must be in"),
    (swiglu, (X[:, :7],), 561002, "self must have an even size in dimension -1"),
    (swiglu_backward, (X, X), 561002, "grad_output must have shape"),
    (swiglu_backward, (None, X), 161001, "grad_output must be given"),
    (rms_norm, (X, GAMMA.half()), 161002, "gamma must be float32"),
    (rms_norm, (X, GAMMA[:4]), 561002, "gamma must have shape"),
    (rms_norm, (X, torch.ones(2, 4, 8)), 561002, "gamma must have 1 to 2 dimensions"),
    (rms_norm, (X, GAMMA, "1"), 161002, "epsilon must be a number"),
    (rms_norm_backward, (X[:2], X, GAMMA, X[:, :1]), 561002, "dy must have shape"),
    (rms_norm_backward, (X, X, GAMMA, X), 561002, "rstd must have shape"),
]


@pytest.mark.parametrize("call, arguments, code, message", REFUSED)
def test_refusals(call, arguments, code, message):
    with pytest.raises(MoeError, match=f"{call.__name__}: .*{message}") as raised:
        call(*arguments)
    assert raised.value.code == code


@compilers.usual
def test_compiled():
    x, gamma = torch.randn(4, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    compilers.check(swiglu, x)
    compilers.check(lambda x, gamma: rms_norm(x, gamma)[0], x, gamma)
    compilers.check(lambda x: swiglu_backward(x[:, :4], x), x.detach())
    compilers.check(
        lambda x, gamma: rms_norm_backward(x, x, gamma, x[:, :1]), x.detach(), gamma.detach()
    )
