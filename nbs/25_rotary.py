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
import torch
from torch import Tensor

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
def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (..., head_dim / 2) fp32, for integer `positions` (...)."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    # A quotient, not a negative power: the table then equals the one checkpoints were trained with to the bit.
    angles = positions.float().unsqueeze(-1) * (1.0 / theta ** (pairs / head_dim))
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
# Near distances are read off the fast hands, far ones off the slow.


# %%
#| export
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` (batch, sequence, heads, head_dim) by a table of (sequence, head_dim / 2); dtype stays."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


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
# Next: [attention](26_attention.py), which uses it.
