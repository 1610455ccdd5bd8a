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
# only scales. A chunk's logits stay in the cache: that is faster as well as smaller.


# %%
#| export
class LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `hidden @ weight.T`, gradients made chunk by chunk in the forward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, training: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if training else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if training else None
        for start in range(0, len(hidden), chunk):
            piece = slice(start, start + chunk)
            wanted = targets[piece]
            counted = wanted != -100
            safe = wanted.where(counted, 0).unsqueeze(1)
            logits = (hidden[piece] @ matrix.t()).float()
            log_total = torch.logsumexp(logits, dim=1, keepdim=True)
            total += ((log_total - logits.gather(1, safe)).squeeze(1) * counted).sum()
            if training:
                grad = logits.sub_(log_total).exp_()
                grad.scatter_add_(1, safe, grad.new_full(safe.shape, -1.0))
                grad = grad.mul_(counted.unsqueeze(1)).to(hidden.dtype)
                torch.mm(grad, matrix, out=grad_hidden[piece])
                grad_weight += grad.t() @ hidden[piece]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad).to(ctx.weight_dtype), None, None, None


# %%
#| export
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_elements: int = 1 << 21) -> Tensor:
    """Sum over tokens of the cross-entropy in nats, an fp32 scalar.

    `hidden` (T, H), `weight` (V, H), `targets` (T,) int64 with -100 for tokens that do not count. At most
    `chunk_elements` logits exist at a time. Differentiable once in `hidden` and `weight`.
    """
    chunk = max(1, chunk_elements // weight.shape[0])
    training = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearCrossEntropy.apply(hidden, weight, targets, chunk, training)


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
# Memory for logits and their gradient in float32, against the number of tokens, for the vocabulary of
# Qwen3 (151,936 entries). The chunked form is flat.

# %%
import matplotlib.pyplot as plt

tokens = [2**n for n in range(8, 17)]
fig, ax = plt.subplots(figsize=(6, 3.2))
ax.loglog(tokens, [2 * 4 * t * 151_936 / 2**30 for t in tokens], "o-", label="whole logits")
ax.loglog(tokens, [2 * 4 * min(t * 151_936, 1 << 21) / 2**30 for t in tokens], "o-", label="chunks")
ax.set(title="Memory of the loss", xlabel="tokens", ylabel="GiB")
ax.legend()
fig

# %% [markdown]
# Next: the pieces put together into a decoder layer, cut in [five stages](30_stages.py).
