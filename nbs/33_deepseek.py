# %% [markdown]
# # DeepSeek
#
# > DeepSeek-V2, V2-Lite and V3: latent attention, experts in groups, and an MLP that every token visits.
#
# DeepSeek-V2 (arXiv 2405.04434) made two choices that many models followed. Attention keeps a short latent
# per token where others keep keys and values ([how](28_latent_attention.py)), and experts are small and
# many, a few of them shared by all tokens. DeepSeek-V3 (arXiv 2412.19437) is the same layer with another
# [router](20_router.py): sigmoid scores and a selection bias that balances without a loss.

# %%
#| default_exp models.deepseek

# %%
#| export
from functools import partial

from torch import Tensor

from pithtrain.config import DeepseekConfig
from pithtrain.layers.attention import Cache, Sequences
from pithtrain.layers.experts import Experts
from pithtrain.layers.latent_attention import LatentAttention
from pithtrain.layers.mlp import MLP
from pithtrain.layers.norm import RMSNorm
from pithtrain.layers.rotary import Yarn, yarn_magnitude, yarn_table
from pithtrain.layers.router import Routed, Router
from pithtrain.models.decoder import Decoder
from pithtrain.models.stages import Layer, Place

# %% [markdown]
# ## A layer
#
# $$h' = h + \operatorname{MLA}(\operatorname{RMSNorm}(h)), \quad u = \operatorname{RMSNorm}(h'), \quad
#   h'' = h' + \operatorname{MLP}(u) + \lambda \sum_{e \in S} w_e \operatorname{Expert}_e(u).$$
#
# The MLP is what every token visits. In most layers it is the *shared experts*, which are
# [one wider MLP](23a_mlp.py). In the first one to three it is a large one, and there are no experts. An MLP
# that every token visits has nowhere to travel, so it belongs to stage 1, and an engine that overlaps stages
# hides the tokens' journey behind it. ($\lambda$ is already in the router's weights.)
#
# Which parts of a head are rotated decides where YaRN's magnitude goes. The scores are a sum of a rotated
# and an unrotated product, and both must be sharpened, so the softmax's scale carries the square of
# `yarn_magnitude`. (A model may sharpen the rotated part further; published ones do not.)


# %%
#| export
class DeepseekLayer(Layer):
    """One decoder layer, in stages; without experts where it is `dense`."""

    def __init__(self, config: DeepseekConfig, dense: bool, place: Place):
        super().__init__()
        c = config
        scale = yarn_magnitude(c.yarn_factor, c.yarn_mscale_all_dim) ** 2 / (c.head_dim + c.rope_dim) ** 0.5
        self.attention_norm = RMSNorm(c.hidden, c.norm_eps)
        self.attention = LatentAttention(
            c.hidden, c.heads, c.head_dim, c.rope_dim, c.value_dim, c.latent_rank, c.query_rank, scale, place.core
        )
        self.mlp_norm = RMSNorm(c.hidden, c.norm_eps)
        inner = c.dense_hidden if dense else c.shared_experts * c.expert_hidden
        self.mlp = MLP(c.hidden, inner) if inner else None
        self.router = self.experts = None
        if not dense:
            scoring = c.renormalise, c.scoring == "sigmoid", c.routed_scale
            self.router = Router(c.hidden, c.experts, c.top_k, *scoring, c.groups, c.top_groups)
            self.experts = Experts(c.hidden, len(place.exchange.share(c.experts)), c.expert_hidden)

    def attend(
        self, hidden: Tensor, sequences: Sequences, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor, Routed | None]:
        """Stage 1: attention, the MLP that every token visits, then routing of the normalised tokens."""
        residual = hidden + self.attention(self.attention_norm(hidden), sequences, cache)
        tokens = self.mlp_norm(residual.flatten(0, 1))
        if self.mlp is not None:
            residual = residual + self.mlp(tokens).view_as(residual)
        return residual, tokens, None if self.router is None else self.router(tokens)


# %%
config = DeepseekConfig(
    vocab_size=300,
    layers=2,
    hidden=32,
    heads=4,
    head_dim=8,
    rope_dim=4,
    value_dim=8,
    latent_rank=16,
    dense_hidden=64,
    experts=8,
    expert_hidden=16,
    tie_embeddings=False,
)
for dense in (True, False):
    print(", ".join(name for name, _ in DeepseekLayer(config, dense, Place()).named_parameters()), end="\n\n")

# %% [markdown]
# ## The model


# %%
#| export
def deepseek(config: DeepseekConfig, place: Place = Place()) -> Decoder:
    """A DeepSeek decoder (arXiv 2405.04434, 2412.19437), or the part of it that `place` asks for."""
    c = config
    layers = {number: DeepseekLayer(c, number < c.dense_layers, place) for number in place.held(c.layers)}
    yarn = Yarn(c.yarn_factor, c.yarn_length, c.yarn_beta_fast, c.yarn_beta_slow)
    magnitude = yarn_magnitude(c.yarn_factor, c.yarn_mscale) / yarn_magnitude(c.yarn_factor, c.yarn_mscale_all_dim)
    rotary = partial(yarn_table, head_dim=c.rope_dim, theta=c.rope_theta, yarn=yarn, magnitude=magnitude)
    return Decoder(c, layers, rotary, RMSNorm(c.hidden, c.norm_eps), place)


# %%
import torch

from pithtrain.models.decoder import initialise

model = deepseek(config)
initialise(model, seed=0)
token_ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
hidden, routing = model(token_ids, torch.arange(12))
print("hidden", tuple(hidden.shape), "logits", tuple(model.logits(hidden).shape))
print("experts of the first token, layer by layer:", [r and r.expert_ids[0].tolist() for r in routing])

# %% [markdown]
# ## The same numbers as elsewhere
#
# Where `transformers` is installed: its DeepSeek-V2 with the weights of the model above, and the two models'
# scores for the same tokens. (tests/test_deepseek.py does this in every corner of the config, for V3 and for
# all gradients as well.)

# %%
import importlib.util

if importlib.util.find_spec("transformers"):
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    c = config
    theirs = DeepseekV2ForCausalLM(
        DeepseekV2Config(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden,
            intermediate_size=c.dense_hidden,
            moe_intermediate_size=c.expert_hidden,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            n_shared_experts=c.shared_experts,
            n_routed_experts=c.experts,
            num_experts_per_tok=c.top_k,
            kv_lora_rank=c.latent_rank,
            q_lora_rank=None,
            qk_rope_head_dim=c.rope_dim,
            qk_nope_head_dim=c.head_dim,
            v_head_dim=c.value_dim,
            first_k_dense_replace=c.dense_layers,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
    )
    # The two models hold their parameters in nearly the same order; theirs has gate and up apart.
    with torch.no_grad():
        for layer, their in zip(model.layers.values(), theirs.model.layers, strict=True):
            mine, other = layer.attention, their.self_attn
            for ours, source in (
                (mine.query, other.q_proj),
                (mine.latent, other.kv_a_proj_with_mqa),
                (mine.latent_norm, other.kv_a_layernorm),
                (mine.expand, other.kv_b_proj),
                (mine.output, other.o_proj),
                (layer.attention_norm, their.input_layernorm),
                (layer.mlp_norm, their.post_attention_layernorm),
            ):
                source.weight.copy_(ours.weight)
            dense = their.mlp if layer.router is None else their.mlp.shared_experts
            dense.gate_proj.weight.copy_(layer.mlp.gate_up.weight.chunk(2)[0])
            dense.up_proj.weight.copy_(layer.mlp.gate_up.weight.chunk(2)[1])
            dense.down_proj.weight.copy_(layer.mlp.down.weight)
            if layer.router is not None:
                their.mlp.gate.weight.copy_(layer.router.weight)
                their.mlp.experts.gate_up_proj.copy_(layer.experts.gate_up)
                their.mlp.experts.down_proj.copy_(layer.experts.down)
        theirs.model.embed_tokens.weight.copy_(model.embedding.weight)
        theirs.lm_head.weight.copy_(model.head.weight)
        expected = theirs(token_ids).logits
    difference = (model.logits(hidden) - expected).abs().max() / expected.abs().max()
    print(f"largest difference of a logit, over the largest logit: {difference.item():.1e}")
    assert difference < 1e-5

# %% [markdown]
# ## What it buys: long texts
#
# The cache of one sequence of 163,840 tokens, the longest these models read, through all layers in bfloat16.
# Measured as before: one token goes through one layer, and what the layer keeps is counted. Beside them the
# same models with the attention that they did without: a key and value for each head, or for eight groups.

# %%
from pathlib import Path

import matplotlib.pyplot as plt

import pithtrain
from pithtrain.config import load_config
from pithtrain.layers.attention import Attention, OneRank

published = ("deepseek-v2-lite", "deepseek-v2", "deepseek-v3")
configs = Path(pithtrain.__file__).parent.parent / "configs"


def gigabytes(attention, rope_dim, hidden, layers, tokens=163_840):
    """Cache of a sequence in `layers` such layers, in GiB."""
    x, table = (
        torch.empty(1, 1, hidden, dtype=torch.bfloat16, device="meta"),
        torch.empty(1, rope_dim // 2, device="meta"),
    )
    attention(x, Sequences(table, table), cache := Cache())
    return sum(t.nbytes for t in cache.kept) * layers * tokens / 2**30


bars = {"latents (as published)": [], "8 key heads": [], "a key head for each head": []}
for name in published:
    c = load_config(configs / f"{name}.toml").model
    with torch.device("meta"):
        latent = DeepseekLayer(c, True, Place()).attention
        heads = {n: Attention(c.hidden, c.heads, n, c.head_dim, 1e-6, OneRank()) for n in (8, c.heads)}
    sizes = [gigabytes(latent, c.rope_dim, c.hidden, c.layers)]
    sizes += [gigabytes(attention, c.head_dim, c.hidden, c.layers) for attention in heads.values()]
    for label, size in zip(bars, sizes, strict=True):
        bars[label].append(size)
    print(f"{name:18} " + ", ".join(f"{label}: {size:.1f} GiB" for label, size in zip(bars, sizes, strict=True)))
fig, ax = plt.subplots(figsize=(7, 3))
for i, (label, sizes) in enumerate(bars.items()):
    ax.bar(torch.arange(3) + (i - 1) * 0.27, sizes, 0.25, label=label, color=("C1", "C0", "0.7")[i])
ax.axhline(80, color="0.4", ls=":")
ax.set(title="Cache of one sequence of 163,840 tokens", ylabel="GiB", yscale="log", ylim=(1, 1000))
ax.set_xticks(range(3), list(published))
ax.legend(fontsize=8)
fig

# %% [markdown]
# The dotted line is a GPU of 80 GiB. With a key and value for each of its 128 heads, DeepSeek-V3's cache for
# a single text would take eight of them; the latents leave most of one free.
#
# Next: [another family](34_gpt_oss.py), or [from a config to a model](36_build.py).
