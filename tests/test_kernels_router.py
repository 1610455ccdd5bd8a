"""The router kernels against the reference in float64, on the GPU or under Triton's interpreter."""

import pytest
import torch

from pithtrain.kernels import lang
from pithtrain.kernels.router import Routed, route_gradient_kernel, route_kernel, triton_route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
TOLERANCE = {torch.float32: 1e-5, HALF: 1e-2}
pytestmark = pytest.mark.skipif(not lang.HAS_TRITON, reason="Triton is not installed")


def reference_route(hidden, router_weight, top_k, bias=None, renormalise=True, sigmoid=False, scale=1.0):
    """`triton_route` in plain PyTorch, in the dtype of what it is given."""
    logits = hidden @ router_weight.T
    probs = logits.sigmoid() if sigmoid else logits.softmax(-1)
    chosen = probs.detach() if bias is None else probs.detach() + bias
    expert_ids = chosen.topk(top_k).indices
    weights = probs.gather(1, expert_ids)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # a bias can choose scores that are all 0
    load = torch.bincount(expert_ids.flatten(), minlength=len(router_weight)).int()
    return Routed(weights * scale, expert_ids, probs, load)


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b).norm() / b.norm()).item()


def compare(T, H, E, K, dtype, dense=True, router_dtype=None, **options):
    x = torch.randn(T, H, device=DEVICE).to(dtype).requires_grad_()
    r = (torch.randn(E, H, device=DEVICE) / H**0.5).to(router_dtype or dtype).requires_grad_()
    x64, r64 = (t.detach().double().requires_grad_() for t in (x, r))
    got, true = triton_route(x, r, K, **options), reference_route(x64, r64, K, **options)
    assert torch.equal(got.expert_ids, true.expert_ids) and got.expert_ids.dtype == torch.int64
    assert torch.equal(got.load, true.load)
    assert got.weights.dtype == got.probs.dtype == torch.float32
    dw, dp = torch.randn_like(got.weights), torch.randn_like(got.probs) * dense
    for routing in (got, true):
        ((routing.weights * dw).sum() + ((routing.probs * dp).sum() if dense else 0)).backward()
    assert error(got.weights, true.weights) < 1e-5 and error(got.probs, true.probs) < 1e-5
    # with one expert, or one renormalised choice, the gradient is zero up to rounding
    if E > 1 and (K > 1 or dense or not options.get("renormalise", True)):
        assert error(x.grad, x64.grad) < TOLERANCE[dtype] and error(r.grad, r64.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    "T, H, E, K", [(64, 64, 16, 2), (77, 40, 11, 3), (1, 32, 4, 1), (30, 32, 4, 4), (20, 24, 1, 1), (9, 72, 130, 8)]
)
def test_sizes(T, H, E, K, dtype):
    compare(T, H, E, K, dtype)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_options(renormalise, sigmoid, biased, dense):
    bias = torch.randn(12, device=DEVICE) if biased else None
    options = {"renormalise": renormalise, "sigmoid": sigmoid, "bias": bias, "scale": 2.5}
    compare(50, 48, 12, 3, torch.float32, dense, **options)


def test_a_router_in_fp32_beside_half_precision_tokens():
    compare(50, 48, 12, 3, HALF, router_dtype=torch.float32)


def test_equal_scores_choose_different_experts():
    got = triton_route(torch.zeros(5, 16, device=DEVICE), torch.ones(6, 16, device=DEVICE), 3)
    assert got.expert_ids.tolist() == [[0, 1, 2]] * 5
    assert got.load.tolist() == [5, 5, 5, 0, 0, 0]


def test_scores_that_underflow_get_no_weight():
    """A bias can choose experts whose probabilities are exactly zero: their weights are 0, not 0 / 0."""
    x, r = torch.full((5, 16), 10.0, device=DEVICE), torch.zeros(6, 16, device=DEVICE)
    r[0] = 10.0
    bias = torch.tensor([0.0, 0, 0, 5, 5, 0], device=DEVICE)
    for run in (triton_route, reference_route):
        got = run(x, r, 2, bias=bias)
        assert got.expert_ids.sort().values.tolist() == [[3, 4]] * 5 and not got.weights.any()


@pytest.mark.parametrize("logit", [40.0, 60.0, 85.0])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_gradients_of_improbable_choices(sigmoid, logit):
    """Chosen by a bias: what they are divided by is 1e-20 and not much else."""
    x = torch.ones(5, 16, device=DEVICE)
    r = torch.randn(6, 16, device=DEVICE) / 16 - sigmoid * logit / 16
    r[0] += logit / 16
    bias = torch.tensor([0.0, 0, 0, 5, 6, 0], device=DEVICE)
    seed = torch.randn(5, 2, device=DEVICE)
    leaves = [(a.clone().requires_grad_(), b.clone().requires_grad_()) for a, b in ((x, r), (x.double(), r.double()))]
    grads = [
        torch.autograd.grad(run(*pair, 2, bias=bias, sigmoid=sigmoid).weights, pair, seed.to(pair[0].dtype))
        for run, pair in zip((triton_route, reference_route), leaves, strict=True)
    ]
    for got, true in zip(*grads, strict=True):
        assert (got - true).norm() <= 5e-4 * true.norm() + 1e-12


@pytest.mark.parametrize("experts", [600, 1100])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_many_experts(experts, dtype):
    x, r = torch.randn(70, 48, device=DEVICE).to(dtype), (torch.randn(experts, 48, device=DEVICE) / 48**0.5).to(dtype)
    got, true = triton_route(x, r, 4), reference_route(x.double(), r.double(), 4)
    assert torch.equal(got.expert_ids, true.expert_ids) and torch.equal(got.load, true.load)
    assert error(got.weights, true.weights) < 1e-5
    with pytest.raises(ValueError, match="router_weight has 2049 rows; this kernel takes at most 2048 experts"):
        triton_route(x, torch.zeros(2049, 48, device=DEVICE), 4)


def test_nan_names_only_experts_that_exist():
    got = triton_route(torch.full((5, 16), float("nan"), device=DEVICE), torch.ones(6, 16, device=DEVICE), 3)
    assert int(got.expert_ids.min()) >= 0 and int(got.expert_ids.max()) < 6


def test_a_bias_of_minus_infinity_closes_an_expert():
    x, r, bias = torch.randn(20, 16, device=DEVICE), torch.randn(6, 16, device=DEVICE), torch.zeros(6, device=DEVICE)
    bias[5] = -torch.inf
    got, true = (run(x, r, 3, bias=bias) for run in (triton_route, reference_route))
    assert torch.equal(got.expert_ids, true.expert_ids) and torch.equal(got.load, true.load)
    assert got.load[5] == 0


def test_differentiating_twice_is_refused():
    x, r = torch.randn(5, 16, device=DEVICE, requires_grad=True), torch.randn(6, 16, device=DEVICE)
    (d_x,) = torch.autograd.grad(triton_route(x, r, 2).weights.square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


def test_no_tokens():
    assert triton_route(torch.zeros(0, 16, device=DEVICE), torch.ones(6, 16, device=DEVICE), 3).weights.shape == (0, 3)


@pytest.mark.parametrize(
    "x, r, k, message",
    [
        (torch.zeros(4, 16, dtype=torch.int32), torch.zeros(6, 16), 2, "hidden is torch.int32"),
        (torch.zeros(4, 16), torch.zeros(6, 8), 2, r"router_weight has shape \(6, 8\); want \(any, 16\)"),
        (torch.zeros(4, 16), torch.zeros(6, 16), 7, "top_k is 7; want 1 to 6"),
        (torch.zeros(4, 1, 16), torch.zeros(6, 16), 2, r"hidden has shape \(4, 1, 16\); want \(any, any\)"),
    ],
)
def test_wrong_arguments_are_named(x, r, k, message):
    with pytest.raises((TypeError, ValueError), match=message):
        triton_route(x.to(DEVICE), r.to(DEVICE), k)


@pytest.mark.skipif(not lang.INTERPRETED, reason="a GPU multiplies bfloat16")
def test_the_interpreter_refuses_bfloat16():
    """It would multiply its bits."""
    with pytest.raises(TypeError, match=r"hidden is torch.bfloat16; want one of torch.float32, torch.float16"):
        triton_route(torch.zeros(4, 16).bfloat16(), torch.zeros(6, 16).bfloat16(), 2)


def test_tokens_beyond_2_to_the_31_elements(unwritten, only_program):
    H = E = 32
    T, K, rows = 2**31 // H + 16, 2, 16
    hidden, probs = torch.empty(T, H, dtype=torch.float16), torch.empty(T, E)
    weights, ids, load = torch.empty(T, K), torch.empty(T, K, dtype=torch.int64), torch.zeros(E, dtype=torch.int32)
    hidden[-rows:], router_weight = torch.randn(rows, H).half(), torch.randn(E, H).half()
    only_program(T // rows - 1)
    args = weights, ids, probs, load, T, 1.0
    route_kernel[(1,)](hidden, router_weight, None, *args, H, E, K, E, K, False, True, False, rows, 16)
    last = hidden[-rows:].double().requires_grad_()
    true = reference_route(last, router_weight.double(), K)
    assert torch.equal(ids[-rows:], true.expert_ids) and torch.equal(load, true.load)
    assert error(weights[-rows:], true.weights) < 1e-5 and error(probs[-rows:], true.probs) < 1e-5
    d_weights, d_logits = torch.empty(T, K), torch.empty(T, E)
    d_weights[-rows:] = grad = torch.randn(rows, K)
    route_gradient_kernel[(1,)](probs, ids, d_weights, None, d_logits, T, 1.0, E, K, E, False, True, False, rows)
    (d_hidden,) = torch.autograd.grad(true.weights, last, grad.double())
    assert error(d_logits[-rows:].double() @ router_weight.double(), d_hidden) < 1e-5


def test_non_contiguous_inputs():
    x, r = torch.randn(40, 50, device=DEVICE).T, torch.randn(40, 9, device=DEVICE).T
    got, same = triton_route(x, r, 3), triton_route(x.contiguous(), r.contiguous(), 3)
    assert not x.is_contiguous() and all(torch.equal(a, b) for a, b in zip(got, same, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("H, E, K", [(2048, 128, 8), (2880, 32, 4), (1024, 384, 8), (7168, 256, 8)])
def test_gpu_shapes(H, E, K, sigmoid):
    x, r = torch.randn(3000, H, device=DEVICE).bfloat16(), (torch.randn(E, H, device=DEVICE) / H**0.5).bfloat16()
    options = {"bias": torch.randn(E, device=DEVICE) / 8 if sigmoid else None, "sigmoid": sigmoid}
    got, true = triton_route(x, r, K, **options), reference_route(x.double(), r.double(), K, **options)
    assert (got.expert_ids == true.expert_ids).float().mean() > 0.999  # fp32 and fp64 may differ on a near tie
    # A tensor core's float32 sum of 7,168 products was 1.03e-5 off on an H200.
    assert error(got.probs, true.probs) < 1e-5 * max(1, H / 4096)
    assert torch.equal(got.load.long(), torch.bincount(got.expert_ids.flatten(), minlength=E))
