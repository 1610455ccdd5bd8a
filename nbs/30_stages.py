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
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pithtrain.layers.attention import Cache, OneRank, Sequences
from pithtrain.layers.router import Routed

# %% [markdown]
# ## What a model owes a driver
#
# The residual stream `hidden` is (batch, sequence, H). Between stages 1 and 5 a layer works on `tokens`,
# (T, H) with T = batch times sequence, because experts do not care which sequence a token is from.


# %%
#| export
class Layer(nn.Module):
    """A decoder layer in stages. H features, T tokens, K = top_k.

    A family defines `attend`, and `experts`: stage 3, which gives for each of its tokens (Q, H) the weighted sum over
    those of its `expert_ids` (Q, K) that live here, from `weights` (Q, K): (Q, H)."""

    def attend(
        self, hidden: Tensor, sequences: Sequences, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor, Routed | None]:
        """Stage 1. The new residual (batch, sequence, H), the normalised tokens (T, H), where they go.

        A dense layer has nothing to route: it returns its output as the residual, and None."""
        raise NotImplementedError

    def aggregate(self, residual: Tensor, expert_output: Tensor) -> Tensor:
        """Stage 5. The layer's output (batch, sequence, H) from the residual and (T, H)."""
        return residual + expert_output.view_as(residual)


# %% [markdown]
# ## What a driver owes a model
#
# Stages 2 and 4 are one object, the *exchange*: it knows which experts live here and how tokens travel. On
# a rank alone all of them do, and nothing travels. Before tokens can leave, the ranks must know how many will arrive;
# that is told in `announce`, apart, so that a driver can do something else before it waits for the answer. `Arrived`
# is what stage 3 gets: tokens, the experts they visit here, numbered from 0 (-1: an expert that lives elsewhere), and
# the weights of those visits.


# %%
#| export
class Arrived(NamedTuple):
    """Tokens at the rank of their experts: Q of them, from every rank of the exchange."""

    tokens: Tensor  #: (Q, H)
    expert_ids: Tensor  #: (Q, K) int64, numbered from this rank's first expert; -1: not here
    weights: Tensor  #: (Q, K) fp32


# %%
#| export
class Exchange:
    """Stages 2 and 4: as it stands, on a rank that holds every expert."""

    def share(self, experts: int) -> range:
        """Those of a layer's experts that live on this rank."""
        return range(experts)

    def announce(self, routed: Routed) -> object:
        """Ahead of stage 2: ranks tell each other how many rows they will send. Nothing here waits for it."""
        return None

    def dispatch(self, tokens: Tensor, routed: Routed, announced: object) -> tuple[Arrived, object]:
        """Stage 2: `tokens` (T, H) travel to their experts. The second result is for `combine` alone."""
        return Arrived(tokens, routed.expert_ids, routed.weights), None

    def combine(self, output: Tensor, journey: object) -> Tensor:
        """Stage 4: outputs (Q, H) travel home, where those of the same token are added: (T, H)."""
        return output


AtHome = Exchange  # nothing travels


# %% [markdown]
# `Place` is all that a model is told about where it runs: the exchange, how its queries meet their keys,
# which layers are here, and the dtype of its activations. It is given when the model is made. Models know
# nothing of meshes and process groups.
#
# `recompute` trades time for memory. A stage that is recomputed keeps its inputs alone and runs again when
# its backward comes. What has travelled is an input of stage 3 and is kept, so nothing travels twice.


# %%
#| export
@dataclass(frozen=True)
class Place:
    """What a model knows of the rank it is made for; the default is a rank that holds everything."""

    exchange: Exchange = AtHome()  # noqa: RUF009 (it holds no state)
    core: OneRank = OneRank()
    layers: range | None = None  #: global numbers of the layers that are here; None: all
    first: bool = True  #: the embedding is here
    last: bool = True  #: the final norm and the head are here
    dtype: torch.dtype = torch.float32  #: of activations
    recompute: Literal["none", "attention", "experts", "layer"] = "none"

    def held(self, layers: int) -> range:
        """The layers that are here, of a model of so many."""
        return range(layers) if self.layers is None else self.layers


# %% [markdown]
# ## The plain driver


# %%
#| export
def run_layer(
    layer: Layer, hidden: Tensor, sequences: Sequences, place: Place, cache: Cache | None = None
) -> tuple[Tensor, Routed | None]:
    """All stages of one layer in order: the new residual stream and where its tokens went."""
    attend, experts = layer.attend, layer.experts
    if torch.is_grad_enabled():
        if place.recompute in ("attention", "layer"):
            attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        if place.recompute in ("experts", "layer"):
            experts = partial(checkpoint, experts, use_reentrant=False, preserve_rng_state=False)
    residual, tokens, routed = attend(hidden, sequences, cache)
    if routed is None:
        return residual, None
    arrived, journey = place.exchange.dispatch(tokens, routed, place.exchange.announce(routed))
    expert_output = place.exchange.combine(experts(*arrived), journey)
    return layer.aggregate(residual, expert_output), routed


# %% [markdown]
# Stage 3 takes the routing weights along and returns *weighted sums*. A token that visits three experts on
# the same rank then travels there once and comes back as one row. And stage 5 is a plain addition.
#
# A toy layer shows them all: attention that does nothing, and expert $e$ multiplying by $e$.


# %%
class Toy(Layer):
    def attend(self, hidden, sequences, cache=None):
        tokens = hidden.flatten(0, 1)
        expert_ids = torch.tensor([[0, 1], [1, 2], [2, 3]])
        weights, probs, load = torch.full((3, 2), 0.5), torch.full((3, 4), 0.25), torch.tensor([1, 2, 2, 1])
        return hidden, tokens, Routed(weights, expert_ids, probs, load)

    def experts(self, tokens, expert_ids, weights):
        return tokens * (weights * expert_ids).sum(dim=1, keepdim=True)


hidden, routed = run_layer(Toy(), torch.ones(1, 3, 1), None, Place())
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
# Next: the [driver of a whole model](31_decoder.py), and a [real layer](32_qwen3_moe.py) in this form.
