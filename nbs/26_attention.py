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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pithtrain.kernels.attention import TILE, AttendPieces, flash_attention_4, flash_fits, pieces
from pithtrain.layers.linear import Linear
from pithtrain.layers.norm import RMSNorm
from pithtrain.layers.rotary import rotate

# %% [markdown]
# ## The maths
#
# For query head $h$ with key and value head $\lfloor h / g \rfloor$, where $g$ is the size of a group,
#
# $$o_t^h = \sum_{s \le t} \operatorname{softmax}_s\!
#   \left( \frac{q_t^h \cdot k_s^{\lfloor h/g \rfloor}}{\sqrt d} \right) v_s^{\lfloor h/g \rfloor}.$$
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
# 2205.14135).

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
# given its *core*, an object with the methods of `OneRank` below, and does not ask which one it is. `attend` serves
# attention; `whole_sequence`, `own_sequence` and `held` serve [the delta rule](29_delta_rule.py), which reads each
# sequence from its start and so gets a share of the heads instead of a share of the tokens.
#
# Three things may narrow or change what a query sees. *Documents* packed into one row must not see each
# other. A *window* lets a query see its nearest keys alone. A *sink* is a learned logit in each head's
# softmax that has no value (GPT-OSS). For [latent attention](28_latent_attention.py) a core is given *latents*, short
# vectors, and the matrix that makes keys and values of them: what travels between ranks should be the small latents.
#
# `expand_latent` makes the keys and values of all heads by one matrix product; the rotated part of the key is the same
# for all heads.


# %%
#| export
def expand_latent(latent: Tensor, key_rope: Tensor, expand: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys (B, heads, L, head_dim) and values (B, heads, L, Dv) of latents (B, L, R); see `OneRank.attend`."""
    heads, unrotated = expand.shape[0], head_dim - key_rope.shape[-1]
    both = F.linear(latent, expand.flatten(0, 1).to(latent.dtype)).unflatten(-1, (heads, -1)).transpose(1, 2)
    shared = key_rope.unsqueeze(1).expand(-1, heads, -1, -1)
    return torch.cat([both[..., :unrotated], shared], dim=-1), both[..., unrotated:]


# %% [markdown]
# ## On one rank
#
# Plain causal attention goes to torch, which picks its fastest kernel, or to FlashAttention-4 where that is installed
# and takes these heads. The rest is computed [in pieces](15_attention_pieces.py): rectangles of the score matrix that
# skip what no query sees, never a mask of the matrix's size.


# %%
#| export
class OneRank:
    """How queries meet keys on a rank that holds whole sequences; on others see `Ring`, which has the same methods."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float,
        documents: Tensor | None = None, window: int | None = None, sinks: Tensor | None = None,
        expand: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Causal attention: q (B, heads, S, D), k (B, kv_heads, L, D), v (B, kv_heads, L, Dv) -> (B, heads, S, Dv).

        With L > S the queries are the last S of the L positions (decoding with a cache; ValueError for documents then).
        documents: (N + 1,) integers, best kept on the CPU: where the packed documents begin in the tokens of
        all rows laid end to end, the start of each row included, and last the number of tokens. Where ranks
        share each sequence, rows are whole sequences here. window: a query sees itself and the window - 1 keys
        before it. sinks: (heads,) the logit of a key without a value. expand: (heads, D - Dr + Dv, R), for multi-head
        latent attention: k is then a latent (B, L, R) of which it makes each head's unrotated key and its value, and v
        the rotated rest of the key (B, L, Dr), which all heads share."""
        if expand is not None:
            k, v = expand_latent(k, v, expand, q.shape[-1])
        rows, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        dense = documents is None and window is None and sinks is None
        if dense and (queries == 1 or (queries == keys and flash_attention_4(q, v.shape[-1]) is None)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, scale=scale, enable_gqa=True)
        if documents is not None and queries != keys:
            raise ValueError(f"documents: {queries} queries meet {keys} keys; packed documents have no cache")
        tile = None if flash_fits(q, v.shape[-1]) else TILE
        cut = pieces([range(keys - queries, keys)], [range(keys)], rows, keys, window, documents, tile)
        return AttendPieces.apply(q, k, v, sinks, scale, cut)

    def whole_sequence(self, x: Tensor) -> Tensor:
        """(B, S, heads, D) of this rank's tokens -> (B, all tokens in order, this rank's share of heads, D)."""
        return x

    def own_sequence(self, x: Tensor) -> Tensor:
        """The way back from `whole_sequence`."""
        return x

    def held(self, heads: int) -> slice:
        """Which of so many heads are this rank's share in `whole_sequence`."""
        return slice(0, heads)


# %% [markdown]
# Every combination of these against the matrix written out, in a batch of two rows of 24 tokens. The last
# column counts the scores that a query may see: what the window and the documents save.

# %%
batch, length = 2, 24
q, k, v = torch.randn(batch, 8, length, 16), torch.randn(batch, 2, length, 16), torch.randn(batch, 2, length, 12)
boundaries, position = torch.tensor([0, 9, 24, 31, 48], dtype=torch.int32), torch.arange(length)
document = torch.bucketize(torch.arange(batch * length), boundaries, right=True).view(batch, 1, length)
distance = position[:, None] - position
print("window documents sinks   error   scores seen")
for window in (None, 5):
    for documents in (None, boundaries):
        for sinks in (None, torch.randn(8)):
            seen = (distance >= 0) & (distance < (window or length)) & torch.ones(batch, 1, 1, 1, dtype=torch.bool)
            if documents is not None:
                seen = seen & (document[..., :, None] == document[..., None, :])
            scores = (q @ k.repeat_interleave(4, dim=1).mT / 4).masked_fill(~seen, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.view(1, 8, 1, 1).expand(batch, -1, length, 1)], dim=-1)
            true = scores.softmax(dim=-1)[..., :length] @ v.repeat_interleave(4, dim=1)
            error = (OneRank().attend(q, k, v, 0.25, documents, window, sinks) - true).norm() / true.norm()
            given = ["-" if x is None else "yes" for x in (documents, sinks)]
            print(f"{window or '-':>6} {given[0]:>9} {given[1]:>5} {error:.1e} {int(seen.sum()):>9}")
            assert error < 1e-6

# %% [markdown]
# What every layer of a model needs to know about the tokens at hand travels as one value; what a layer
# keeps while it generates text is a cache.


# %%
#| export
class Sequences(NamedTuple):
    """What attention knows of its tokens: where they stand, and which documents they belong to."""

    cos: Tensor
    """(S, Dr / 2) or (B, S, Dr / 2) fp32: the rotary table of the positions, for Dr rotated features."""
    sin: Tensor
    documents: Tensor | None = None
    """Where packed documents begin: see `OneRank.attend`."""


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
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, norm_eps: float,
        core: OneRank = OneRank(),  # noqa: B008 (it holds no state)
    ):  # fmt: skip
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
        cos, sin, documents = sequences
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        q, k = (rotate(t, cos, sin).transpose(1, 2) for t in (self.query_norm(q), self.key_norm(k)))
        v = v.transpose(1, 2)
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
