"""Rotary positions against complex multiplication in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.layers.rotary import rotary_table, rotate


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def turn(x, positions, theta):
    """Pair i of a head as the complex number x_i + j x_{i + d/2}, times e^(j t theta^(-2i/d)), in float64."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    angles = positions.double()[:, None] * frequencies
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("theta", [100.0, 10_000.0, 1e6])
@pytest.mark.parametrize("head_dim", [2, 6, 32, 128])
def test_against_complex_numbers(head_dim, theta, dtype, tolerance):
    torch.manual_seed(0)
    positions = torch.arange(17)
    x = torch.randn(2, 17, 3, head_dim).to(dtype)
    got = rotate(x, *rotary_table(positions, head_dim, theta))
    assert got.dtype == dtype and got.shape == x.shape
    assert error(got, turn(x, positions, theta)) < tolerance


def test_table_is_fp32_with_an_error_of_one_rounding_of_the_angle():
    positions = torch.tensor([0, 1, 1000, 40_000])
    cos, sin = rotary_table(positions, 128, 1e6)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (4, 64)
    assert torch.equal(cos[0], torch.ones(64)) and not sin[0].any()
    angles = positions.double()[:, None] * 1e6 ** (-torch.arange(0, 128, 2).double() / 128)
    bound = 3 * 2**-23 * angles + 1e-7
    assert ((cos - angles.cos()).abs() <= bound).all() and ((sin - angles.sin()).abs() <= bound).all()


@pytest.mark.parametrize("head_dim, theta", [(32, 10_000.0), (128, 1e6), (6, 123.0)])
def test_table_equals_that_of_transformers_bit_for_bit(head_dim, theta):
    hf = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = hf.Qwen3MoeConfig(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    positions = torch.arange(0, 40_960, 7)
    theirs = hf.Qwen3MoeRotaryEmbedding(config)(torch.zeros(()), positions[None])
    for ours, their in zip(rotary_table(positions, head_dim, theta), theirs, strict=True):
        assert torch.equal(torch.cat([ours, ours], dim=-1), their[0])


def test_table_of_positions_of_any_shape_and_order():
    positions = torch.tensor([[3, 0, 9], [5, 5, 1]])
    cos, sin = rotary_table(positions, 8, 10_000.0)
    assert cos.shape == sin.shape == (2, 3, 4)
    whole = rotary_table(torch.arange(10), 8, 10_000.0)
    assert torch.equal(cos, whole[0][positions]) and torch.equal(sin, whole[1][positions])


def test_gradient_by_finite_differences():
    cos, sin = (t.double() for t in rotary_table(torch.arange(5), 6, 100.0))
    x = torch.randn(2, 5, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, cos, sin), x)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200), st.integers(1, 16), st.integers(0, 99))
def test_inner_products_see_only_distance(i, j, shift, half, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 2 * half, generator=generator)

    def score(a, b):
        q_turned = rotate(q, *rotary_table(torch.tensor([a]), 2 * half, 10_000.0))
        return (q_turned * rotate(k, *rotary_table(torch.tensor([b]), 2 * half, 10_000.0))).sum()

    assert abs(score(i, j) - score(i + shift, j + shift)) < 1e-4 * (1 + q.norm() * k.norm())


def test_rotation_keeps_lengths_and_comes_back():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, 8)
    cos, sin = rotary_table(torch.arange(9), 8, 10_000.0)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(turned, cos, -sin), x)
    assert torch.equal(turned[:, 0], x[:, 0]) and not torch.equal(turned[:, 1], x[:, 1])


def test_non_contiguous_input():
    table = rotary_table(torch.arange(9), 8, 10_000.0)
    x = torch.randn(2, 3, 9, 8).transpose(1, 2)
    assert not x.is_contiguous()
    assert torch.equal(rotate(x, *table), rotate(x.contiguous(), *table))
