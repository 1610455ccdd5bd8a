# %% [markdown]
# # AdamW at the speed of memory
#
# > One step of AdamW on one tensor: all is read once, what changes is written once, gradients are clipped on the way.
#
# An MoE model has far more parameters than any one token uses, and its optimiser touches all of them. There is
# next to nothing to compute; what counts is what moves. AdamW needs four numbers of every parameter, the weight, its
# gradient and two averages, and changes three of them: in fp32 that is 4 · 4 + 3 · 4 = 28 bytes.
#
# [Clipping](43_sharding.py) wants every gradient divided by one number first, $c = \max(1, \lVert g \rVert /
# \text{limit})$ with the norm of all gradients together, for which each is read once, 4 bytes that no row below counts.
# Divided in a pass of its own, it is read and written again, 8 bytes. torch's fused AdamW does it in the same pass, but
# then writes the gradients back, though nobody reads them again: 4 bytes.
#
# ```
#                        read                  write              bytes
#  clip, then AdamW      g   w g m v           g   w m v             36
#  torch's fused AdamW       w g m v             g w m v             32
#  here                      w g m v               w m v             28
# ```

# %%
#| default_exp kernels.adamw

# %%
#| export
import torch
from torch import Tensor

from pithtrain.kernels.lang import tl, triton, want

# %% [markdown]
# ## The maths
#
# For a weight $w$, its gradient $g$ and the averages $m$ and $v$, at step $n$, counted from 1, with the learning rate
# $\eta$ and the weight decay $\lambda$ ([what it means](65_optimizer.py); arXiv 1711.05101):
#
# $$m \leftarrow m + (1-\beta_1) (g / c - m), \quad v \leftarrow \beta_2 v + (1-\beta_2) (g / c)^2, \quad
#   w \leftarrow (1 - \eta\lambda)\, w - \frac{\eta}{1 - \beta_1^n}\,
#   \frac{m}{\sqrt{v} \,/ \sqrt{1 - \beta_2^n} + \epsilon}.$$
#
# What depends on the step alone is computed before the kernel starts, on the host and in float64: in $1 - \beta_2^n$
# with $\beta_2 = 0.999$ and $n = 1$ three digits cancel. The kernel gets `keep` $= 1 - \eta\lambda$, `move`
# $= \eta / (1 - \beta_1^n)$, `root` $= 1 / \sqrt{1 - \beta_2^n}$, and `new1` and `new2`, $1 - \beta_1$ and
# $1 - \beta_2$; `mean` and `square` are $m$ and $v$. `scale` is $c$.
# Where $\beta_1 < 1/2$, the same $m$ is written $g / c + \beta_1 (m - g / c)$, so that the smaller term is the one that
# is multiplied, and rounded.


# %%
#| export
@triton.jit
def adamw_kernel(
    w_ptr, g_ptr, mean_ptr, square_ptr, scale_ptr, numbers, keep, move, root, beta1, new1, beta2, new2, eps,
    CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step on BLOCK of so many numbers; the gradient is divided by the scalar at scale_ptr if CLIPPED."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numbers
    g = tl.load(g_ptr + i, mask=mask, other=0.0).to(tl.float32)
    if CLIPPED:
        g /= tl.load(scale_ptr)
    mean = tl.load(mean_ptr + i, mask=mask, other=0.0)
    square = tl.load(square_ptr + i, mask=mask, other=0.0)
    w = tl.load(w_ptr + i, mask=mask, other=0.0)
    mean = tl.where(beta1 < 0.5, g + beta1 * (mean - g), mean + new1 * (g - mean))
    square = beta2 * square + new2 * g * g
    w = keep * w - move * mean / (tl.sqrt(square) * root + eps)
    tl.store(w_ptr + i, w, mask=mask)
    tl.store(mean_ptr + i, mean, mask=mask)
    tl.store(square_ptr + i, square, mask=mask)


# %% [markdown]
# Everything is updated in place, so a tensor that is not contiguous must be refused: a copy would be updated instead.


# %%
#| export
def triton_adamw(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, scale: Tensor | None, step: int,
    rate: float, decay: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """AdamW's step number `step`, from 1, in place: on a fp32 `weight` of any shape and its averages.

    `grad` may be fp32, bf16 or fp16; it is divided by `scale`, a fp32 scalar, and stays as it is. Raises TypeError or
    ValueError, one line, on bad arguments. Source: arXiv 1711.05101."""
    here = weight.device
    for name, tensor, device in (("weight", weight, None), ("mean", mean, here), ("square", square, here)):
        want(name, tensor, weight.shape, (torch.float32,), device)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous: it is updated where it is")
    want("grad", grad, weight.shape, (torch.float32, torch.bfloat16, torch.float16), here)
    if scale is not None:
        want("scale", scale, (), (torch.float32,), here)
    if numbers := weight.numel():
        adamw_kernel[(triton.cdiv(numbers, 1024),)](
            weight, grad.contiguous(), mean, square, scale, numbers,
            1 - rate * decay, rate / (1 - beta1**step), (1 - beta2**step) ** -0.5,
            beta1, 1 - beta1, beta2, 1 - beta2, eps, scale is not None, 1024,
        )  # fmt: skip


# %% [markdown]
# Ten steps beside torch's own AdamW in float64, with and without a scale:

# %%
from pithtrain.kernels.lang import runs_triton

torch.manual_seed(0)
rate, decay, beta1, beta2, eps = 1e-2, 0.1, 0.9, 0.999, 1e-8
for scale in (None, torch.tensor(3.0)):
    weight = torch.randn(30, 50)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    true = torch.nn.Parameter(weight.double())
    begin = true.detach().clone()
    torchs = torch.optim.AdamW([true], lr=rate, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    for step in range(1, 11):
        grad = torch.randn_like(weight)
        true.grad = grad.double() / (1.0 if scale is None else 3.0)
        torchs.step()
        if runs_triton(weight):
            triton_adamw(weight, grad, mean, square, scale, step, rate, decay, beta1, beta2, eps)
    if runs_triton(weight):
        moved = (true - begin).norm()
        print(f"scale {scale}: moved {moved:.2f}, off by {((weight - true).norm() / moved).item():.1e} of it")
        assert (weight - true).norm() < 1e-5 * moved

# %% [markdown]
# On a GPU (`tools/memory_kernels.py`) the bytes are the smaller part of the gain: torch's kernel also moves its own
# more slowly.

# %%
import json
from pathlib import Path

import pithtrain

file = Path(pithtrain.__file__).parent.parent / "docs" / "benchmarks" / "memory-h200.json"
if file.exists():
    measured = json.loads(file.read_text())
    print(f"{measured['measured']}, {measured['date']}")
    for row, size in zip(measured["kernels"][:2], (28, 32), strict=True):
        moved = row["bytes"] * size / 28
        print(f"{row['name']:48} {row['ms']:5.2f} ms for {moved / 1e9:.1f} GB: {moved / row['ms'] / 1e9:.2f} TB/s")

# %% [markdown]
# [The optimizer](65_optimizer.py) launches it where parameters are on a GPU, and [a benchmark](86_bench_step.py)
# measures what that does for a whole step. Next: the layers that the kernels serve, beginning with [the
# router](20_router.py).
