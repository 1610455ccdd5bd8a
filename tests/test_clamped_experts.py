"""Clamped experts against a loop in float64 and against transformers', with absent pairs, none and all of them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.kernels.lang import INTERPRETED
from pithtrain.layers import clamped_experts
from pithtrain.layers.clamped_experts import ClampedExperts

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def clamped_swiglu(projected):
    gate, up = projected.chunk(2, dim=-1)
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)


def loop(tokens, ids, weights, gate_up, gate_up_bias, down, down_bias):
    rows = []
    for t in range(len(tokens)):
        y = torch.zeros_like(tokens[t]) + 0 * tokens[t]
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            if e >= 0:
                activated = clamped_swiglu(gate_up[e] @ tokens[t] + gate_up_bias[e])
                y = y + w * (down[e] @ activated + down_bias[e])
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(tokens)


def make(T, H, E, K, D, seed=0, size=3.0):
    g = torch.Generator().manual_seed(seed)
    layer = ClampedExperts(H, E, D)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) / (
            parameter.shape[-1] ** 0.5 if parameter.dim() == 3 else 1
        )
    weights, ids = torch.softmax(torch.randn(T, E, generator=g), dim=1).topk(K)
    return layer, size * torch.randn(T, H, generator=g), ids, weights


def compare(layer, tokens, ids, weights, dtype=torch.float32):
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(9)).to(tokens.device, dtype)
    tokens = tokens.to(dtype).requires_grad_()
    weights = weights.clone().requires_grad_()
    output = layer(tokens, ids, weights)
    assert output.dtype == dtype
    grads = torch.autograd.grad(output, [tokens, weights, *layer.parameters()], upstream)
    leaves = [t.detach().to(dtype).double().requires_grad_() for t in (tokens, *layer.parameters())]
    true_weights = weights.detach().double().requires_grad_()
    true = loop(leaves[0], ids, true_weights, *leaves[1:])
    wanted = [leaves[0], true_weights, *leaves[1:]]
    true_grads = torch.autograd.grad(true, wanted, upstream.double(), allow_unused=True)
    assert output.shape == true.shape and error(output, true) < TOLERANCE[dtype]
    one = torch.ones_like(ids[:, :1], dtype=torch.float64)
    added = [loop(leaves[0], own, one, *leaves[1:]) * upstream for own in ids.split(1, dim=1)]
    for i, (a, b) in enumerate(zip(grads, true_grads, strict=True)):
        b = torch.zeros_like(a) if b is None else b
        if i == 1:  # sums over features, which may cancel: judged by what was added
            assert (a - b).norm() <= TOLERANCE[dtype] * max(b.norm(), torch.stack(added).norm())
        else:
            assert error(a, b) < TOLERANCE[dtype]
    return output, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, H, E, K, D", [(40, 16, 6, 2, 24), (1, 8, 4, 1, 8), (33, 24, 5, 5, 40), (9, 8, 64, 2, 8)])
def test_sizes(T, H, E, K, D, dtype):
    compare(*make(T, H, E, K, D), dtype)


def test_both_clamps_take_part():
    layer, tokens, ids, weights = make(40, 16, 6, 2, 24)
    pre = torch.stack([layer.gate_up[e] @ t + layer.gate_up_bias[e] for t, e in zip(tokens, ids[:, 0], strict=True)])
    gate, up = pre.chunk(2, dim=-1)
    assert (gate > 7).any() and (gate < -7).any() and (up > 7).any() and (up < -7).any()
    _, grads = compare(layer, tokens, ids, weights)
    assert all(g.any() for g in grads)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_and_any_absence(data):
    E = data.draw(st.integers(1, 6))
    K = data.draw(st.integers(1, E))
    T, H, D = data.draw(st.integers(1, 12)), *(8 * data.draw(st.integers(1, 3)) for _ in range(2))
    layer, tokens, ids, weights = make(T, H, E, K, D, data.draw(st.integers(0, 999)))
    absent = data.draw(st.lists(st.booleans(), min_size=T * K, max_size=T * K))
    compare(layer, tokens, ids.masked_fill(torch.tensor(absent).view(T, K), -1), weights)


def test_what_stands_where_a_pair_is_absent_does_not_matter():
    layer, tokens, ids, weights = make(30, 16, 5, 3, 8)
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = -1
    ids[4] = -1
    output, _ = compare(layer, tokens, ids, weights)
    assert not output[4].any()
    holes = weights.masked_fill(ids == -1, torch.nan).requires_grad_()
    again = layer(tokens, ids, holes)
    again.sum().backward()
    assert torch.equal(again, output)
    assert all(p.grad.isfinite().all() for p in layer.parameters()) and not holes.grad[ids == -1].any()


def test_every_pair_absent_and_no_tokens():
    layer, tokens, ids, weights = make(6, 8, 4, 2, 8)
    for cut in (slice(None), slice(0, 0)):
        output = layer(tokens[cut].requires_grad_(), torch.full_like(ids, -1)[cut], weights[cut])
        grads = torch.autograd.grad(output.sum(), list(layer.parameters()))
        assert output.shape == tokens[cut].shape and not output.any() and not any(g.any() for g in grads)


def test_against_transformers():
    """Its gate and up columns alternate, and its matrices are transposed."""
    hf = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    layer, tokens, ids, weights = make(40, 16, 6, 3, 24)
    config = hf.GptOssConfig(hidden_size=16, intermediate_size=24, num_local_experts=6, experts_implementation="eager")
    theirs = hf.GptOssExperts(config)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(layer.gate_up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).mT)
        theirs.gate_up_proj_bias.copy_(layer.gate_up_bias.unflatten(1, (2, -1)).mT.flatten(1))
        theirs.down_proj.copy_(layer.down.mT)
        theirs.down_proj_bias.copy_(layer.down_bias)
    assert error(layer(tokens, ids, weights), theirs(tokens, ids, weights)) < 1e-6
    pre = torch.randn(5, 48)
    expected = theirs._apply_gate(pre.unflatten(1, (2, -1)).mT.flatten(1))
    torch.testing.assert_close(clamped_swiglu(pre), expected)


def test_biases_alone():
    """With matrices of zero, a token's output is the weighted sum of its experts' constants."""
    layer, tokens, ids, weights = make(10, 8, 4, 2, 16)
    layer.gate_up.data.zero_()
    constants = torch.stack(
        [layer.down[e] @ clamped_swiglu(layer.gate_up_bias[e]) + layer.down_bias[e] for e in range(4)]
    )
    expected = (weights.unsqueeze(-1) * F.embedding(ids, constants)).sum(dim=1)
    torch.testing.assert_close(layer(tokens, ids, weights), expected)


def spy(monkeypatch):
    """A list that grows with each call of the kernels."""
    calls, kernels = [], clamped_experts.triton_expert_mlp
    monkeypatch.setattr(clamped_experts, "triton_expert_mlp", lambda *a, **k: (calls.append(1), kernels(*a, **k))[1])
    return calls


@pytest.mark.parametrize("T, H, E, K, D", [(40, 16, 6, 2, 24), (1, 8, 4, 1, 8), (33, 24, 5, 5, 40), (9, 8, 64, 2, 8)])
@pytest.mark.parametrize("absent", [False, True])
def test_the_kernels_compute_the_same(T, H, E, K, D, absent, monkeypatch):
    if not INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    layer, tokens, ids, weights = make(T, H, E, K, D)
    if absent:
        ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = -1
    calls = spy(monkeypatch)
    monkeypatch.setattr(clamped_experts, "kernels_take", lambda *_: True)
    compare(layer, tokens, ids, weights)
    assert calls


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter")
def test_the_kernels_pass_nan_on(monkeypatch):
    """The clamp of a GPU would hide it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer, tokens, ids, weights = make(9, 16, 4, 2, 24)
    tokens[3] = torch.nan
    monkeypatch.setattr(clamped_experts, "kernels_take", lambda *_: True)
    output = layer.to(device)(tokens.to(device), ids.to(device), weights.to(device))
    assert output.isnan().any(dim=1).tolist() == [t == 3 for t in range(9)] and output[3].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, H, E, K, D", [(100, 256, 16, 4, 384), (77, 40, 5, 2, 24), (1, 64, 4, 1, 64)])
def test_gpu_kernels_compute_the_same(T, H, E, K, D, dtype, monkeypatch):
    calls = spy(monkeypatch)
    # In bf16 few values are clamped: which side of 7 a rounded one falls on decides whether a gradient passes.
    layer, *inputs = make(T, H, E, K, D, size=3.0 if dtype == torch.float32 else 1.0)
    inputs[1][::7, 0] = -1
    compare(layer.cuda(), *(t.cuda() for t in inputs), dtype)
    assert calls
