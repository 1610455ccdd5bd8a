"""Grouped-query attention against loops over heads and positions in float64."""

import pytest
import torch

from pithtrain.layers.attention import Attention, Sequences
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
