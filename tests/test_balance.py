"""Balance losses against loops written out, and the loss-free bias."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.config import BalanceConfig
from pithtrain.layers.balance import balance_loss, routing_entropy, switch_loss, update_bias
from pithtrain.layers.router import Routed, expert_load, route


def routing(T, E, K, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.softmax(2 * torch.randn(T, E, generator=generator, dtype=dtype), dim=1)
    weights, expert_ids = probs.topk(K)
    return Routed(weights, expert_ids, probs, load_of(expert_ids, E))


def load_of(expert_ids, experts):
    return expert_load(expert_ids.flatten(), experts)


def sequence_loss(probs, expert_ids, sequences):
    """The sequence form alone, as the trainer asks for it."""
    load = expert_load(expert_ids.reshape(sequences, -1), probs.shape[-1])[None]
    coefficients = BalanceConfig(sequence=1.0, global_batch=0.0)
    return balance_loss([Routed(probs, expert_ids, probs, load.sum(dim=1))], load, load.sum(dim=1), coefficients)


def naive_load(expert_ids, experts):
    load = [0] * experts
    for row in expert_ids.tolist():
        for e in row:
            load[e] += 1
    return load


def naive_switch(probs, expert_ids, counted_ids):
    """E sum_e f_e P_e with P over the rows of `probs`, f over the rows of `counted_ids`."""
    T, E = probs.shape
    load = naive_load(counted_ids, E)
    return E * sum(load[e] / sum(load) * sum(probs[t, e].item() for t in range(T)) / T for e in range(E))


sizes = st.tuples(st.integers(1, 30), st.integers(1, 9), st.integers(0, 10**6)).flatmap(
    lambda s: st.tuples(st.just(s[0]), st.just(s[1]), st.integers(1, s[1]), st.just(s[2]))
)


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_load_and_micro_batch_loss(size):
    T, E, K, seed = size
    routed = routing(T, E, K, seed)
    load = load_of(routed.expert_ids, E)
    assert load.tolist() == naive_load(routed.expert_ids, E) and load.sum() == T * K and load.dtype == torch.int64
    expected = naive_switch(routed.probs, routed.expert_ids, routed.expert_ids)
    assert switch_loss(routed.probs, load).item() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 5))
def test_sequence_loss(size, sequences):
    T, E, K, seed = size
    routed = routing(T * sequences, E, K, seed)
    pieces = [slice(i * T, (i + 1) * T) for i in range(sequences)]
    expected = sum(naive_switch(routed.probs[p], routed.expert_ids[p], routed.expert_ids[p]) for p in pieces)
    got = sequence_loss(routed.probs, routed.expert_ids, sequences).item()
    assert got == pytest.approx(expected / sequences, rel=1e-5)


@pytest.mark.parametrize("E", [1, 2, 8, 128])
def test_one_at_balance_and_E_at_collapse(E):
    T = 3 * E
    balanced = torch.full((T, E), 1 / E)
    even_ids = torch.arange(T).remainder(E).unsqueeze(1)
    collapsed = torch.eye(E)[torch.full((T,), E - 1)]
    all_last = torch.full((T, 1), E - 1)
    for probs, ids, expected in ((balanced, even_ids, 1.0), (collapsed, all_last, float(E))):
        assert switch_loss(probs, load_of(ids, E)).item() == pytest.approx(expected, rel=1e-6)
        assert sequence_loss(probs, ids, 3).item() == pytest.approx(expected, rel=1e-6)
    # f even or P even is enough for 1: the loss is a product of the two
    assert switch_loss(collapsed, load_of(even_ids, E)).item() == pytest.approx(1.0, rel=1e-6)
    assert switch_loss(balanced, load_of(all_last, E)).item() == pytest.approx(1.0, rel=1e-6)


def test_all_experts_chosen_is_one_whatever_the_probabilities():
    routed = routing(10, 4, 4)
    assert switch_loss(routed.probs, load_of(routed.expert_ids, 4)).item() == pytest.approx(1.0, rel=1e-6)


def test_scopes_order_and_meet():
    """One sequence: sequence and micro-batch agree. Equal sequences: all three agree."""
    routed = routing(12, 6, 2)
    micro = switch_loss(routed.probs, load_of(routed.expert_ids, 6))
    torch.testing.assert_close(sequence_loss(routed.probs, routed.expert_ids, 1), micro)
    probs, ids = routed.probs.repeat(3, 1), routed.expert_ids.repeat(3, 1)
    torch.testing.assert_close(sequence_loss(probs, ids, 3), micro)
    torch.testing.assert_close(switch_loss(probs, load_of(ids, 6)), micro)


def test_against_transformers():
    """Its loss adds up f over the top_k choices where ours is their mean: it is top_k times as large."""
    hf = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for K in (1, 2, 8):
        probs = logits.softmax(dim=1)
        ours = switch_loss(probs, load_of(probs.topk(K).indices, 8))
        torch.testing.assert_close(K * ours, hf.load_balancing_loss_func((logits,), 8, K))


def test_gradients_by_finite_differences():
    routed = routing(6, 5, 2, dtype=torch.float64)
    load = load_of(routed.expert_ids, 5)
    probs = routed.probs.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: switch_loss(p, load), probs)
    assert torch.autograd.gradcheck(lambda p: sequence_loss(p, routed.expert_ids, 3), probs)


def test_descent_moves_probability_from_busy_to_idle_experts():
    logits = torch.linspace(0, 1, 6).repeat(40, 1).requires_grad_()
    probs = logits.softmax(dim=1)
    load = torch.tensor([0, 1, 2, 10, 20, 47])
    (grad,) = torch.autograd.grad(switch_loss(probs, load), logits)
    assert (grad[:, 0] < 0).all() and (grad[:, -1] > 0).all()


def test_load_has_no_gradient_and_leading_axes_are_a_mean():
    first, second = routing(8, 4, 2, 1), routing(8, 4, 2, 2)
    loads = torch.stack([load_of(r.expert_ids, 4) for r in (first, second)])
    got = switch_loss(torch.stack([first.probs, second.probs]), loads)
    apart = [switch_loss(r.probs, load) for r, load in zip((first, second), loads, strict=True)]
    torch.testing.assert_close(got, sum(apart) / 2)


def test_non_contiguous():
    routed = routing(12, 6, 2)
    probs = routed.probs.t().contiguous().t()
    ids = routed.expert_ids.t().contiguous().t()
    assert not probs.is_contiguous() and not ids.is_contiguous()
    torch.testing.assert_close(
        sequence_loss(probs, ids, 3),
        sequence_loss(routed.probs, routed.expert_ids, 3),
        rtol=1e-6,
        atol=0,
    )
    assert torch.equal(load_of(ids, 6), load_of(routed.expert_ids, 6))


def test_sequences_that_do_not_divide_the_tokens():
    routed = routing(9, 4, 2)
    with pytest.raises(RuntimeError):
        sequence_loss(routed.probs, routed.expert_ids, 2)


COEFFICIENTS = BalanceConfig(micro_batch=0.3, sequence=0.05, global_batch=0.7)


def test_all_forms_over_layers_and_accumulation():
    """Three microbatches of two sequences, two layers, as a step runs them, against loops."""
    E, K, T, layers, sequences = 6, 2, 10, 2, 2
    step = [[routing(T, E, K, seed=10 * m + layer) for layer in range(layers)] for m in range(3)]
    so_far = torch.zeros(layers, E, dtype=torch.long)
    for m, micro in enumerate(step):
        own = torch.stack([expert_load(r.expert_ids.reshape(sequences, -1), E) for r in micro])
        so_far += own.sum(dim=1)
        got = balance_loss(micro, own, so_far, COEFFICIENTS)
        expected = 0.0
        for layer, r in enumerate(micro):
            seen = torch.cat([step[i][layer].expert_ids for i in range(m + 1)])
            halves = [slice(0, T // 2), slice(T // 2, T)]
            expected += 0.3 * naive_switch(r.probs, r.expert_ids, r.expert_ids)
            expected += 0.05 * sum(naive_switch(r.probs[h], r.expert_ids[h], r.expert_ids[h]) for h in halves) / 2
            expected += 0.7 * naive_switch(r.probs, r.expert_ids, seen)
        assert got.item() == pytest.approx(expected, rel=1e-5)


def test_global_form_over_a_step_of_specialised_microbatches():
    """Each microbatch uses experts of its own: the micro-batch form objects, the global form only at first."""
    probs = [torch.zeros(8, 4), torch.zeros(8, 4)]
    ids = [torch.tensor([[0, 1]] * 8), torch.tensor([[2, 3]] * 8)]
    for p, i in zip(probs, ids, strict=True):
        p.scatter_(1, i, 0.5)
    loads = [load_of(i, 4) for i in ids]
    one = BalanceConfig(global_batch=1.0)
    routed = [Routed(p, i, p, load) for p, i, load in zip(probs, ids, loads, strict=True)]
    assert balance_loss([routed[0]], loads[0][None, None], loads[0][None], one).item() == pytest.approx(2.0)
    assert balance_loss([routed[1]], loads[1][None, None], sum(loads)[None], one).item() == pytest.approx(1.0)
    micro = BalanceConfig(micro_batch=1.0, global_batch=0.0)
    assert balance_loss([routed[1]], loads[1][None, None], sum(loads)[None], micro).item() == pytest.approx(2.0)


def test_gradient_of_all_forms_reaches_the_router_only_through_probs():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    routed = route(tokens, weight, torch.zeros(6), 2, True)
    load = load_of(routed.expert_ids, 6)
    (got,) = torch.autograd.grad(
        balance_loss([routed], expert_load(routed.expert_ids.reshape(3, -1), 6)[None], load[None], COEFFICIENTS), weight
    )
    weight64 = weight.detach().double().requires_grad_()
    probs = torch.softmax(tokens.double() @ weight64.t(), dim=1)
    loss = (0.3 + 0.7) * switch_loss(probs, load) + 0.05 * sequence_loss(probs, routed.expert_ids, 3)
    (expected,) = torch.autograd.grad(loss, weight64)
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_no_coefficient_is_no_loss_and_layers_must_match():
    routed = routing(8, 4, 2)
    load = load_of(routed.expert_ids, 4)[None]
    off = BalanceConfig(global_batch=0.0)
    assert balance_loss([routed], load[None], load, off).item() == 0.0
    with pytest.raises(ValueError):
        balance_loss([routed, routed], load[None], load, off)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=12), st.floats(1e-4, 1.0))
def test_bias_moves_towards_the_mean(load, rate):
    bias = torch.zeros(len(load))
    update_bias(bias, torch.tensor(load), rate)
    mean = sum(load) / len(load)
    for b, count in zip(bias.tolist(), load, strict=True):
        if abs(count - mean) > 1e-6 * mean:  # the mean is an fp32 number
            assert b == pytest.approx(math.copysign(rate, mean - count))


def test_bias_fixed_point_is_balance_and_it_moves_in_place():
    bias = torch.tensor([0.5, -0.25, 0.0])
    same = bias
    update_bias(bias, torch.tensor([7, 7, 7]), 0.1)
    assert bias.tolist() == [0.5, -0.25, 0.0]
    update_bias(bias, torch.tensor([0, 0, 0]), 0.1)
    assert bias.tolist() == [0.5, -0.25, 0.0]
    update_bias(bias, torch.tensor([6, 7, 8]), 0.25)
    assert same.tolist() == [0.75, -0.25, -0.25] and not bias.requires_grad


def test_bias_alone_balances_a_skewed_router():
    torch.manual_seed(0)
    weight, bias = torch.randn(8, 16) / 6, torch.zeros(8)
    weight[:, 0] += torch.linspace(-0.6, 0.6, 8)
    imbalance = []
    for _ in range(300):
        tokens = torch.randn(512, 16)
        tokens[:, 0] = 1.0
        load = load_of(route(tokens, weight, bias, 2, True).expert_ids, 8)
        imbalance.append((load.max() / load.float().mean()).item())
        update_bias(bias, load, 0.003)
    assert imbalance[0] > 1.7 and sum(imbalance[-50:]) / 50 < 1.25


def test_entropy():
    probs = routing(20, 7, 1, dtype=torch.float64).probs
    probs[0] = torch.eye(7)[2]
    expected = -sum(p * math.log(p) for row in probs.tolist() for p in row if p > 0) / 20
    assert routing_entropy(probs).item() == pytest.approx(expected, rel=1e-12)
    assert routing_entropy(torch.full((3, 7), 1 / 7)).item() == pytest.approx(math.log(7), rel=1e-6)
    assert routing_entropy(torch.eye(7)).item() == 0.0
    assert not routing_entropy(torch.full((3, 7), 1 / 7, requires_grad=True)).requires_grad


def test_load_refuses_absent_pairs():
    with pytest.raises(RuntimeError):
        load_of(torch.tensor([[0, -1]]), 4)
