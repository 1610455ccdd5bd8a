# %% [markdown]
# # Rotary positions
#
# > Rotates pairs of features by an angle proportional to the position, so that attention sees distance.
#
# Attention compares a query with a key by their inner product, which does not know where either stands.
# Rotary embeddings (arXiv 2104.09864) rotate both, by angles that grow with the position; the inner
# product of two rotated vectors then depends on the *difference* of their positions alone.

# %%
#| default_exp layers.rotary

# %%
#| export
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pithtrain.kernels.lang import kernels_serve
from pithtrain.kernels.rotary import triton_rotate

# %% [markdown]
# ## The maths
#
# A head of $d$ features is $d/2$ pairs; pair $i$ turns with frequency $\theta^{-2i/d}$. Token $t$'s pair
# $(x_i, x_{i+d/2})$ becomes
#
# $$\begin{pmatrix} x'_i \\ x'_{i+d/2} \end{pmatrix} =
#   \begin{pmatrix} \cos\phi & -\sin\phi \\ \sin\phi & \cos\phi \end{pmatrix}
#   \begin{pmatrix} x_i \\ x_{i+d/2} \end{pmatrix}, \qquad \phi = t\,\theta^{-2i/d}.$$
#
# The angles do not depend on the data: a table of cosines and sines is made once.


# %%
#| export
def frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair of a head, (head_dim / 2,) fp32."""
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    # A quotient, not a negative power: the table then equals the one checkpoints were trained with to the bit.
    return 1.0 / theta ** (pairs / head_dim)


# %%
print("positions per turn:", [round(turn) for turn in (2 * math.pi / frequencies(16, 10_000.0)).tolist()])


# %%
#| export
def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (..., head_dim / 2) fp32, for integer `positions` (...)."""
    angles = positions.float().unsqueeze(-1) * frequencies(head_dim, theta, positions.device)
    return angles.cos(), angles.sin()


# %%
import matplotlib.pyplot as plt

cos, sin = rotary_table(torch.arange(128), head_dim=32, theta=10_000.0)
fig, ax = plt.subplots(figsize=(6.5, 3))
image = ax.imshow(cos.T, aspect="auto", cmap="RdBu")
ax.set(title="cos of the angles: fast pairs above, slow pairs below", xlabel="position", ylabel="pair")
fig.colorbar(image)
fig

# %% [markdown]
# Each pair is a clock hand: the first turns once in about six tokens, the last hardly moves in a thousand.
# Near distances are read off the fast hands, far ones off the slow. On a GPU [a kernel](17_rotary_kernel.py) turns
# them, in one pass.


# %%
#| export
def rotate(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> Tensor:
    """Rotate `x` (batch, sequence, heads, head_dim) by a table in fp32; dtype stays.

    `cos` and `sin` are (sequence, head_dim / 2) or (batch, sequence, head_dim / 2). A pair is feature i of each half
    or, if `neighbours`, features 2i and 2i + 1."""
    if kernels_serve(x):
        return triton_rotate(x, cos, sin, neighbours)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if neighbours else x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, dim=-1).flatten(-2) if neighbours else torch.cat(turned, dim=-1)


# %% [markdown]
# The property that it exists for: shift the query and the key by the same number of positions, and their
# inner product does not change.

# %%
torch.manual_seed(0)
query, key = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)


def score(query_position, key_position):
    q, k = (
        rotate(x, *rotary_table(torch.tensor([p]), 32, 10_000.0))
        for x, p in ((query, query_position), (key, key_position))
    )
    return (q * k).sum().item()


for shift in (0, 10, 100):
    print(f"positions {7 + shift:3} and {2 + shift:3}: {score(7 + shift, 2 + shift):.5f}")
assert abs(score(7, 2) - score(107, 102)) < 1e-4

# %% [markdown]
# ## Neighbouring pairs
#
# Which features make a pair is a convention, but one that a checkpoint's weights are bound to. DeepSeek's
# models pair neighbours, $(x_{2i}, x_{2i+1})$, where most others pair halves. With the features moved accordingly, the
# two are the same:

# %%
table = rotary_table(torch.tensor([7]), 32, 10_000.0)
places = torch.arange(32).view(2, 16).t().flatten()  # 0, 16, 1, 17, ...: halves to neighbours
moved = rotate(query[..., places], *table, neighbours=True)
assert torch.equal(moved, rotate(query, *table)[..., places])

# %% [markdown]
# ## Longer than it was trained on: YaRN
#
# A slow hand that moved through a quarter turn over the $L$ positions of training meets angles at
# position $2L$ that it has never seen. A fast hand has been everywhere already. YaRN (arXiv 2309.00071)
# stretches a context by a factor $s$ accordingly: with $r_i = L\,\theta^{-2i/d} / 2\pi$ the turns of pair $i$
# within the training length, frequencies of pairs with $r_i$ above $\beta_\text{fast}$ stay, those below
# $\beta_\text{slow}$ are divided by $s$ (so position $sL$ looks as $L$ did), and a linear ramp
# $\gamma$ over $i$ leads from one to the other:
#
# $$f_i = (1 - \gamma_i)\, \theta^{-2i/d} + \gamma_i\, \frac{\theta^{-2i/d}}{s}, \qquad
#   \gamma_i = \operatorname{clamp}\!\left(\frac{i - i_\text{fast}}{i_\text{slow} - i_\text{fast}}, 0, 1\right), \qquad
#   i_\beta = \frac{d \ln (L / 2\pi\beta)}{2 \ln \theta}.$$
#
# $i_\beta$ is the pair that makes $\beta$ turns. DeepSeek rounds both ends of the ramp outwards to whole
# pairs (`truncate`), GPT-OSS does not.


# %%
#| export
class Yarn(NamedTuple):
    """A context of `factor` times the training `length`, in positions; see `yarn_frequencies`."""

    factor: float
    length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


# %%
#| export
def yarn_frequencies(head_dim: int, theta: float, yarn: Yarn, device: torch.device | None = None) -> Tensor:
    """`frequencies` for a context that `yarn` stretches.

    Pairs of more than `beta_fast` turns in its `length` keep theirs, pairs of fewer than `beta_slow` are slowed
    by `factor`; `truncate` rounds the ends of the ramp between them to whole pairs. Source: arXiv 2309.00071."""
    factor, length, *betas, truncate = yarn
    plain, pairs = frequencies(head_dim, theta, device), torch.arange(head_dim // 2, device=device).float()
    if factor == 1:
        return plain
    fast, slow = (head_dim * math.log(length / (2 * math.pi * beta)) / (2 * math.log(theta)) for beta in betas)
    if truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, head_dim - 1)
    # The order of these roundings is that of published code: the result equals it to the bit.
    keep = 1 - ((pairs - fast) / (slow - fast or 0.001)).clamp(0, 1)
    slowed = 1.0 / (factor * theta ** (2 * pairs / head_dim))
    return slowed * (1 - keep) + plain * keep


# %%
fig, ax = plt.subplots(figsize=(6.5, 3))
for name, theta, yarn in (
    ("DeepSeek-V3, 4,096 positions to 40 times as many", 10_000.0, Yarn(40.0, 4096)),
    ("GPT-OSS, 4,096 to 32 times as many", 150_000.0, Yarn(32.0, 4096, truncate=False)),
):
    kept = yarn_frequencies(64, theta, yarn) / frequencies(64, theta)
    ax.semilogy(kept, "o-", ms=3, label=name)
ax.set(title="YaRN slows the slow pairs and leaves the fast alone", xlabel="pair", ylabel="frequency, scaled / plain")
ax.legend(fontsize=8, loc="lower left")
fig

# %% [markdown]
# In the figure the ramp lies where a pair makes between 32 turns and one in 4,096 positions.
#
# A longer context also flattens the softmax: there are more keys to share it. YaRN sharpens it again by a
# *magnitude*, found by experiment, on the queries and on the keys:


# %%
#| export
def yarn_magnitude(factor: float, strength: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by in a context `factor` times as long: 0.1 strength ln(factor) + 1."""
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


# %%
for factor in (1, 4, 32, 40):
    magnitude = yarn_magnitude(factor)
    print(f"{factor:2} times as long: {magnitude:.4f}, squared on the scores {magnitude**2:.4f}")

# %% [markdown]
# GPT-OSS multiplies the table by it, and so all of query and key, which are rotated whole. DeepSeek rotates
# only a part of each head and puts the square into the softmax's scale instead.


# %%
#| export
def yarn_table(
    positions: Tensor, head_dim: int, theta: float, yarn: Yarn, magnitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`rotary_table` with `yarn_frequencies`, cosines and sines multiplied by `magnitude`."""
    angles = positions.float().unsqueeze(-1) * yarn_frequencies(head_dim, theta, yarn, positions.device)
    return angles.cos() * magnitude, angles.sin() * magnitude


# %% [markdown]
# How familiar is what lies beyond? A slow pair's cosine over four training lengths, plain and stretched by four:
# stretched, it stays within what training has shown, the shaded part of the axis.

# %%
positions = torch.arange(4 * 4096)
plain, stretched = rotary_table(positions, 64, 10_000.0), yarn_table(positions, 64, 10_000.0, Yarn(4.0, 4096))
fig, ax = plt.subplots(figsize=(6.5, 3))
ax.plot(plain[0][:, -4], label="plain")
ax.plot(stretched[0][:, -4], label="YaRN")
seen = plain[0][:4096, -4]
ax.axhspan(seen.min(), seen.max(), color="0.9")
ax.axvline(4096, color="0.5", ls=":")
ax.set(title="A slow pair beyond the training length", xlabel="position", ylabel="cosine of pair 28 of 32")
ax.legend()
assert stretched[0][:, -4].min() >= seen.min() - 1e-3
fig

# %% [markdown]
# Next: [attention](26_attention.py), which uses it.
