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

import torch
from torch import Tensor, nn

from pithtrain.config import Qwen3MoeConfig
from pithtrain.layers.attention import Attention, Cache, Sequences
from pithtrain.layers.experts import Experts
from pithtrain.layers.norm import RMSNorm
from pithtrain.layers.rotary import rotary_table
from pithtrain.layers.router import Routed, Router
from pithtrain.models.decoder import Decoder
from pithtrain.models.stages import Place

# %% [markdown]
# ## A layer
#
# $$h' = h + \operatorname{Attention}(\operatorname{RMSNorm}(h)), \qquad
#   h'' = h' + \operatorname{MoE}(\operatorname{RMSNorm}(h')).$$
#
# In stages: everything up to the choice of experts is stage 1, the experts are stage 3, the last addition
# is stage 5 ([why](30_stages.py)). `experts` is the module itself: calling it is the stage.


# %%
#| export
class Qwen3MoeLayer(nn.Module):
    """One decoder layer, in the stages of `pithtrain.models.stages.Layer`."""

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

    def aggregate(self, residual: Tensor, expert_output: Tensor) -> Tensor:
        """Stage 5: the experts' output joins the residual stream."""
        return residual + expert_output.view_as(residual)

    def new_cache(self) -> Cache:
        """Keys and values of the tokens seen."""
        return Cache()


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
# ## The published size
#
# On the meta device, where tensors have shapes and no memory, the published model is made in a moment.

# %%
from pithtrain.models.decoder import count_parameters

published = Qwen3MoeConfig(
    vocab_size=151_936,
    layers=48,
    hidden=2048,
    heads=32,
    kv_heads=4,
    head_dim=128,
    experts=128,
    top_k=8,
    expert_hidden=768,
    rope_theta=1e6,
    tie_embeddings=False,
)
with torch.device("meta"):  # shapes without memory
    total, active = count_parameters(qwen3_moe(published), 128, 8)
print(f"Qwen3-30B-A3B: {total / 1e9:.2f} B in all, {active / 1e9:.2f} B active (published: 30.5 B, 3.3 B)")
assert round(total / 1e9, 1) == 30.5 and abs(active / 3.3e9 - 1) < 0.02

# %%
import matplotlib.pyplot as plt

parts = {}
for name, parameter in qwen3_moe(Qwen3MoeConfig()).named_parameters():
    part = next((p for p in ("embedding", "attention", "experts", "router", "norm") if p in name), name)
    parts[part] = parts.get(part, 0) + parameter.numel()
fig, ax = plt.subplots(figsize=(6, 2.4))
ax.barh(list(parts), [n / 1e6 for n in parts.values()])
ax.set(title="Where the tiny model's parameters are", xlabel="millions")
fig

# %% [markdown]
# Next: [from a config to a model](36_build.py).
