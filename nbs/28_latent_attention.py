# %% [markdown]
# # Multi-head latent attention
#
# > Every head keeps keys and values of its own, and all of them are read off one short vector per token.
#
# While a model generates text it keeps the keys and values of every token so far. With 128 heads that is
# the largest thing in memory. Grouped-query attention ([here](26_attention.py)) shrinks it by letting heads
# share. Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434) lets no head share, but keeps
# neither keys nor values: it keeps a *latent*, a vector of a few hundred features, from which a matrix
# makes the keys and values of all heads when they are wanted.

# %%
#| default_exp layers.latent_attention

# %%
#| export
import torch
from torch import Tensor, nn

from pithtrain.layers.attention import Cache, OneRank, Sequences
from pithtrain.layers.linear import Linear
from pithtrain.layers.norm import RMSNorm
from pithtrain.layers.rotary import rotate

# %% [markdown]
# ## The maths
#
# For a token $x_s$, with $W^{DKV}$ down to $R$ features and, for head $h$, $W^{UK}_h, W^{UV}_h$ up again:
#
# $$c_s = \operatorname{RMSNorm}(W^{DKV} x_s), \qquad k_s^h = \begin{pmatrix} W^{UK}_h c_s \\ k_s^R \end{pmatrix},
#   \qquad v_s^h = W^{UV}_h c_s, \qquad k_s^R = \operatorname{rotate}(W^{KR} x_s).$$
#
# Why the second part of the key? If $W^{UK}_h c_s$ were rotated as well, a rotation by the position of the token would
# stand between $W^{UK}_h$ and the query, and the two could not be multiplied first, as they are below: rotated keys of
# all heads would have to be kept. So position lives in a few features of its own, $k^R$, which all heads share. Only
# $c_s$ and $k_s^R$ are kept. In the code `latent` is $W^{DKV}$ on top of $W^{KR}$, and `expand` each head's $W^{UK}_h$
# on top of $W^{UV}_h$. Queries have the same two parts, $q^h = (q^C, q^R)$, and may go through a low rank of their own,
# which saves activations in training.
#
# The smallest true implementation makes no key and no value at all. As
# $q^C \cdot (W^{UK}_h c_s) = (W^{UK\top}_h q^C) \cdot c_s$, a head can carry its *query* into the latent space,
# attend over latents as if they were keys and values, and carry the mean back:


# %%
def latent_attention_reference(q, latent, key_rope, expand, scale):
    """One sequence and head: q (S, Dn + Dr), latent (S, R), key_rope (S, Dr), expand (Dn + Dv, R) -> (S, Dv)."""
    unrotated = q.shape[1] - key_rope.shape[1]
    expand_key, expand_value = expand[:unrotated], expand[unrotated:]
    scores = (q[:, :unrotated] @ expand_key @ latent.t() + q[:, unrotated:] @ key_rope.t()) * scale
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ latent @ expand_value.t()


# %% [markdown]
# The [core](26_attention.py) takes latents instead of keys and values, and `expand` with them: it makes the keys where
# they are needed, which for a whole sequence at once is the cheaper way.

# %%
torch.manual_seed(0)
q, latent, key_rope = torch.randn(1, 2, 10, 8 + 4), torch.randn(1, 10, 16), torch.randn(1, 10, 4)
expand = torch.randn(2, 8 + 6, 16) / 4
ours = OneRank().attend(q, latent, key_rope, scale=0.3, expand=expand)
for head in range(2):
    reference = latent_attention_reference(q[0, head], latent[0], key_rope[0], expand[head], 0.3)
    torch.testing.assert_close(ours[0, head], reference, rtol=1e-5, atol=1e-5)
print(tuple(ours.shape))

# %% [markdown]
# ## The layer


# %%
#| export
class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434).

    A head's query and key have `head_dim` unrotated and `rope_dim` rotated features, its value `value_dim`.
    Keys and values come from `latent_rank` features a token; queries from `query_rank`, or directly if it is 0."""

    def __init__(
        self, hidden: int, heads: int, head_dim: int, rope_dim: int, value_dim: int, latent_rank: int,
        query_rank: int, scale: float, core: OneRank,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.head_dim, self.rope_dim, self.latent_rank = heads, head_dim, rope_dim, latent_rank
        self.scale, self.core = scale, core
        # Published models fix the epsilon of these two norms, whatever that of the others.
        self.query_latent = Linear(hidden, query_rank) if query_rank else None
        self.query_norm = RMSNorm(query_rank, 1e-6) if query_rank else None
        self.query = Linear(query_rank or hidden, heads * (head_dim + rope_dim))
        self.latent = Linear(hidden, latent_rank + rope_dim)
        self.latent_norm = RMSNorm(latent_rank, 1e-6)
        self.expand = Linear(latent_rank, heads * (head_dim + value_dim))
        self.output = Linear(heads * value_dim, hidden)

    def forward(self, x: Tensor, sequences: Sequences, cache: Cache | None = None) -> Tensor:
        """(B, S, hidden) to the same; with a `cache`, which keeps latents, x continues the tokens seen before."""
        cos, sin, documents = sequences
        source = x if self.query_latent is None else self.query_norm(self.query_latent(x))
        q, q_rope = self.query(source).unflatten(-1, (self.heads, -1)).split([self.head_dim, self.rope_dim], dim=-1)
        q = torch.cat([q, rotate(q_rope, cos, sin, neighbours=True)], dim=-1).transpose(1, 2)
        latent, key_rope = self.latent(x).split([self.latent_rank, self.rope_dim], dim=-1)
        latent = self.latent_norm(latent)
        key_rope = rotate(key_rope.unsqueeze(2), cos, sin, neighbours=True).squeeze(2)  # as one head
        if cache is not None:
            latent, key_rope = cache.extend(latent, key_rope)
        expand = self.expand.weight.unflatten(0, (self.heads, -1))
        mixed = self.core.attend(q, latent, key_rope, self.scale, documents, expand=expand)
        return self.output(mixed.transpose(1, 2).flatten(2))


# %% [markdown]
# Ten tokens at once, and the same ten one after the other from the cache:

# %%
from pithtrain.layers.rotary import rotary_table

layer = LatentAttention(
    hidden=32,
    heads=4,
    head_dim=8,
    rope_dim=4,
    value_dim=6,
    latent_rank=16,
    query_rank=12,
    scale=12**-0.5,
    core=OneRank(),
)
x, (cos, sin) = torch.randn(1, 10, 32), rotary_table(torch.arange(10), 4, 10_000.0)
cache = Cache()
steps = [layer(x[:, t : t + 1], Sequences(cos[t : t + 1], sin[t : t + 1]), cache) for t in range(10)]
torch.testing.assert_close(torch.cat(steps, dim=1), layer(x, Sequences(cos, sin)), rtol=1e-5, atol=1e-6)
print("kept for ten tokens:", [tuple(t.shape) for t in cache.kept])

# %% [markdown]
# ## What is kept
#
# The cache of one token, in one layer with 128 heads of 128 features (DeepSeek-V3's), measured: each layer
# below is run on one token in bfloat16 and its cache counted. The dotted line is the latent's.

# %%
import matplotlib.pyplot as plt

from pithtrain.layers.attention import Attention


def bytes_kept(layer, rope_dim):
    """Bytes of the cache after one token; on the meta device, where tensors have sizes but no memory."""
    x, table = torch.empty(1, 1, 512, dtype=torch.bfloat16, device="meta"), torch.empty(1, rope_dim // 2, device="meta")
    layer(x, Sequences(table, table), cache := Cache())
    return sum(t.nbytes for t in cache.kept)


with torch.device("meta"):
    layers = {f"GQA, {n} key heads": (Attention(512, 128, n, 128, 1e-6, OneRank()), 128) for n in (128, 16, 8, 1)}
    mla = LatentAttention(512, 128, 128, 64, 128, 512, 1536, 192**-0.5, OneRank())
    layers["MLA, 128 heads of their own"] = (mla, 64)
    kept = {name: bytes_kept(*pair) for name, pair in layers.items()}
for name, size in kept.items():
    print(f"{name:28} {size:6,} bytes a token and layer")
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.barh(list(kept), list(kept.values()), color=["C0"] * 4 + ["C1"])
ax.axvline(kept["MLA, 128 heads of their own"], color="C1", ls=":")
ax.set(title="Cache of one token in one layer", xlabel="bytes, bfloat16", xscale="log", xlim=(100, 1e5))
ax.invert_yaxis()
fig

# %% [markdown]
# The latent costs as much as two and a quarter key-value heads would, and 57 times less than a key and a
# value for each of the heads (the top bar).
#
# Next: attention with a state instead of a cache, [the delta rule](29_delta_rule.py). The family that is built on
# latents is [DeepSeek](33_deepseek.py).
