# %% [markdown]
# # Qwen3.5-MoE
#
# > A hybrid: in three of four layers a memory of fixed size, in the fourth attention to everything, gated.
#
# Softmax attention finds any token again but costs more with every token; the
# [gated delta rule](29_delta_rule.py) costs the same for each, but its memory is finite. Qwen3.5 (and Qwen3-Next
# before it) takes three layers of the second for each of the first. Most of the model then reads a long text in
# time proportional to its length, and a quarter of the layers can still look anything up. This is the text model.

# %%
#| default_exp models.qwen3_5_moe

# %%
#| export
from functools import partial

import torch
from torch import Tensor, nn

from pithtrain.config import Qwen3_5MoeConfig
from pithtrain.layers.attention import Cache, OneRank, Sequences
from pithtrain.layers.delta_rule import GatedDeltaNet
from pithtrain.layers.experts import Experts
from pithtrain.layers.linear import Linear
from pithtrain.layers.mlp import MLP
from pithtrain.layers.norm import RMSNorm
from pithtrain.layers.rotary import rotary_table, rotate
from pithtrain.layers.router import Routed, Router
from pithtrain.models.decoder import Decoder
from pithtrain.models.stages import Layer, Place

# %% [markdown]
# ## Gated attention
#
# The fourth layer is [grouped-query attention](26_attention.py) with a gate: from the same token that asks the query,
# each feature of the answer is let through or not,
#
# $$o_t^h \odot \sigma(W_g^h x_t).$$
#
# It gives a head the means to say nothing (compare the [sinks of GPT-OSS](34_gpt_oss.py)). Only the first quarter of
# a head's features is rotated; the rest compares content without regard to distance. Queries and keys are
# [normed](24_norm.py) head by head; all norms of this family store their scale as its difference from 1.


# %%
#| export
class GatedAttention(nn.Module):
    """Causal grouped-query attention, normed, its first features rotated, its output gated; a family's fourth layer."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, norm_eps: float, core: OneRank):
        super().__init__()
        self.head_dim, self.core = head_dim, core
        self.query = Linear(hidden, heads * 2 * head_dim)  # head by head, its query and then its gate
        self.key = Linear(hidden, kv_heads * head_dim)
        self.value = Linear(hidden, kv_heads * head_dim)
        self.output = Linear(heads * head_dim, hidden)
        self.query_norm = RMSNorm(head_dim, norm_eps, offset=1.0)
        self.key_norm = RMSNorm(head_dim, norm_eps, offset=1.0)

    def forward(self, x: Tensor, sequences: Sequences, cache: Cache | None = None) -> Tensor:
        """(B, S, hidden) to the same; with a `cache`, x continues the tokens seen before."""
        q, gate = self.query(x).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.key, self.value))
        q, k = (
            torch.cat([rotate(t[..., :turned], sequences.cos, sequences.sin), t[..., turned:]], dim=-1).transpose(1, 2)
            for turned in [2 * sequences.cos.shape[-1]]
            for t in (self.query_norm(q), self.key_norm(k))
        )
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        mixed = self.core.attend(q, k, v, self.head_dim**-0.5, sequences.documents).transpose(1, 2)
        return self.output((mixed * gate.sigmoid()).flatten(2))


# %% [markdown]
# Without its rotated features a layer does not see the order of the tokens before the last: here the first nine
# of ten are turned round, and what the last token gets changes only if there is something to rotate.

# %%
from pithtrain.layers.attention import OneRank

torch.manual_seed(0)
layer, x = GatedAttention(32, heads=4, kv_heads=2, head_dim=8, norm_eps=1e-6, core=OneRank()), torch.randn(1, 10, 32)
turned = torch.cat([x[:, :9].flip(1), x[:, 9:]], dim=1)
for rope_dim in (0, 2, 8):
    sequences = Sequences(*rotary_table(torch.arange(10), rope_dim or 2, 100.0))
    if not rope_dim:
        sequences = Sequences(sequences.cos[:, :0], sequences.sin[:, :0])
    difference = (layer(x, sequences) - layer(turned, sequences))[0, -1].norm().item()
    print(f"{rope_dim} of 8 features rotated: the last token's output differs by {difference:.4f}")

# %% [markdown]
# ## A layer
#
# Behind either kind of attention stand experts chosen by a softmax and renormalised, and one more that every
# token visits, with a gate of its own. With $u = \operatorname{norm}(h')$,
#
# $$h'' = h' + \sigma(w \cdot u)\operatorname{MLP}(u) + \sum_{e \in S} w_e \operatorname{Expert}_e(u).$$
#
# The shared expert does not travel, so it belongs to stage 1.


# %%
#| export
class Qwen3_5MoeLayer(Layer):
    """One decoder layer, in stages; `full` has softmax attention."""

    def __init__(self, config: Qwen3_5MoeConfig, full: bool, place: Place):
        super().__init__()
        c = config
        self.attention_norm = RMSNorm(c.hidden, c.norm_eps, offset=1.0)
        if full:
            self.attention = GatedAttention(c.hidden, c.heads, c.kv_heads, c.head_dim, c.norm_eps, place.core)
        else:
            heads = c.delta_key_heads, c.delta_value_heads, c.delta_key_dim, c.delta_value_dim
            self.attention = GatedDeltaNet(c.hidden, *heads, c.delta_taps, c.norm_eps, place.core)
        self.expert_norm = RMSNorm(c.hidden, c.norm_eps, offset=1.0)
        self.router = Router(c.hidden, c.experts, c.top_k, renormalise=True)
        self.shared = MLP(c.hidden, c.shared_hidden)
        self.shared_gate = Linear(c.hidden, 1)
        self.experts = Experts(c.hidden, len(place.exchange.share(c.experts)), c.expert_hidden)

    def attend(self, hidden: Tensor, sequences: Sequences, cache: Cache | None = None) -> tuple[Tensor, Tensor, Routed]:
        """Stage 1: attention of the layer's kind, the shared expert, then routing of the normalised tokens."""
        residual = hidden + self.attention(self.attention_norm(hidden), sequences, cache)
        tokens = self.expert_norm(residual.flatten(0, 1))
        shared = self.shared_gate(tokens).sigmoid() * self.shared(tokens)
        residual = residual + shared.view_as(residual)
        return residual, tokens, self.router(tokens)


# %%
config = Qwen3_5MoeConfig(
    vocab_size=300,
    layers=4,
    hidden=32,
    heads=4,
    head_dim=8,
    rope_dim=2,
    experts=8,
    expert_hidden=16,
    delta_key_dim=8,
    delta_value_dim=8,
    shared_hidden=16,
    tie_embeddings=False,
)
for full in (False, True):
    print(", ".join(name for name, _ in Qwen3_5MoeLayer(config, full, Place()).named_parameters()), end="\n\n")

# %% [markdown]
# ## The model


# %%
#| export
def qwen3_5_moe(config: Qwen3_5MoeConfig, place: Place = Place()) -> Decoder:
    """The text model of Qwen3.5-MoE, or the part of it that `place` asks for."""
    c = config
    layers = {n: Qwen3_5MoeLayer(c, (n + 1) % c.full_every == 0, place) for n in place.held(c.layers)}
    rotary = partial(rotary_table, head_dim=c.rope_dim, theta=c.rope_theta)
    return Decoder(c, layers, rotary, RMSNorm(c.hidden, c.norm_eps, offset=1.0), place)


# %%
from pithtrain.models.decoder import initialise

model = qwen3_5_moe(config)
initialise(model, seed=0)
token_ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
hidden, routing = model(token_ids, torch.arange(12))
print("hidden", tuple(hidden.shape), "logits", tuple(model.logits(hidden).shape))
print("layers:", ", ".join(type(layer.attention).__name__ for layer in model.layers.values()))
print("experts of the first token, layer by layer:", [r.expert_ids[0].tolist() for r in routing])

# %% [markdown]
# ## What a memory holds
#
# The model, with 16 value heads, reads a phrase of eight tokens three times, token by token. Drawn is what the first
# layer keeps of them: the memory (values by keys) of the head that forgets fastest and of the one that forgets
# slowest. On the right, how alike the memory is after one token and after another, blue where it is the same.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt

reader = qwen3_5_moe(replace(config, delta_value_heads=16, init_std=0.3))
initialise(reader, seed=0)
phrase = torch.randint(300, (1, 8), generator=torch.Generator().manual_seed(0)).repeat(1, 3)
caches, memories = [Cache() for _ in reader.layers], []
with torch.no_grad():
    for t in range(24):
        reader(phrase[:, t : t + 1], torch.tensor([t]), caches=caches)
        memories.append(caches[0].kept[1][0])  # (heads, value features, key features)
memories = torch.stack(memories)
unit = memories.flatten(2) / memories.flatten(2).norm(dim=-1, keepdim=True)
alike = torch.einsum("thx,shx->hts", unit, unit)

fig, axes = plt.subplots(2, 4, figsize=(10, 4.6), width_ratios=(1, 1, 1, 1.3))
for row, head, speed in ((0, 15, "fastest"), (1, 0, "slowest")):
    for ax, t in zip(axes[row], (7, 11, 15), strict=False):
        largest = memories[t, head].abs().max()
        ax.imshow(memories[t, head], cmap="RdBu", vmin=-largest, vmax=largest)
        ax.set(title=f"{speed}, token {t}", xticks=[], yticks=[], xlabel="keys", ylabel="values")
    axes[row, 3].imshow(alike[head], cmap="RdBu", vmin=-1, vmax=1)
    axes[row, 3].set(title=f"{speed}: how alike", xlabel="token", ylabel="token")
fig.tight_layout()
fig

# %%
for head in (15, 0):
    sizes = torch.linalg.svdvals(memories[-1, head])
    print(f"head {head:2}: singular values of the memory, over the largest:", [f"{s:.2f}" for s in sizes / sizes[0]])
assert torch.allclose(memories[15], memories[23], atol=1e-4)

# %% [markdown]
# The fastest head holds the last token alone: one value under one key, a matrix of rank one, the same whenever the
# token returns. The slowest blends several: its memory turns slowly from one mixture into the next, and comes back with
# the phrase. Tokens 7 and 15 end the phrase, so the memories behind them are the same; 11 is in its middle.
#
# ## The same numbers as elsewhere
#
# Where `transformers` is installed: its Qwen3.5-MoE with the weights of the model above.
# (tests/test_qwen3_5_moe.py does this in every corner of the config, with all gradients.)

# %%
import importlib.util

if importlib.util.find_spec("transformers"):
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    c = config
    theirs = Qwen3_5MoeForCausalLM(
        Qwen3_5MoeTextConfig(
            vocab_size=c.vocab_size,
            num_hidden_layers=c.layers,
            hidden_size=c.hidden,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_dim,
            num_experts=c.experts,
            num_experts_per_tok=c.top_k,
            moe_intermediate_size=c.expert_hidden,
            shared_expert_intermediate_size=c.shared_hidden,
            linear_num_key_heads=c.delta_key_heads,
            linear_num_value_heads=c.delta_value_heads,
            linear_key_head_dim=c.delta_key_dim,
            linear_value_head_dim=c.delta_value_dim,
            linear_conv_kernel_dim=c.delta_taps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": 0.25},
        )
    )
    with torch.no_grad():
        for layer, their in zip(model.layers.values(), theirs.model.layers, strict=True):
            mine = layer.attention
            if isinstance(mine, GatedDeltaNet):
                other = their.linear_attn
                pairs = [(mine.qkv, other.in_proj_qkv), (mine.gate, other.in_proj_z), (mine.output, other.out_proj)]
                pairs += [(mine.strength, other.in_proj_b), (mine.decay, other.in_proj_a), (mine.norm, other.norm)]
                other.conv1d.weight.copy_(mine.convolution)
                other.A_log.copy_(mine.A_log)
                other.dt_bias.copy_(mine.dt_bias)
            else:
                other = their.self_attn
                pairs = [(mine.query, other.q_proj), (mine.key, other.k_proj), (mine.value, other.v_proj)]
                pairs += [(mine.output, other.o_proj)]
            pairs += [(layer.router, their.mlp.gate), (layer.shared_gate, their.mlp.shared_expert_gate)]
            pairs += [(layer.shared.down, their.mlp.shared_expert.down_proj)]
            for ours, source in pairs:
                source.weight.copy_(ours.weight)
            gate, up = layer.shared.gate_up.weight.chunk(2)
            their.mlp.shared_expert.gate_proj.weight.copy_(gate)
            their.mlp.shared_expert.up_proj.weight.copy_(up)
            their.mlp.experts.gate_up_proj.copy_(layer.experts.gate_up)
            their.mlp.experts.down_proj.copy_(layer.experts.down)
        theirs.model.embed_tokens.weight.copy_(model.embedding.weight)
        theirs.lm_head.weight.copy_(model.head.weight)
        expected = theirs(token_ids).logits
    difference = (model.logits(hidden) - expected).abs().max() / expected.abs().max()
    print(f"largest difference of a logit, over the largest logit: {difference.item():.1e}")
    assert difference < 2e-5

# %% [markdown]
# ## What the hybrid buys
#
# The layers of the 35B model in order, and what a sequence keeps in all of them while text is generated, in bfloat16
# (the memories in float32). Measured: one token goes through each layer, and what its cache holds is counted. Beside
# it, the same model if all of its layers were of one kind.

# %%
from pathlib import Path

import pithtrain
from pithtrain.config import load_config

c = load_config(Path(pithtrain.__file__).parent.parent / "configs" / "qwen3.5-35b-a3b.toml").model
x, table = torch.empty(1, 1, c.hidden, dtype=torch.bfloat16, device="meta"), torch.empty(1, 32, device="meta")
with torch.device("meta"):
    kinds = {full: Qwen3_5MoeLayer(c, full, Place()) for full in (False, True)}
caches = {full: Cache() for full in kinds}
for full, layer in kinds.items():
    layer.attention(x, Sequences(table, table), caches[full])
per_token = sum(t.nbytes for t in caches[True].kept)
fixed = sum(t.nbytes for t in caches[False].kept)

tokens = torch.logspace(2, 6, 50)
fig, axes = plt.subplots(1, 2, figsize=(10, 3), width_ratios=(1.3, 1))
order = torch.tensor([(n + 1) % c.full_every == 0 for n in range(c.layers)]).float()
axes[0].imshow(order.view(5, 8), cmap="coolwarm", vmin=-0.3, vmax=1.3)
for n in range(c.layers):
    axes[0].text(n % 8, n // 8, n, ha="center", va="center", color="white", fontsize=8)
axes[0].set(title="blue: delta rule, red: attention", xticks=[], yticks=[], xlabel="layers 0 to 39, row by row")
for full, label in ((c.layers, "attention only"), (c.layers // 4, "hybrid"), (0, "delta rule only")):
    size = full * per_token * tokens + (c.layers - full) * fixed
    axes[1].loglog(tokens, size / 2**30, label=label)
    print(f"{label:16} at 262,144 tokens: {(full * per_token * 262_144 + (c.layers - full) * fixed) / 2**30:6.2f} GiB")
axes[1].set(title="What one sequence keeps", xlabel="tokens", ylabel="GiB")
axes[1].legend()
fig.tight_layout()
fig

# %% [markdown]
# Next: [from a config to a model](36_build.py).
