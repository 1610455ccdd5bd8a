"""Grouped-query attention against loops over heads and positions in float64."""

import pytest
import torch

from pithtrain.layers.attention import Attention, Cache, OneRank, Sequences
from pithtrain.layers.rotary import rotary_table

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def make(hidden, heads, kv_heads, head_dim, eps=1e-6):
    torch.manual_seed(0)
    layer = Attention(hidden, heads, kv_heads, head_dim, eps)
    for norm in (layer.query_norm, layer.key_norm):
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    return layer


def naive(parameters, x, cos, sin, heads, kv_heads, head_dim, eps=1e-6):
    """`x` (sequence, hidden) float64; one head and one position at a time."""

    def norm(v, weight):
        return weight * v / (v.square().mean() + eps).sqrt()

    def turn(v, t):
        first, second = v[: head_dim // 2], v[head_dim // 2 :]
        return torch.cat([first * cos[t] - second * sin[t], first * sin[t] + second * cos[t]])

    outputs = []
    for t in range(len(x)):
        mixed = []
        for h in range(heads):
            group = h // (heads // kv_heads)
            own, shared = slice(h * head_dim, (h + 1) * head_dim), slice(group * head_dim, (group + 1) * head_dim)
            q = turn(norm(parameters["query.weight"][own] @ x[t], parameters["query_norm.weight"]), t)
            scores, values = [], []
            for s in range(t + 1):
                k = turn(norm(parameters["key.weight"][shared] @ x[s], parameters["key_norm.weight"]), s)
                scores.append(q @ k / head_dim**0.5)
                values.append(parameters["value.weight"][shared] @ x[s])
            mixed.append(torch.stack(scores).softmax(dim=0) @ torch.stack(values))
        outputs.append(parameters["output.weight"] @ torch.cat(mixed))
    return torch.stack(outputs)


SHAPES = [(16, 4, 2, 4), (16, 4, 1, 6), (12, 3, 3, 4), (16, 6, 2, 2), (8, 1, 1, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequence", [1, 2, 11])
@pytest.mark.parametrize("hidden, heads, kv_heads, head_dim", SHAPES)
def test_against_loops(hidden, heads, kv_heads, head_dim, sequence, dtype):
    layer = make(hidden, heads, kv_heads, head_dim)
    x = torch.randn(2, sequence, hidden).to(dtype).requires_grad_()
    upstream = torch.randn(2, sequence, hidden).to(dtype)
    table = rotary_table(torch.arange(sequence), head_dim, 10_000.0)
    got = layer(x, Sequences(*table))
    assert got.dtype == dtype and got.shape == x.shape
    parameters = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    cos, sin = (t.double() for t in table)
    true = torch.stack([naive(parameters, row, cos, sin, heads, kv_heads, head_dim) for row in x64])
    assert error(got, true) < TOLERANCE[dtype]
    got_grads = torch.autograd.grad(got, (x, *layer.parameters()), upstream)
    true_grads = torch.autograd.grad(true, (x64, *parameters.values()), upstream.double(), materialize_grads=True)
    for name, a, b in zip(("x", *parameters), got_grads, true_grads, strict=True):
        assert a.dtype == (dtype if name == "x" else torch.float32)
        if dtype == torch.float32 and sequence == 1 and name.startswith(("query", "key")):
            assert a.abs().max() < 1e-5, name  # one score, whose softmax is 1 whatever it is
        elif dtype == torch.float32:
            assert error(a, b) < 1e-5, name
    # In bfloat16 a nearly cancelled gradient of queries or keys has no digits left: the whole is compared.
    whole = [torch.cat([g.double().flatten() for g in grads]) for grads in (got_grads, true_grads)]
    assert error(*whole) < TOLERANCE[dtype]


def test_no_token_sees_the_future():
    layer = make(16, 4, 2, 4)
    table = rotary_table(torch.arange(9), 4, 10_000.0)
    x = torch.randn(1, 9, 16, requires_grad=True)
    for t in range(9):
        (grad,) = torch.autograd.grad(layer(x, Sequences(*table))[0, t].sum(), x)
        reach = grad[0].abs().amax(dim=1)
        assert not reach[t + 1 :].any() and (reach[: t + 1] > 0).all()


def test_sequences_of_a_batch_do_not_mix():
    layer = make(16, 4, 2, 4)
    table = rotary_table(torch.arange(7), 4, 10_000.0)
    x = torch.randn(3, 7, 16, requires_grad=True)
    together = layer(x, Sequences(*table))
    torch.testing.assert_close(together, torch.cat([layer(x[i : i + 1], Sequences(*table)) for i in range(3)]))
    (grad,) = torch.autograd.grad(together[1].sum(), x)
    assert grad[1].any() and not grad[0].any() and not grad[2].any()


def test_only_relative_positions_matter():
    layer = make(16, 4, 2, 4)
    x = torch.randn(1, 7, 16)
    near, far = (layer(x, Sequences(*rotary_table(torch.arange(7) + shift, 4, 10_000.0))) for shift in (0, 50))
    assert error(near, far) < 1e-5
    turned = layer(x, Sequences(*rotary_table(torch.arange(7).flip(0), 4, 10_000.0)))
    assert error(turned, near) > 1e-3


def test_scores_do_not_grow_with_the_input():
    """Queries and keys are normalised: a larger input scales the values alone."""
    layer = make(16, 4, 2, 4, eps=0.0)
    table = rotary_table(torch.arange(7), 4, 10_000.0)
    x = torch.randn(1, 7, 16)
    assert error(layer(100 * x, Sequences(*table)), 100 * layer(x, Sequences(*table))) < 1e-5


def test_non_contiguous_input_and_no_grad():
    layer = make(16, 4, 2, 4)
    table = rotary_table(torch.arange(7), 4, 10_000.0)
    x = torch.randn(7, 2, 16).transpose(0, 1)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x, Sequences(*table)), layer(x.contiguous(), Sequences(*table)))
    with torch.no_grad():
        assert not layer(x, Sequences(*table)).requires_grad


def test_decoding_with_a_cache_equals_the_whole():
    layer = make(16, 4, 2, 4)
    cos, sin = rotary_table(torch.arange(9), 4, 10_000.0)
    x = torch.randn(2, 9, 16)
    whole, cache, seen = layer(x, Sequences(cos, sin)), Cache(), 0
    for step in (4, 1, 1, 3):
        now = slice(seen, seen + step)
        part = layer(x[:, now], Sequences(cos[now], sin[now]), cache)
        assert error(part, whole[:, now]) < 1e-5
        seen += step
    assert cache.kept[0].shape == (2, 2, 9, 4)


@pytest.mark.parametrize("queries", [1, 3])
def test_decoding_through_a_window_with_sinks(queries):
    torch.manual_seed(0)
    q, k, v, sinks = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(4)
    whole = OneRank().attend(q, k, v, 0.3, window=5, sinks=sinks)
    part = OneRank().attend(q[:, :, -queries:], k, v, 0.3, window=5, sinks=sinks)
    assert error(part, whole[:, :, -queries:]) < 1e-5


def test_documents_are_as_if_alone():
    layer = make(16, 4, 2, 4)
    cos, sin = rotary_table(torch.tensor([0, 1, 2, 3, 0, 1, 2]), 4, 10_000.0)
    x = torch.randn(1, 7, 16, requires_grad=True)
    packed = layer(x, Sequences(cos, sin, torch.tensor([0, 4, 7], dtype=torch.int32)))
    alone = [layer(x[:, a:b], Sequences(cos[a:b], sin[a:b])) for a, b in ((0, 4), (4, 7))]
    assert error(packed, torch.cat(alone, dim=1)) < 1e-5
    (grad,) = torch.autograd.grad(packed[0, 4:].sum(), x)
    assert not grad[0, :4].any() and grad[0, 4:].any()


def test_documents_with_a_cache_are_refused():
    q, k = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="packed documents have no cache"):
        OneRank().attend(q, k, k, 0.5, documents=torch.tensor([0, 1]))


def test_latents_are_keys_and_values_in_the_making():
    """Loops over heads and positions in float64; head dims of keys (3 + 2) and values (4) differ."""
    torch.manual_seed(0)
    shapes = dict(q=(2, 3, 6, 5), k=(2, 6, 7), v=(2, 6, 2), expand=(3, 7, 7))
    inputs = {n: torch.randn(s, dtype=torch.float64, requires_grad=True) for n, s in shapes.items()}
    got = OneRank().attend(**inputs, scale=0.4)
    true = torch.zeros_like(got)
    for b in range(2):
        for h in range(3):
            for t in range(6):
                both = [inputs["expand"][h] @ inputs["k"][b, s] for s in range(t + 1)]
                keys = [torch.cat([both[s][:3], inputs["v"][b, s]]) for s in range(t + 1)]
                weights = torch.stack([inputs["q"][b, h, t] @ key * 0.4 for key in keys]).softmax(dim=0)
                true[b, h, t] = weights @ torch.stack([x[3:] for x in both])
    assert error(got, true) < 1e-12
    upstream = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(o, inputs.values(), upstream) for o in (got, true)), strict=True):
        assert error(a, b) < 1e-12
