# %% [markdown]
# # RMSNorm
#
# > Scales every token's vector to unit root-mean-square before a layer reads it.
#
# The residual stream of a transformer grows as layers add to it. Each layer therefore reads a normalised
# copy: divided by its root mean square, then scaled feature by feature with a learned $g$
# (arXiv 1910.07467):
#
# $$y = g \odot \frac{x}{\sqrt{\tfrac{1}{H}\sum_i x_i^2 + \epsilon}}$$

# %%
#| default_exp layers.norm

# %%
#| export
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pithtrain.kernels.lang import wanted

# %% [markdown]
# The smallest true implementation is that line. The mean of squares is taken in float32 whatever the
# input is: bfloat16 has 8 bits of mantissa, too few to sum thousands of squares.


# %%
def rms_norm_reference(x, weight, eps):
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


# %% [markdown]
# ## With its backward by hand
#
# Autograd would keep two tensors of the size of $x$, the input in float32 and the normalised copy, and walk
# back through every operation apart. The gradient needs only $x$, in its own dtype, and one number a token,
# $r = 1/\sqrt{\tfrac1H\sum x_i^2+\epsilon}$. With $\hat x = r x$ and $\bar{\hat x} = g \odot \bar y$,
#
# $$\bar x = r \left( \bar{\hat x} - \hat x\, \tfrac{1}{H} \langle \bar{\hat x}, \hat x \rangle \right),
#   \qquad \bar g = \sum_{\text{tokens}} \bar y \odot \hat x.$$


# %%
#| export
class RMSNormFunction(torch.autograd.Function):
    """y = weight * x / rms(x) over the last axis, statistics in fp32. Source: arXiv 1910.07467."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        square = torch.linalg.vecdot(x32, x32).unsqueeze(-1)
        inverse = torch.rsqrt(square / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x32 * inverse).to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        unit = x.float() * inverse
        grad32 = grad.float()
        features = x.shape[-1]
        wants_x, wants_weight = wanted(ctx)
        grad_x = grad_weight = None
        if wants_weight:
            grad_weight = torch.linalg.vecdot(grad32.reshape(-1, features), unit.reshape(-1, features), dim=0)
            grad_weight = grad_weight.to(weight.dtype)
        if wants_x:
            grad_unit = grad32 * weight
            mean = torch.linalg.vecdot(grad_unit, unit).unsqueeze(-1) / features
            grad_x = grad_unit.addcmul_(unit, mean, value=-1).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None


# %% [markdown]
# On a GPU torch has one kernel for all of it, forward, and two backward; on a CPU it has none.
#
# Some families store the scale as its difference from 1 (an `offset` of 1): $y = (1 + g) \odot \hat x$. The function is
# the same. What differs is where weight decay, if applied to it, would pull: to a plain normalisation, not to silence.


# %%
#| export
class RMSNorm(nn.Module):
    """RMSNorm over the last axis, of `features` features, scaled by `offset` + weight; the scale begins at 1."""

    def __init__(self, features: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((features,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (..., features); the dtype stays."""
        scale = self.offset + self.weight if self.offset else self.weight
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], scale.to(x.dtype), self.eps)
        return RMSNormFunction.apply(x, scale, self.eps)


# %%
torch.manual_seed(0)
norm = RMSNorm(64, eps=1e-6)
torch.nn.init.normal_(norm.weight)
x = (3 * torch.randn(2, 5, 64)).requires_grad_()
seed = torch.randn(2, 5, 64)
ours = (norm(x), *torch.autograd.grad(norm(x), (x, norm.weight), seed))
y = rms_norm_reference(x, norm.weight, 1e-6)
for a, b in zip(ours, (y, *torch.autograd.grad(y, (x, norm.weight), seed)), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
around_zero = RMSNorm(64, eps=1e-6, offset=1.0)
around_zero.weight.data.copy_(norm.weight.data - 1)
torch.testing.assert_close(around_zero(x), y, rtol=1e-5, atol=1e-5)

# %% [markdown]
# Before and after, for tokens of very different size:

# %%
import matplotlib.pyplot as plt

sizes = torch.logspace(-2, 2, 40)
stream = torch.randn(40, 64) * sizes[:, None]
fig, ax = plt.subplots(figsize=(6, 3.2))
for eps in (1e-6, 1e-2):
    after = RMSNorm(64, eps)(stream).detach().square().mean(1).sqrt()
    ax.loglog(stream.square().mean(1).sqrt(), after, "o-", ms=3, label=f"eps = {eps:g}")
ax.set(title="RMSNorm flattens sizes, down to where eps begins", xlabel="rms before", ylabel="rms after")
ax.legend()
fig

# %% [markdown]
# Next: how attention learns where a token stands: [rotary positions](25_rotary.py).
