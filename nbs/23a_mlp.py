# %% [markdown]
# # The gated MLP
#
# > Two projections up, one of them a gate for the other, and one down: SwiGLU, dense.
#
# An expert is an MLP that some tokens visit. Some families keep a few that *every* token visits as well: a
# *shared expert* beside the routed ones, for what all tokens need (DeepSeekMoE, arXiv 2401.06066), and plain
# *dense layers* at the bottom of the model, where routing is slow to settle. All of these are this MLP.

# %%
#| default_exp layers.mlp

# %%
#| export
import torch.nn.functional as F
from torch import Tensor, nn

from pithtrain.layers.linear import Linear

# %% [markdown]
# ## The maths
#
# With $G$ and $U$ stacked in one matrix, so that both products are one (SwiGLU, arXiv 2002.05202):
#
# $$\operatorname{MLP}(x) = D\,\bigl(\operatorname{silu}(G x) \odot U x\bigr), \qquad
#   \operatorname{silu}(z) = \frac{z}{1 + e^{-z}}.$$


# %%
#| export
class MLP(nn.Module):
    """SwiGLU of width `inner` over `hidden` features; `gate_up` holds the gate's rows first."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_up = Linear(hidden, 2 * inner)
        self.down = Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) to the same."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


# %% [markdown]
# Several shared experts need no code of their own: the sum of $n$ MLPs of width $D$ *is* one MLP of width
# $nD$, whose inner features are theirs side by side.

# %%
import torch

torch.manual_seed(0)
one, other, both = MLP(8, 5), MLP(8, 5), MLP(8, 10)
with torch.no_grad():
    halves = [mlp.gate_up.weight.chunk(2) for mlp in (one, other)]
    both.gate_up.weight.copy_(torch.cat([halves[0][0], halves[1][0], halves[0][1], halves[1][1]]))
    both.down.weight.copy_(torch.cat([one.down.weight, other.down.weight], dim=1))
x = torch.randn(3, 8)
print("largest difference:", (both(x) - one(x) - other(x)).abs().max().item())
torch.testing.assert_close(both(x), one(x) + other(x))

# %% [markdown]
# What the gate does: the feature $\operatorname{silu}(g)\,u$ over its two inputs. It is open (linear in $u$)
# on the right, shut on the left, and the edge between is smooth, so that both can learn.

# %%
import matplotlib.pyplot as plt

g, u = torch.meshgrid(torch.linspace(-6, 6, 121), torch.linspace(-3, 3, 61), indexing="xy")
fig, ax = plt.subplots(figsize=(6, 3))
image = ax.imshow(F.silu(g) * u, extent=(-6, 6, -3, 3), origin="lower", aspect="auto", cmap="RdBu")
ax.set(title="One inner feature of a SwiGLU", xlabel="gate g", ylabel="up u")
fig.colorbar(image, label="silu(g) u")
fig

# %% [markdown]
# Next: the [norm](24_norm.py) in front of it.
