"""The router against float64, one token at a time. `route` computes in fp32 by design, so gradcheck cannot apply."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.kernels import lang
from pithtrain.layers import router
from pithtrain.layers.router import Router, choose_in_groups, route

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def naive(tokens, weight, bias, top_k, renormalise):
    """Weights, ids and probabilities in float64, and how far each token is from another choice or order."""
    all_weights, all_ids, all_probs, gaps = [], [], [], []
    for x in tokens:
        scores = torch.stack([(row * x).sum() for row in weight])
        p = (scores - scores.max()).exp()
        p = p / p.sum()
        order = sorted(range(len(p)), key=lambda e: -(p[e] + bias[e]).item())
        ranked = [(p[e] + bias[e]).item() for e in order]
        gaps.append(min((a - b for a, b in itertools.pairwise(ranked[: top_k + 1])), default=1.0))
        chosen = order[:top_k]
        total = sum(p[e] for e in chosen) if renormalise else 1.0
        all_weights.append(torch.stack([p[e] / total for e in chosen]))
        all_ids.append(chosen)
        all_probs.append(p)
    return torch.stack(all_weights), torch.tensor(all_ids), torch.stack(all_probs), torch.tensor(gaps)


def compare(T, H, E, K, renormalise, biased, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(E, H, generator=generator) / H**0.5).requires_grad_()
    bias = biased * torch.randn(E, generator=generator) / E
    tokens64, weight64 = (t.detach().double().requires_grad_() for t in (tokens, weight))
    got = route(tokens, weight, bias, K, renormalise)
    weights, ids, probs, gaps = naive(tokens64, weight64, bias.double(), K, renormalise)
    sure = gaps > 1e-5
    assert torch.equal(got.expert_ids[sure], ids[sure])
    assert got.weights.dtype == got.probs.dtype == torch.float32 and got.expert_ids.dtype == torch.int64
    assert got.weights.shape == got.expert_ids.shape == (T, K) and got.probs.shape == (T, E)
    assert error(got.probs, probs) < 1e-5 and error(got.weights[sure], weights[sure]) < 1e-5
    if not sure.all():
        return
    seed_w, seed_p = torch.randn(T, K, generator=generator), torch.randn(T, E, generator=generator)
    got_grads = torch.autograd.grad((got.weights * seed_w).sum() + (got.probs * seed_p).sum(), (tokens, weight))
    true_grads = torch.autograd.grad((weights * seed_w).sum() + (probs * seed_p).sum(), (tokens64, weight64))
    if E > 1:  # with one expert the gradient is zero up to rounding
        assert error(got_grads[0], true_grads[0]) < TOLERANCE[dtype]
        assert error(got_grads[1], true_grads[1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("T, H, E, K", [(1, 8, 4, 1), (33, 24, 7, 3), (20, 16, 5, 5), (6, 8, 1, 1), (9, 40, 130, 8)])
def test_sizes(T, H, E, K, biased, renormalise, dtype):
    compare(T, H, E, K, renormalise, biased, dtype, seed=0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data):
    E = data.draw(st.integers(1, 12))
    K = data.draw(st.integers(1, E))
    T, H = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    compare(
        T, H, E, K, data.draw(st.booleans()), data.draw(st.booleans()), torch.float32, data.draw(st.integers(0, 999))
    )


def example(T=20, H=16, E=8):
    torch.manual_seed(0)
    return torch.randn(T, H), torch.randn(E, H) / H**0.5


def test_bias_changes_the_choice_and_not_the_weights():
    tokens, weight = example()
    plain = route(tokens, weight, torch.zeros(8), 2, False)
    bias = torch.tensor([0.0, 0, 0, 0, 0, 2, 0, 0])
    biased = route(tokens, weight, bias, 2, False)
    assert torch.equal(biased.probs, plain.probs)
    assert (biased.expert_ids[:, 0] == 5).all() and not (plain.expert_ids[:, 0] == 5).all()
    assert torch.equal(biased.weights, plain.probs.gather(1, biased.expert_ids))
    shifted = route(tokens, weight, torch.full((8,), 0.25), 2, True)
    unshifted = route(tokens, weight, torch.zeros(8), 2, True)
    assert torch.equal(shifted.weights, unshifted.weights) and torch.equal(shifted.expert_ids, unshifted.expert_ids)


def test_no_gradient_reaches_the_bias():
    tokens, weight = example()
    bias = torch.zeros(8, requires_grad=True)
    routed = route(tokens, weight.requires_grad_(), bias, 2, True)
    assert torch.autograd.grad(routed.weights[:, 0].sum(), bias, allow_unused=True) == (None,)


def test_weights_sum_to_one_when_renormalised_and_to_less_otherwise():
    tokens, weight = example()
    ours = route(tokens, weight, torch.zeros(8), 3, True).weights.sum(dim=1)
    torch.testing.assert_close(ours, torch.ones(20))
    assert (route(tokens, weight, torch.zeros(8), 3, False).weights.sum(dim=1) < 0.999).all()
    torch.testing.assert_close(route(tokens, weight, torch.zeros(8), 8, False).weights.sum(dim=1), torch.ones(20))


def test_best_first_and_no_expert_twice():
    tokens, weight = example()
    routed = route(tokens, weight, torch.zeros(8), 8, True)
    assert (routed.weights.diff(dim=1) <= 0).all()
    assert torch.equal(routed.expert_ids.sort(dim=1).values, torch.arange(8).expand(20, 8))


def test_one_renormalised_choice_has_weight_one_and_no_gradient():
    tokens, weight = example()
    weight.requires_grad_()
    routed = route(tokens, weight, torch.zeros(8), 1, True)
    assert torch.equal(routed.weights, torch.ones(20, 1))
    (grad,) = torch.autograd.grad(routed.weights.sum(), weight)
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("renormalise", [True, False])
def test_only_the_chosen_rows_move_when_renormalised(renormalise):
    tokens, weight = example(T=1)
    weight.requires_grad_()
    routed = route(tokens, weight, torch.zeros(8), 3, renormalise)
    (grad,) = torch.autograd.grad(routed.weights[0, 0], weight)
    norms = grad.norm(dim=1)
    rest = [e for e in range(8) if e not in routed.expert_ids[0]]
    assert (norms[routed.expert_ids[0]] > 1e-3).all()
    assert norms[rest].max() < 1e-7 if renormalise else norms[rest].min() > 1e-5


def test_scores_are_fp32_under_bf16_tokens():
    tokens = torch.ones(1, 4, dtype=torch.bfloat16)
    weight = torch.full((3, 4), 1.0)
    weight[1] += 1e-5  # equal to the others in bfloat16
    assert torch.equal(weight.bfloat16()[0], weight.bfloat16()[1])
    assert route(tokens, weight, torch.zeros(3), 1, True).expert_ids.item() == 1


def test_extreme_scores_stay_finite():
    tokens, weight = example()
    for scale in (1e4, -1e4):
        routed = route(tokens * scale, weight.requires_grad_(), torch.zeros(8), 2, True)
        (grad,) = torch.autograd.grad(routed.weights.square().sum() + routed.probs.square().sum(), weight)
        assert routed.weights.isfinite().all() and routed.probs.isfinite().all() and grad.isfinite().all()


def test_non_contiguous_tokens():
    tokens, weight = example()
    strided = torch.stack([tokens, -tokens], dim=2)[:, :, 0]
    transposed = tokens.t().contiguous().t()
    assert not strided.is_contiguous() and not transposed.is_contiguous()
    expected = route(tokens, weight, torch.zeros(8), 2, True)
    for other in (strided, transposed):
        got = route(other, weight, torch.zeros(8), 2, True)
        assert torch.equal(got.expert_ids, expected.expert_ids)
        torch.testing.assert_close(got.weights, expected.weights)


def test_no_tokens():
    routed = route(torch.empty(0, 16), torch.randn(8, 16), torch.zeros(8), 2, True)
    assert routed.weights.shape == routed.expert_ids.shape == (0, 2) and routed.probs.shape == (0, 8)


def test_layer_routes_saves_its_bias_and_makes_no_gradient_without_grad():
    tokens, weight = example()
    layer = Router(16, 8, top_k=2, renormalise=True)
    layer.weight.data.copy_(weight)
    layer.bias[3] = 5.0
    routed = layer(tokens)
    expected = route(tokens, weight, layer.bias, 2, True)
    assert all(torch.equal(a, b) for a, b in zip(routed, expected, strict=True))
    assert (routed.expert_ids[:, 0] == 3).all()
    assert set(layer.state_dict()) == {"weight", "bias"} and [n for n, _ in layer.named_parameters()] == ["weight"]
    assert routed.weights.requires_grad and routed.probs.requires_grad
    with torch.no_grad():
        assert not any(t.requires_grad for t in layer(tokens))


@pytest.mark.skipif(not lang.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(not (lang.INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("sigmoid", [True, False])
def test_the_kernel_routes_as_the_layer_does_without_it(sigmoid, renormalise, monkeypatch):
    tokens, weight = example()
    layer = Router(16, 8, 3, renormalise, sigmoid, scale=2.5)
    layer.weight.data.copy_(weight)
    layer.bias.copy_(torch.randn(8) / 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, layer = tokens.to(device), layer.to(device)
    seeds = torch.randn(20, 3, device=device), torch.randn(20, 8, device=device)
    monkeypatch.setattr(router, "kernels_serve", lambda tokens: True)
    grads = []
    for routed in (route(tokens, layer.weight, layer.bias, 3, renormalise, sigmoid, 2.5), layer(tokens)):
        (grad,) = torch.autograd.grad((routed.weights, routed.probs), layer.weight, seeds)
        grads.append((routed, grad))
    (plain, plain_grad), (kernel, kernel_grad) = grads
    assert torch.equal(plain.expert_ids, kernel.expert_ids) and torch.equal(plain.load, kernel.load.long())
    assert plain.load.sum() == 60
    for a, b in ((plain.weights, kernel.weights), (plain.probs, kernel.probs), (plain_grad, kernel_grad)):
        torch.testing.assert_close(a, b)


def test_more_experts_than_the_kernel_takes_are_routed_without_it(monkeypatch):
    monkeypatch.setattr(router, "kernels_serve", lambda tokens: True)
    layer = Router(8, 2049, 2, renormalise=True)
    torch.nn.init.normal_(layer.weight)
    assert layer(torch.randn(5, 8)).load.sum() == 10


def test_chosen_probabilities_that_underflow_weigh_nothing():
    tokens, weight = torch.ones(3, 1), torch.tensor([[0.0], [-200.0], [-200.0], [0.0]])
    bias = torch.tensor([0.0, 2.0, 2.0, 0.0])
    for layer in (
        Router(1, 4, 2, True),
        Router(1, 4, 2, True, groups=2, top_groups=2),
        Router(1, 4, 2, True, sigmoid=True),
    ):
        layer.weight.data.copy_(weight)
        layer.bias.copy_(bias)
        routed = layer(tokens)
        assert routed.expert_ids.sort().values.tolist() == [[1, 2]] * 3
        assert torch.equal(routed.weights, torch.zeros(3, 2))
        (grad,) = torch.autograd.grad(routed.weights.sum() + routed.probs.square().sum(), layer.weight)
        assert grad.isfinite().all()


def choose_naive(row, top_k, groups, top_groups, best):
    size = len(row) // groups
    value = [sum(sorted(row[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
    open_groups = sorted(range(groups), key=lambda g: -value[g])[:top_groups]
    experts = [e for e in range(len(row)) if e // size in open_groups]
    return sorted(experts, key=lambda e: -row[e])[:top_k]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.data())
def test_choice_in_groups_against_a_loop(groups, size, data):
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    best = data.draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = torch.randn(7, groups * size, generator=generator, dtype=torch.float64)
    got = choose_in_groups(scores, top_k, groups, top_groups, best)
    assert got.tolist() == [choose_naive(row, top_k, groups, top_groups, best) for row in scores.tolist()]


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("sigmoid", [True, False])
def test_group_router_against_float64_with_gradients(sigmoid, renormalise):
    tokens, weight = example()
    layer = Router(16, 8, 3, renormalise, sigmoid, scale=2.5, groups=4, top_groups=2)
    layer.weight.data.copy_(weight)
    layer.bias.copy_(torch.randn(8, generator=torch.Generator().manual_seed(5)) / 8)
    routed = layer(tokens)
    exact = weight.double().requires_grad_()
    logits = tokens.double() @ exact.t()
    scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
    choice = (scores.detach() + layer.bias.double()).tolist()
    ids = torch.tensor([choose_naive(row, 3, 4, 2, 2 if sigmoid else 1) for row in choice])
    assert torch.equal(routed.expert_ids, ids)
    assert not torch.equal(ids, torch.tensor(choice).topk(3).indices)  # the groups did forbid something
    weights = 2.5 * scores.gather(1, ids)
    if renormalise:
        weights = weights / scores.gather(1, ids).sum(dim=1, keepdim=True)
    probs = scores / scores.sum(dim=1, keepdim=True)
    assert error(routed.weights, weights) < 1e-6 and error(routed.probs, probs) < 1e-6
    seeds = torch.randn(20, 3), torch.randn(20, 8)
    (got,) = torch.autograd.grad((routed.weights * seeds[0]).sum() + (routed.probs * seeds[1]).sum(), layer.weight)
    (true,) = torch.autograd.grad((weights * seeds[0]).sum() + (probs * seeds[1]).sum(), exact)
    assert error(got, true) < 1e-5
    assert routed.weights.dtype == layer(tokens.bfloat16()).weights.dtype == torch.float32
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_group_router_takes_no_tokens():
    layer = Router(4, 8, 2, True, sigmoid=True, groups=2, top_groups=1)
    assert layer(torch.empty(0, 4)).weights.shape == (0, 2)
