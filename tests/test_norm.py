"""RMSNorm against autograd over the formula in float64. Its statistics are fp32 by design: no gradcheck."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.layers.norm import RMSNorm, RMSNormFunction

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def formula(x, weight, eps):
    return weight * x / ((x * x).sum(dim=-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def compare(x, weight, eps, scale=1.0):
    upstream = (scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))).to(x.dtype)
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    got, true = RMSNormFunction.apply(x, weight, eps), formula(x64, weight64, eps)
    assert got.dtype == x.dtype and got.shape == x.shape
    assert error(got, true) < TOLERANCE[x.dtype]
    grads = torch.autograd.grad(got, (x, weight), upstream)
    for g, t, leaf in zip(
        grads, torch.autograd.grad(true, (x64, weight64), upstream.double()), (x, weight), strict=True
    ):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        if x.shape[-1] > 1:  # the gradient of one feature is zero but for eps
            assert error(g, t) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 3), (2, 7, 33), (2, 3, 4, 16), (1, 4096), (3, 1)])
def test_shapes(shape, dtype):
    torch.manual_seed(0)
    compare(3 * torch.randn(shape).to(dtype), torch.randn(shape[-1]), 1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 5), max_size=3),
    st.integers(2, 40),
    st.floats(-3, 3),
    st.sampled_from([1e-8, 1e-6, 1e-2]),
    st.integers(0, 999),
)
def test_any_shape_and_size(lead, features, exponent, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (10**exponent * torch.randn(*lead, features, generator=generator)).requires_grad_()
    weight, upstream = torch.randn(features, generator=generator), torch.randn(x.shape, generator=generator)
    x64 = x.detach().double().requires_grad_()
    got, true = RMSNormFunction.apply(x, weight, eps), formula(x64, weight.double(), eps)
    assert error(got, true) < 1e-5
    (g,), (t,) = torch.autograd.grad(got, x, upstream), torch.autograd.grad(true, x64, upstream.double())
    # The gradient is a difference, small where x and g * upstream are parallel: its terms bound the error.
    inverse = (x64.detach().square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    assert (g - t).norm() < 1e-5 * (inverse * weight * upstream).norm()


@pytest.mark.parametrize("scale", [1e-4, 1e4, 0.0])
def test_scaled_upstream_gradient(scale):
    compare(torch.randn(4, 6, 32), torch.randn(32), 1e-6, scale)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e15])
def test_extreme_sizes_stay_finite(size):
    x = (size * torch.randn(4, 32)).requires_grad_()
    output = RMSNorm(32, 1e-6)(x)
    output.sum().backward()
    assert output.isfinite().all() and x.grad.isfinite().all()
    if size == 0.0:
        assert not output.any()


def test_scale_of_the_input_drops_out():
    torch.manual_seed(0)
    norm, x = RMSNorm(32, 0.0), torch.randn(4, 32)
    torch.testing.assert_close(norm(x), norm(1000 * x))
    torch.testing.assert_close(norm(x).square().mean(dim=1), torch.ones(4))


def test_non_contiguous_input_and_upstream():
    torch.manual_seed(0)
    norm, x, upstream = RMSNorm(8, 1e-6), torch.randn(3, 8, 5), torch.randn(3, 8, 5)
    torch.nn.init.normal_(norm.weight)
    turned, seed = x.transpose(1, 2).requires_grad_(), upstream.transpose(1, 2)
    plain = turned.detach().contiguous().requires_grad_()
    assert not turned.is_contiguous() and not seed.is_contiguous()
    got = torch.autograd.grad(norm(turned), (turned, norm.weight), seed)
    expected = torch.autograd.grad(norm(plain), (plain, norm.weight), seed.contiguous())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.autograd.grad(norm(plain).sum(), plain)  # an upstream of stride 0


def test_no_tokens():
    norm, x = RMSNorm(8, 1e-6), torch.empty(0, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.shape == (0, 8) and not norm.weight.grad.any()


def test_no_gradient_without_grad_and_none_twice():
    norm, x = RMSNorm(8, 1e-6), torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        assert not norm(x).requires_grad
    (grad,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_input_is_left_alone():
    x = torch.randn(3, 8)
    before = x.clone()
    RMSNorm(8, 1e-6)(x.requires_grad_()).sum().backward()
    assert torch.equal(x, before)
