# %% [markdown]
# # Grouped-query attention
#
# > Causal attention in which several query heads share one key and value head.
#
# Attention lets a token read from those before it. Each query head compares its query with every earlier
# key and takes the average of the values, weighted by how well they match. In *grouped-query* attention
# (arXiv 2305.13245) a group of query heads shares a key and value head: the cache that generation needs
# shrinks by the size of the group, the quality hardly suffers.

# %%
#| default_exp layers.attention

# %%
#| export
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pithtrain.layers.linear import Linear
from pithtrain.layers.norm import RMSNorm
from pithtrain.layers.rotary import rotate

# %% [markdown]
# ## The maths
#
# For query head $h$ with key and value head $\lfloor h / g \rfloor$, where $g$ is the size of a group,
#
# $$o_t^h = \sum_{s \le t} \operatorname{softmax}_s\!\left( \frac{q_t^h \cdot k_s}{\sqrt d} \right) v_s.$$
#
# The smallest true implementation writes the score matrix out:


# %%
def attention_reference(q, k, v):
    """q (batch, heads, sequence, d); k, v (batch, kv_heads, sequence, d)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ v


# %% [markdown]
# It needs memory that grows with the square of the sequence. torch's `scaled_dot_product_attention` never
# forms the matrix: it walks over blocks of keys and keeps a running softmax (FlashAttention, arXiv
# 2205.14135). It is the fast implementation here, on CPU and GPU.

# %%
torch.manual_seed(0)
q, k, v = torch.randn(2, 8, 64, 16), torch.randn(2, 2, 64, 16), torch.randn(2, 2, 64, 16)
fast = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
torch.testing.assert_close(fast, attention_reference(q, k, v))

# %% [markdown]
# ## The layer
#
# Qwen3's form normalises each head's query and key (an RMSNorm of `head_dim` features) before the
# rotation. It bounds the scores: without it, training at a high learning rate can drive them to where the
# softmax saturates.


# %%
#| export
class Attention(nn.Module):
    """Causal grouped-query attention with RMSNorm on queries and keys (Qwen3, arXiv 2505.09388)."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, norm_eps: float):
        super().__init__()
        self.head_dim = head_dim
        self.query = Linear(hidden, heads * head_dim)
        self.key = Linear(hidden, kv_heads * head_dim)
        self.value = Linear(hidden, kv_heads * head_dim)
        self.output = Linear(heads * head_dim, hidden)
        self.query_norm = RMSNorm(head_dim, norm_eps)
        self.key_norm = RMSNorm(head_dim, norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, sequence, hidden) to the same, with the rotary table of the sequence's positions."""
        batch, sequence, _ = x.shape
        q = self.query(x).view(batch, sequence, -1, self.head_dim)
        k = self.key(x).view(batch, sequence, -1, self.head_dim)
        v = self.value(x).view(batch, sequence, -1, self.head_dim)
        q = rotate(self.query_norm(q), cos, sin).transpose(1, 2)
        k = rotate(self.key_norm(k), cos, sin).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


# %% [markdown]
# No token sees the future: change token 6 of 10, and the outputs before it stay the same to the last bit.

# %%
from pithtrain.layers.rotary import rotary_table

layer = Attention(hidden=32, heads=4, kv_heads=2, head_dim=8, norm_eps=1e-6)
table = rotary_table(torch.arange(10), 8, 10_000.0)
x = torch.randn(1, 10, 32)
changed = x.clone()
changed[0, 6] += 1
difference = (layer(x, *table) - layer(changed, *table)).abs().amax(dim=-1)[0]
print([f"{d:.3f}" for d in difference.tolist()])
assert torch.equal(difference[:6], torch.zeros(6)) and (difference[6:] > 0).all()

# %% [markdown]
# ## What a head looks at
#
# The attention weights (the softmax of the scores) of four query heads of an untrained layer. Heads 0 and 1
# share a key head, as do 2 and 3; the queries differ, so the pictures do.

# %%
import matplotlib.pyplot as plt

with torch.no_grad():
    q = rotate(layer.query_norm(layer.query(x).view(1, 10, 4, 8)), *table).transpose(1, 2)
    k = rotate(layer.key_norm(layer.key(x).view(1, 10, 2, 8)), *table).transpose(1, 2)
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / 8**0.5
    shares = torch.softmax(scores.masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf), dim=-1)[0]
fig, axes = plt.subplots(1, 4, figsize=(9, 2.6), sharey=True)
for head, ax in enumerate(axes):
    ax.imshow(shares[head], cmap="viridis", vmin=0, vmax=1)
    ax.set(title=f"query head {head}, key head {head // 2}", xlabel="key position")
axes[0].set_ylabel("query position")
fig.tight_layout()
fig

# %% [markdown]
# Next: what the whole model is judged by: the [loss](27_loss.py).
