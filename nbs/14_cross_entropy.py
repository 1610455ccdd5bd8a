# %% [markdown]
# # A row of logits becomes its loss and its gradient
#
# > Cross-entropy of rows of logits, which turn into their own gradient in the same memory.
#
# The last product of a language model is its widest. With 16,384 tokens and Qwen3's 151,936 words, the logits
# in fp32 are 10 GB, their gradient another 10 GB, and no row of them is needed for long. The loss needs one number
# of a row, and the gradient of a row needs only that row. So [the loss](27_loss.py) multiplies a block of rows,
# turns it into its loss *and its gradient* on the spot, multiplies that back, and forgets it:
#
# ```
# for a block of rows:   hidden ──▶ logits ──▶ loss, and in the same memory softmax − onehot
#                                                  ├──▶ × weight  = grad_hidden of the block
#                                                  └──▶ ᵀ × hidden, added to grad_weight
# ```
#
# The step in the middle is this notebook's. In PyTorch it reads or writes the block about ten times; it need
# be read twice and written once.

# %%
#| default_exp kernels.cross_entropy

# %%
#| export
import torch
from torch import Tensor

from pithtrain.kernels.lang import kernels_serve, tl, triton, want

# %% [markdown]
# ## The maths
#
# For a row of logits $\ell$ with target $y$, the loss in nats and its gradient are
#
# $$L = \log \sum_v e^{\ell_v} - \ell_y, \qquad
#   \frac{\partial L}{\partial \ell_v} = \frac{e^{\ell_v}}{\sum_j e^{\ell_j}} - [v = y].$$
#
# A target of -100 marks a row that does not count; any other that is no word is a mistake, which PyTorch refuses and
# the kernel, which cannot stop, answers with a loss of NaN. The smallest true implementation, which serves the CPU too:


# %%
#| export
def reference_row_losses(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """`row_losses` in plain PyTorch, at least in fp32."""
    counted = targets != -100
    own = targets.where(counted, 0).unsqueeze(1)
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    losses = -logs.gather(1, own).squeeze(1).where(counted, 0)
    if gradient:
        probs = logs.exp_()
        probs.scatter_add_(1, own, probs.new_full(own.shape, -1.0))
        logits.copy_(probs.mul_(counted.unsqueeze(1)))
    return losses


# %%
torch.manual_seed(0)
logits = torch.randn(50, 1000)
targets = torch.randint(0, 1000, (50,))
targets[::7] = -100
leaf = logits.clone().requires_grad_()
true = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
true.sum().backward()
gradient = logits.clone()
losses = reference_row_losses(gradient, targets, gradient=True)
torch.testing.assert_close(losses, true)
torch.testing.assert_close(gradient, leaf.grad)
print(f"{losses.sum() / (targets >= 0).sum():.3f} nats a row; log(1000) = {torch.tensor(1000.0).log():.3f}")

# %% [markdown]
# Worse than knowing nothing, since these logits are noise: with a variance of 1 they raise $\log\sum_v e^{\ell_v}$ to
# about $\log 1000 + 1/2$, and what the targets' own logits are leaves 42 rows uncertain by 0.15.
#
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
    target = tl.load(target_ptr + row)
    counts = target != -100
    known = (target >= 0) & (target < V)
    target = target.to(tl.int32)
    # Before the loop, whose reductions all warps wait for: behind it another warp may have overwritten this logit.
    own = tl.load(logit_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    top = float("-inf")
    total = 0.0
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        x = tl.load(logit_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing yet but minus infinity
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
        top = higher
    tl.store(loss_ptr + row, tl.where(counts, tl.log(total) + (top - own), 0.0))
    if GRADIENT:
        scale = tl.where(counts, 1.0 / total, 0.0)
        for start in range(0, V, BV):
            v = start + tl.arange(0, BV)
            x = tl.load(logit_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
            d = tl.exp(x - top) * scale - tl.where(v == target, 1.0, 0.0)
            tl.store(logit_ptr + v, d.to(logit_ptr.dtype.element_ty), mask=v < V)


# %% [markdown]
# Which runs when: the kernel on CUDA (and, to test it, under Triton's interpreter), PyTorch elsewhere.


# %%
#| export
def triton_row_losses(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """`row_losses` by the kernel. Raises TypeError or ValueError, one line, on bad arguments."""
    want("logits", logits, (None, None), (torch.float32, torch.bfloat16, torch.float16))
    T, V = logits.shape
    want("targets", targets, (T,), (torch.int32, torch.int64), logits.device)
    if V == 0:
        raise ValueError(f"logits has shape {(T, V)}; want at least one word")
    if not (logits.is_contiguous() and targets.is_contiguous()):
        raise ValueError("logits and targets must be contiguous: logits are overwritten where they are")
    losses = torch.empty(T, dtype=torch.float32, device=logits.device)
    if T:
        width = min(4096, triton.next_power_of_2(V))
        cross_entropy_kernel[(T,)](logits, targets, losses, V, gradient, width, num_warps=8)
    return losses


# %%
from pithtrain.kernels.lang import runs_triton

if runs_triton(logits):
    gradient = logits.clone()
    torch.testing.assert_close(triton_row_losses(gradient, targets, gradient=True), true)
    torch.testing.assert_close(gradient, leaf.grad)


# %%
#| export
def row_losses(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """Losses (T,) in nats of `logits` (T, V), which, if `gradient`, are overwritten with the gradient of their sum.

    targets (T,) integers in [0, V), -100 for a row that does not count. fp32 arithmetic, whatever the logits' dtype."""
    run = triton_row_losses if kernels_serve(logits) else reference_row_losses
    return run(logits, targets, gradient)


# %%
assert torch.equal(row_losses(logits, targets, gradient=False), losses)

# %% [markdown]
# Next: softmax attention [in pieces](15_attention_pieces.py).
