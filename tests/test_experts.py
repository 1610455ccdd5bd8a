"""The expert MLPs: the reference by finite differences, the fast form against the reference in float64.

`ExpertMLP` sums a token's experts in fp32, so gradcheck cannot apply to it.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.kernels.expert_mlp import reference_expert_mlp
from pithtrain.layers import experts
from pithtrain.layers.experts import ExpertMLP, Experts, portions

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
NAMES = ("output", "tokens", "weights", "gate_up", "down")


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def make(T, H, E, K, D, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(T, H, generator=g)
    weights, ids = torch.softmax(torch.randn(T, E, generator=g), dim=1).topk(K)
    gate_up, down = torch.randn(E, 2 * D, H, generator=g) / H**0.5, torch.randn(E, H, D, generator=g) / D**0.5
    return tokens, ids, weights, gate_up, down


def run(function, inputs, upstream):
    tokens, ids, *rest = inputs
    leaves = [t.detach().requires_grad_() for t in (tokens, *rest)]
    output = function(leaves[0], ids, *leaves[1:])
    return output, *torch.autograd.grad(output, leaves, upstream.to(output.dtype))


def compare(inputs, dtype=torch.float32, scale=1.0):
    tokens, ids, weights, gate_up, down = inputs
    inputs = (tokens.to(dtype), ids, weights, gate_up.to(dtype), down.to(dtype))
    upstream = (scale * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(9))).to(dtype)
    got = run(ExpertMLP.apply, inputs, upstream)
    true = run(reference_expert_mlp, tuple(t.double() if t.is_floating_point() else t for t in inputs), upstream)
    for name, a, b in zip(NAMES, got, true, strict=True):
        assert a.dtype == (torch.float32 if name == "weights" else dtype), name
        assert a.shape == b.shape and error(a, b) < TOLERANCE[dtype], f"{name}: {error(a, b):.1e}"
    return got


def test_reference_is_the_formula():
    tokens, ids, weights, gate_up, down = (t.double() if t.is_floating_point() else t for t in make(7, 6, 4, 2, 5))
    ids[2, 0] = -1
    expected = torch.zeros_like(tokens)
    for t in range(7):
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            if e >= 0:
                gate, up = gate_up[e, :5] @ tokens[t], gate_up[e, 5:] @ tokens[t]
                expected[t] += w * (down[e] @ (gate / (1 + torch.exp(-gate)) * up))
    torch.testing.assert_close(reference_expert_mlp(tokens, ids, weights, gate_up, down), expected)


def test_reference_gradient_by_finite_differences():
    tokens, ids, weights, gate_up, down = (t.double() if t.is_floating_point() else t for t in make(4, 3, 3, 2, 2))
    ids[1] = -1
    leaves = [t.requires_grad_() for t in (tokens, weights, gate_up, down)]
    assert torch.autograd.gradcheck(lambda x, w, g, d: reference_expert_mlp(x, ids, w, g, d), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "T, H, E, K, D",
    [(40, 16, 6, 2, 24), (1, 8, 4, 1, 8), (1, 8, 3, 3, 5), (33, 24, 5, 5, 7), (10, 1, 2, 1, 1), (9, 8, 64, 2, 8)],
)
def test_sizes(T, H, E, K, D, dtype):
    compare(make(T, H, E, K, D), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expert", [0, 2, 4])
def test_all_tokens_to_one_expert(expert, dtype):
    tokens, ids, weights, gate_up, down = make(20, 12, 5, 1, 8)
    _, _, _, grad_gate_up, grad_down = compare((tokens, torch.full_like(ids, expert), weights, gate_up, down), dtype)
    others = [e for e in range(5) if e != expert]
    assert not grad_gate_up[others].any() and not grad_down[others].any()
    assert grad_gate_up[expert].any() and grad_down[expert].any()


def test_absent_pairs():
    tokens, ids, weights, gate_up, down = make(30, 12, 5, 3, 8)
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = -1
    ids[4] = -1
    output, grad_tokens, grad_weights, _, _ = compare((tokens, ids, weights, gate_up, down))
    assert not output[4].any() and not grad_tokens[4].any() and not grad_weights[ids == -1].any()
    # what stands where a pair is absent does not matter
    weights = weights.masked_fill(ids == -1, torch.nan)
    again = ExpertMLP.apply(tokens, ids, weights, gate_up, down)
    assert torch.equal(again, output)


def test_every_pair_absent_and_no_tokens():
    tokens, ids, weights, gate_up, down = make(6, 8, 4, 2, 8)
    for cut in (slice(None), slice(0, 0)):
        inputs = (tokens[cut], torch.full_like(ids, -1)[cut], weights[cut], gate_up, down)
        for value, like in zip(run(ExpertMLP.apply, inputs, torch.ones_like(tokens[cut])), NAMES, strict=True):
            assert not value.any(), like


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_and_any_absence(data):
    E = data.draw(st.integers(1, 6))
    K = data.draw(st.integers(1, E))
    T, H, D = (data.draw(st.integers(1, n)) for n in (12, 9, 9))
    tokens, ids, weights, gate_up, down = make(T, H, E, K, D, data.draw(st.integers(0, 999)))
    absent = data.draw(st.lists(st.booleans(), min_size=T * K, max_size=T * K))
    ids = ids.masked_fill(torch.tensor(absent).view(T, K), -1)
    most = data.draw(st.integers(0, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "portions", lambda counts, _: portions(counts, most))
        compare((tokens, ids, weights, gate_up, down))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 20))
def test_portions_cover_all_experts_and_pairs(counts, most):
    ends, expert, pair = [sum(counts[:e]) for e in range(len(counts) + 1)], 0, 0
    for some, run in portions(counts, most):
        assert (some.start, run.start) == (expert, pair) and run.stop == ends[some.stop] and some.stop > expert
        assert sum(counts[some]) <= most or sum(count > 0 for count in counts[some]) == 1
        expert, pair = some.stop, run.stop
    assert (expert, pair) == (len(counts), sum(counts))


def test_non_contiguous_inputs_and_upstream():
    inputs = make(20, 12, 5, 2, 8)
    upstream = torch.randn(20, 12, generator=torch.Generator().manual_seed(2))
    expected = run(ExpertMLP.apply, inputs, upstream)
    turned = tuple(t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs)
    assert not any(t.is_contiguous() for t in turned)
    for a, b in zip(run(ExpertMLP.apply, turned, upstream.t().contiguous().t()), expected, strict=True):
        assert error(a, b) < 1e-6
    one = run(ExpertMLP.apply, inputs, torch.ones(()).expand(20, 12))
    for a, b in zip(one, run(ExpertMLP.apply, inputs, torch.ones(20, 12)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [1e-4, 1e4, 0.0])
def test_scaled_upstream_gradient(scale):
    compare(make(20, 12, 5, 2, 8), scale=scale)


def test_order_of_a_tokens_experts_does_not_matter():
    tokens, ids, weights, gate_up, down = make(20, 12, 5, 3, 8)
    a = ExpertMLP.apply(tokens, ids, weights, gate_up, down)
    b = ExpertMLP.apply(tokens, ids.flip(1), weights.flip(1), gate_up, down)
    assert error(a, b) < 1e-6


def test_inputs_are_left_alone_and_backward_can_run_again():
    inputs = make(20, 12, 5, 2, 8)
    copies = [t.clone() for t in inputs]
    leaves = [t.requires_grad_() for t in (inputs[0], *inputs[2:])]
    output = ExpertMLP.apply(inputs[0], inputs[1], *inputs[2:])
    first = torch.autograd.grad(output.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(output.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_differentiating_twice_is_refused():
    tokens, ids, *rest = make(4, 6, 3, 2, 5)
    tokens.requires_grad_()
    (grad,) = torch.autograd.grad(ExpertMLP.apply(tokens, ids, *rest).square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_layer():
    tokens, ids, weights, gate_up, down = make(20, 12, 5, 2, 8)
    layer = Experts(hidden=12, experts=5, expert_hidden=8)
    layer.gate_up.data, layer.down.data = gate_up, down
    assert torch.equal(layer(tokens, ids, weights), ExpertMLP.apply(tokens, ids, weights, gate_up, down))
    output = layer(tokens.bfloat16(), ids, weights)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and layer.gate_up.grad.dtype == layer.down.grad.dtype == torch.float32
    with torch.no_grad():
        assert not layer(tokens, ids, weights).requires_grad


def test_one_expert_is_a_dense_mlp():
    tokens, ids, _, gate_up, down = make(20, 12, 1, 1, 8)
    gate, up = F.linear(tokens, gate_up[0]).chunk(2, dim=1)
    assert (
        error(ExpertMLP.apply(tokens, ids, torch.ones(20, 1), gate_up, down), (F.silu(gate) * up) @ down[0].t()) < 1e-6
    )
