# %% [markdown]
# # Qwen3-MoE
#
# > The Qwen3 Mixture-of-Experts decoder, from token ids to the last hidden state, in five stages a layer.
#
# Qwen3-30B-A3B and 235B-A22B (arXiv 2505.09388) are decoders in which every layer is grouped-query
# attention followed by a Mixture-of-Experts: 128 experts, of which a token visits 8, with renormalised
# softmax weights, and no shared experts. This is that architecture at any size.

# %%
#| default_exp models.qwen3_moe

# %%
#| export
from functools import partial

from torch import Tensor

from pithtrain.config import Qwen3MoeConfig
from pithtrain.layers.attention import Attention, Cache, Sequences
from pithtrain.layers.experts import Experts
from pithtrain.layers.norm import RMSNorm
from pithtrain.layers.rotary import rotary_table
from pithtrain.layers.router import Routed, Router
from pithtrain.models.decoder import Decoder
from pithtrain.models.stages import Layer, Place

# %% [markdown]
# ## A layer
#
# $$h' = h + \operatorname{Attention}(\operatorname{RMSNorm}(h)), \qquad
#   h'' = h' + \operatorname{MoE}(\operatorname{RMSNorm}(h')).$$
#
# In stages: everything up to the choice of experts is stage 1, the experts are stage 3, the last addition
# is stage 5, which is [every layer's](30_stages.py). `experts` is the module itself: calling it is the stage.


# %%
#| export
class Qwen3MoeLayer(Layer):
    """One decoder layer, in stages."""

    def __init__(self, config: Qwen3MoeConfig, place: Place):
        super().__init__()
        c = config
        self.attention_norm = RMSNorm(c.hidden, c.norm_eps)
        self.attention = Attention(c.hidden, c.heads, c.kv_heads, c.head_dim, c.norm_eps, place.core)
        self.expert_norm = RMSNorm(c.hidden, c.norm_eps)
        self.router = Router(c.hidden, c.experts, c.top_k, c.renormalise)
        self.experts = Experts(c.hidden, len(place.exchange.share(c.experts)), c.expert_hidden)

    def attend(self, hidden: Tensor, sequences: Sequences, cache: Cache | None = None) -> tuple[Tensor, Tensor, Routed]:
        """Stage 1: attention, then routing of the normalised tokens."""
        residual = hidden + self.attention(self.attention_norm(hidden), sequences, cache)
        tokens = self.expert_norm(residual.flatten(0, 1))
        return residual, tokens, self.router(tokens)


# %%
config = Qwen3MoeConfig(hidden=32, heads=4, head_dim=8, experts=8, expert_hidden=16, vocab_size=300, layers=2)
layer = Qwen3MoeLayer(config, Place())
print(layer)

# %% [markdown]
# ## The model
#
# The [decoder](31_decoder.py) around such layers, with rotary angles over the whole head.


# %%
#| export
def qwen3_moe(config: Qwen3MoeConfig, place: Place = Place()) -> Decoder:
    """A Qwen3-MoE decoder, or the part of it that `place` asks for. Source: arXiv 2505.09388."""
    layers = {number: Qwen3MoeLayer(config, place) for number in place.held(config.layers)}
    rotary = partial(rotary_table, head_dim=config.head_dim, theta=config.rope_theta)
    return Decoder(config, layers, rotary, RMSNorm(config.hidden, config.norm_eps), place)


# %%
import torch

from pithtrain.models.decoder import initialise

model = qwen3_moe(config)
initialise(model, seed=0)
token_ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
hidden, routing = model(token_ids, torch.arange(12))
print("hidden", tuple(hidden.shape), "logits", tuple(model.logits(hidden).shape))
print("experts of the first token, layer by layer:", [r.expert_ids[0].tolist() for r in routing])

# %% [markdown]
# An untrained model knows nothing: its loss is close to that of a uniform guess, $\log V$.

# %%
import math

loss = model(token_ids[:, :-1], torch.arange(11), targets=token_ids[:, 1:])[0] / 22
print(f"loss {loss.item():.3f} nats, log V = {math.log(300):.3f}")
assert abs(loss.item() - math.log(300)) < 0.2

# %% [markdown]
# ## Much held, little used
#
# Where the parameters of Qwen3-30B-A3B are, and which of them a token meets (solid): all of the attention, the row of
# the embedding that is its own, and of every layer's 128 experts 8. On the meta device, where tensors have shapes and
# no memory, the model is made in a moment.

# %%
from pathlib import Path

import matplotlib.pyplot as plt

import pithtrain
from pithtrain.config import load_config

published = load_config(Path(pithtrain.__file__).parent.parent / "configs" / "qwen3-30b-a3b.toml").model
with torch.device("meta"):
    whole = qwen3_moe(published)
held, used = {}, {}
for name, parameter in whole.named_parameters():
    part = next(p for p in ("experts", "attention", "embedding", "head", "router", "norm") if p in name)
    share = {"experts": published.top_k / published.experts, "embedding": 1 / published.vocab_size}.get(part, 1)
    held[part] = held.get(part, 0) + parameter.numel() / 1e9
    used[part] = used.get(part, 0) + share * parameter.numel() / 1e9
parts = sorted(held, key=held.__getitem__)
fig, ax = plt.subplots(figsize=(7, 2.6))
ax.barh(parts, [held[part] for part in parts], color="0.85", label="held")
ax.barh(parts, [used[part] for part in parts], color="C0", label="used by a token")
for row, part in enumerate(parts):
    ax.text(
        held[part] + 0.3, row, f"{1e3 * used[part]:,.1f} of {1e3 * held[part]:,.1f} million", va="center", fontsize=8
    )
ax.set(title="Parameters of Qwen3-30B-A3B", xlabel="billions", xlim=(0, 38))
ax.legend(fontsize=8, loc="lower right")
fig

# %% [markdown]
# Every published model's two numbers, counted like this, are beside the published ones in
# [the notebook that builds them](36_build.py). Next: [another family](33_deepseek.py).
