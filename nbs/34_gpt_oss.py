# %% [markdown]
# # GPT-OSS
#
# > OpenAI's open Mixture-of-Experts decoders: attention with sinks, every other layer through a window.
#
# GPT-OSS-20B and 120B (arXiv 2508.10925) spend little on long texts. Every other layer sees only the last 128
# tokens. And a head that finds nothing to read need not read: each has a *sink*, a place to put its
# attention that holds no value. Biases on every projection, and [experts with a clamp](22a_clamped_experts.py),
# are the rest of what sets them apart.

# %%
#| default_exp models.gpt_oss

# %%
#| export
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pithtrain.config import GptOssConfig
from pithtrain.layers.attention import Cache, OneRank, Sequences
from pithtrain.layers.clamped_experts import ClampedExperts
from pithtrain.layers.linear import Linear
from pithtrain.layers.norm import RMSNorm
from pithtrain.layers.rotary import Yarn, rotate, yarn_magnitude, yarn_table
from pithtrain.layers.router import Routed, expert_load
from pithtrain.models.decoder import Decoder
from pithtrain.models.stages import Layer, Place

# %% [markdown]
# ## Attention with a sink
#
# A softmax must give its whole weight to something. Heads that find nothing give it to the first token, whose
# value is then in every output (arXiv 2309.17453). A learned score $z_h$ for each head, in the denominator
# alone, is somewhere to put it that adds nothing:
#
# $$o_t^h = \frac{\sum_{s} \exp(q_t^h \cdot k_s / \sqrt d)\, v_s}{\exp(z_h) + \sum_s \exp(q_t^h \cdot k_s / \sqrt d)},
#   \qquad t - W < s \le t,$$
#
# where $W$ is the window, or without limit in the layers that see everything. The smallest true implementation:


# %%
def sink_attention_reference(q, k, v, z, window):
    """q, k, v (sequence, d), one head with sink z: outputs (sequence, d), and the sink's share (sequence,)."""
    outputs, shares = [], []
    for t in range(len(q)):
        seen = slice(max(0, t - window + 1), t + 1)
        scores = torch.cat([q[t] @ k[seen].T / q.shape[1] ** 0.5, z.view(1)])
        probs = torch.softmax(scores, dim=0)
        outputs.append(probs[:-1] @ v[seen])
        shares.append(probs[-1])
    return torch.stack(outputs), torch.stack(shares)


# %% [markdown]
# [The core](26_attention.py) computes this for all heads at once, in pieces that skip what lies outside the
# window:

# %%
from pithtrain.layers.attention import OneRank

torch.manual_seed(0)
texts, z = 50, torch.tensor([0.0, 2.0])
q, k, v = torch.randn(texts, 2, 24, 8), torch.randn(texts, 1, 24, 8), torch.randn(texts, 1, 24, 8)
fast, shares = OneRank().attend(q, k, v, 8**-0.5, window=6, sinks=z), torch.empty(texts, 2, 24)
for text in range(texts):
    for head in range(2):
        true, shares[text, head] = sink_attention_reference(q[text, head], k[text, 0], v[text, 0], z[head], window=6)
        torch.testing.assert_close(fast[text, head], true, rtol=1e-5, atol=1e-5)

# %%
import matplotlib.pyplot as plt

fig, axes = plt.subplots(1, 3, figsize=(10, 3), width_ratios=(1, 1, 1.3))
position = torch.arange(24)
distance = position[:, None] - position
for ax, window, title in zip(axes, (6, 24), ("even layers: a window of 6", "odd layers: everything"), strict=False):
    ax.imshow((distance >= 0) & (distance < window), cmap="Blues", vmax=1.5)
    ax.set(title=title, xlabel="key position", ylabel="query position")
for head, label in enumerate(("z = 0", "z = 2")):
    axes[2].plot(shares[:3, head].T, color=f"C{head}", lw=0.5, alpha=0.5)
    axes[2].plot(shares[:, head].mean(dim=0), color=f"C{head}", lw=2, label=label)
axes[2].set(title="The sink's share of attention", xlabel="query position", ylabel="probability", ylim=(0, 1))
axes[2].legend()
fig.tight_layout()
fig

# %% [markdown]
# Left and centre, which keys a query sees. Right, what two heads with a window of 6 leave to their sinks, in three
# texts (thin) and on average over fifty: much where there are few keys to look at, the same from the sixth token on,
# and around that it depends on how well the keys match. At $z = 2$ the sink weighs more than seven keys of score 0.


# %%
#| export
class SinkAttention(nn.Module):
    """Causal grouped-query attention with a sink for each head, through a window unless that is None."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, window: int | None, core: OneRank):
        super().__init__()
        self.head_dim, self.window, self.core = head_dim, window, core
        self.query = Linear(hidden, heads * head_dim, bias=True)
        self.key = Linear(hidden, kv_heads * head_dim, bias=True)
        self.value = Linear(hidden, kv_heads * head_dim, bias=True)
        self.output = Linear(heads * head_dim, hidden, bias=True)
        self.sinks = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor, sequences: Sequences, cache: Cache | None = None) -> Tensor:
        """(B, S, hidden) to the same; with a `cache`, x continues the tokens seen before."""
        cos, sin, documents = sequences
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        q, k, v = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
            if self.window is not None:  # the next query sees itself and window - 1 of these
                cache.kept = tuple(t[:, :, max(0, t.shape[2] - self.window + 1) :] for t in (k, v))
        mixed = self.core.attend(q, k, v, self.head_dim**-0.5, documents, self.window, self.sinks)
        return self.output(mixed.transpose(1, 2).flatten(2))


# %% [markdown]
# Through a window a change is felt `window - 1` tokens later at most: token 6 of 20 changes, the window is 5. And
# while text is generated, the layer keeps no more than those `window - 1` keys.

# %%
from pithtrain.layers.rotary import rotary_table

layer = SinkAttention(hidden=32, heads=4, kv_heads=2, head_dim=8, window=5, core=OneRank())
sequences = Sequences(*rotary_table(torch.arange(20), 8, 10_000.0))
x = torch.randn(1, 20, 32)
changed = x.clone()
changed[0, 6] += 1
felt = (layer(x, sequences) - layer(changed, sequences)).abs().amax(dim=-1)[0] > 1e-6
print("felt by tokens", felt.nonzero().flatten().tolist())
assert felt.nonzero().flatten().tolist() == [6, 7, 8, 9, 10]
layer(x, sequences, cache := Cache())
print("keys kept after 20 tokens:", cache.kept[0].shape[2])

# %% [markdown]
# ## The router
#
# Most families take a softmax over all experts and then choose. GPT-OSS chooses first:
#
# $$S = \operatorname{top\text{-}k}_e(r_e \cdot x + c_e), \qquad
#   w_e = \frac{\exp(r_e \cdot x + c_e)}{\sum_{j \in S} \exp(r_j \cdot x + c_j)}.$$
#
# In exact arithmetic that is the same as choosing after the softmax and dividing by the sum over $S$. The biases
# $c_e$ are learned and count in the weights, which the selection bias of [loss-free balancing](21_balance.py) must
# not: that one is added for the choice alone.


# %%
#| export
class TopKSoftmaxRouter(nn.Module):
    """Chooses `top_k` of `experts` by their scores, with biases, and takes the softmax over the chosen."""

    def __init__(self, hidden: int, experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.score_bias = nn.Parameter(torch.zeros(experts))
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))

    def forward(self, tokens: Tensor) -> Routed:
        """Route `tokens` (T, hidden), in fp32. `Routed.probs` is the softmax over all experts."""
        scores = F.linear(tokens.float(), self.weight.float(), self.score_bias.float())
        expert_ids = torch.topk(scores.detach() + self.bias, self.top_k, dim=-1).indices
        weights, load = scores.gather(1, expert_ids).softmax(dim=-1), expert_load(expert_ids.flatten(), scores.shape[1])
        return Routed(weights, expert_ids, scores.softmax(dim=-1), load)


# %%
router = TopKSoftmaxRouter(hidden=32, experts=8, top_k=2)
nn.init.normal_(router.weight, std=0.2)
routed = router(torch.randn(3, 32))
chosen = routed.probs.gather(1, routed.expert_ids)
torch.testing.assert_close(routed.weights, chosen / chosen.sum(dim=1, keepdim=True))
print(routed.expert_ids.tolist(), routed.weights.sum(dim=1).tolist())

# %% [markdown]
# ## A layer


# %%
#| export
class GptOssLayer(Layer):
    """One decoder layer, in stages; `window` None sees everything."""

    def __init__(self, config: GptOssConfig, window: int | None, place: Place):
        super().__init__()
        c = config
        self.attention_norm = RMSNorm(c.hidden, c.norm_eps)
        self.attention = SinkAttention(c.hidden, c.heads, c.kv_heads, c.head_dim, window, place.core)
        self.expert_norm = RMSNorm(c.hidden, c.norm_eps)
        self.router = TopKSoftmaxRouter(c.hidden, c.experts, c.top_k)
        self.experts = ClampedExperts(c.hidden, len(place.exchange.share(c.experts)), c.expert_hidden)

    def attend(self, hidden: Tensor, sequences: Sequences, cache: Cache | None = None) -> tuple[Tensor, Tensor, Routed]:
        """Stage 1: attention, then routing of the normalised tokens."""
        residual = hidden + self.attention(self.attention_norm(hidden), sequences, cache)
        tokens = self.expert_norm(residual.flatten(0, 1))
        return residual, tokens, self.router(tokens)


# %%
config = GptOssConfig(
    vocab_size=300,
    layers=2,
    hidden=32,
    heads=4,
    head_dim=8,
    experts=8,
    expert_hidden=16,
    window=6,
    yarn_factor=32.0,
    yarn_length=64,
    tie_embeddings=False,
)
print(", ".join(name for name, _ in GptOssLayer(config, config.window, Place()).named_parameters()))

# %% [markdown]
# ## The model
#
# Layers alternate, the first through a window. Positions are [YaRN's](25_rotary.py), with a ramp that does not stop
# at whole pairs, and its magnitude on all of query and key.


# %%
#| export
def gpt_oss(config: GptOssConfig, place: Place = Place()) -> Decoder:
    """A GPT-OSS decoder (arXiv 2508.10925), or the part of it that `place` asks for."""
    c = config
    layers = {n: GptOssLayer(c, c.window if n % 2 == 0 else None, place) for n in place.held(c.layers)}
    yarn = Yarn(c.yarn_factor, c.yarn_length, c.yarn_beta_fast, c.yarn_beta_slow, truncate=False)
    magnitude = yarn_magnitude(c.yarn_factor)
    rotary = partial(yarn_table, head_dim=c.head_dim, theta=c.rope_theta, yarn=yarn, magnitude=magnitude)
    return Decoder(c, layers, rotary, RMSNorm(c.hidden, c.norm_eps), place)


# %%
from pithtrain.models.decoder import initialise

model = gpt_oss(config)
initialise(model, seed=0)
token_ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
hidden, routing = model(token_ids, torch.arange(12))
print("hidden", tuple(hidden.shape), "logits", tuple(model.logits(hidden).shape))
print("experts of the first token, layer by layer:", [r.expert_ids[0].tolist() for r in routing])

# %% [markdown]
# ## The same numbers as elsewhere
#
# Where `transformers` is installed: its GPT-OSS with the weights of the model above. It stores an expert's gates and
# ups in turns, and transposed. (tests/test_gpt_oss.py does this in every corner of the config, with all gradients.)

# %%
import importlib.util

if importlib.util.find_spec("transformers"):
    from transformers import GptOssConfig as TheirConfig
    from transformers import GptOssForCausalLM

    c = config
    rope = {"rope_type": "yarn", "factor": c.yarn_factor, "original_max_position_embeddings": c.yarn_length}
    rope |= {"rope_theta": c.rope_theta, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    theirs = GptOssForCausalLM(
        TheirConfig(
            vocab_size=c.vocab_size,
            num_hidden_layers=c.layers,
            hidden_size=c.hidden,
            intermediate_size=c.expert_hidden,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_dim,
            num_local_experts=c.experts,
            num_experts_per_tok=c.top_k,
            sliding_window=c.window,
            rms_norm_eps=c.norm_eps,
            rope_parameters=rope,
            max_position_embeddings=2048,
            attn_implementation="eager",
        )
    )
    with torch.no_grad():
        for layer, their in zip(model.layers.values(), theirs.model.layers, strict=True):
            mine, other = layer.attention, their.self_attn
            for ours, source in (
                (mine.query, other.q_proj),
                (mine.key, other.k_proj),
                (mine.value, other.v_proj),
                (mine.output, other.o_proj),
            ):
                source.weight.copy_(ours.weight)
                source.bias.copy_(ours.bias)
            other.sinks.copy_(mine.sinks)
            their.mlp.router.weight.copy_(layer.router.weight)
            their.mlp.router.bias.copy_(layer.router.score_bias)
            experts = their.mlp.experts
            experts.gate_up_proj.copy_(layer.experts.gate_up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).mT)
            experts.gate_up_proj_bias.copy_(layer.experts.gate_up_bias.unflatten(1, (2, -1)).mT.flatten(1))
            experts.down_proj.copy_(layer.experts.down.mT)
            experts.down_proj_bias.copy_(layer.experts.down_bias)
        theirs.model.embed_tokens.weight.copy_(model.embedding.weight)
        theirs.lm_head.weight.copy_(model.head.weight)
        expected = theirs(token_ids).logits
    difference = (model.logits(hidden) - expected).abs().max() / expected.abs().max()
    print(f"largest difference of a logit, over the largest logit: {difference.item():.1e}")
    assert difference < 1e-5

# %% [markdown]
# Next: [another family](35_qwen3_5_moe.py), or [from a config to a model](36_build.py).
