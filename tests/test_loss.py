"""Cross-entropy without the logits, against the whole logits in float64. Its sums are fp32: no gradcheck."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.layers.loss import linear_cross_entropy

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def make(T, H, V, ignored=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(T, H, generator=g), torch.randn(V, H, generator=g) / H**0.5
    targets = torch.randint(V, (T,), generator=g)
    targets[torch.rand(T, generator=g) < ignored] = -100
    return hidden, weight, targets


def naive(hidden, weight, targets):
    """The definition in float64, a token at a time."""
    total = 0.0 * (hidden.sum() + weight.sum())
    for h, y in zip(hidden, targets.tolist(), strict=True):
        if y != -100:
            z = weight @ h
            total = total + z.max() + (z - z.max()).exp().sum().log() - z[y]
    return total


def compare(hidden, weight, targets, chunk_elements, dtype=torch.float32, scale=1.0, weight_dtype=torch.float32):
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(weight_dtype).requires_grad_()
    hidden64 = hidden.detach().double().requires_grad_()
    weight64 = weight.detach().to(dtype).double().requires_grad_()
    got, true = linear_cross_entropy(hidden, weight, targets, chunk_elements), naive(hidden64, weight64, targets)
    assert got.dtype == torch.float32 and got.shape == ()
    # The loss of a token that is nearly certain is a small difference of logits; rounding is judged by theirs.
    assert (got - true).abs() < TOLERANCE[dtype] * max(true, 0.1 * len(hidden))
    grads = torch.autograd.grad(scale * got, (hidden, weight))
    true_grads = torch.autograd.grad(scale * true, (hidden64, weight64))
    whole = torch.cat([t.flatten() for t in true_grads]).norm().clamp(min=1e-12)
    for g, t, leaf, other in zip(grads, true_grads, (hidden, weight), (weight64, hidden64), strict=True):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        # Sums over the vocabulary may cancel to nearly nothing; rounding is then judged by the whole gradient, or by
        # what a probability, rounded beside 1, is multiplied with.
        assert (g - t).norm() < TOLERANCE[dtype] * max(t.norm(), 0.1 * whole, 0.1 * abs(scale) * other.norm())
    return grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_elements", [1, 37, 37 * 4, 37 * 5 + 20, 37 * 23, 1 << 21])
def test_chunk_sizes_that_do_and_do_not_divide(chunk_elements, dtype):
    compare(*make(23, 16, 37, ignored=0.3), chunk_elements, dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 10), st.integers(2, 20), st.integers(1, 100), st.integers(0, 999))
def test_any_shape(T, H, V, chunk_elements, seed):
    compare(*make(T, H, V, 0.3, seed), chunk_elements)


def test_bf16_weights():
    compare(*make(23, 16, 37), 37 * 4, torch.bfloat16, weight_dtype=torch.bfloat16)


@pytest.mark.parametrize("scale", [1e-4, 1 / 23, 1e4, -3.0])
def test_scaled_upstream_gradient(scale):
    compare(*make(23, 16, 37, 0.2), 37 * 4, scale=scale)


def test_every_target_ignored():
    hidden, weight, _ = make(9, 16, 37)
    hidden_grad, weight_grad = compare(hidden, weight, torch.full((9,), -100), 37 * 4)
    assert not hidden_grad.any() and not weight_grad.any()
    assert linear_cross_entropy(hidden, weight, torch.full((9,), -100)).item() == 0.0


def test_ignored_tokens_count_for_nothing():
    hidden, weight, targets = make(12, 16, 37, ignored=0.5)
    kept = targets != -100
    grad, weight_grad = compare(hidden, weight, targets, 37 * 5)
    assert not grad[~kept].any() and grad[kept].any(dim=1).all()
    kept_grad, kept_weight_grad = compare(hidden.detach()[kept], weight.detach(), targets[kept], 37 * 5)
    torch.testing.assert_close(grad[kept], kept_grad)
    torch.testing.assert_close(weight_grad, kept_weight_grad)


def test_one_token_and_no_token():
    compare(*make(1, 8, 11), 1 << 21)
    hidden, weight, targets = make(0, 8, 11)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad.shape == (0, 8) and not weight.grad.any()


def test_uniform_scores_cost_log_v():
    loss = linear_cross_entropy(torch.zeros(4, 8), torch.randn(11, 8), torch.tensor([0, 3, 10, -100]))
    assert loss.item() == pytest.approx(3 * math.log(11))


def test_large_scores_stay_finite():
    hidden, weight, targets = make(9, 16, 37)
    compare(1e4 * hidden, weight, targets, 37 * 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: lambda t: t.long()}, "hidden is torch.int64; want one of torch.float64"),
        ({1: lambda t: t[:, :9]}, r"weight has shape \(37, 9\); want \(any, 16\)"),
        ({1: lambda t: t[:0]}, r"weight has shape \(0, 16\); want at least one word"),
        ({1: lambda t: t.to("meta")}, "weight is on meta; want cpu"),
        ({2: lambda t: t[:4]}, r"targets has shape \(4,\); want \(9,\)"),
        ({2: lambda t: t.int()}, "targets is torch.int32"),
        ({3: lambda _: 0}, "chunk_elements is 0; want at least 1"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(change, message):
    args = [*make(9, 16, 37), None]
    for i, wrong in change.items():
        args[i] = wrong(args[i])
    with pytest.raises((TypeError, ValueError), match=message):
        linear_cross_entropy(*args)


def test_a_row_that_does_not_count_may_hold_anything():
    hidden, weight, targets = make(9, 16, 37)
    hidden[2], targets[2] = torch.nan, -100
    rest = torch.arange(9) != 2
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, targets), linear_cross_entropy(hidden[rest], weight, targets[rest])
    )


@pytest.mark.parametrize("target", [-1, -99, 37, 1000])
def test_a_target_outside_the_vocabulary_is_refused(target):
    hidden, weight, targets = make(9, 16, 37)
    targets[4] = target
    with pytest.raises((RuntimeError, IndexError)):
        linear_cross_entropy(hidden.requires_grad_(), weight, targets)


def test_non_contiguous_inputs():
    hidden, weight, targets = make(23, 16, 37, 0.2)
    expected = compare(hidden, weight, targets, 37 * 4)
    turned = (
        hidden.detach().t().contiguous().t(),
        weight.detach().t().contiguous().t(),
        torch.stack([targets, targets], 1)[:, 0],
    )
    assert not any(t.is_contiguous() for t in turned)
    for a, b in zip(compare(*turned, 37 * 4), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradient_of_one_input_alone(frozen):
    hidden, weight, targets = make(23, 16, 37)
    leaf = weight if frozen == "hidden" else hidden
    leaf.requires_grad_()
    (got,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, 37 * 4), leaf)
    (expected,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), targets, reduction="sum"), leaf)
    assert error(got, expected) < 1e-5


def test_without_grad_there_is_no_graph_and_the_same_loss():
    hidden, weight, targets = make(23, 16, 37, 0.2)
    plain = linear_cross_entropy(hidden, weight, targets, 37 * 4)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, targets, 37 * 4)
    assert not plain.requires_grad and not quiet.requires_grad
    assert torch.equal(plain, quiet) and torch.equal(
        quiet, linear_cross_entropy(hidden, weight, targets, 37 * 4).detach()
    )


def test_backward_can_run_again_and_not_be_differentiated():
    hidden, weight, targets = make(9, 16, 37)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_memory_of_the_logits_is_bounded():
    """No tensor as large as the whole logits exists, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return result

    hidden, weight, targets = make(400, 4, 100)
    hidden.requires_grad_(), weight.requires_grad_()
    with Watch():
        linear_cross_entropy(hidden, weight, targets, chunk_elements=2000).backward()
    assert 1600 <= largest <= 2000
