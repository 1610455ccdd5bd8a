"""The rotation kernel against complex numbers in float64, forward and backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pithtrain.kernels import lang
from pithtrain.kernels.rotary import triton_rotate
from pithtrain.layers.rotary import rotary_table, rotate

pytestmark = pytest.mark.skipif(not lang.HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def turn(x, cos, sin, neighbours):
    """The definition: pairs as complex numbers, in float64."""
    x = x.double()
    halves = (x[..., 0::2], x[..., 1::2]) if neighbours else x.chunk(2, dim=-1)
    turned = torch.complex(*halves) * torch.complex(cos.double(), sin.double()).unsqueeze(-2)
    parts = (turned.real, turned.imag)
    return torch.stack(parts, dim=-1).flatten(-2) if neighbours else torch.cat(parts, dim=-1)


def compare(x, cos, sin, neighbours=False, grad=None):
    """The kernel's output and gradient of x, whose relative errors are within the limit of its dtype."""
    x = x.detach().requires_grad_()
    grad = torch.randn_like(x) if grad is None else grad
    out = triton_rotate(x, cos, sin, neighbours)
    out.backward(grad)
    assert out.dtype == x.grad.dtype == x.dtype and out.is_contiguous()
    for got, true in ((out, turn(x, cos, sin, neighbours)), (x.grad, turn(grad, cos, -sin, neighbours))):
        assert got.shape == true.shape
        assert (got.double() - true).norm() <= LIMITS[x.dtype] * true.norm()


def inputs(batch, sequence, heads, head_dim, dtype=torch.float32):
    x = torch.randn(batch, sequence, heads, head_dim, device=DEVICE).to(dtype)
    return x, *rotary_table(torch.arange(sequence, device=DEVICE) + 3, head_dim, 100.0)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 17, 3, 6), (3, 5, 2, 80), (1, 9, 1, 128)])
def test_shapes(shape, dtype, neighbours):
    if dtype == torch.bfloat16 and lang.INTERPRETED:
        pytest.skip("the interpreter cuts bfloat16 off; see test_bfloat16_in_the_interpreter")
    compare(*inputs(*shape, dtype), neighbours)


def test_bfloat16_in_the_interpreter(monkeypatch):
    """Triton's interpreter does not round to bfloat16 but cuts off, which is twice as far."""
    monkeypatch.setitem(LIMITS, torch.bfloat16, 8e-3)
    for neighbours in (False, True):
        compare(*inputs(2, 17, 3, 80, torch.bfloat16), neighbours)


def test_a_table_for_each_sequence():
    positions = torch.randint(0, 99, (3, 11), device=DEVICE)
    x, *_ = inputs(3, 11, 2, 8)
    compare(x, *rotary_table(positions, 8, 100.0))
    assert torch.equal(triton_rotate(x[1:2], *rotary_table(positions[1], 8, 100.0))[0],
                       triton_rotate(x, *rotary_table(positions, 8, 100.0))[1])  # fmt: skip


@given(st.data())
def test_any_strides(data):
    """x and its gradient lie in memory as they come: heads first, a part of a wider head, features far apart."""
    batch, sequence, heads, half = (data.draw(st.integers(1, n)) for n in (3, 9, 4, 5))

    def strided():
        order = data.draw(st.permutations(range(4)))
        whole = torch.randn(*[(batch, sequence, heads, 2 * half + 3)[axis] for axis in order], device=DEVICE)
        begin = data.draw(st.integers(0, 3))
        return whole.permute(*[order.index(axis) for axis in range(4)])[..., begin : begin + 2 * half]

    _, cos, sin = inputs(1, sequence, 1, 2 * half)
    wide = torch.zeros(sequence, half + 1, device=DEVICE)
    wide[:, :half] = sin
    compare(strided(), cos, wide[:, :half], data.draw(st.booleans()), strided())


def test_empty():
    for shape in ((0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)):
        assert triton_rotate(*inputs(*shape)).shape == shape


def test_wrong_arguments_are_named():
    x, cos, sin = inputs(2, 5, 3, 8)
    with pytest.raises(TypeError, match=r"x is torch.float64; want one of torch.float32"):
        triton_rotate(x.double(), cos, sin)
    with pytest.raises(TypeError, match=r"sin is torch.bfloat16; want one of torch.float32"):
        triton_rotate(x, cos, sin.bfloat16())
    with pytest.raises(ValueError, match=r"cos has shape \(4, 4\); want \(5, 4\)"):
        triton_rotate(x, cos[:4], sin)
    with pytest.raises(ValueError, match=r"sin has shape \(5, 4\); want \(2, 5, 4\)"):
        triton_rotate(x, cos.expand(2, 5, 4), sin)
    with pytest.raises(ValueError, match="heads of 7 features; want an even number"):
        triton_rotate(x[..., :7], cos, sin)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    "heads, head_dim, neighbours", [(32, 128, False), (4, 128, False), (16, 64, True), (1, 64, True)]
)
def test_gpu_sizes_of_models(heads, head_dim, neighbours, dtype):
    shape = (2, 1500, heads, head_dim)
    heads_first = torch.randn(2, heads, 1500, head_dim, device="cuda").to(dtype).transpose(1, 2)
    compare(*inputs(*shape, dtype), neighbours, heads_first)
    compare(heads_first, *inputs(*shape)[1:], neighbours)


@pytest.mark.gpu
def test_gpu_layers_use_it():
    x, cos, sin = inputs(2, 300, 4, 64, torch.bfloat16)
    assert torch.equal(rotate(x, cos, sin), triton_rotate(x, cos, sin))
    assert torch.equal(rotate(x, cos, sin, neighbours=True), triton_rotate(x, cos, sin, neighbours=True))


@pytest.mark.gpu
def test_gpu_more_than_2_to_the_31_elements():
    """The last sequence of a batch too large for 32-bit offsets, forward and backward."""
    x, cos, sin = inputs(1, 4096, 32, 128, torch.bfloat16)
    many = x.expand(130, -1, -1, -1).contiguous().requires_grad_()
    assert many.numel() > 2**31
    out = triton_rotate(many, cos, sin)
    assert torch.equal(out[-1:], triton_rotate(x, cos, sin))
    out.backward(out.detach())
    back = many.grad[-1:].double()
    assert (back - x.double()).norm() < 2 * LIMITS[torch.bfloat16] * x.double().norm()
