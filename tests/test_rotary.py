"""Rotary positions against complex multiplication in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.layers.rotary import (
    Yarn,
    frequencies,
    rotary_table,
    rotate,
    yarn_frequencies,
    yarn_magnitude,
    yarn_table,
)


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


YARN = {  # what published configs and their neighbours ask for
    "DeepSeek-V2 and V3": (64, 1e4, 40.0, 4096, {}),
    "GPT-OSS": (64, 150_000.0, 32.0, 4096, {"truncate": False}),
    "tiny, other betas": (8, 100.0, 4.0, 32, {"beta_fast": 4.0, "beta_slow": 0.5}),
    "ramp of no width": (8, 1e4, 4.0, 8, {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False}),
    "ramp past the last pair": (4, 10.0, 8.0, 100_000, {}),
}


@pytest.mark.parametrize("name", YARN)
def test_yarn_equals_that_of_transformers_bit_for_bit(name):
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig

    head_dim, theta, factor, length, options = YARN[name]
    yarn = Yarn(factor, length, **options)
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, **options}
    config = Qwen3MoeConfig(head_dim=head_dim, rope_parameters={**rope, "original_max_position_embeddings": length})
    theirs, magnitude = utils.ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    ours = yarn_frequencies(head_dim, theta, yarn)
    assert torch.equal(ours, theirs) and yarn_magnitude(factor) == magnitude
    positions = torch.arange(0, 40 * length, max(1, length // 7))
    cos, sin = yarn_table(positions, head_dim, theta, yarn, magnitude)
    angles = positions[:, None].float() * theirs
    assert torch.equal(cos, angles.cos() * magnitude) and torch.equal(sin, angles.sin() * magnitude)
    assert not torch.equal(ours, frequencies(head_dim, theta)) or name == "ramp past the last pair"


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    plain, scaled = frequencies(64, 1e4), yarn_frequencies(64, 1e4, Yarn(40.0, 4096))
    turns = 4096 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns > 64], plain[turns > 64])
    torch.testing.assert_close(scaled[turns < 0.5], plain[turns < 0.5] / 40)
    ratio = scaled / plain
    assert (ratio.diff() < 1e-6).all() and 0.1 < ratio[16] < 0.9


def test_yarn_by_a_factor_of_one_changes_nothing():
    table = rotary_table(torch.arange(99), 16, 1e4)
    for ours, plain in zip(yarn_table(torch.arange(99), 16, 1e4, Yarn(1.0, 32)), table, strict=True):
        assert torch.equal(ours, plain)
    assert yarn_magnitude(1.0) == yarn_magnitude(0.5) == 1.0 and yarn_magnitude(40.0, 0.0) == 1.0


@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_neighbouring_pairs_against_complex_numbers_and_their_gradient(head_dim):
    torch.manual_seed(0)
    x, positions = torch.randn(2, 11, 3, head_dim), torch.arange(11)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    angles = positions[:, None].double() * frequencies(head_dim, 1e4).double()
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    got = rotate(x, *rotary_table(positions, head_dim, 1e4), neighbours=True)
    assert error(got, torch.view_as_real(turned).flatten(-2)) < 1e-6
    cos, sin = (t.double() for t in rotary_table(positions[:3], head_dim, 100.0))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin, neighbours=True), x[:1, :3].double().requires_grad_())


def test_a_table_for_each_row_of_a_batch():
    torch.manual_seed(0)
    x, positions = torch.randn(2, 5, 3, 8), torch.tensor([[0, 1, 2, 3, 4], [3, 4, 0, 1, 2]])
    for neighbours in (False, True):
        together = rotate(x, *rotary_table(positions, 8, 100.0), neighbours)
        for row in range(2):
            alone = rotate(x[row : row + 1], *rotary_table(positions[row], 8, 100.0), neighbours)
            assert torch.equal(together[row], alone[0])
