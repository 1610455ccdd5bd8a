"""The blockwise loss against PyTorch's in float64, on the GPU or under Triton's interpreter."""

import pytest
import torch

from pithtrain.kernels import lang
from pithtrain.kernels.cross_entropy import (
    linear_cross_entropy,
    reference_linear_cross_entropy,
    rows_at_once,
    triton_linear_cross_entropy,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not lang.HAS_TRITON, reason="Triton is not installed")


def compare(T, H, V, rows, dtype, tolerance, targets=None):
    hidden, weight = (
        torch.randn(T, H, device=DEVICE).to(dtype),
        (torch.randn(V, H, device=DEVICE) * 3 / H**0.5).to(dtype),
    )
    if targets is None:
        targets = torch.randint(0, V, (T,), device=DEVICE)
        targets[::5] = -100
    ours = [t.clone().requires_grad_() for t in (hidden, weight)]
    true = [t.double().requires_grad_() for t in (hidden, weight)]
    loss, exact = triton_linear_cross_entropy(*ours, targets, rows), reference_linear_cross_entropy(*true, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    (loss * 0.3).backward()
    (exact * 0.3).backward()
    for a, b in [(loss, exact)] + [(p.grad, q.grad) for p, q in zip(ours, true, strict=True)]:
        assert a.isfinite().all()
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("T, H, V, rows", [(40, 32, 1000, 16), (1, 16, 7, 128), (33, 24, 5000, 33), (17, 16, 64, 5)])
def test_against_float64(T, H, V, rows):
    compare(T, H, V, rows, torch.float32, 1e-5)


def test_all_targets_ignored():
    compare(9, 16, 50, 4, torch.float32, 1e-5, torch.full((9,), -100, device=DEVICE))


def test_large_logits_do_not_overflow():
    hidden, weight = torch.full((3, 16), 30.0, device=DEVICE), torch.eye(16, device=DEVICE)[:8] * 100
    loss = triton_linear_cross_entropy(hidden, weight, torch.arange(3, device=DEVICE))
    torch.testing.assert_close(loss.cpu(), 3 * torch.log(torch.tensor(8.0)))


def test_only_the_gradient_that_is_needed():
    hidden, weight = torch.randn(5, 16, device=DEVICE), torch.randn(9, 16, device=DEVICE, requires_grad=True)
    targets = torch.arange(5, device=DEVICE)
    triton_linear_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is not None
    with torch.no_grad():
        loss = triton_linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, reference_linear_cross_entropy(hidden, weight, targets))


def test_a_second_backward_is_refused():
    hidden, weight = torch.randn(5, 16, device=DEVICE, requires_grad=True), torch.randn(9, 16, device=DEVICE)
    loss = triton_linear_cross_entropy(hidden, weight, torch.arange(5, device=DEVICE))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"targets is torch.float32"):
        triton_linear_cross_entropy(*(torch.zeros(s, device=DEVICE) for s in ((3, 8), (9, 8), (3,))))
    with pytest.raises(ValueError, match=r"weight has shape \(9, 4\); want \(9, 8\)"):
        triton_linear_cross_entropy(
            torch.zeros(3, 8, device=DEVICE), torch.zeros(9, 4, device=DEVICE), torch.zeros(3, device=DEVICE).long()
        )


def test_blocks_hold_at_most_half_a_gib():
    assert all(rows_at_once(v) * v <= 2**28 for v in (1000, 32000, 151936))


@pytest.mark.gpu
def test_gpu_bfloat16_and_memory():
    compare(1000, 512, 32000, 300, torch.bfloat16, 1e-2)
    hidden = torch.randn(16384, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151936, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 151936, (16384,), device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**30  # all logits in fp32 would be 9.3 GiB
