"""The AdamW kernel, and the optimiser that launches it, against torch's AdamW in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pithtrain.config import OptimizerConfig
from pithtrain.kernels import lang
from pithtrain.kernels.adamw import triton_adamw
from pithtrain.train.optimizer import KernelAdamW, make_optimizer

pytestmark = pytest.mark.skipif(not lang.HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(shape, steps, scale=None, dtype=torch.float32, limit=1e-5, **how):
    """`steps` steps of the kernel and of torch in float64 are as far from the start, and leave the same averages.

    Errors are measured by what was added up, gradients and steps, since sums of one number may come to nothing."""
    how = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1} | how
    weight = torch.randn(shape, device=DEVICE)
    begin, true = weight.double(), torch.nn.Parameter(weight.double())
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    torchs, largest, way = torch.optim.AdamW([true], **how), 0.0, 0.0
    for step in range(1, steps + 1):
        grad = torch.randn(shape, device=DEVICE) * 10 ** torch.randn(shape, device=DEVICE).clamp(max=3)
        grad = grad.to(dtype)
        kept, before = grad.clone(), true.detach().clone()
        true.grad = grad.double() / (1.0 if scale is None else scale.double())
        torchs.step()
        largest, way = max(largest, true.grad.norm()), way + (true - before).norm()
        triton_adamw(weight, grad, mean, square, scale, step, how["lr"], how["weight_decay"], *how["betas"], how["eps"])
        assert torch.equal(grad, kept)  # nothing is written back
    state = torchs.state[true]
    assert (mean - state["exp_avg"]).norm() <= 1e-6 * largest
    assert (square - state["exp_avg_sq"]).norm() <= 1e-6 * state["exp_avg_sq"].norm()
    rounding = 2 * 2**-24 * steps * begin.norm()  # a step shrinks the weight and then moves it
    assert (weight - true).norm() <= limit * way + rounding


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1023,), (1024,), (1025,), (7, 11, 64)])
def test_shapes(shape):
    compare(shape, steps=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_any_width(dtype):
    compare((50, 30), steps=4, dtype=dtype)


@given(st.data())
def test_any_settings(data):
    draw = data.draw
    compare(
        (draw(st.integers(1, 70)), draw(st.integers(1, 40))),
        steps=draw(st.integers(1, 6)),
        scale=draw(st.sampled_from([None, 1.0, 1.5, 1e4]).map(lambda s: s and torch.tensor(s, device=DEVICE))),
        lr=draw(st.sampled_from([1e-5, 1e-3, 0.5])),
        betas=draw(st.sampled_from([(0.0, 0.5), (0.9, 0.95), (0.9, 0.999), (0.99, 0.9999)])),
        eps=draw(st.sampled_from([1e-15, 1e-8, 1e-3])),
        weight_decay=draw(st.sampled_from([0.0, 0.1, 1.0])),
    )


def test_late_steps_and_the_first_of_a_slow_average():
    """1 - 0.9999**1 keeps few digits in fp32, and 0.9**10000 is nothing."""
    compare((40, 40), steps=1, betas=(0.9999, 0.99999))
    weight, begin = (torch.full((9,), 2.0, device=DEVICE) for _ in range(2))
    mean, square = torch.full_like(weight, 0.5), torch.full_like(weight, 0.25)
    triton_adamw(weight, mean.clone(), mean, square, None, 10_000, 0.01, 0.0, 0.9, 0.95, 1e-12)
    torch.testing.assert_close(weight, begin - 0.01)


def test_a_mean_that_forgets_at_once():
    """With beta1 = 0 the mean is the gradient, however large the one before it was."""
    weight, grad = torch.zeros(5, device=DEVICE), torch.full((5,), 1e-3, device=DEVICE)
    mean, square = torch.full_like(weight, 1e4), torch.zeros_like(weight)
    triton_adamw(weight, grad, mean, square, None, 1, 0.1, 0.0, 0.0, 0.95, 1e-8)
    assert torch.equal(mean, grad)


def test_zero_gradients_do_not_divide_by_zero():
    weight, zero = torch.ones(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    triton_adamw(weight, zero, zero.clone(), zero.clone(), None, 1, 0.1, 0.5, 0.9, 0.95, 1e-8)
    torch.testing.assert_close(weight, torch.full_like(weight, 0.95))


def test_strided_gradient_and_no_numbers():
    compare((0,), steps=1)
    weights = [torch.ones(4, 6, device=DEVICE) for _ in range(2)]
    grad = torch.randn(6, 4, device=DEVICE)
    for weight, g in zip(weights, (grad.t(), grad.t().contiguous()), strict=True):
        mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
        triton_adamw(weight, g, mean, square, None, 1, 0.1, 0.0, 0.9, 0.95, 1e-8)
    assert torch.equal(*weights)


def test_wrong_arguments_are_named():
    w, g, m, v = (torch.zeros(4, 6, device=DEVICE) for _ in range(4))
    settings = (None, 1, 0.1, 0.0, 0.9, 0.95, 1e-8)
    with pytest.raises(TypeError, match=r"weight is torch.bfloat16; want one of torch.float32"):
        triton_adamw(w.bfloat16(), g, m, v, *settings)
    with pytest.raises(ValueError, match=r"square has shape \(3, 6\); want \(4, 6\)"):
        triton_adamw(w, g, m, v[:3], *settings)
    with pytest.raises(TypeError, match=r"grad is torch.float64"):
        triton_adamw(w, g.double(), m, v, *settings)
    with pytest.raises(ValueError, match=r"mean must be contiguous: it is updated where it is"):
        triton_adamw(w, g, torch.zeros(6, 4, device=DEVICE).t(), v, *settings)
    with pytest.raises(ValueError, match=r"scale has shape \(1,\); want \(\)"):
        triton_adamw(w, g, m, v, torch.ones(1, device=DEVICE), *settings[1:])


def optimizers(*shapes):
    """Ours by the kernel and torch's fused AdamW over equal parameters; the first shape's are decayed."""
    values = [torch.randn(shape, device=DEVICE) for shape in shapes]

    def make(kind, **how):
        p = [torch.nn.Parameter(value.clone()) for value in values]
        groups = [{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:], "weight_decay": 0.0}]
        return p, kind(groups, 0.01, (0.9, 0.95), **how)

    (ours, kernels), (true, torchs) = make(KernelAdamW), make(torch.optim.AdamW, fused=True)
    for p in ours:
        zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        kernels.state[p] = {"step": torch.zeros(()), **zeros}
    return ours, kernels, true, torchs


def test_optimizer_steps_like_torchs():
    """Groups, a parameter without a gradient, rates and a scale that come and go, a resumed count."""
    ours, kernels, true, torchs = optimizers((5, 7), (3, 4, 2), (7,), (2, 2))
    idle = ours[-1].detach().clone()
    for step in range(5):
        for a, b in zip(ours[:-1], true[:-1], strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        kernels.grad_scale = torchs.grad_scale = torch.tensor(2.5, device=DEVICE) if step % 2 else None
        for optimizer in (kernels, torchs):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
            for state in optimizer.state.values():
                if step == 3:
                    state["step"].fill_(100)
            optimizer.step()
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [int(kernels.state[p]["step"]) for p in ours] == [102, 102, 102, 100]
    assert torch.equal(ours[-1], idle)


def test_which_optimizer_is_made():
    parameters = {"a.weight": torch.nn.Parameter(torch.zeros(3, 4, device=DEVICE))}
    kind = KernelAdamW if DEVICE == "cuda" else torch.optim.AdamW
    assert type(make_optimizer(parameters, OptimizerConfig())) is kind


@pytest.mark.gpu
def test_gpu_optimizer_waits_for_nobody():
    ours, kernels, _, _ = optimizers((300, 70), (70,))
    kernels.grad_scale = torch.tensor(2.5, device="cuda")
    for p in ours:
        p.grad = torch.randn_like(p)
    kernels.step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    n = 2**31 + 1000
    weight, grad, mean, square = (torch.zeros(n, device="cuda") for _ in range(4))
    weight[-1500:], grad[-1500:] = 2.0, 1.0
    triton_adamw(weight, grad, mean, square, None, 1, 0.1, 0.0, 0.9, 0.95, 1e-8)
    torch.testing.assert_close(weight[-1500:], torch.full((1500,), 1.9, device="cuda"))
    assert not weight[:-1500].any() and not mean[:-1500].any()
