# %% [markdown]
# # The gated delta rule
#
# > Attention with a memory of fixed size: each token corrects what the memory holds under its key.
#
# Softmax attention keeps every key and value it has seen. Linear attention keeps one matrix $S$ a head, the
# sum of all $v_t k_t^\top$, and reads it with a query: $o_t = S_t q_t$. The matrix never grows, but it is an
# accountant who only adds: write a second value under a key, and reading the key gives the sum of both.
#
# The *delta rule* (arXiv 2406.06484) looks before it writes. It reads what the memory holds under $k_t$ and
# writes the difference to $v_t$. The *gated* delta rule (arXiv 2412.06464) also lets all of the memory fade
# by a factor that the token chooses. Three of four layers of Qwen3-Next and Qwen3.5 are of this kind.

# %%
#| default_exp layers.delta_rule

# %%
#| export
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pithtrain.layers.attention import Cache, OneRank, Sequences
from pithtrain.layers.linear import Linear
from pithtrain.layers.norm import RMSNorm

# %% [markdown]
# ## The maths
#
# One head has keys and queries of $D_k$ features and values of $D_v$, a memory $S_t \in \mathbb{R}^{D_v
# \times D_k}$, a decay $a_t \in (0, 1]$ and a strength of writing $b_t \in (0, 1)$:
#
# $$S_t = a_t S_{t-1} (I - b_t k_t k_t^\top) + b_t v_t k_t^\top, \qquad o_t = S_t q_t.$$
#
# With $|k_t| = 1$ the bracket erases a share $b_t$ of what was held under $k_t$. The smallest true
# implementation is that line, token by token:


# %%
def delta_rule_reference(q, k, v, a, b, S):
    """q, k (sequence, Dk), v (sequence, Dv), a, b (sequence,), S (Dv, Dk): outputs (sequence, Dv) and the last S."""
    o = []
    for t in range(len(q)):
        S = a[t] * (S - b[t] * torch.outer(S @ k[t], k[t])) + b[t] * torch.outer(v[t], k[t])
        o.append(S @ q[t])
    return torch.stack(o), S


# %% [markdown]
# A memory in use: values are numbers ($D_v = 1$), and the two keys $A$ and $B$ overlap a little. Token 2
# writes 1 under $A$, token 6 writes 2 under $B$, token 10 writes 3 under $A$; at all others nothing is
# written. What does a query for $A$ or $B$ read after each token?

# %%
import matplotlib.pyplot as plt

A, B = torch.tensor([1.0, 0.0]), torch.tensor([0.2, 0.96**0.5])
k = torch.stack([B if t == 6 else A for t in range(16)])
v, b = torch.zeros(16, 1), torch.zeros(16)
for t, value in ((2, 1.0), (6, 2.0), (10, 3.0)):
    v[t], b[t] = value, 1.0

fig, axes = plt.subplots(1, 3, figsize=(10, 2.8), sharey=True)
for ax, rule, decay in zip(axes, ("sum", "delta rule", "gated delta rule, a = 0.9"), (1.0, 1.0, 0.9), strict=True):
    for key, name, colour in ((A, "A", "C0"), (B, "B", "C1")):
        if rule == "sum":
            read = torch.stack([(v[: t + 1] * b[: t + 1, None] * (k[: t + 1] @ key)[:, None]).sum() for t in range(16)])
        else:
            read = delta_rule_reference(key.expand(16, 2), k, v, torch.full((16,), decay), b, torch.zeros(1, 2))[0]
        ax.step(range(16), read.flatten(), where="mid", color=colour, label=f"reading {name}")
    ax.set(title=rule, xlabel="token", xticks=range(0, 16, 5))
axes[0].set_ylabel("value read")
axes[0].legend()
fig.tight_layout()
fig

# %% [markdown]
# The sum answers 4.4 for $A$: both values it was given, and some of $B$'s. The delta rule answers 3, the last
# value, because the write first took away what was there. The price is a little of $B$, whose key overlaps
# with $A$'s. With a decay, old values fade until they are written again.
#
# The memory itself, a matrix of values by keys, as it is after four writes of random values. The keys are the axes
# here, so each has a column. Left to right: two values; the first key's replaced; and all the while what is not
# written again fades, by $a = 0.8$.

# %%
slots, values = torch.tensor([2, 5, 2, 6]), torch.randn(4, 8)
fig, axes = plt.subplots(1, 4, figsize=(10, 2.6), sharey=True)
for t, ax in enumerate(axes):
    keys, fading, strength = torch.eye(8)[slots[: t + 1]], torch.full((t + 1,), 0.8), torch.ones(t + 1)
    memory = delta_rule_reference(keys, keys, values[: t + 1], fading, strength, torch.zeros(8, 8))[1]
    ax.imshow(memory, cmap="RdBu", vmin=-2, vmax=2)
    ax.set(title=f"write {t + 1}, to key {slots[t]}", xlabel="key feature", xticks=range(0, 8, 2))
assert torch.allclose(memory[:, 2], 0.8 * values[2]) and torch.allclose(memory[:, 5], 0.8**2 * values[1])
axes[0].set_ylabel("value feature")
fig.tight_layout()
fig

# %% [markdown]
# ## In chunks
#
# A loop over tokens is slow on every machine: it does rank-one work. Take $C$ tokens together. Let $S_0$ be
# the memory before the chunk, and $g_t = \prod_{s \le t} a_s$ the decay since then. Unrolled, the memory is
#
# $$S_t = g_t S_0 + \sum_{j \le t} \frac{g_t}{g_j} u_j k_j^\top, \qquad
#   u_t = b_t \Big( v_t - g_t S_0 k_t - \sum_{j < t} \frac{g_t}{g_j} (k_j \cdot k_t)\, u_j \Big),$$
#
# so that $u_t$ is what token $t$ really writes: its value less what the memory held. These are $C$ linear
# equations, each in the $u_j$ before it. With rows for tokens and $\Gamma_{tj} = g_t / g_j$ for $j \le t$,
#
# $$\big( I + \operatorname{tril}_{-1}(\operatorname{diag}(b)\, \Gamma \odot K K^\top) \big)\, U
#   = \operatorname{diag}(b) \big( V - \operatorname{diag}(g) K S_0^\top \big).$$
#
# The inverse of the bracket, by one triangular solve for all chunks at once, gives $U$ as (what the values alone
# would write) minus (keys seen) times $S_0^\top$. Only $S_0$ has to be carried from chunk to chunk, with two matrix
# products in each step:
#
# $$O = \operatorname{diag}(g)\, Q S_0^\top + (\Gamma \odot Q K^\top)\, U, \qquad
#   S_C = g_C S_0 + U^\top \operatorname{diag}(g_C / g)\, K.$$
#
# ### Documents
#
# In a packed row the memory must be empty where a document begins. Nothing has to be cut: a token of *age* $n$
# (it stands behind $n$ others of its document) may use the $u_j$ with $t - j \le n$ and, if its document began
# before the chunk, $S_0$. That replaces the causal mask of $\Gamma$ and sets some $g_t$ to zero.


# %%
#| export
def ages(documents: Tensor, batch: int, sequence: int) -> Tensor:
    """(batch, sequence): how many tokens of its own document stand before each token; `documents` as in `attend`."""
    tokens = torch.arange(batch * sequence, dtype=documents.dtype, device=documents.device)
    begins = documents[torch.bucketize(tokens, documents, right=True) - 1]
    return (tokens - begins).view(batch, sequence)


# %%
documents = torch.tensor([0, 3, 8, 10, 16], dtype=torch.int32)
print(ages(documents, 2, 8).tolist())


# %%
#| export
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor,
    state: Tensor | None = None, age: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs (B, S, heads, Dv) in the dtype of `v`, and the last state (B, heads, Dv, Dk) fp32.

    q, k (B, S, heads, Dk), v (B, S, heads, Dv), log_a and b (B, S, heads), age (B, S) from `ages` where rows hold
    several documents. `state` is the memory before the first token; tokens that have the age to, see it.
    Computed in fp32, `chunk` tokens at a time. Sources: arXiv 2406.06484 (chunks), arXiv 2412.06464 (gate)."""
    sequence, dtype = v.shape[1], v.dtype
    chunk = min(chunk, sequence)
    padding = -sequence % chunk
    step = torch.arange(chunk, device=q.device)
    if age is None:
        age = torch.full((1, sequence), sequence + chunk, device=q.device)  # older than the row: no document begins
    # Behind the end stand tokens that write nothing (b = 0) and forget nothing (a = 1), in the last document.
    age = torch.cat([age, age[:, -1:] + 1 + torch.arange(padding, device=q.device)], dim=1)
    q, k, v, log_a, b = (
        F.pad(x.float(), (0, 0) * (x.dim() - 2) + (0, padding))
        .unflatten(1, (-1, chunk))
        .movedim((1, 3), (0, 2))
        .contiguous()
        for x in (q, k, v, log_a, b)
    )  # (chunks, B, heads, chunk, ...)
    age = age.unflatten(1, (-1, 1, chunk)).movedim(1, 0)

    log_g = log_a.cumsum(dim=-1)
    distance = step[:, None] - step
    hidden = (distance < 0) | (distance > age.unsqueeze(-1))
    # Each stretch is summed alone: a difference of two long sums loses digits behind a token that forgets much.
    between = log_a.unsqueeze(-1).expand(*log_a.shape, chunk).tril(-1).cumsum(dim=-2)
    gamma = between.masked_fill(hidden, -torch.inf).exp()
    g = (log_g.exp() * (age > step)).unsqueeze(-1)  # zero for tokens whose document began in this chunk

    system = b.unsqueeze(-1) * gamma * (k @ k.mT)  # the solve reads it below the diagonal only
    unit = torch.eye(chunk, device=q.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, unit, upper=False, unitriangular=True) * b.unsqueeze(-2)
    written, seen, last = inverse @ v, (inverse * g.mT) @ k, gamma[..., -1, :, None] * k

    if state is None:
        state = v.new_zeros(*v.shape[1:3], v.shape[-1], k.shape[-1])
    shape, state = state.shape, state.flatten(0, 1)
    states, u = [], []
    for written_n, seen_n, last_n, g_n in zip(*(x.flatten(1, 2) for x in (written, seen, last, g)), strict=True):
        states.append(state)
        u.append(torch.baddbmm(written_n, seen_n, state.mT, alpha=-1))
        state = torch.baddbmm(g_n[:, -1:] * state, u[-1].mT, last_n)
    states = torch.stack(states).unflatten(1, shape[:2])
    o = (g * q) @ states.mT + (gamma * (q @ k.mT)) @ torch.stack(u).view_as(v)
    return o.movedim((0, 2), (1, 3)).flatten(1, 2)[:, :sequence].to(dtype), state.view(shape)


# %% [markdown]
# Against the loop, for a row of 50 tokens, in chunks of 16, with a state from before; then the same row as
# three documents, which must equal three rows.

# %%
torch.manual_seed(0)
batch, sequence, heads, key_dim, value_dim = 2, 50, 3, 8, 12
q, k = (F.normalize(torch.randn(batch, sequence, heads, key_dim), dim=-1) for _ in range(2))
v = torch.randn(batch, sequence, heads, value_dim)
log_a, b = -torch.rand(batch, sequence, heads), torch.rand(batch, sequence, heads)
before = torch.randn(batch, heads, value_dim, key_dim)

o, state = gated_delta_rule(q, k, v, log_a, b, before, chunk=16)
for row in range(batch):
    for h in range(heads):
        one = (x[row, :, h] for x in (q, k, v, log_a.exp(), b))
        o_true, state_true = delta_rule_reference(*one, before[row, h])
        torch.testing.assert_close(o[row, :, h], o_true, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[row, h], state_true, rtol=1e-5, atol=1e-5)

inputs = [x[:1] for x in (q, k, v, log_a, b)]
packed, _ = gated_delta_rule(*inputs, age=ages(torch.tensor([0, 7, 33, 50]), 1, 50), chunk=16)
apart = [gated_delta_rule(*(x[:, i:j] for x in inputs))[0] for i, j in ((0, 7), (7, 33), (33, 50))]
torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-5, atol=1e-5)

# %% [markdown]
# How long should a chunk be? Longer chunks mean fewer steps in a row, but work inside a chunk grows with its
# length. Forward and backward of 1,024 tokens with 4 heads of 64 features, best of three, on this machine. (Of 32, 64,
# 128 and 256, chunks of 128 were the fastest on an H100, with 32 heads of 128 features.)

# %%
import time

torch.manual_seed(0)
leaves = [torch.randn(1, 1024, 4, 64).requires_grad_() for _ in range(3)]
log_a, b = -0.1 * torch.rand(1, 1024, 4), torch.rand(1, 1024, 4)
for chunk in (1, 8, 16, 32, 64, 128, 256):
    times = []
    for _ in range(1 if chunk == 1 else 3):
        start = time.perf_counter()
        normal = [F.normalize(x, dim=-1) for x in leaves[:2]]
        gated_delta_rule(*normal, leaves[2], log_a, b, chunk=chunk)[0].sum().backward()
        times.append(time.perf_counter() - start)
    print(f"chunks of {chunk:3}: {1e3 * min(times):6.1f} ms")

# %% [markdown]
# ## A short convolution
#
# Before the rule, each feature of the queries, keys and values is mixed with its own last few values:
# $y_t = \sum_{i} w_i\, x_{t-K+1+i}$, with $K = 4$ taps a feature. It gives a key some context, so that
# "the word after *New*" can be a key. Products with shifted copies are all there is to it, and where a copy
# would bring in another document's token, its age tells.


# %%
#| export
def short_convolution(x: Tensor, taps: Tensor, before: Tensor | None = None, age: Tensor | None = None) -> Tensor:
    """Causal convolution along S, apart for each feature: x (B, S, heads, D), taps (K, heads, D), the last tap newest.

    `before` (B, K - 1, heads, D): inputs ahead of the first, zeros if None. `age` (B, S): see `ages`."""
    count, sequence = len(taps), x.shape[1]
    padded = F.pad(x, (0, 0, 0, 0, count - 1, 0)) if before is None else torch.cat([before, x], dim=1)
    y = x * taps[-1].to(x.dtype)
    for back in range(1, count):
        shifted = padded[:, count - 1 - back : count - 1 - back + sequence]
        tap = taps[-1 - back].to(x.dtype)
        y = torch.addcmul(y, shifted, tap if age is None else torch.where((age >= back)[..., None, None], tap, 0))
    return y


# %%
pulse = torch.zeros(1, 10, 1, 1)
pulse[0, [2, 5]] = 1
taps = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
print("one document: ", short_convolution(pulse, taps).flatten().int().tolist())
print(
    "cut at token 6:",
    short_convolution(pulse, taps, age=ages(torch.tensor([0, 6, 10]), 1, 10)).flatten().int().tolist(),
)

# %% [markdown]
# ## The layer
#
# Around the rule, as in Qwen3-Next: queries and keys are brought to length 1 (the rule needs it: an erasure
# must not overshoot), $q$ is scaled by $1/\sqrt{D_k}$, and the gates of token $x$ are
#
# $$b = \sigma(w_b \cdot x), \qquad \log a = -e^{A}\, \operatorname{softplus}(w_a \cdot x + \beta),$$
#
# with a rate $A$ (`A_log`) and an offset $\beta$ (`dt_bias`) for each value head. The output is normalised head by
# head and gated with $\operatorname{silu}(z)$. A key head serves several consecutive value heads.
#
# Under context parallelism a rank holds pieces of each sequence, but a recurrence wants all of it. The core
# therefore trades tokens for heads ahead of the convolution and back behind the rule: a key head travels with
# the value heads that it serves.
#
# While text is generated, the layer keeps its last inputs to the convolution and its memory, and nothing more
# however long the text.


# %%
#| export
class GatedDeltaNet(nn.Module):
    """Linear attention by the gated delta rule, in the form of Qwen3.5 (arXiv 2412.06464)."""

    def __init__(
        self, hidden: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, taps: int,
        norm_eps: float, core: OneRank = OneRank(),
    ):  # fmt: skip
        super().__init__()
        self.key_heads, self.value_heads, self.key_dim, self.value_dim = key_heads, value_heads, key_dim, value_dim
        self.core = core
        self.channels = [key_heads * key_dim, key_heads * key_dim, value_heads * value_dim]
        self.qkv = Linear(hidden, sum(self.channels))
        self.convolution = nn.Parameter(F.pad(torch.ones(sum(self.channels), 1, 1), (taps - 1, 0)))  # first, no change
        self.decay = Linear(hidden, value_heads)
        self.strength = Linear(hidden, value_heads)
        self.gate = Linear(hidden, value_heads * value_dim)
        # Rates spread over (0, 16), which the published models draw at random; the first offset is 1.
        self.A_log = nn.Parameter(torch.log(16 * (torch.arange(value_heads) + 0.5) / value_heads))
        self.dt_bias = nn.Parameter(torch.ones(value_heads))
        self.norm = RMSNorm(value_dim, norm_eps)
        self.output = Linear(value_heads * value_dim, hidden)

    def by_key_head(self, x: Tensor) -> Tensor:
        """(..., all queries | all keys | all values) -> (..., key_heads, a query | a key | the values it serves)."""
        return torch.cat([part.unflatten(-1, (self.key_heads, -1)) for part in x.split(self.channels, dim=-1)], dim=-1)

    def forward(self, x: Tensor, sequences: Sequences, cache: Cache | None = None) -> Tensor:
        """(B, S, hidden) to the same; with a `cache`, x continues one document's tokens seen before."""
        a, b = self.decay(x).float(), self.strength(x).float()
        log_a = -self.A_log.exp() * F.softplus(a + self.dt_bias)
        gates = torch.cat([t.unflatten(-1, (self.key_heads, -1)) for t in (log_a, b.sigmoid())], dim=-1)
        log_a, b = (t.flatten(2) for t in self.core.whole_sequence(gates).chunk(2, dim=-1))

        mixed = self.core.whole_sequence(self.by_key_head(self.qkv(x)))
        taps = self.by_key_head(self.convolution.flatten(1).t())[:, self.core.held(self.key_heads)]
        age = None if sequences.documents is None else ages(sequences.documents, *mixed.shape[:2]).to(x.device)
        before, state = (cache and cache.kept) or (None, None)
        if cache is not None:
            recent = mixed if before is None else torch.cat([before, mixed], dim=1)
            recent = F.pad(recent, (0, 0, 0, 0, len(taps) - 1, 0))[:, recent.shape[1] :]
        # In fp32, as the rule is: rounding each tap's product to bfloat16 would outweigh every other rounding here.
        mixed = F.silu(short_convolution(mixed.float(), taps, before, age))

        q, k, v = mixed.split([self.key_dim, self.key_dim, mixed.shape[-1] - 2 * self.key_dim], dim=-1)
        served = self.value_heads // self.key_heads
        v = v.unflatten(-1, (served, self.value_dim)).flatten(2, 3)
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        q, k = (t.repeat_interleave(served, dim=2) for t in (q * self.key_dim**-0.5, k))
        o, state = gated_delta_rule(q, k, v, log_a, b, state, age)
        if cache is not None:
            cache.kept = recent, state
        o = self.norm(self.core.own_sequence(o.to(x.dtype))).flatten(2)
        return self.output(o * F.silu(self.gate(x)))


# %% [markdown]
# Read at once, or a first part and then token by token with a cache: the same outputs.

# %%
torch.manual_seed(0)
layer = GatedDeltaNet(hidden=32, key_heads=2, value_heads=4, key_dim=8, value_dim=8, taps=4, norm_eps=1e-6)
for parameter in layer.parameters():
    if parameter.dim() > 1:
        nn.init.normal_(parameter, std=0.3)
x, nothing = torch.randn(2, 30, 32), torch.zeros(0)
sequences = Sequences(nothing, nothing)  # the rule has an order of its own: no rotary table is read
cache = Cache()
with torch.no_grad():
    whole = layer(x, sequences)
    pieces = [layer(x[:, :21], sequences, cache)] + [layer(x[:, t : t + 1], sequences, cache) for t in range(21, 30)]
print(f"largest difference: {(whole - torch.cat(pieces, dim=1)).abs().max():.1e}")
torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)

# %% [markdown]
# ## What the memory costs
#
# The layer of Qwen3.5-35B-A3B keeps 32 matrices of 128 x 128 in float32 and three inputs of the convolution.
# Softmax attention in the same model keeps keys and values of 2 heads of 256 features in bfloat16, for every
# token. The lines cross at about a thousand tokens; from there on, the memory of fixed size is smaller.

# %%
tokens = torch.logspace(1, 6, 60)
fixed = 32 * 128 * 128 * 4 + 3 * (2 * 16 + 32) * 128 * 2
growing = tokens * 2 * 2 * 256 * 2
print(f"{fixed / 2**20:.2f} MiB; crossing at {fixed / (2 * 2 * 256 * 2):.0f} tokens")
fig, ax = plt.subplots(figsize=(6, 3.2))
ax.loglog(tokens, growing / 2**20, label="keys and values")
ax.axhline(fixed / 2**20, color="C1", label="memory of the delta rule")
ax.set(title="What one layer keeps while it generates", xlabel="tokens so far", ylabel="MiB")
ax.legend()
fig

# %% [markdown]
# Next: the layers that hold all this together, in [five stages](30_stages.py), and the family that uses it:
# [Qwen3.5-MoE](35_qwen3_5_moe.py).
