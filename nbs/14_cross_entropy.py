# %% [markdown]
# # The loss without the logits
#
# > Cross-entropy of a linear layer over a large vocabulary, a few rows of logits at a time.
#
# The last product of a language model is its widest. With 16,384 tokens and Qwen3's 151,936 words, the logits
# in fp32 are 10 GB, their gradient another 10 GB, and nobody looks at them twice. The loss needs one number
# of a row, and the gradient of a row needs only that row. So a block of rows is multiplied, turned into its
# loss *and its gradient* on the spot, multiplied back, and forgotten:
#
# ```
# for a block of rows:   hidden ──▶ logits ──▶ loss, and in the same memory softmax − onehot
#                                                  ├──▶ × weight  = d_hidden of the block
#                                                  └──▶ ᵀ × hidden, added to d_weight
# ```
#
# The gradients are ready before anyone asks for them; the backward pass only multiplies them by the gradient
# of the loss. It saves the fourth product (the logits once more), and the memory does not grow with the tokens.

# %%
#| default_exp kernels.cross_entropy

# %%
#| export
import torch
import torch.nn.functional as F
from torch import Tensor

from pithtrain.kernels.lang import runs_triton, tl, triton, want

# %% [markdown]
# ## The maths
#
# For a row of logits $\ell$ with target $y$, the loss in nats and its gradient are
#
# $$L = \log \sum_v e^{\ell_v} - \ell_y, \qquad
#   \frac{\partial L}{\partial \ell_v} = \frac{e^{\ell_v}}{\sum_j e^{\ell_j}} - [v = y].$$
#
# A target of -100 marks a row that does not count. The smallest true implementation is PyTorch's:


# %%
#| export
def reference_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`linear_cross_entropy` with all logits at once, at least in fp32."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.long(), ignore_index=-100, reduction="sum")


# %%
torch.manual_seed(0)
hidden, weight = torch.randn(50, 32), torch.randn(1000, 32) / 32**0.5
targets = torch.randint(0, 1000, (50,))
targets[::7] = -100
loss = reference_linear_cross_entropy(hidden, weight, targets)
print(f"{loss / (targets >= 0).sum():.3f} nats a token; log(1000) = {torch.log(torch.tensor(1000.0)):.3f}")

# %% [markdown]
# ## One row, two passes, in place
#
# A program owns a row. The first pass keeps a running maximum $m$ and a running sum of $e^{\ell - m}$, rescaled
# whenever the maximum moves (Milakov and Gimelshein, arXiv 1805.02867). The second overwrites the logits
# with their gradient.


# %%
#| export
@triton.jit
def cross_entropy_kernel(logit_ptr, target_ptr, loss_ptr, V, GRADIENT: tl.constexpr, BV: tl.constexpr):
    """loss of a row of logits (V,), which become their gradient if GRADIENT."""
    row = tl.program_id(0).to(tl.int64)
    logit_ptr += row * V
    target = tl.load(target_ptr + row).to(tl.int32)
    counts = (target >= 0) & (target < V)
    top = float("-inf")
    total = 0.0
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        x = tl.load(logit_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    own = tl.load(logit_ptr + target, mask=counts, other=0.0).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(counts, tl.log(total) + (top - own), 0.0))
    if GRADIENT:
        scale = tl.where(counts, 1.0 / total, 0.0)
        for start in range(0, V, BV):
            v = start + tl.arange(0, BV)
            x = tl.load(logit_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
            d = tl.exp(x - top) * scale - tl.where(v == target, 1.0, 0.0)
            tl.store(logit_ptr + v, d.to(logit_ptr.dtype.element_ty), mask=v < V)


# %%
if runs_triton(hidden):
    logits, losses = hidden @ weight.T, torch.empty(50)
    true = F.cross_entropy(logits, targets, reduction="none")
    cross_entropy_kernel[(50,)](logits, targets, losses, 1000, False, 256)
    torch.testing.assert_close(losses, true)

# %% [markdown]
# ## Block by block
#
# A block has as many rows as make half a GiB of bf16 logits: enough to fill the GPU, little beside the weights.
# The logits are in the dtype of the inputs, the arithmetic on them is in fp32.


# %%
#| export
def rows_at_once(vocabulary: int) -> int:
    """How many rows of logits to hold: 2**28 elements' worth."""
    return max(128, 2**28 // vocabulary // 128 * 128)


class LinearCrossEntropy(torch.autograd.Function):
    """`triton_linear_cross_entropy` with its gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows):
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight) if needs_weight else None
        width = min(4096, triton.next_power_of_2(len(weight)))
        for start in range(0, len(hidden), rows):
            block = slice(start, start + rows)
            logits = hidden[block] @ weight.T
            cross_entropy_kernel[(len(logits),)](
                logits, targets[block], losses[block], len(weight), needs_hidden or needs_weight, width, num_warps=8
            )
            if needs_hidden:
                torch.mm(logits, weight, out=d_hidden[block])
            if needs_weight:
                d_weight.addmm_(logits.T, hidden[block])
        ctx.save_for_backward(d_hidden, d_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        # in place: a second backward pass through the same graph is refused by autograd, not answered wrongly
        return *(None if d is None else d.mul_(grad) for d in (d_hidden, d_weight)), None, None


# %%
#| export
def triton_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
    """`linear_cross_entropy` block by block, `rows` at a time. One-line TypeError or ValueError on bad arguments."""
    (T, H), V, device = hidden.shape, len(weight), hidden.device
    if not runs_triton(hidden):
        raise ValueError(f"hidden is on {device}; the Triton loss wants CUDA, or Triton's interpreter on the CPU")
    want("hidden", hidden, (T, H), (torch.float32, torch.bfloat16, torch.float16), device)
    want("weight", weight, (V, H), (hidden.dtype,), device)
    want("targets", targets, (T,), (torch.int32, torch.int64), device)
    return LinearCrossEntropy.apply(
        hidden.contiguous(), weight.contiguous(), targets.contiguous(), rows or rows_at_once(V)
    )


# %%
def worst_error(hidden, weight, targets, rows):
    ours = [t.clone().requires_grad_() for t in (hidden, weight)]
    true = [t.double().requires_grad_() for t in (hidden, weight)]
    fast, exact = triton_linear_cross_entropy(*ours, targets, rows), reference_linear_cross_entropy(*true, targets)
    (fast / 3).backward()
    (exact / 3).backward()
    pairs = [(fast, exact)] + [(a.grad, b.grad) for a, b in zip(ours, true, strict=True)]
    return [f"{((a - b).norm() / b.norm()).item():.1e}" for a, b in pairs]


if runs_triton(hidden):
    print("relative error of loss, d_hidden, d_weight:", worst_error(hidden, weight, targets, rows=16))

# %% [markdown]
# ## Which runs when


# %%
#| export
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of the cross-entropy of `hidden @ weight.T`: an fp32 scalar, in nats.

    hidden (T, H) and weight (V, H) in one dtype; targets (T,) integers in [0, V), -100 for a row to leave out. On
    CUDA the logits exist a block of rows at a time and the graph can be walked backwards once; elsewhere
    PyTorch does it all at once.
    """
    run = triton_linear_cross_entropy if hidden.is_cuda and runs_triton(hidden) else reference_linear_cross_entropy
    return run(hidden, weight, targets)


# %%
torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), loss)

# %% [markdown]
# On an H100, with 16,384 tokens of 2,048 features and that vocabulary in bf16, loss and gradients took 53 ms and 1.6
# GiB beyond inputs; all at once in PyTorch, 81 ms and 27.8 GiB.
#
# What it buys, drawn: memory for logits and their gradient against the number of tokens, for Qwen3's vocabulary.

# %%
import matplotlib.pyplot as plt

V, tokens = 151936, torch.arange(0, 16385, 1024)
fig, ax = plt.subplots(figsize=(6, 3))
ax.plot(tokens, tokens * V * 8 / 2**30, label="all at once, fp32")
ax.plot(tokens, torch.clamp(tokens, max=rows_at_once(V)) * V * 2 / 2**30, label="block by block, bf16")
ax.set(title="Memory of the logits and their gradient", xlabel="tokens", ylabel="GiB")
ax.legend()
fig

# %% [markdown]
# Next: [the layers](20_router.py) that these kernels serve.
