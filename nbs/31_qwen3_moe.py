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
import zlib

import torch
from torch import Tensor, nn

from pithtrain.config import ModelConfig
from pithtrain.layers.attention import Attention
from pithtrain.layers.experts import Experts
from pithtrain.layers.norm import RMSNorm
from pithtrain.layers.rotary import rotary_table
from pithtrain.layers.router import Routed, Router
from pithtrain.models.stages import run_layer

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

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.attention_norm = RMSNorm(c.hidden, c.norm_eps)
        self.attention = Attention(c.hidden, c.heads, c.kv_heads, c.head_dim, c.norm_eps)
        self.expert_norm = RMSNorm(c.hidden, c.norm_eps)
        self.router = Router(c.hidden, c.experts, c.top_k, c.renormalise)
        self.experts = Experts(c.hidden, c.experts, c.expert_hidden)

    def attend(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Routed]:
        """Stage 1: attention, then routing of the normalised tokens."""
        residual = hidden + self.attention(self.attention_norm(hidden), cos, sin)
        tokens = self.expert_norm(residual).flatten(0, 1)
        return residual, tokens, self.router(tokens)

    def aggregate(self, residual: Tensor, expert_output: Tensor) -> Tensor:
        """Stage 5: the experts' output joins the residual stream."""
        return residual + expert_output.view_as(residual)


# %%
config = ModelConfig(hidden=32, heads=4, head_dim=8, experts=8, expert_hidden=16, vocab_size=300, layers=2)
layer = Qwen3MoeLayer(config)
print(layer)

# %% [markdown]
# ## The model
#
# An embedding, the layers, a last norm, and a head that gives every vocabulary entry a score. The forward
# stops at the last hidden state: the [loss](27_loss.py) takes it from there together with the head's
# matrix, so that the scores of all tokens never exist at once. `logits` is for generation, which wants
# the scores of a few.
#
# The routing of each layer comes back beside it. Balance losses and load counts are made from it by
# whoever trains; the model itself keeps no statistics.


# %%
#| export
class Qwen3Moe(nn.Module):
    """A Qwen3-MoE decoder. Source: arXiv 2505.09388."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Qwen3MoeLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix (vocab_size, hidden); the embedding's own when they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, token_ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Routed]]:
        """Last hidden state (batch, sequence, hidden) in the compute `dtype`, and each layer's routing.

        `token_ids` (batch, sequence) int64.
        """
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        cos, sin = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        hidden = self.embedding(token_ids).to(dtype)
        routing = []
        for layer in self.layers:
            hidden, routed = run_layer(layer, hidden, cos, sin)
            routing.append(routed)
        return self.norm(hidden), routing

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., vocab_size) of the next token, fp32, from last hidden states (..., hidden)."""
        return (hidden @ self.head_weight.to(hidden.dtype).t()).float()


# %% [markdown]
# ## First weights
#
# Each parameter is drawn from a generator of its own, seeded by the run's seed and the parameter's name.
# The weights then do not depend on the order in which parameters are made, nor on which rank makes them.
# Matrices that write to the residual stream start smaller by $\sqrt{2L}$, so that the stream's size at
# the end does not grow with the depth (GPT-2's rule).


# %%
#| export
@torch.no_grad()
def initialise(model: nn.Module, std: float, layers: int, seed: int) -> None:
    """Fill every matrix of `model` with normal values of deviation `std`; norms and biases stay as they are."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        # One hash of both: torch's CPU generator reads only the low 32 bits of a seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        writes_to_residual = name.endswith(("output.weight", "experts.down"))
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values * (std / (2 * layers) ** 0.5 if writes_to_residual else std))


# %%
model = Qwen3Moe(config)
initialise(model, std=0.02, layers=2, seed=0)
token_ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
hidden, routing = model(token_ids)
print("hidden", tuple(hidden.shape), "logits", tuple(model.logits(hidden).shape))
print("experts of the first token, layer by layer:", [r.expert_ids[0].tolist() for r in routing])

# %% [markdown]
# An untrained model knows nothing: its loss is close to that of a uniform guess, $\log V$.

# %%
import math

from pithtrain.layers.loss import linear_cross_entropy

loss = linear_cross_entropy(hidden[:, :-1].flatten(0, 1), model.head_weight, token_ids[:, 1:].flatten()) / 22
print(f"loss {loss.item():.3f} nats, log V = {math.log(300):.3f}")
assert abs(loss.item() - math.log(300)) < 0.2

# %% [markdown]
# ## Total and active parameters
#
# What makes a Mixture-of-Experts worth it, in two numbers: how much it can hold and how much a token uses.


# %%
#| export
def count_parameters(model: nn.Module, experts: int, top_k: int) -> tuple[int, int]:
    """All parameters, and those that one token uses: `top_k` of `experts` where experts are stacked."""
    total = sum(p.numel() for p in model.parameters())
    stacked = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return total, total - stacked + stacked * top_k // experts


# %%
published = ModelConfig(
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
    total, active = count_parameters(Qwen3Moe(published), 128, 8)
print(f"Qwen3-30B-A3B: {total / 1e9:.2f} B in all, {active / 1e9:.2f} B active (published: 30.5 B, 3.3 B)")
assert round(total / 1e9, 1) == 30.5 and abs(active / 3.3e9 - 1) < 0.02

# %%
import matplotlib.pyplot as plt

parts = {}
for name, parameter in Qwen3Moe(ModelConfig()).named_parameters():
    part = next((p for p in ("embedding", "attention", "experts", "router", "norm") if p in name), name)
    parts[part] = parts.get(part, 0) + parameter.numel()
fig, ax = plt.subplots(figsize=(6, 2.4))
ax.barh(list(parts), [n / 1e6 for n in parts.values()])
ax.set(title="Where the tiny model's parameters are", xlabel="millions")
fig

# %% [markdown]
# Next: text for it to read: the [corpus](60_corpus.py).
