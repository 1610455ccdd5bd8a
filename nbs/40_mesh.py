# %% [markdown]
# # The mesh
#
# > The ranks of a run laid out along four axes, and one object that says where a rank stands in them.
#
# Training on many ranks shares four things out, each along an axis of its own:
#
# | axis | what its ranks share | what travels between them |
# |---|---|---|
# | `pp` pipeline | the layers | hidden states and their gradients, between neighbours |
# | `dp` data | the batch | weights and gradients (sharded), once a step or once a layer |
# | `cp` context | each sequence | keys and values |
# | `ep` expert | each layer's experts, and the batch | tokens |
#
# Ranks are numbered with `ep` innermost and `pp` outermost: what talks most sits closest. The ranks of `ep`
# hold different experts but read different sequences too, so outside the experts they are data-parallel
# ranks like those of `dp`: the batch is shared by `dp * ep` ranks.

# %%
#| default_exp parallel.mesh

# %%
#| export
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pithtrain.config import Config, MeshConfig, Qwen3_5MoeConfig, UserError
from pithtrain.parallel.pipeline.generate import generate
from pithtrain.parallel.pipeline.schedule import ScheduleError, split_layers

# %% [markdown]
# ## Sizes
#
# `dp` is what the other axes leave. What does not fit is refused with the axis that does not fit.


# %%
#| export
class Axes(NamedTuple):
    """Ranks along each axis; their product is the number of ranks."""

    pp: int
    dp: int
    cp: int
    ep: int

    @property
    def batch_ranks(self) -> int:
        """Ranks that share the batch."""
        return self.dp * self.ep


# %%
#| export
def fit_axes(config: MeshConfig, world_size: int) -> Axes:
    """The axes for so many ranks. Raises UserError naming the axis that does not divide what is left for it."""
    left = world_size
    for name, size in (("pp", config.pp), ("cp", config.cp), ("ep", config.ep)):
        if left % size:
            cure = f"; pithtrain launch --nproc {size} starts several ranks" if world_size == 1 else ""
            raise UserError(
                f"mesh.{name}: {size} does not divide {left}, what the axes before leave of {world_size} ranks{cure}"
            )
        left //= size
    if config.dp not in (0, left):
        raise UserError(
            f"mesh.dp: {config.dp}, but pp {config.pp} x cp {config.cp} x ep {config.ep} leave {left} "
            f"of {world_size} ranks; set it to {left}, or to 0 to have it inferred"
        )
    if left % config.copies:
        raise UserError(f"mesh.copies: {config.copies} does not divide mesh.dp, {left}")
    return Axes(config.pp, left, config.cp, config.ep)


# %%
print(fit_axes(MeshConfig(pp=2, ep=4), 32))
for wrong in (MeshConfig(ep=3), MeshConfig(dp=3, cp=2), MeshConfig(copies=3)):
    try:
        fit_axes(wrong, 8)
    except UserError as error:
        print(error)

# %% [markdown]
# And the axes must divide what they share, a pipeline needs microbatches and layers enough for its
# [schedule](51_generate.py), and the gated delta rule's heads are shared by the ranks of `cp`. All of it is refused
# here, from the config alone: before a process is started, a tensor made or a folder written.


# %%
#| export
def check_axes(config: Config, axes: Axes) -> None:
    """Refuse a config whose model or batch cannot be shared along `axes`."""
    model, train, (pp, _, cp, ep) = config.model, config.train, axes
    length, batch, size, ranks = train.sequence_length, train.batch_size, train.micro_batch_size, axes.batch_ranks
    if model.experts % ep:
        raise UserError(f"mesh.ep: {ep} does not divide model.experts, {model.experts}")
    if cp > 1 and length % (2 * cp):
        held = f"{cp} ranks hold two pieces each of a sequence"
        raise UserError(f"mesh.cp: {held}, and {2 * cp} does not divide train.sequence_length, {length}")
    if isinstance(model, Qwen3_5MoeConfig) and model.full_every > 1 and model.delta_key_heads % cp:
        raise UserError(f"mesh.cp: {cp} does not divide model.delta_key_heads, {model.delta_key_heads}")
    if batch % ranks:
        raise UserError(f"mesh.dp x mesh.ep: {ranks} ranks share the batch, and must divide train.batch_size, {batch}")
    if batch % (size * ranks):
        raise UserError(
            f"train.micro_batch_size: {size} sequences on each of {ranks} ranks (mesh.dp x mesh.ep) "
            f"do not divide train.batch_size, {batch}; set it to {batch // ranks} or a divisor of that"
        )
    if pp > 1 and model.tie_embeddings:
        raise UserError("model.tie_embeddings: with mesh.pp > 1 embedding and head are on two ranks; set it to false")
    try:
        cure = "raise train.batch_size, lower train.micro_batch_size or choose another mesh.schedule"
        schedule = generate(config.mesh.schedule if pp > 1 else "1f1b", pp, batch // (size * ranks))
        cure = "lower mesh.pp or raise model.layers"
        split_layers(model.layers, schedule.stages)
    except ScheduleError as error:
        raise UserError(f"mesh.pp: {error}; {cure}") from None


# %%
for config, axes in (
    (Config(), Axes(1, 3, 1, 1)),
    (Config(model=Qwen3_5MoeConfig(delta_key_heads=2)), Axes(1, 1, 4, 1)),
    (Config(model=Qwen3_5MoeConfig(tie_embeddings=False)), Axes(8, 1, 1, 1)),
):
    try:
        check_axes(config, axes)
        raise AssertionError(axes)
    except UserError as error:
        print(error)

# %% [markdown]
# ## The object
#
# What a rank needs to know of the others: its coordinates, the groups it talks in, and its device. Nothing
# else in PithTrain asks torch which rank it is.
#
# Weights are sharded over all ranks that hold the same ones. For experts those are `dp x cp`; for all other
# weights `dp x cp x ep`. Hybrid sharding keeps `copies` whole sets of shards, so that gathers stay within a
# host, at the price of memory.


# %%
#| export
@dataclass(frozen=True)
class Mesh:
    """Where this rank stands. A group or a device mesh is None where it would have one rank."""

    axes: Axes
    rank: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    copies: int = 1
    pp_group: dist.ProcessGroup | None = None
    cp_group: dist.ProcessGroup | None = None
    ep_group: dist.ProcessGroup | None = None
    token_group: dist.ProcessGroup | None = None  #: all ranks of a pipeline rank: they see different tokens
    shards: DeviceMesh | None = None  #: (copies, shards) or (shards,) of weights other than experts'
    expert_shards: DeviceMesh | None = None  #: (copies, shards) of experts' weights
    expert_order: DeviceMesh | None = None  #: (ep, shards): the pieces of a stack of experts, in global order

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.axes.pp * self.axes.dp * self.axes.cp * self.axes.ep

    @property
    def coordinates(self) -> Axes:
        """This rank's place along each axis, counted from 0."""
        return Axes(*map(int, np.unravel_index(self.rank, self.axes)))

    @property
    def batch_rank(self) -> int:
        """This rank's number among those that share the batch."""
        here = self.coordinates
        return here.dp * self.axes.ep + here.ep


# %%
#| export
def make_mesh(config: MeshConfig, rank: int, world_size: int, device: torch.device) -> Mesh:
    """The mesh of `world_size` ranks, its groups made. Every rank of the default process group calls this."""
    axes = fit_axes(config, world_size)
    if world_size == 1:
        return Mesh(axes, rank, device)
    ranks = torch.arange(world_size)
    expert_shards = axes.dp // config.copies * axes.cp
    names = ("pp", "copies", "shards", "ep")
    experts = DeviceMesh(device.type, ranks.view(axes.pp, config.copies, expert_shards, axes.ep), mesh_dim_names=names)
    context = DeviceMesh(device.type, ranks.view(-1, axes.cp, axes.ep), mesh_dim_names=("rest", "cp", "ep"))
    others = DeviceMesh(device.type, experts.mesh.flatten(2), mesh_dim_names=names[:3])
    tokens = DeviceMesh(device.type, ranks.view(axes.pp, -1), mesh_dim_names=("pp", "tokens"))
    sharded = ("copies", "shards") if config.copies > 1 else "shards"
    order = torch.tensor(experts.mesh.tolist())[experts.get_local_rank("pp"), experts.get_local_rank("copies")].t()
    groups = [experts.get_group("ep"), experts.get_group("shards")]
    return Mesh(
        axes,
        rank,
        device,
        config.copies,
        pp_group=experts.get_group("pp") if axes.pp > 1 else None,
        cp_group=context.get_group("cp") if axes.cp > 1 else None,
        ep_group=experts.get_group("ep") if axes.ep > 1 else None,
        token_group=tokens.get_group("tokens") if axes.dp * axes.cp * axes.ep > 1 else None,
        shards=others[sharded],
        expert_shards=experts[sharded],
        expert_order=DeviceMesh.from_group(groups, device.type, order.contiguous(), mesh_dim_names=("ep", "shards")),
    )


# %% [markdown]
# ## The picture
#
# Sixteen ranks as pp 2, dp 2, cp 2, ep 2. Colours tell the four quarters of the experts' shards of one
# pipeline rank apart: same letter, same experts; same number, same part of each sequence.

# %%
import matplotlib.pyplot as plt

axes = Axes(2, 2, 2, 2)
fig, ax = plt.subplots(figsize=(9, 2.8))
for rank in range(16):
    here = Mesh(axes, rank).coordinates
    x, y = here.pp * 5 + here.cp * 2 + here.ep, here.dp
    ax.add_patch(plt.Rectangle((x, y), 0.94, 0.9, color=f"C{here.ep}", alpha=0.45 + 0.4 * here.cp))
    words = f"rank {rank}\nexperts {'AB'[here.ep]}\ntokens {here.cp + 1}/2"
    ax.text(x + 0.47, y + 0.45, words, ha="center", va="center", fontsize=7)
ax.set(xlim=(-0.2, 9.2), ylim=(2.1, -0.3), yticks=[0.45, 1.45], yticklabels=["dp 0", "dp 1"])
ax.set(xticks=[2, 7], xticklabels=["pipeline rank 0", "pipeline rank 1"], title="pp 2 x dp 2 x cp 2 x ep 2")
fig

# %% [markdown]
# Next: how tokens reach experts on other ranks: [expert parallelism](41_expert_parallel.py).
