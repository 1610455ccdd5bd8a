# %% [markdown]
# # The five stages of a decoder layer
#
# > A layer is written once, as stages cut where tokens would change machines; every driver runs those.
#
# A Mixture-of-Experts layer has two places where tokens may have to travel: from the rank that routed them
# to the rank that holds their expert, and back. Everything between those places is ordinary local compute.
# PithTrain cuts a layer exactly there:
#
# | stage | does | owner |
# |---|---|---|
# | 1 attend | norm, attention, residual, norm, routing | the model |
# | 2 dispatch | tokens travel to the ranks that hold their experts | the engine |
# | 3 experts | the expert MLPs, on the tokens that arrived | the model |
# | 4 combine | expert outputs travel home | the engine |
# | 5 aggregate | a token's expert outputs join the residual stream | the model |
#
# Whoever runs a model is a *driver* over these stages. The plain forward runs them in order. Expert
# parallelism puts an all-to-all in 2 and 4. A pipeline engine runs stage 1 of one microbatch while stage 2
# of another is on the wire. There is one definition of a layer, and no second one to drift from it.

# %%
#| default_exp models.stages

# %%
#| export
from typing import Protocol

from torch import Tensor

from pithtrain.layers.router import Routed

# %% [markdown]
# ## What a model owes a driver
#
# The residual stream `hidden` is (batch, sequence, H). Between stages 1 and 5 a layer works on `tokens`,
# (T, H) with T = batch times sequence, because experts do not care which sequence a token is from.


# %%
#| export
class Layer(Protocol):
    """A decoder layer in stages. H features, T tokens, K = top_k."""

    def attend(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Routed]:
        """Stage 1. The new residual (batch, sequence, H), the normalised tokens (T, H), where they go."""
        ...

    def experts(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Stage 3. For each of `tokens` the weighted sum over its experts that live here: (T, H)."""
        ...

    def aggregate(self, residual: Tensor, expert_output: Tensor) -> Tensor:
        """Stage 5. The layer's output (batch, sequence, H) from the residual and (T, H)."""
        ...


# %% [markdown]
# ## The plain driver
#
# On one rank every expert is at home: dispatch and combine have nothing to do.


# %%
#| export
def run_layer(layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Routed]:
    """All stages of one layer on one rank: the new residual stream and where its tokens went."""
    residual, tokens, routed = layer.attend(hidden, cos, sin)
    expert_output = layer.experts(tokens, routed.expert_ids, routed.weights)
    return layer.aggregate(residual, expert_output), routed


# %% [markdown]
# Stage 3 takes the routing weights along and returns *weighted sums*. A token that visits three experts on
# the same rank then travels there once and comes back as one row. And stage 5 is a plain addition.
#
# A toy layer shows the protocol: attention that does nothing, and expert $e$ multiplying by $e$.

# %%
import torch


class Toy:
    def attend(self, hidden, cos, sin):
        tokens = hidden.flatten(0, 1)
        expert_ids = torch.tensor([[0, 1], [1, 2], [2, 3]])
        return hidden, tokens, Routed(torch.full((3, 2), 0.5), expert_ids, torch.full((3, 4), 0.25))

    def experts(self, tokens, expert_ids, weights):
        return tokens * (weights * expert_ids).sum(dim=1, keepdim=True)

    def aggregate(self, residual, expert_output):
        return residual + expert_output.view_as(residual)


hidden, routed = run_layer(Toy(), torch.ones(1, 3, 1), None, None)
print(hidden.flatten().tolist())
assert hidden.flatten().tolist() == [1.5, 2.5, 3.5]

# %% [markdown]
# ## The picture
#
# Where each stage's tokens are, when four experts live on two ranks. Compute is coloured, travel is grey:
# the grey bars are what a pipeline engine hides under another microbatch's coloured ones.

# %%
import matplotlib.pyplot as plt

stages = [("1 attend", 3), ("2 dispatch", 1.2), ("3 experts", 3), ("4 combine", 1.2), ("5 aggregate", 0.6)]
fig, ax = plt.subplots(figsize=(8, 1.8))
for rank in range(2):
    start = 0
    for name, width in stages:
        colour = "0.8" if name[0] in "24" else f"C{'135'.index(name[0])}"
        ax.barh(rank, width, left=start, color=colour, edgecolor="white", height=0.8)
        ax.text(start + width / 2, rank, name if width > 1 else name[0], ha="center", va="center", fontsize=8)
        start += width
ax.set(title="One layer on two ranks", yticks=[0, 1], yticklabels=["rank 0", "rank 1"], xticks=[], xlabel="time")
fig

# %% [markdown]
# Next: a real layer in this form, and the model around it: [Qwen3-MoE](31_qwen3_moe.py).
