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
from typing import NamedTuple, Protocol

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
# ## The core: how queries meet keys
#
# What a layer computes around attention (projections, norms, rotation) does not depend on where the keys
# are. How queries meet keys does: on one rank, or with each sequence spread over several. So a layer is
# given its *core*, an object with the methods below, and does not ask which one it is.


# %%
#| export
class AttentionCore(Protocol):
    """How queries meet keys. A rank holds whole sequences, or (context parallel) its share of each."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        documents: Tensor | None = None,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention: q (B, heads, S, D), k (B, kv_heads, L, D), v (B, kv_heads, L, Dv) -> (B, heads, S, Dv).

        With L > S the queries are the last S of the L positions (decoding with a cache).
        documents: (N + 1,) int32, boundaries of packed documents over the B * S tokens laid row by row, the
        boundaries of rows included. window: a query sees itself and the window - 1 keys before it.
        sinks: (heads,) the logit of a key without a value.
        """
        ...

    def attend_latent(
        self,
        q: Tensor,
        latent: Tensor,
        key_rope: Tensor,
        expand: Tensor,
        scale: float,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Multi-head latent attention: q (B, heads, S, Dn + Dr), latent (B, L, R), key_rope (B, L, Dr).

        expand (heads, Dn + Dv, R) makes each head's unrotated key and value of a latent; all heads share
        key_rope. Returns (B, heads, S, Dv).
        """
        ...

    def whole_sequence(self, x: Tensor) -> Tensor:
        """(B, S, heads, D) of this rank's tokens -> (B, all tokens in order, this rank's share of heads, D)."""
        ...

    def own_sequence(self, x: Tensor) -> Tensor:
        """The way back from `whole_sequence`."""
        ...


# %%
#| export
class OneRank:
    """The core of a rank that holds whole sequences."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        documents: Tensor | None = None,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        (batch, _, queries, _), keys = q.shape, k.shape[2]
        if documents is None and window is None and sinks is None and queries in (1, keys):
            return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, scale=scale, enable_gqa=True)
        position = torch.arange(keys, device=q.device)
        distance = position[keys - queries :, None] - position
        seen = (distance >= 0) & (distance < (window or keys))
        if documents is not None:
            tokens = torch.arange(batch * keys, device=q.device)
            document = torch.bucketize(tokens, documents.to(q.device), right=True).view(batch, 1, keys)
            seen = seen & (document[..., keys - queries :, None] == document.unsqueeze(-2))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        scores = ((q @ k.transpose(-1, -2)).float() * scale).masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(1, -1, 1, 1).expand(batch, -1, queries, 1)
            scores = torch.cat([scores, sink], dim=-1)
        return scores.softmax(dim=-1)[..., :keys].to(v.dtype) @ v

    def attend_latent(
        self,
        q: Tensor,
        latent: Tensor,
        key_rope: Tensor,
        expand: Tensor,
        scale: float,
        documents: Tensor | None = None,
    ) -> Tensor:
        k, v = expand_latent(latent, key_rope, expand, q.shape[-1])
        return self.attend(q, k, v, scale, documents)

    def whole_sequence(self, x: Tensor) -> Tensor:
        return x

    def own_sequence(self, x: Tensor) -> Tensor:
        return x


# %%
#| export
def expand_latent(latent: Tensor, key_rope: Tensor, expand: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys (B, heads, L, head_dim) and values (B, heads, L, Dv) of latents; see `AttentionCore.attend_latent`."""
    heads = expand.shape[0]
    both = F.linear(latent, expand.flatten(0, 1).to(latent.dtype)).unflatten(-1, (heads, -1)).transpose(1, 2)
    unrotated = head_dim - key_rope.shape[-1]
    shared = key_rope.unsqueeze(1).expand(-1, heads, -1, -1)
    return torch.cat([both[..., :unrotated], shared], dim=-1), both[..., unrotated:]


# %% [markdown]
# What every layer of a model needs to know about the tokens at hand travels as one value; what a layer
# keeps while it generates text is a cache.


# %%
#| export
class Sequences(NamedTuple):
    """What attention knows of its tokens: where they stand, and which documents they belong to."""

    cos: Tensor
    """(S, R / 2) or (B, S, R / 2) fp32: the rotary table of the tokens' positions."""
    sin: Tensor
    documents: Tensor | None = None
    """See `AttentionCore.attend`."""


# %%
#| export
class Cache:
    """What one layer keeps of earlier tokens while text is generated."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, ...] = ()

    def extend(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same tensors with all earlier ones in front, along axis -2."""
        self.kept = (
            tuple(torch.cat(pair, dim=-2) for pair in zip(self.kept, tensors, strict=True)) if self.kept else tensors
        )
        return self.kept


# %%
cache = Cache()
cache.extend(torch.zeros(1, 3, 2))
print(cache.extend(torch.ones(1, 1, 2))[0][0].tolist())

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

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        norm_eps: float,
        core: AttentionCore = OneRank(),  # noqa: B008 (it holds no state)
    ):
        super().__init__()
        self.head_dim = head_dim
        self.core = core
        self.query = Linear(hidden, heads * head_dim)
        self.key = Linear(hidden, kv_heads * head_dim)
        self.value = Linear(hidden, kv_heads * head_dim)
        self.output = Linear(heads * head_dim, hidden)
        self.query_norm = RMSNorm(head_dim, norm_eps)
        self.key_norm = RMSNorm(head_dim, norm_eps)

    def forward(self, x: Tensor, sequences: Sequences, cache: Cache | None = None) -> Tensor:
        """(B, S, hidden) to the same; with a `cache`, x continues the tokens seen before."""
        batch, sequence, _ = x.shape
        cos, sin, documents = sequences
        q = self.query(x).view(batch, sequence, -1, self.head_dim)
        k = self.key(x).view(batch, sequence, -1, self.head_dim)
        v = self.value(x).view(batch, sequence, -1, self.head_dim).transpose(1, 2)
        q = rotate(self.query_norm(q), cos, sin).transpose(1, 2)
        k = rotate(self.key_norm(k), cos, sin).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        mixed = self.core.attend(q, k, v, self.head_dim**-0.5, documents)
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
difference = (layer(x, Sequences(*table)) - layer(changed, Sequences(*table))).abs().amax(dim=-1)[0]
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
