# %% [markdown]
# # A head turns in one pass
#
# > Rotates pairs of features of queries and keys, and turns their gradients back; each number is read and written once.
#
# [Rotary positions](25_rotary.py) tell attention where a token stands: every head's features are taken in pairs,
# and each pair is turned by an angle that grows with the position. This notebook takes the angles as a table of
# cosines and sines, and turns.
#
# In PyTorch that is four products, a sum, a difference and a concatenation, each of which reads and writes half of
# the head or all of it. Forward, in halves of a head:
#
# ```
# in PyTorch                               read  write         here       read  write
#   first cos, second sin, ... (4 times)      4      4
#   the sum, the difference                   4      2
#   the concatenation                         2      2         one pass      2      2
#                                            ──     ──                      ──     ──
#                                            10      8                       2      2
# ```

# %%
#| default_exp kernels.rotary

# %%
#| export
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pithtrain.kernels.lang import tl, triton, want

# %% [markdown]
# ## The maths
#
# A pair $(a, b)$ is a complex number, and turning it is a product:
#
# $$a' + b' \mathrm{i} = (a + b\,\mathrm{i})\, e^{\mathrm{i} \phi}, \qquad
#   a' = a \cos\phi - b \sin\phi, \quad b' = b \cos\phi + a \sin\phi.$$
#
# The gradient with respect to $(a, b)$ is that of $(a', b')$ turned back, by $-\phi$: a rotation's transpose is its
# inverse. So one kernel does both, with a sign. The smallest true implementation is torch's own complex product:

# %%
torch.manual_seed(0)
batch, sequence, heads, head_dim = 2, 5, 3, 8
x = torch.randn(batch, sequence, heads, head_dim)
angles = torch.randn(sequence, head_dim // 2)


def turn(x, angles):
    """Heads (..., heads, D) whose halves are pairs, turned by angles (sequence, D / 2)."""
    pairs = torch.complex(*x.chunk(2, dim=-1))
    pairs = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


print("lengths before", x[0, 0, 0].norm().item(), "and after", turn(x, angles)[0, 0, 0].norm().item())

# %% [markdown]
# ## The kernel
#
# A program owns a few tokens and walks over their heads: the angles belong to the token, so their cosines and sines
# are loaded once and stay in registers. Which features are a pair is a matter of two distances: from a pair to the
# next (`STEP`), and from a pair's first feature to its second (`APART`). Halves, $(x_i, x_{i + d/2})$, have 1 and
# $d / 2$; neighbours, $(x_{2i}, x_{2i+1})$, have 2 and 1. Sums are in fp32, and rounded once.
#
# Token $t$ is counted through the batch. Its angles are in row $t \bmod$ `table_rows`: a table has $S$ rows, for all
# sequences, or $T$, one for each token.


# %%
#| export
@triton.jit
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, T, S, table_rows, heads, x_batch, x_token, x_head, sign,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, APART: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Turn all heads of BT of the T = batch * S tokens by `sign` (1 or -1) times the angles.

    `x_batch`, `x_token` and `x_head` are strides of x, whose features lie side by side; cos and sin (table_rows, PAIRS)
    are fp32, contiguous as out is. WIDTH is PAIRS rounded up to a power of two."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    i = tl.arange(0, WIDTH)[None, :]
    mask = (t < T) & (i < PAIRS)
    at = (t % table_rows).to(tl.int64) * PAIRS + i
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0) * sign
    t = t.to(tl.int64)
    x_ptr += t // S * x_batch + t % S * x_token + i * STEP
    out_ptr += t * heads * 2 * PAIRS + i * STEP
    for _ in range(heads):
        a = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + APART, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + APART, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask)
        x_ptr += x_head
        out_ptr += 2 * PAIRS


# %%
#| export
def turned(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, sign: float) -> Tensor:
    """`x` (B, S, heads, D) turned by `sign` times the angles of contiguous fp32 tables; the result is contiguous."""
    batch, sequence, heads, head_dim = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        tokens, pairs, block = batch * sequence, head_dim // 2, 4  # with 2 warps: fastest of 1 to 16, and 1 to 8
        rotate_kernel[(triton.cdiv(tokens, block),)](
            x, cos, sin, out, tokens, sequence, cos.numel() // pairs, heads, *x.stride()[:3], sign,
            pairs, triton.next_power_of_2(pairs), 2 if neighbours else 1, 1 if neighbours else pairs, block,
            num_warps=2,
        )  # fmt: skip
    return out


# %%
#| export
class Rotate(torch.autograd.Function):
    """`triton_rotate` with its gradient: the same, turned back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.neighbours = neighbours
        return turned(x, cos, sin, neighbours, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return turned(grad, *ctx.saved_tensors, ctx.neighbours, -1.0), None, None, None


# %%
#| export
def triton_rotate(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> Tensor:
    """Turn the pairs of `x` (B, S, heads, D): `layers.rotary.rotate` by one kernel.

    `cos` and `sin` (S, D / 2) or (B, S, D / 2) are fp32. Differentiable once, in `x` alone. Raises TypeError or
    ValueError, one line, on bad arguments."""
    want("x", x, (None, None, None, None), (torch.float32, torch.bfloat16, torch.float16))
    batch, sequence, _, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"x has heads of {head_dim} features; want an even number, they turn in pairs")
    shape = (sequence, head_dim // 2) if cos.dim() == 2 else (batch, sequence, head_dim // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        want(name, table, shape, (torch.float32,), x.device)
    return Rotate.apply(x, cos.contiguous(), sin.contiguous(), neighbours)


# %% [markdown]
# Both ways to pair, forward and backward, against complex numbers:

# %%
from pithtrain.kernels.lang import runs_triton

if runs_triton(x):
    leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)
    out = triton_rotate(leaf, angles.cos(), angles.sin())
    out.backward(grad)
    torch.testing.assert_close(out, turn(x, angles))
    torch.testing.assert_close(leaf.grad, turn(grad, -angles))
    to_neighbours = torch.arange(head_dim).view(2, -1).t().flatten()  # 0, 4, 1, 5, ...
    leaf = x[..., to_neighbours].clone().requires_grad_()
    out = triton_rotate(leaf, angles.cos(), angles.sin(), neighbours=True)
    out.backward(grad[..., to_neighbours])
    torch.testing.assert_close(out, turn(x, angles)[..., to_neighbours])
    torch.testing.assert_close(leaf.grad, turn(grad, -angles)[..., to_neighbours])

# %% [markdown]
# ## On a GPU
#
# Forward and backward, of 4 rows of 4,096 tokens in bf16 (`tools/memory_kernels.py`): queries and keys of
# Qwen3-30B-A3B, whose pairs are halves, and the 64 of a DeepSeek-V2-Lite query's features that turn, whose pairs are
# neighbours. The kernel gains more than the bytes above say, since PyTorch's passes over halves of a head are the
# farther from the memory's speed.

# %%
import json
from pathlib import Path

import pithtrain

file = Path(pithtrain.__file__).parent.parent / "docs" / "benchmarks" / "memory-h200.json"
if file.exists():
    measured = json.loads(file.read_text())
    print(f"{measured['measured']}, {measured['date']}")
    for row in measured["kernels"]:
        if row["name"].startswith("rotation"):
            speed = row["bytes"] / row["ms"] / 1e9
            print(f"{row['name']:46} {row['ms']:6.3f} ms, {speed:4.2f} TB/s of the bytes that must move")

# %% [markdown]
# [Rotary positions](25_rotary.py) calls it for whatever is on a GPU. Next: the last pass of a training step,
# [AdamW](18_adamw_kernel.py).
