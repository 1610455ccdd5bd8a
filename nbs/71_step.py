# %% [markdown]
# # The training step
#
# > What one rank does in an optimiser step: its microbatches, its part of the model, one update.
#
# A single process trains a model on a batch. On many ranks each has its part of the model and its part of
# the batch, and together they must do the very same step. There is one code for both: a process alone is a
# mesh of one rank, a model without a pipeline is a pipeline of one stage, and accumulating gradients over
# microbatches is what the [pipeline engine](57_engine.py) does anyway.

# %%
#| default_exp train.step

# %%
#| export
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pithtrain.config import Config, DecoderConfig, UserError
from pithtrain.layers.attention import OneRank
from pithtrain.layers.balance import balance_loss, routing_entropy, update_bias
from pithtrain.layers.router import Routed, expert_load
from pithtrain.models.build import build
from pithtrain.models.decoder import Decoder, count_parameters, initialise
from pithtrain.models.stages import AtHome, Place
from pithtrain.parallel.expert import ExpertExchange
from pithtrain.parallel.mesh import Mesh, check_axes
from pithtrain.parallel.pipeline.engine import Engine, ModuleStage
from pithtrain.parallel.pipeline.generate import generate
from pithtrain.parallel.pipeline.lower import lower
from pithtrain.parallel.pipeline.overlap import overlapped
from pithtrain.parallel.pipeline.schedule import split_layers
from pithtrain.parallel.ring import Ring, zigzag
from pithtrain.parallel.sharding import ShardedStage, clip_gradients, drop_gathered
from pithtrain.parallel.sharding import in_global_order, on_this_rank, shard_decoder, shard_layer
from pithtrain.train.batches import IGNORE, Batches, HeldOutBatches
from pithtrain.train.optimizer import make_optimizer

# %% [markdown]
# ## A rank's share of the batch
#
# A step's sequences are dealt out in rounds: in each, every rank that shares the batch takes
# `micro_batch_size` of them. With context parallelism each rank then keeps its two pieces of every sequence.


# %%
#| export
class Microbatch(NamedTuple):
    """What one forward pass of one rank reads: b sequences, S tokens of each."""

    inputs: Tensor  #: (b, S) int64
    targets: Tensor  #: (b, S) int64, IGNORE for none
    positions: Tensor  #: (S,) int64


# %%
#| export
def read_microbatches(batches: Batches, step: int, size: int, mesh: Mesh) -> list[Microbatch]:
    """This rank's microbatches of `size` sequences, of the step numbered `step` from 0, on its device."""
    axes, here = mesh.axes, mesh.coordinates
    positions = torch.arange(batches.sequence_length)
    if axes.cp > 1:
        positions = zigzag(batches.sequence_length, axes.cp, here.cp)
    rounds = batches.rows(step).reshape(-1, axes.batch_ranks, size)
    read = (batches.read(rows) for rows in rounds[:, mesh.batch_rank])
    return [Microbatch(*(t[:, positions].to(mesh.device) for t in pair), positions.to(mesh.device)) for pair in read]


# %% [markdown]
# ## What is minimised
#
# Over all tokens of the step, on all ranks, the mean cross-entropy; plus the [balance losses](21_balance.py),
# meaned over microbatches. A rank computes its own part of that sum, already divided by the *whole* number
# of tokens, so that gradients only ever have to be added.
#
# The last stage of a pipeline ends in the cross-entropy, but every stage has routers to balance. `Attach`
# lets a stage's balance loss ride on its output: forward it is nothing, backward it starts that loss's
# gradient when the output's arrives.
#
# Each form of the balance loss wants the load over its own scope. A sequence's and a microbatch's are added
# over `cp`, whose ranks hold pieces of the same sequences; the global batch's over all ranks of the stage.


# %%
#| export
class Attach(torch.autograd.Function):
    """Its first input; backward, the second gets the gradient 1, as if it had been added to the loss."""

    @staticmethod
    def forward(ctx, output: Tensor, loss: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), device=grad.device)


# %%
#| export
class Objective:
    """A part of the model as the pipeline engine calls it, which also keeps the sums that a step reports."""

    def __init__(self, part: Decoder, config: Config, mesh: Mesh):
        self.part, self.config, self.mesh = part, config, mesh
        numbers = [int(number) for number, layer in part.layers.items() if layer.router is not None]
        self.moe_layers = torch.tensor(numbers, device=mesh.device)  # a list as index would make the host wait

    def begin(self, tokens: Tensor, microbatches: int) -> None:
        """Before a step of so many microbatches a rank and `tokens` targets on all ranks, an int64 scalar."""
        layers, experts, device = self.config.model.layers, self.config.model.experts, self.mesh.device
        self.tokens = tokens
        self.balance_share = 1 / (microbatches * self.mesh.axes.batch_ranks * self.mesh.axes.cp)
        self.losses = torch.zeros(2, device=device)  # cross-entropy and balance
        self.load = torch.zeros(layers, experts, dtype=torch.long, device=device)
        self.load_so_far = torch.zeros_like(self.load)
        self.entropy = torch.zeros(layers, device=device)

    def __call__(self, x: None, batch: Microbatch) -> Tensor:
        """The loss of one microbatch, of a model that is all here."""
        return self.close(*self.part(batch.inputs, batch.positions, targets=batch.targets), batch)

    def close(self, output: Tensor, routing: list[Routed | None], batch: Microbatch) -> Tensor:
        """What a stage returns, from what its part of the model did: the hidden state, or this rank's loss."""
        balance = self.balance(routing, len(batch.inputs))
        self.losses[1] += balance.detach()
        if not self.part.place.last:
            return Attach.apply(output, balance) if balance.requires_grad else output
        loss = output / self.tokens
        self.losses[0] += loss.detach()
        return loss + balance

    def balance(self, routing: list[Routed | None], sequences: int) -> Tensor:
        """This rank's part of the balance loss of one microbatch, a scalar; counts where tokens went."""
        routing = [routed for routed in routing if routed is not None]
        if not routing:
            return self.losses.new_zeros(())
        wanted, seen, own = self.config.balance, torch.stack([r.load for r in routing]), None
        self.load[self.moe_layers] += seen
        self.entropy[self.moe_layers] += torch.stack([routing_entropy(r.probs) for r in routing]) * self.balance_share
        if wanted.global_batch and self.mesh.token_group:
            dist.all_reduce(seen, group=self.mesh.token_group)
        if wanted.sequence or wanted.micro_batch:
            own = torch.stack([expert_load(r.expert_ids.reshape(sequences, -1), r.probs.shape[1]) for r in routing])
            if self.mesh.cp_group:
                dist.all_reduce(own, group=self.mesh.cp_group)
        self.load_so_far[self.moe_layers] += seen
        return balance_loss(routing, own, self.load_so_far[self.moe_layers], wanted) * self.balance_share


# %% [markdown]
# ## What a rank trains
#
# Layers are made one at a time, given their first weights and sharded before the next is made: at no moment
# does a rank hold more than one layer whole.


# %%
#| export
def build_part(config: Config, place: Place, mesh: Mesh) -> Decoder:
    """The part of the model that `place` asks for, with its first weights, on the mesh's device, sharded."""
    seed = config.run.seed

    def made(here: Place) -> Decoder:
        with mesh.device:
            part = build(config.model, here)
        initialise(part, seed)
        return part

    if mesh.world_size == 1:
        return made(place)
    part = made(replace(place, layers=range(0)))
    for number in place.held(config.model.layers):
        layer = made(replace(place, layers=range(number, number + 1), first=False, last=False)).layers[str(number)]
        shard_layer(layer, place.dtype, mesh)
        part.layers[str(number)] = layer
    shard_decoder(part, mesh)
    return part


# %% [markdown]
# Along a pipeline layers are dealt out so that stages take equally long, and the last stage has the head beside its
# layers. A product costs what its weights are many, so both are counted in weights that a token uses; looking up an
# embedding is close to free.


# %%
#| export
def head_cost(model: DecoderConfig) -> float:
    """What the head and the loss take, in units of the last layer (which has experts in every family)."""
    with torch.device("meta"):
        layer = build(model, Place(layers=range(model.layers - 1, model.layers), first=False, last=False))
    return model.vocab_size * model.hidden / count_parameters(layer, model.experts, model.top_k)[1]


# %%
from pithtrain.config import Qwen3MoeConfig

published = Qwen3MoeConfig(
    vocab_size=151_936, layers=48, hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128, top_k=8,
    expert_hidden=768, tie_embeddings=False,
)  # fmt: skip
print(f"Qwen3-30B-A3B: the head costs {head_cost(published):.1f} layers; over 8 stages",
      *map(len, split_layers(48, 8, 0.1, head_cost(published))))  # fmt: skip

# %% [markdown]
# A model that is too large must be refused before it is made: a GPU would say so, but an operating system promises
# memory that it does not have, and kills the process that takes it at its word. Whatever else a step needs, it holds
# four fp32 numbers a parameter: the weight, its gradient, and AdamW's two averages.


# %%
#| export
def check_memory(config: Config, ranks: int, device: torch.device, beside: int = 1) -> None:
    """Raise UserError where what `beside` of `ranks` ranks hold exceeds the memory of the device that they share."""
    with torch.device("meta"):
        total, _ = count_parameters(build(config.model), config.model.experts, config.model.top_k)
    needed = 16 * total * config.mesh.copies / ranks * beside
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        holds = f"its weights, gradients and averages take {needed / 2**30:,.0f} GiB, and this device has"
        cure = "lower model.layers, or share them among more devices"
        raise UserError(f"model: {holds} {memory / 2**30:,.0f}; {cure}")


# %%
try:
    check_memory(Config(model=published), ranks=1, device=torch.device("cpu"))
except UserError as error:
    print(error)

# %% [markdown]
# What fits so far may still be too much with a microbatch's activations, which only the GPU itself finds out.


# %%
#| export
def memory_error(error: RuntimeError) -> UserError | None:
    """What a device said when its memory did not suffice, and what can be done; None for any other error."""
    said = str(error).partition(". GPU")[0].rstrip(".")
    if "DefaultCPUAllocator: " in said:
        said = said.partition("DefaultCPUAllocator: ")[2].partition(". Error code")[0]
    elif not isinstance(error, torch.OutOfMemoryError):
        return None
    return UserError(
        f"{said}; lower train.micro_batch_size, set train.recompute to experts or layer, or use more ranks"
    )


# %%
#| export
class StepResult(NamedTuple):
    """What a step reports, the same on every rank. L layers with experts, E experts."""

    loss: float  #: mean cross-entropy, nats per token
    balance: float  #: mean balance loss, with its coefficients
    grad_norm: float  #: global gradient norm before clipping
    load: Tensor  #: (L, E) int64 pairs that each expert got in the step
    entropy: Tensor  #: (L,) mean routing entropy, nats


# %%
#| export
class Learner:
    """What one rank trains: its parts of the model, their optimiser, and the engine that runs them.

    Raises UserError where the config cannot be shared along the mesh's axes, or exceeds the device's memory."""

    def __init__(self, config: Config, mesh: Mesh, dtype: torch.dtype = torch.float32):
        check_axes(config, mesh.axes)
        check_memory(config, mesh.world_size, mesh.device)
        self.config, self.mesh = config, mesh
        pp, train = mesh.axes.pp, config.train
        microbatches = train.batch_size // (train.micro_batch_size * mesh.axes.batch_ranks)
        self.schedule = generate(config.mesh.schedule if pp > 1 else "1f1b", pp, microbatches)
        splits = split_layers(config.model.layers, self.schedule.stages, 0.1, head_cost(config.model))
        place = Place(
            exchange=ExpertExchange(mesh.ep_group) if mesh.ep_group else AtHome(),
            core=Ring(mesh.cp_group) if mesh.cp_group else OneRank(),
            dtype=dtype,
            recompute=train.recompute,
        )
        self.share = place.exchange.share(config.model.experts)
        self.parts: dict[int, Decoder] = {}
        for stage in self.schedule.held_by(mesh.coordinates.pp):
            first, last = stage == 0, stage == self.schedule.stages - 1
            here = replace(place, layers=splits[stage], first=first, last=last)
            self.parts[stage] = build_part(config, here, mesh)
        self.optimizer = make_optimizer(dict(self.named_parameters()), config.optimizer)
        self.objectives = {stage: Objective(part, config, mesh) for stage, part in self.parts.items()}
        stages: dict[int, ModuleStage] = {stage: ModuleStage(objective) for stage, objective in self.objectives.items()}
        if pp > 1:  # the schedule says when weights are gathered; without one, each layer does it by itself
            self.schedule = lower(self.schedule)
            beside = torch.cuda.Stream(mesh.device, priority=-1) if mesh.device.type == "cuda" else None
            stages = {s: ShardedStage(self.parts[s], o.close, beside) for s, o in self.objectives.items()}
        tokens = train.sequence_length // mesh.axes.cp
        shape = (train.micro_batch_size, tokens, config.model.hidden)
        self.boundary = torch.empty(shape, dtype=dtype, device=mesh.device)
        self.engine = Engine(self.schedule, stages, self.boundary, mesh.pp_group, overlapped)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters under their global names."""
        for part in self.parts.values():
            yield from part.named_parameters()

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds beside the step, under global names; loading fills it in place."""
        state = {}
        for name, parameter in self.named_parameters():
            averages = self.optimizer.state[parameter]
            for key, tensor in (
                (f"model.{name}", parameter.detach()),
                (f"optimizer.{name}.exp_avg", averages["exp_avg"]),
                (f"optimizer.{name}.exp_avg_sq", averages["exp_avg_sq"]),
            ):
                state[key] = in_global_order(name, tensor, self.mesh)
        for part in self.parts.values():
            state |= {f"model.{name}": buffer for name, buffer in part.named_buffers()}
        return state

    def finite(self) -> bool:
        """Whether all weights, of all ranks, are finite numbers."""
        broken = torch.zeros((), dtype=torch.int32, device=self.mesh.device)
        for _, parameter in self.named_parameters():
            broken += ~on_this_rank(parameter).isfinite().all()
        if self.mesh.world_size > 1:
            dist.all_reduce(broken)
        return not broken

    def resume(self, step: int) -> None:
        """After `state` was filled with that behind `step`."""
        for averages in self.optimizer.state.values():
            averages["step"].fill_(step)

    def step(self, batches: list[Microbatch], rate: float) -> StepResult:
        """One optimiser step at learning rate `rate` on this rank's microbatches."""
        tokens = sum((batch.targets != IGNORE).sum() for batch in batches)
        if self.mesh.token_group:
            dist.all_reduce(tokens, group=self.mesh.token_group)
        for objective in self.objectives.values():
            objective.begin(tokens, len(batches))
        self.optimizer.zero_grad(set_to_none=True)
        self.engine.step(batches)
        norm = clip_gradients(self.optimizer, self.config.optimizer.clip, self.mesh)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return self.result(norm)

    def result(self, norm: Tensor) -> StepResult:
        """Adds up what the objectives of all ranks counted; moves the selection biases."""
        objectives = self.objectives.values()
        load = sum(objective.load for objective in objectives)
        sums = sum(torch.cat([objective.losses, objective.entropy]) for objective in objectives)
        if self.mesh.world_size > 1:
            dist.all_reduce(load)
            dist.all_reduce(sums)
        if rate := self.config.balance.bias_rate:
            for part in self.parts.values():
                for number, layer in part.layers.items():
                    if layer.router is not None:
                        update_bias(layer.router.bias, load[int(number)], rate)
        load, sums = load.cpu(), sums.cpu()
        routed = load.any(dim=1)
        loss, balance, *_ = sums.tolist()
        return StepResult(loss, balance, norm.item(), load[routed], sums[2:][routed])

    @torch.no_grad()
    def evaluate(self, batches: HeldOutBatches) -> tuple[float, int]:
        """Summed cross-entropy in nats over all targets of `batches`, and the number of those targets."""
        total = torch.zeros(2, dtype=torch.float64)
        for step in range(len(batches)):
            for batch in read_microbatches(batches, step, self.config.train.micro_batch_size, self.mesh):
                loss = self.forward(batch)
                if loss is not None:
                    total += torch.tensor([loss.item(), (batch.targets != IGNORE).sum().item()])
        for part in self.parts.values():
            drop_gathered(part)
        if self.mesh.world_size > 1:
            total = total.to(self.mesh.device)
            dist.all_reduce(total)
        return total[0].item(), int(total[1].item())

    def forward(self, batch: Microbatch) -> Tensor | None:
        """One microbatch through all stages, no gradients: its summed loss on the last stage's rank."""
        place, me, group = self.schedule.placement, self.mesh.coordinates.pp, self.mesh.pp_group
        x = batch.inputs
        for stage, part in sorted(self.parts.items()):
            if stage and place[stage - 1] != me:
                x = torch.empty_like(self.boundary)
                dist.recv(x, group=group, group_src=place[stage - 1])
            x, _ = part(x, batch.positions, targets=batch.targets if part.place.last else None)
            if not part.place.last and place[stage + 1] != me:
                dist.send(x, group=group, group_dst=place[stage + 1])
        return x if part.place.last else None


# %% [markdown]
# ## One process
#
# Eight steps on a sentence that repeats: the loss falls, and cutting the batch in four changes nothing but
# rounding.

# %%
from pithtrain.config import BalanceConfig, Qwen3MoeConfig, TrainConfig
from pithtrain.parallel.mesh import Axes

small = Qwen3MoeConfig(hidden=64, heads=4, head_dim=16, experts=8, expert_hidden=32, vocab_size=300, layers=2)
rows = (torch.arange(4 * 33).view(4, 33) * 7) % 31
losses = {}
for size in (4, 1):
    train = TrainConfig(steps=8, batch_size=4, micro_batch_size=size, sequence_length=32)
    config = Config(model=small, balance=BalanceConfig(global_batch=0.0), train=train)
    learner = Learner(config, Mesh(Axes(1, 1, 1, 1)))
    positions = torch.arange(32)
    batches = [Microbatch(r[:, :-1], r[:, 1:], positions) for r in rows.split(size)]
    losses[size] = [learner.step(batches, rate=0.003).loss for _ in range(8)]
    print(f"microbatches of {size}:", " ".join(f"{loss:.4f}" for loss in losses[size]))
assert losses[4][-1] < losses[4][0] - 1 and abs(losses[4][-1] - losses[1][-1]) < 1e-3

# %% [markdown]
# That every mesh takes this very step is what [verify](87_verify.py) checks. Next: the loop around the step:
# the [trainer](72_trainer.py).
