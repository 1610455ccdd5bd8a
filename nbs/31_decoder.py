# %% [markdown]
# # The decoder
#
# > What every family shares: embedding, layers in five stages, a last norm, a head; or any part of those.
#
# A family of models differs from the next in its layers. What stands around the layers does not differ, and
# is here: token ids become vectors, the layers work on the residual stream, a norm and a matrix turn the
# last hidden state into a score for each entry of the vocabulary.
#
# A pipeline cuts a model between layers, and each of its stages holds a part: the first has the embedding,
# the last has norm and head. So a `Decoder` is *a part of a decoder*, and the whole model is the part that
# holds everything. Layers keep their global number in every part, and so do their parameters' names.

# %%
#| default_exp models.decoder

# %%
#| export
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pithtrain.config import DecoderConfig
from pithtrain.layers.attention import Cache, Sequences
from pithtrain.layers.loss import linear_cross_entropy
from pithtrain.layers.router import Routed
from pithtrain.models.stages import Layer, Place, run_layer

# %% [markdown]
# ## Forward
#
# `positions` says where in its sequence each token stands. It is an argument because a rank need not hold a
# sequence's tokens in order, or all of them. The family's `rotary` makes its table of angles from it, once
# for all layers.
#
# Where targets are given, the last part returns the summed cross-entropy instead of the hidden state: the
# [loss](27_loss.py) takes the head's matrix, and the scores of all tokens never exist at once. `logits` is
# for generation, which wants the scores of a few.
#
# The routing of each layer comes back beside the result. Balance losses and load counts are made from it by
# whoever trains; the model itself keeps no statistics.


# %%
#| export
class Decoder(nn.Module):
    """The part of a decoder that `place` asks for.

    `layers` are the part's own, by global number; `rotary` gives cosines and sines of positions."""

    def __init__(
        self, config: DecoderConfig, layers: Mapping[int, Layer], rotary: Callable[[Tensor], tuple[Tensor, Tensor]],
        norm: nn.Module, place: Place,
    ):  # fmt: skip
        super().__init__()
        self.config, self.rotary, self.place = config, rotary, place
        has_embedding = place.first or (place.last and config.tie_embeddings)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden) if has_embedding else None
        self.layers = nn.ModuleDict({str(number): layer for number, layer in layers.items()})
        self.norm = norm if place.last else None
        own_head = place.last and not config.tie_embeddings
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False) if own_head else None

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix (vocab_size, hidden); the embedding's own when they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self, x: Tensor, positions: Tensor, documents: Tensor | None = None,
        targets: Tensor | None = None, caches: Sequence[Cache] | None = None,
    ) -> tuple[Tensor, list[Routed | None]]:  # fmt: skip
        """The hidden state (B, S, hidden) behind this part, and where each layer's tokens went.

        `x` is (B, S) int64 token ids on the first part, the hidden state of the part before on others;
        `positions` is (S,) or (B, S) int64; `documents` as in `OneRank.attend`. The last part returns,
        where `targets` (B, S) are given, the sum over tokens of the cross-entropy in nats, an fp32 scalar."""
        hidden, sequences = self.begin(x, positions, documents)
        routing = []
        for number, layer in enumerate(self.layers.values()):
            hidden, routed = run_layer(layer, hidden, sequences, self.place, caches[number] if caches else None)
            routing.append(routed)
        return self.finish(hidden, targets), routing

    def begin(self, x: Tensor, positions: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Sequences]:
        """What comes before this part's layers: the hidden state that they get, and the angles of its tokens."""
        hidden = self.embedding(x).to(self.place.dtype) if self.place.first else x
        return hidden, Sequences(*self.rotary(positions), documents)

    def finish(self, hidden: Tensor, targets: Tensor | None) -> Tensor:
        """What comes behind this part's layers: nothing, the norm, or norm and loss."""
        if not self.place.last:
            return hidden
        hidden = self.norm(hidden)
        if targets is None:
            return hidden
        return linear_cross_entropy(hidden.flatten(0, 1), self.head_weight, targets.flatten())

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., vocab_size) of the next token, fp32, from last hidden states (..., hidden)."""
        return (hidden @ self.head_weight.to(hidden.dtype).t()).float()


# %% [markdown]
# A decoder whose layers do nothing but add a constant: cut in two, the parts together are the whole.

# %%
from pithtrain.config import Qwen3MoeConfig
from pithtrain.layers.norm import RMSNorm


class Shift(Layer):
    experts = None  # a dense layer

    def __init__(self, number):
        super().__init__()
        self.number = number

    def attend(self, hidden, sequences, cache=None):
        return hidden + self.number, None, None


def toy(place):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(vocab_size=300, hidden=8)
    layers = {number: Shift(number) for number in place.held(4)}
    return Decoder(config, layers, lambda positions: (positions, positions), RMSNorm(8, 1e-6), place)


token_ids, positions = torch.tensor([[5, 6, 7]]), torch.arange(3)
whole, _ = toy(Place())(token_ids, positions)
middle, _ = toy(Place(layers=range(0, 1), last=False))(token_ids, positions)
end, _ = toy(Place(layers=range(1, 4), first=False))(middle, positions)
assert torch.equal(end, whole)
print([name for name, _ in toy(Place(layers=range(1, 4), first=False)).named_modules()])

# %% [markdown]
# ## First weights
#
# Each matrix is drawn from a generator of its own, seeded by the run's seed and the parameter's name, and an
# expert's by its number too. The weights then do not depend on the order in which parameters are made, nor
# on which rank makes them or which part of them it holds. Matrices that write to the residual stream start
# smaller by $\sqrt{2L}$, so that the stream's size at the end does not grow with the depth (GPT-2's rule).
# Norms, biases (also those of stacked experts) and short convolutions are set by the modules that have them.


# %%
#| export
@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Fill every matrix of `model` with normal values of deviation `config.init_std`."""
    config = model.config
    share = model.place.exchange.share(config.experts)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith(("bias", "convolution")):
            continue
        writes_to_residual = name.endswith(("output.weight", "down", "down.weight"))
        std = config.init_std / (2 * config.layers) ** 0.5 if writes_to_residual else config.init_std
        stacked = ".experts." in name
        shape = parameter.shape[1:] if stacked else parameter.shape
        names = [f"{seed} {name} {expert}" for expert in share] if stacked else [f"{seed} {name}"]
        draws = []
        for one in names:
            # One hash of it all: torch's CPU generator reads only the low 32 bits of a seed.
            generator = torch.Generator().manual_seed(zlib.crc32(one.encode()))
            draws.append(torch.randn(shape, generator=generator) * std)
        parameter.copy_(torch.stack(draws) if stacked else draws[0])


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


# %% [markdown]
# Next: a family's layer in this frame: [Qwen3-MoE](32_qwen3_moe.py).
