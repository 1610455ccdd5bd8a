"""Losses of rows of logits and their gradients, against PyTorch's in float64, on the GPU or Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from pithtrain.kernels import lang
from pithtrain.kernels.cross_entropy import cross_entropy_kernel, reference_row_losses, row_losses, triton_row_losses
from pithtrain.layers.loss import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not lang.HAS_TRITON, reason="Triton is not installed")


def compare(run, T, V, dtype, tolerance, targets=None):
    logits = (torch.randn(T, V, device=DEVICE) * 3).to(dtype)
    if targets is None:
        targets = torch.randint(0, V, (T,), device=DEVICE)
        targets[::5] = -100
    leaf = logits.double().requires_grad_()
    true = F.cross_entropy(leaf, targets, reduction="none")
    true.sum().backward()
    before = logits.clone()
    losses = run(logits, targets, False)
    assert torch.equal(logits, before)
    assert torch.equal(losses, run(logits, targets, True)) and losses.dtype == torch.float32
    for ours, exact in ((losses, true.detach()), (logits, leaf.grad)):
        assert ours.isfinite().all()
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()
    assert not logits[targets == -100].any()


RUNS = [triton_row_losses, reference_row_losses]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("T, V", [(40, 1000), (1, 7), (33, 5000), (17, 64)])
def test_against_float64(run, T, V):
    compare(run, T, V, torch.float32, 1e-5)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(run, dtype):
    compare(run, 20, 300, dtype, 1e-2)


@pytest.mark.parametrize("run", RUNS)
def test_all_targets_ignored_and_no_row(run):
    compare(run, 9, 50, torch.float32, 1e-5, torch.full((9,), -100, device=DEVICE))
    assert run(torch.empty(0, 7, device=DEVICE), torch.empty(0, dtype=torch.long, device=DEVICE), True).shape == (0,)


@pytest.mark.parametrize("run", RUNS)
def test_large_logits_do_not_overflow(run):
    losses = run(torch.full((3, 8), 300.0, device=DEVICE), torch.arange(3, device=DEVICE), True)
    torch.testing.assert_close(losses.cpu(), torch.tensor(8.0).log().expand(3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("run", RUNS)
def test_words_that_cannot_be(run):
    """The first block of the kernel holds minus infinity alone."""
    logits = torch.randn(4, 5000, device=DEVICE)
    logits[:, :4500] = -torch.inf
    targets = torch.randint(4500, 5000, (4,), device=DEVICE)
    true = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(run(logits, targets, True).double(), true, rtol=1e-5, atol=0)
    assert logits.isfinite().all() and not logits[:, :4500].any()


@pytest.mark.parametrize("wrong", [-1, 8, 2**31, 2**32 + 3])
def test_a_target_that_is_no_word_has_no_loss(wrong):
    losses = triton_row_losses(torch.zeros(3, 8, device=DEVICE), torch.tensor([1, wrong, -100], device=DEVICE), True)
    assert losses.isnan().tolist() == [False, True, False] and losses[2] == 0


def test_wrong_arguments_are_named():
    logits, targets = torch.zeros(3, 8, device=DEVICE), torch.zeros(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"logits has shape \(3, 8, 1\); want \(any, any\)"):
        triton_row_losses(logits.unsqueeze(2), targets.long(), True)
    with pytest.raises(TypeError, match=r"targets is torch.float32"):
        triton_row_losses(logits, targets, True)
    with pytest.raises(ValueError, match=r"targets has shape \(2,\); want \(3,\)"):
        triton_row_losses(logits, targets[:2].long(), True)
    with pytest.raises(ValueError, match=r"logits has shape \(3, 0\); want at least one word"):
        triton_row_losses(logits[:, :0], targets.long(), True)
    with pytest.raises(ValueError, match="contiguous"):
        triton_row_losses(torch.zeros(8, 3, device=DEVICE).T, targets.long(), True)


def test_float64_goes_to_the_reference():
    losses = row_losses(torch.zeros(3, 8, device=DEVICE).double(), torch.arange(3, device=DEVICE), False)
    assert losses.dtype == torch.float64


def test_a_row_beyond_2_to_the_31_elements(unwritten, only_program):
    V = 64
    T = 2**31 // V + 3
    logits, targets = torch.empty(T, V, dtype=torch.float16), torch.empty(T, dtype=torch.int64)
    losses = torch.empty(T)
    logits[-1], targets[-1] = row, target = torch.randn(V).half(), torch.tensor(5)
    only_program(T - 1)
    cross_entropy_kernel[(1,)](logits, targets, losses, V, True, V)
    exact = row[None].double()
    torch.testing.assert_close(losses[-1:].double(), reference_row_losses(exact, target[None], True), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[-1].double(), exact[0], atol=1e-3, rtol=0)


@pytest.mark.gpu
def test_gpu_bfloat16_and_memory():
    compare(triton_row_losses, 1000, 32000, torch.bfloat16, 1e-2)
    hidden = torch.randn(16384, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(151936, 256, device=DEVICE) / 16).requires_grad_()
    targets = torch.randint(0, 151936, (16384,), device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**30  # all logits in fp32 would be 9.3 GiB
    rows = slice(0, 16384, 8)
    leaves = [t.detach().double().requires_grad_() for t in (hidden[rows], weight.bfloat16())]
    fast = [t.detach().clone().requires_grad_() for t in (hidden[rows], weight)]
    F.cross_entropy(leaves[0] @ leaves[1].T, targets[rows], reduction="sum").backward()
    linear_cross_entropy(*fast, targets[rows], 1 << 26).backward()
    for ours, exact in zip(fast, leaves, strict=True):
        assert (ours.grad.double() - exact.grad).norm() <= 1e-2 * exact.grad.norm()
