# %% [markdown]
# # Cross-entropy without the logits
#
# > The language-modelling loss straight from the last hidden state, a chunk of tokens at a time.
#
# A language model is trained to give the next token a high probability. Its last layer multiplies every
# token's hidden state with the whole vocabulary, and the result, the *logits*, is the largest tensor of
# the step: 16,384 tokens by 151,936 entries is 10 GB in float32, and its gradient is as large again.
# Neither has to exist.

# %%
#| default_exp layers.loss

# %%
#| export
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pithtrain.kernels.cross_entropy import row_losses
from pithtrain.kernels.lang import FLOATS, want, wanted

# %% [markdown]
# ## The maths
#
# With hidden states $h_t$, head $W$ of $V$ rows, and targets $y_t$,
#
# $$z_t = W h_t, \qquad \ell_t = \log \sum_{v} e^{z_{t,v}} - z_{t,y_t}, \qquad
#   \frac{\partial \ell_t}{\partial z_{t}} = \operatorname{softmax}(z_t) - \mathbf{1}_{y_t}.$$
#
# The smallest true implementation:


# %%
def cross_entropy_reference(hidden, weight, targets):
    return torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")


# %% [markdown]
# The gradient of $z_t$ needs only $z_t$, and everything it is used for, $\bar h_t = \bar z_t W$ and
# $\bar W = \sum_t \bar z_t h_t^\top$, can be computed as soon as it is known. So the forward takes a chunk
# of tokens, makes its logits, its loss *and* its gradients, and throws the logits away. The backward then
# only scales. How a chunk's logits turn into losses, and in the same memory into their gradient, is the business
# of [a kernel](14_cross_entropy.py). On a CPU a chunk's logits stay in the cache: that is faster as well as smaller. On
# a GPU a chunk is what fills the device, half a GiB in bf16, little beside the weights.
#
# The price is that $\bar W$ exists from the forward on, in fp32 and as large as the head, for every loss whose backward
# is still to come. In a [pipeline](56_describe.py) that is one for each live microbatch of the last stage.


# %%
#| export
class LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `hidden @ weight.T`, gradients made chunk by chunk in the forward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, training: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden, matrix, targets = hidden.contiguous(), weight.to(hidden.dtype), targets.contiguous()
        grad_hidden = torch.empty_like(hidden) if training else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if training else None
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            logits = hidden[piece] @ matrix.t()
            total += row_losses(logits, targets[piece], training).sum()
            if training:
                torch.mm(logits, matrix, out=grad_hidden[piece])
                if hidden.is_cuda and hidden.element_size() == 2:  # added in fp32 as it is multiplied
                    torch.addmm(grad_weight, logits.t(), hidden[piece], out_dtype=torch.float32, out=grad_weight)
                else:
                    grad_weight += logits.t() @ hidden[piece]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        wants_hidden, wants_weight, _ = wanted(ctx)
        grad_hidden = grad_hidden * grad.to(grad_hidden.dtype) if wants_hidden else None
        return grad_hidden, (grad_weight * grad).to(ctx.weight_dtype) if wants_weight else None, None, None, None


# %%
#| export
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_elements: int | None = None) -> Tensor:
    """Sum over tokens of the cross-entropy in nats, an fp32 scalar.

    `hidden` (T, H), `weight` (V, H), `targets` (T,) int64 with -100 for tokens that do not count. At most
    `chunk_elements` logits exist at a time, 2**28 on CUDA and 2**21 elsewhere. Differentiable once in `hidden` and
    `weight`. Raises TypeError or ValueError, one line, on bad arguments."""
    want("hidden", hidden, (None, None), FLOATS, hidden.device)
    want("weight", weight, (None, hidden.shape[1]), FLOATS, hidden.device)
    want("targets", targets, (len(hidden),), (torch.int64,), hidden.device)
    if chunk_elements is not None and chunk_elements < 1:
        raise ValueError(f"chunk_elements is {chunk_elements}; want at least 1")
    if len(weight) == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; want at least one word")
    rows = (chunk_elements or (1 << 28 if hidden.is_cuda else 1 << 21)) // weight.shape[0]
    rows = rows // 128 * 128 or max(1, rows)
    training = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearCrossEntropy.apply(hidden, weight, targets, rows, training)


# %%
torch.manual_seed(0)
hidden, weight = torch.randn(100, 32).requires_grad_(), torch.randn(500, 32).requires_grad_()
targets = torch.randint(500, (100,))
targets[::7] = -100
expected = cross_entropy_reference(hidden, weight, targets)
got = linear_cross_entropy(hidden, weight, targets, chunk_elements=500 * 33)
torch.testing.assert_close(got, expected)
for a, b in zip(
    torch.autograd.grad(got / 86, (hidden, weight)),
    torch.autograd.grad(expected / 86, (hidden, weight)),
    strict=True,
):
    torch.testing.assert_close(a, b)

# %% [markdown]
# ## What it saves
#
# Memory for logits and their gradient, against the number of tokens, for the vocabulary of Qwen3 (151,936
# entries). The chunked form is flat.

# %%
import matplotlib.pyplot as plt

V, tokens = 151_936, [2**n for n in range(8, 17)]
fig, ax = plt.subplots(figsize=(6, 3.2))
ax.loglog(tokens, [2 * 4 * t * V / 2**30 for t in tokens], "o-", label="whole logits, fp32")
ax.loglog(tokens, [2 * min(t * V, 1 << 28) / 2**30 for t in tokens], "o-", label="chunks on a GPU, bf16")
ax.loglog(tokens, [4 * min(t * V, 1 << 21) / 2**30 for t in tokens], "o-", label="chunks on a CPU, fp32")
ax.set(title="Memory of the logits and their gradient", xlabel="tokens", ylabel="GiB")
ax.legend()
fig

# %% [markdown]
# Next: the pieces put together into a decoder layer, cut in [five stages](30_stages.py).
