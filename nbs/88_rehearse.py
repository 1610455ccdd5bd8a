# %% [markdown]
# # Rehearsal: one rank without its peers
#
# > Runs any single rank of any mesh on one device, with the shapes and the memory it would have in the job.
#
# Whether a run fits is best known before a cluster is paid for. A rank's memory depends on its own shapes
# alone: its layers, its shard of the weights, the tokens that arrive at its experts, the microbatches that
# its schedule keeps alive. So one rank can be run with nobody to talk to. torch has a process group that
# pretends: every collective returns at once, with this rank's own numbers in the place of its peers', and a receive
# leaves its buffer as it was.
#
# A weight gathered in this way is one shard over and over, and the choice of experts would be as odd. So tokens choose
# at random, evenly, and as many rows arrive at this rank's experts as it sends, for as many of them: what it would
# get from peers whose routers are balanced. Hidden states that never arrive from the stage before are drawn at
# random too. Losses mean nothing here; sizes and times do.
#
# What a rehearsal does not show is the time that communication takes, and the memory of an unbalanced router.
# On a GPU it reports the peak of what torch allocated in it. A CPU has no such count: there it is the most memory
# that the process ever had, interpreter and libraries included.

# %%
#| default_exp rehearse

# %%
#| export
import resource
import time
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from pithtrain.config import Config, UserError
from pithtrain.layers.router import Routed, expert_load
from pithtrain.models.stages import Arrived
from pithtrain.parallel.expert import Announced, ExpertExchange, Journey
from pithtrain.parallel.mesh import make_mesh
from pithtrain.parallel.pipeline.engine import Engine
from pithtrain.parallel.sharding import on_this_rank
from pithtrain.train.step import Learner, memory_error, read_microbatches
from pithtrain.train.trainer import choose_compute
from pithtrain.verify import RandomBatches


# %%
#| export
class Rehearsal(NamedTuple):
    """What one rank needs. Memory in bytes: on a GPU of tensors, on the CPU of the process in all its life."""

    rank: int
    ranks: int
    place: dict[str, int]  #: coordinates along the axes
    device: str
    parameters: int  #: on this rank
    imbalance: float | None  #: of the tokens this rank routed: its busiest expert over the mean; None: it has no router
    peak_bytes: int
    step_seconds: float  #: without communication; the fastest step
    tokens_per_step: int  #: of the whole job


# %%
#| export
def route_evenly(router: nn.Module, arguments: tuple[Tensor], routed: Routed) -> Routed:
    """Behind a router that has done its work: sends its tokens to experts drawn at random."""
    drawn = torch.rand_like(routed.probs).topk(routed.expert_ids.shape[1]).indices
    return routed._replace(expert_ids=drawn, load=expert_load(drawn.flatten(), routed.probs.shape[1]))


# %%
#| export
class Mirror(ExpertExchange):
    """An exchange without peers: the rows that arrive are for as many experts as those that leave."""

    def dispatch(self, tokens: Tensor, routed: Routed, announced: Announced) -> tuple[Arrived, Journey]:
        arrived, journey = super().dispatch(tokens, routed, announced)
        return arrived._replace(expert_ids=announced.plan.local_ids[: len(arrived.tokens)]), journey


# %%
#| export
class Unfed(Engine):
    """An engine to which nothing is sent: hidden states and their gradients are drawn at random."""

    def _take(self, way: str, stage: int, m: int) -> Tensor:
        tensor = super()._take(way, stage, m)
        return torch.randn_like(tensor) if tensor.dim() else tensor


# %%
#| export
def rehearse(config: Config, rank: int, ranks: int, steps: int = 3) -> Rehearsal:
    """Run `steps` steps as `rank` of `ranks` on this machine's device. This process must have no process group.

    Raises UserError where the mesh does not fit."""
    if rank >= ranks:
        raise UserError(f"--rank: {rank} is not one of {ranks} ranks, which are counted from 0")
    device, dtype = choose_compute(config.run)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        mesh = make_mesh(config.mesh, rank, ranks, device)
        learner = Learner(config, mesh, dtype)
        whole = learner.engine
        learner.engine = Unfed(whole.schedule, whole.stages, whole.boundary, whole.group, whole.overlap)
        for part in learner.parts.values():
            if mesh.ep_group:
                part.place = replace(part.place, exchange=Mirror(mesh.ep_group))
            for layer in part.layers.values():
                if layer.router is not None:
                    layer.router.register_forward_hook(route_evenly)
        train, seconds = config.train, []
        batches = RandomBatches(config.model.vocab_size, train.sequence_length, train.batch_size)
        for step in range(steps):
            own = read_microbatches(batches, step, train.micro_batch_size, mesh)
            start = time.perf_counter()
            load = learner.step(own, config.optimizer.learning_rate).load.double()  # ends with numbers on the host
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        held = [on_this_rank(p) for _, p in learner.named_parameters()]
        imbalance = (load.max(dim=1).values / load.mean(dim=1)).max().item() if len(load) else None
        place, name = mesh.coordinates._asdict(), torch.cuda.get_device_name() if cuda else "cpu"
        found = (sum(p.numel() for p in held), imbalance, peak, min(seconds), train.batch_size * train.sequence_length)
        return Rehearsal(rank, ranks, place, name, *found)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if problem := memory_error(error):
            raise problem from None
        raise
    finally:
        if ranks > 1:
            dist.destroy_process_group()


# %%
#| export
def describe_rehearsal(result: Rehearsal) -> str:
    """The rehearsal in five lines."""
    place = ", ".join(f"{axis} {number}" for axis, number in result.place.items())
    of = "" if result.device != "cpu" else ", the whole process"
    return f"""rank {result.rank} of {result.ranks} ({place}) on {result.device}
  parameters held  {result.parameters:,}
  peak memory      {result.peak_bytes / 2**30:.2f} GiB{of}
  step             {result.step_seconds * 1e3:,.0f} ms without communication
  tokens of a step {result.tokens_per_step:,} on all ranks together"""


# %% [markdown]
# A model in four pieces, and what each rank of the pipeline holds:

# %%
from pithtrain.config import MeshConfig, Qwen3MoeConfig, RunConfig, TrainConfig

config = Config(
    run=RunConfig(device="cpu"),
    model=Qwen3MoeConfig(hidden=64, heads=4, head_dim=16, expert_hidden=64, layers=6, tie_embeddings=False),
    train=TrainConfig(sequence_length=64, batch_size=512, micro_batch_size=2),
    mesh=MeshConfig(pp=2, cp=2, ep=4),
)
for rank in (0, 37, 255):
    print(describe_rehearsal(rehearse(config, rank, 256)))
