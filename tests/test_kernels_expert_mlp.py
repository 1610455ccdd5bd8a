"""The expert MLP kernels against the loop over experts in float64, on the GPU or under Triton's interpreter."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pithtrain.kernels import expert_mlp as mlp
from pithtrain.kernels import lang

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.gpu
pytestmark = pytest.mark.skipif(not lang.HAS_TRITON, reason="Triton is not installed")
# the interpreter cannot multiply bfloat16; float16 takes the same path through the kernels
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
TOLERANCE = {torch.float32: 1e-5, HALF: 1e-2}


def problem(T, H, I, E, K, dtype, ids=None):  # noqa: E741
    x, w = torch.randn(T, H, device=DEVICE), torch.rand(T, K, device=DEVICE)
    gate_up, down = torch.randn(E, 2 * I, H, device=DEVICE) / H**0.5, torch.randn(E, H, I, device=DEVICE) / I**0.5
    ids = torch.rand(T, E, device=DEVICE).topk(K).indices if ids is None else ids.to(DEVICE)
    x, gate_up, down = (t.to(dtype).requires_grad_() for t in (x, gate_up, down))
    return x, ids, w.requires_grad_(), gate_up, down


def error(a, b):
    assert a.shape == b.shape and a.isfinite().all()
    scale = b.norm()
    return ((a.double() - b).norm() / scale).item() if scale > 0 else a.norm().item()


def compare(args, bias=None):
    """Output and all gradients against float64; given `bias`, of clamped experts."""
    x, ids, w, gate_up, down = args
    leaves = [x, w, gate_up, down] if bias is None else [x, w, gate_up, down, bias]
    true = [t.detach().double().requires_grad_() for t in leaves]
    out = mlp.triton_expert_mlp(*args, bias=bias)
    exact = mlp.reference_expert_mlp(true[0], ids, *true[1:])
    assert out.dtype == x.dtype
    grad = torch.randn_like(out)
    out.backward(grad)
    exact.backward(grad.double())
    pairs = {"out": (out, exact)}
    names = ("tokens", "weights", "gate_up", "down", "bias")
    pairs |= {n: (a.grad, b.grad) for n, a, b in zip(names, leaves, true, strict=False)}
    errors = {name: error(a, b) for name, (a, b) in pairs.items()}
    # a weight's gradient is a sum over features, which may cancel: it is judged by what was added
    one = torch.ones_like(ids[:, :1], dtype=torch.float64)
    outputs = [mlp.reference_expert_mlp(true[0], own, one, *true[2:]) for own in ids.split(1, dim=1)]
    errors["weights"] *= (true[1].grad.norm() / (torch.stack(outputs) * grad).norm()).item()
    assert max(errors.values()) < TOLERANCE[x.dtype], errors


SIZES = {
    "whole blocks": (64, 64, 32, 4, 2),
    "sizes no block divides": (77, 40, 24, 5, 3),
    "one token": (1, 32, 16, 4, 2),
    "top_k of 1": (50, 32, 16, 4, 1),
    "top_k of all experts": (40, 32, 16, 4, 4),
    "one expert": (30, 32, 16, 1, 1),
    "more experts than pairs": (5, 32, 16, 30, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_against_float64(size, dtype):
    compare(problem(*size, dtype))


def clamped(args, strided=False):
    """Bias for the experts of these arguments, whose tokens become so large in float32 that clamps take part.

    In half precision few values may be clamped: which side of 7 a rounded one falls on decides whether a gradient
    passes."""
    x, gate_up = args[0], args[3]
    with torch.no_grad():
        x.mul_(3 if x.dtype == torch.float32 else 1)
    bias = torch.randn(gate_up.shape[1::-1] if strided else gate_up.shape[:2], device=DEVICE).to(x.dtype)
    return (bias.T if strided else bias).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_clamped_against_float64(size, dtype):
    args = problem(*size, dtype)
    compare(args, clamped(args))


@pytest.mark.parametrize("ids", [torch.full((60, 2), 3), torch.randint(-4, 6, (60, 2)).clamp(min=-1)])
def test_clamped_with_one_expert_and_with_absent_pairs(ids):
    args = problem(60, 40, 24, 6, 2, torch.float32, ids)
    bias = clamped(args, strided=True)
    assert not bias.is_contiguous()
    compare(args, bias)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_all_tokens_to_one_expert_and_others_empty(dtype):
    compare(problem(70, 32, 24, 6, 1, dtype, torch.full((70, 1), 3)))


def test_an_expert_of_more_rows_than_a_band_of_tiles():
    rows = 16 * mlp.blocks_for(torch.empty(0, device=DEVICE)).rows + 5
    ids = torch.where(torch.arange(rows + 50) < rows, 1, torch.randint(0, 3, (rows + 50,)))[:, None]
    compare(problem(rows + 50, 24, 40, 3, 1, torch.float32, ids))


@pytest.mark.parametrize("ids", [None, torch.full((64, 2), 3)], ids=["near-uniform", "one expert"])
def test_float32_weights_get_the_gradients_of_half_ones_before_rounding(ids):
    half = problem(64, 40, 24, 5, 2, HALF, ids)
    x, w = (t.detach().requires_grad_() for t in (half[0], half[2]))
    masters = [t.detach().float().requires_grad_() for t in half[3:]]
    grad = torch.randn_like(x)
    rounded, unrounded = mlp.triton_expert_mlp(*half), mlp.triton_expert_mlp(x, half[1], w, *masters)
    rounded.backward(grad)
    unrounded.backward(grad)
    assert torch.equal(rounded, unrounded) and torch.equal(x.grad, half[0].grad) and torch.equal(w.grad, half[2].grad)
    for master, leaf in zip(masters, half[3:], strict=True):
        assert master.grad.dtype == torch.float32 and not torch.equal(master.grad, leaf.grad.float())
        assert torch.equal(master.grad.to(HALF), leaf.grad)


def test_absent_pairs_contribute_nothing():
    ids = torch.randint(-4, 6, (60, 3)).clamp(min=-1)
    args = problem(60, 40, 24, 6, 3, torch.float32, ids)
    compare(args)
    absent = ids.to(DEVICE) < 0
    assert (args[2].grad[absent] == 0).all()
    x, ids, w, *matrices = (t.detach() for t in args)
    out = mlp.triton_expert_mlp(x, ids, w, *matrices)
    assert torch.equal(out, mlp.triton_expert_mlp(x, ids, w.masked_fill(absent, torch.nan), *matrices))


def test_int32_ids_and_non_contiguous_inputs():
    x, ids, w, gate_up, down = problem(50, 32, 16, 4, 2, torch.float32)
    x = torch.stack([x.detach()] * 2, -1)[..., 0].requires_grad_()
    w = w.detach().T.contiguous().T.requires_grad_()
    gate_up = gate_up.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    down = down.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    assert not any(t.is_contiguous() for t in (x, w, gate_up, down))
    compare((x, ids.int().T.contiguous().T, w, gate_up, down))


def test_expanded_gradient():
    x, ids, w, gate_up, down = problem(20, 32, 16, 4, 2, torch.float32)
    mlp.triton_expert_mlp(x, ids, w, gate_up, down).sum().backward()
    true = [t.detach().double().requires_grad_() for t in (x, w, gate_up, down)]
    mlp.reference_expert_mlp(true[0], ids, *true[1:]).sum().backward()
    assert error(x.grad, true[0].grad) < 1e-5 and error(down.grad, true[3].grad) < 1e-5


def test_nothing_to_do():
    x, ids, w, gate_up, down = problem(0, 32, 16, 4, 2, torch.float32)
    out = mlp.triton_expert_mlp(x, ids, w, gate_up, down)
    out.sum().backward()
    assert out.shape == (0, 32) and (gate_up.grad == 0).all()
    compare(problem(9, 32, 16, 4, 2, torch.float32, torch.full((9, 2), -1)))


def test_weights_that_begin_anywhere_in_memory():
    x, ids, w, gate_up, down = problem(30, 32, 16, 4, 2, torch.float32)
    odd = [torch.cat([t.new_zeros(1), t.detach().flatten()])[1:].view(t.shape) for t in (gate_up, down)]
    assert all(t.is_contiguous() and t.data_ptr() % 16 for t in odd)
    compare((x, ids, w, *(t.requires_grad_() for t in odd)))


def test_differentiating_twice_is_refused():
    x, *rest = problem(20, 32, 16, 4, 2, torch.float32)
    (d_x,) = torch.autograd.grad(mlp.triton_expert_mlp(x, *rest).square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


def absent_and_uneven():
    """Expert ids of 77 tokens: expert 3 has most of them, 1 has none, and some pairs are absent."""
    return torch.tensor([-1, 0, 2, 3, 3, 3, 3, 4])[torch.randint(8, (77, 3))]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_rows_put_in_order_first_give_what_gathering_gives(dtype):
    x, ids, w, gate_up, down = (t.detach() for t in problem(77, 40, 24, 5, 3, dtype, absent_and_uneven()))
    order = mlp.sort_pairs(ids, 5, mlp.blocks_for(x).rows)
    there = slice(0, int(order.offsets[-1]))
    gathered = mlp.up_projection(x, gate_up, order)
    ordered = mlp.up_projection(mlp.dispatch(x, order), gate_up, order, in_order=True)
    assert all(torch.equal(a[there], b[there]) for a, b in zip(gathered, ordered, strict=True))
    grad = torch.randn_like(x)
    gathered = mlp.activation_gradient(grad, down, w, gathered[0], order)
    ordered = mlp.activation_gradient(mlp.dispatch(grad, order), down, w, ordered[0], order, in_order=True)
    assert all(torch.equal(a[there], b[there]) for a, b in zip(gathered[:2], ordered[:2], strict=True))
    assert torch.equal(gathered[2][:, there], ordered[2][:, there])


@gpu
@pytest.mark.parametrize("ids", [None, absent_and_uneven()], ids=["near-uniform", "absent and uneven"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gpu_experts_large_enough_to_put_rows_in_order_first(ids, with_bias):
    args = problem(77, 256, 1032, 5, 3, torch.bfloat16, ids)
    assert mlp.dispatch_first(args[0], args[4]) and not mlp.dispatch_first(args[0].float(), args[4])
    compare(args, clamped(args) if with_bias else None)


@pytest.fixture
def far(unwritten):
    """Makes (rows, columns) in half precision, of more than 2^31 elements."""
    return lambda columns: torch.empty(2**31 // columns + 7, columns, dtype=HALF, device=DEVICE)


def one_tile(pair, slot, offsets):
    """Rows of the one expert there is."""
    device = {"dtype": torch.int32, "device": DEVICE}
    pair = pair if isinstance(pair, torch.Tensor) else torch.tensor(pair, **device)
    return mlp.Sorted(pair, *(torch.tensor(t, **device) for t in (slot, offsets, [0, 1], [0])))


def test_rows_beyond_2_to_the_31_elements_are_written_and_read(far):
    held = far(2**15)
    P, H = held.shape
    slot = torch.tensor([[P - 1, 0], [3, P - 2]], device=DEVICE)
    order = one_tile(torch.empty(P, dtype=torch.int32, device=DEVICE), slot.tolist(), [0, P])
    x, weights = torch.randn(2, H, device=DEVICE).to(HALF), torch.rand(2, 2, device=DEVICE)
    rows = mlp.dispatch(x, order)
    assert torch.equal(rows[slot], x[:, None].expand(-1, 2, -1))
    held[slot] = y = torch.randn(2, 2, H, device=DEVICE).to(HALF)
    out, _ = mlp.combine(held, order, weights)
    assert error(out, (weights[..., None].double() * y.double()).sum(1)) < 1e-2


def test_tokens_beyond_2_to_the_31_elements_are_gathered(far):
    x = far(1024)
    T, H = x.shape
    order = one_tile([T - 1, 5, T - 3], [[0]], [0, 3])
    x[order.pair.long()] = near = torch.randn(3, H, device=DEVICE).to(HALF)
    gate_up, rows = torch.randn(1, 32, H, device=DEVICE).to(HALF), torch.randn(3, 16, device=DEVICE).to(HALF)
    projected, _ = mlp.up_projection(x, gate_up, order)
    assert error(projected, near.double() @ gate_up[0].double().T) < 1e-2
    gradient = mlp.weight_gradient(rows, x, order, gather_left=False, dtype=torch.float32)
    assert error(gradient[0], rows.double().T @ near.double()) < 1e-2


@pytest.mark.parametrize("rows", [5, 300], ids=["part of a tile", "whole tiles"])
def test_products_of_rows_beyond_2_to_the_31_elements(far, rows):
    x = far(16)
    P = len(x)
    tiles = -(-rows // mlp.blocks_for(x).rows)
    order = one_tile([0], [[0]], [P - rows, P])
    order = order._replace(
        first_tile=order.first_tile * tiles, tile_expert=order.tile_expert.expand(tiles).contiguous()
    )
    x[-rows:] = near = torch.randn(rows, 16, device=DEVICE).to(HALF)
    weights = torch.randn(1, 16, 16, device=DEVICE).to(HALF)
    y = mlp.grouped_product(x, weights, order, transposed=True)
    assert error(y[-rows:], near.double() @ weights[0].double().T) < 1e-2


def test_same_bits_every_time():
    args = problem(60, 32, 16, 4, 2, torch.float32)
    runs = []
    for _ in range(2):
        out = mlp.triton_expert_mlp(*args)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [args[i] for i in (0, 2, 3, 4)])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_frozen_weights_get_no_gradient():
    x, ids, w, gate_up, down = problem(20, 32, 16, 4, 2, torch.float32)
    mlp.triton_expert_mlp(x, ids, w, gate_up.detach(), down.detach()).sum().backward()
    assert x.grad is not None and gate_up.grad is None


def test_each_half_of_a_split_backward_does_only_its_products(monkeypatch):
    """Inputs first and weights later, as a zero-bubble pipeline walks the graph."""
    x, _, w, gate_up, down = args = problem(40, 32, 16, 4, 2, torch.float32)
    grad = torch.randn_like(x)
    mlp.triton_expert_mlp(*args).backward(grad)
    whole = [t.grad.clone() for t in (x, w, gate_up, down)]
    for t in (x, w, gate_up, down):
        t.grad = None
    calls = []
    for name in ("grouped_product", "weight_gradient"):
        original = getattr(mlp, name)
        monkeypatch.setattr(
            mlp, name, lambda *a, original=original, name=name, **k: (calls.append(name), original(*a, **k))[1]
        )
    out = mlp.triton_expert_mlp(*args)
    calls.clear()
    out.backward(grad, retain_graph=True, inputs=[x, w])
    assert calls == ["grouped_product"] and gate_up.grad is None
    out.backward(grad, retain_graph=True, inputs=[gate_up, down])
    assert calls == ["grouped_product", "weight_gradient", "weight_gradient"]
    assert all(torch.equal(t.grad, g) for t, g in zip((x, w, gate_up, down), whole, strict=True))
    calls.clear()
    (d_down,) = torch.autograd.grad(out, [down], grad)
    assert calls == ["weight_gradient"] and torch.equal(d_down, whole[3])


@pytest.mark.parametrize(
    "change, message",
    [
        ({1: lambda t: t.float()}, "expert_ids is torch.float32"),
        ({2: lambda t: t.half()}, "weights is torch.float16"),
        ({3: lambda t: t.double()}, "gate_up is torch.float64"),
        ({3: lambda t: t[:, :-8]}, r"gate_up has shape \(4, 24, 32\); want \(4, 32, 32\)"),
        ({0: lambda t: t[None]}, r"tokens has shape \(1, 20, 32\); want \(any, any\)"),
        ({4: lambda t: t.transpose(1, 2)}, "down has shape"),
        ({4: lambda t: t.to("meta")}, "down is on meta"),
        ({0: lambda t: t[:, :30], 3: lambda t: t[..., :30], 4: lambda t: t[:, :30]}, "hidden size 30 .* 16 bytes"),
        ({0: lambda t: t[:, :0], 3: lambda t: t[..., :0], 4: lambda t: t[:, :0]}, "hidden size is 0"),
        ({3: lambda t: t[:, :0], 4: lambda t: t[..., :0], 5: lambda t: t[:, :0]}, "expert hidden size is 0"),
        ({3: lambda t: t[:0], 4: lambda t: t[:0], 5: lambda t: t[:0]}, "number of experts is 0"),
        ({1: lambda t: t[:, :0], 2: lambda t: t[:, :0]}, "top_k is 0"),
        ({5: lambda t: t[:, :16]}, r"bias has shape \(4, 16\); want \(4, 32\)"),
        ({5: lambda t: t.half()}, "bias is torch.float16"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(change, message):
    args = [*problem(20, 32, 16, 4, 2, torch.float32), torch.zeros(4, 32, device=DEVICE)]
    for i, make in change.items():
        args[i] = make(args[i])
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        mlp.triton_expert_mlp(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not lang.INTERPRETED, reason="a GPU multiplies bfloat16")
def test_the_interpreter_refuses_bfloat16():
    """It would multiply its bits."""
    with pytest.raises(TypeError, match=r"tokens is torch.bfloat16; want one of torch.float32, torch.float16"):
        mlp.triton_expert_mlp(*problem(20, 32, 16, 4, 2, torch.bfloat16))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(3000, 512, 384, 8, 2), (1111, 1000, 520, 13, 5), (600, 256, 2304, 4, 2)])
def test_gpu_sizes(size, dtype):
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons new memory
    compare(problem(*size, dtype))


@gpu
def test_gpu_never_waits_for_the_host():
    args = problem(500, 256, 128, 8, 2, torch.bfloat16)
    grad = torch.randn_like(args[0])
    mlp.triton_expert_mlp(*args).backward(grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mlp.triton_expert_mlp(*args).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_gpu_backward_in_a_thread_without_a_cuda_context():
    """autograd runs backward in threads of its own, which have no current CUDA context at first."""
    x, ids, w, gate_up, down = (t.detach() for t in problem(100, 64, 32, 4, 2, torch.bfloat16))
    order = mlp.sort_pairs(ids, 4, mlp.blocks_for(x).rows)
    projected, _ = mlp.up_projection(x, gate_up, order)
    mlp.activation_gradient(x, down, w, projected, order)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(mlp.activation_gradient, x, down, w, projected, order).result()


@gpu
@pytest.mark.parametrize("T, I", [(2**18 + 2**14, 1016), (2**17, 2112)], ids=["gathered", "in order"])
def test_gpu_more_than_two_to_the_31_elements(T, I):  # noqa: E741
    """projected and d_projected hold more elements than that; all is compared with the loop, 4,096 tokens at a time."""
    H, E, K = 64, 8, 4
    assert T * K * 2 * I > 2**31
    x, ids, w, gate_up, down = args = problem(T, H, I, E, K, torch.bfloat16)
    assert mlp.dispatch_first(x, down) == (I > 1024)
    grad = torch.randn_like(x)
    out = mlp.triton_expert_mlp(*args)
    out.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in (gate_up, down)]
    for part in torch.arange(T, device=DEVICE).split(4096):
        tx, tw = (t[part].detach().double().requires_grad_() for t in (x, w))
        true = mlp.reference_expert_mlp(tx, ids[part], tw, *exact)
        true.backward(grad[part].double())
        for ours, one in ((out[part], true), (x.grad[part], tx.grad), (w.grad[part], tw.grad)):
            assert error(ours, one) < 1e-2
    for ours, one in zip((gate_up, down), exact, strict=True):
        assert error(ours.grad, one.grad) < 1e-2
