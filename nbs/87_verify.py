# %% [markdown]
# # Verify: many ranks against one
#
# > Trains a few steps on a mesh of processes and on one process, and compares everything that can be compared.
#
# Whatever a mesh does, it must do what one process does: same losses, same gradient norms, same weights.
# Not to the bit, since sums are taken in another order, but to the rounding of fp32. That is a check of
# the whole parallel engine, it needs no GPU, and it takes seconds: run it after any change.

# %%
#| default_exp verify

# %%
#| export
import dataclasses
import logging
import tempfile
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from pithtrain.config import Config, MeshConfig, UserError
from pithtrain.parallel.mesh import Mesh, check_axes, fit_axes, make_mesh
from pithtrain.parallel.sharding import in_global_order
from pithtrain.train.batches import IGNORE, Batches
from pithtrain.train.optimizer import learning_rate
from pithtrain.train.step import Learner, StepResult, read_microbatches

# %% [markdown]
# ## What is trained on
#
# Random tokens will do, as long as every mesh reads the same: a row is a function of its number. Some of its first
# targets are hidden, in each row as many as it likes: ranks with equally many targets would not show whether a
# mean is one over all tokens, or a mean of the ranks' means.


# %%
#| export
class RandomBatches(Batches):
    """Rows of random tokens, some targets IGNORE; row r depends on r alone."""

    def __init__(self, vocab_size: int, sequence_length: int, batch_size: int):
        self.vocab_size, self.sequence_length, self.batch_size = vocab_size, sequence_length, batch_size

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets of any rows, each (len(rows), sequence_length) int64."""
        length, window, hidden = self.sequence_length, [], []
        for row in rows:
            generator = torch.Generator().manual_seed(int(row))
            window += [torch.randint(self.vocab_size, (length + 1,), generator=generator)]
            hidden += [torch.arange(length) < torch.randint(length // 2 + 1, (1,), generator=generator)]
        window = torch.stack(window)
        return window[:, :-1], window[:, 1:].masked_fill(torch.stack(hidden), IGNORE)


# %%
#| export
Prepare = Callable[[Learner], None] | None  # may change a learner before its first step


# %% [markdown]
# Norms start at one and biases at zero, where a mistake may not show, and where a relative difference would
# be one of nothing but rounding. So everything that does not start at random is moved from where it starts.


# %%
#| export
@torch.no_grad()
def stir(learner: Learner) -> None:
    """Add noise, the same on every mesh, to parameters that do not start at random."""
    for name, parameter in learner.named_parameters():
        if parameter.dim() > 1 and not name.endswith(("bias", "convolution")):
            continue
        share = learner.share if ".experts." in name else range(parameter.shape[0])
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        experts = learner.config.model.experts if ".experts." in name else parameter.shape[0]
        noise = 0.2 * torch.randn((experts, *parameter.shape[1:]), generator=generator)[share.start : share.stop]
        noise = noise.to(parameter.device)
        if isinstance(parameter, DTensor):
            noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter += noise


# %%
#| export
class Trace(NamedTuple):
    """A few steps of training, and the weights behind them under their global names, whole, on the CPU."""

    results: list[StepResult]
    weights: dict[str, Tensor]


# %%
#| export
def trace(config: Config, mesh: Mesh, steps: int, prepare: Prepare = None) -> Trace:
    """Train `steps` steps of `config` on random tokens. With pipelines, a rank has the weights of its stages."""
    learner = Learner(config, mesh)
    stir(learner)
    if prepare:
        prepare(learner)
    train = config.train
    batches = RandomBatches(config.model.vocab_size, train.sequence_length, train.batch_size)
    results = []
    for step in range(steps):
        rate = learning_rate(step + 1, train.steps, config.optimizer)
        results.append(learner.step(read_microbatches(batches, step, train.micro_batch_size, mesh), rate))
    weights = {}
    for name, parameter in learner.named_parameters():
        whole = in_global_order(name, parameter.detach(), mesh)
        if isinstance(whole, DTensor):
            for axis in reversed(range(whole.device_mesh.ndim)):  # all at once is more than torch 2.11 can do
                placements = [*whole.placements[:axis], *[Replicate()] * (whole.device_mesh.ndim - axis)]
                whole = whole.redistribute(placements=placements)
            whole = whole.to_local()
        weights[name] = whole.cpu()
    return Trace(results, weights)


# %% [markdown]
# ## The comparison
#
# One process sees as one microbatch what the mesh's ranks see at the same moment, if the balance loss is
# over the global batch; and what each rank sees, if it is over microbatches.


# %%
#| export
def reference_config(config: Config, batch_ranks: int) -> Config:
    """What one process must run to do what `batch_ranks` ranks do that share the batch."""
    balance, train = config.balance, config.train
    if balance.global_batch and balance.micro_batch:
        raise UserError(
            "balance.micro_batch: one process cannot show both this form and the global one "
            "as a mesh has them; set it or balance.global_batch to 0 to verify"
        )
    size = train.micro_batch_size * (batch_ranks if balance.global_batch else 1)
    return dataclasses.replace(config, mesh=MeshConfig(), train=dataclasses.replace(train, micro_batch_size=size))


# %% [markdown]
# A config that was written for one process need not fit a mesh. For a check of the engine it is changed as
# little as possible. Adam makes a whole step of a gradient that is nothing but rounding, unless its eps is larger.


# %%
#| export
def fit_config(config: Config, world_size: int) -> Config:
    """`config` with a microbatch, and a head of its own, that its mesh of so many ranks can work with."""
    axes, train, model = fit_axes(config.mesh, world_size), config.train, config.model
    share = train.batch_size // axes.batch_ranks
    needed = 1 if axes.pp == 1 else min(2 * axes.pp, share)  # microbatches that fill a pipeline
    size = next((s for s in range(min(train.micro_batch_size, share // needed), 0, -1) if share % s == 0), 1)
    model = dataclasses.replace(model, tie_embeddings=model.tie_embeddings and axes.pp == 1)
    train = dataclasses.replace(train, micro_batch_size=size)
    optimizer = dataclasses.replace(config.optimizer, eps=max(config.optimizer.eps, 1e-6))
    return dataclasses.replace(config, model=model, train=train, optimizer=optimizer)


# %%
#| export
def nan_highest(number: float) -> tuple[bool, float]:
    """A key for `max` and `sorted` that puts NaN above all numbers; without one, where it stands decides."""
    return (number != number, number)


# %%
import math

assert math.isnan(max(1.0, math.nan, 2.0, key=nan_highest)) and max(1.0, math.nan, 2.0) == 2.0


# %%
#| export
class Comparison(NamedTuple):
    """The largest relative differences between a mesh and one process, and where the weights' is."""

    loss: float
    balance: float
    grad_norm: float
    load: float  #: share of (token, expert) pairs that went to another expert
    weight: float  #: of any parameter's Frobenius norm
    name: str

    @property
    def largest(self) -> float:
        """The largest of what is held to the tolerance."""
        return max(self.loss, self.balance, self.grad_norm, self.weight, key=nan_highest)


# %%
#| export
def compare(found: Trace, wanted: Trace) -> Comparison:
    """How far `found` is from `wanted`; where weights are compared, those that `found` has."""
    steps = list(zip(found.results, wanted.results, strict=True))

    def scalar(key: str) -> float:
        pairs = [(getattr(a, key), getattr(b, key)) for a, b in steps]
        return max((0.0 if a == b else abs(a - b) / max(abs(b), 1e-12) for a, b in pairs), key=nan_highest)

    moved = max(((a.load - b.load).abs().sum() / (2 * b.load.sum())).item() for a, b in steps)
    apart = {n: ((w - wanted.weights[n]).norm() / wanted.weights[n].norm()).item() for n, w in found.weights.items()}
    name = max(apart, key=lambda n: nan_highest(apart[n]))
    return Comparison(scalar("loss"), scalar("balance"), scalar("grad_norm"), moved, apart[name], name)


# %% [markdown]
# ## Many processes
#
# Each rank compares the weights it has with those of the single process, read from a file; the worst rank's
# comparison is the result.


# %%
#| export
def run_rank(rank: int, configs: Sequence[Config], world_size: int, steps: int, prepare: Prepare, folder: str) -> None:
    """One process of `verify`: every config in turn."""
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # it minds two gathers
    worst: list[Comparison] = []
    for number, config in enumerate(configs):  # each with a process group of its own, whose threads end with it
        store = dist.FileStore(f"{folder}/store-{number}", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
        found = trace(config, make_mesh(config.mesh, rank, world_size, torch.device("cpu")), steps, prepare)
        wanted = torch.load(f"{folder}/reference-{number}", weights_only=False)
        every: list[Any] = [None] * world_size
        dist.all_gather_object(every, compare(found, wanted))
        worst.append(max(every, key=lambda c: nan_highest(c.largest)))
        dist.destroy_process_group()
    if rank == 0:
        torch.save(worst, f"{folder}/result")


# %%
#| export
def verify(configs: Sequence[Config], world_size: int, steps: int = 3, prepare: Prepare = None) -> list[Comparison]:
    """Compare each of `configs`, on its mesh of `world_size` CPU processes, with one process.

    Raises UserError for a mesh that does not fit, before anything runs."""
    axes = [fit_axes(config.mesh, world_size) for config in configs]
    for config, own in zip(configs, axes, strict=True):
        check_axes(config, own)
    wanted = [reference_config(config, own.batch_ranks) for config, own in zip(configs, axes, strict=True)]
    alone, threads, traces = Mesh(fit_axes(MeshConfig(), 1)), torch.get_num_threads(), {}
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)  # as each rank has: threads that outnumber the free cores wait for one another
        for number, reference in enumerate(wanted):
            if reference not in traces:
                traces[reference] = trace(reference, alone, steps, prepare)
            torch.save(traces[reference], f"{folder}/reference-{number}")
        torch.set_num_threads(threads)
        mp.get_context("forkserver").set_forkserver_preload(["pithtrain.verify"])  # torch is imported once
        method = "spawn" if torch.cuda.is_available() else "forkserver"  # CUDA fails in forks of who asked for it
        mp.start_processes(run_rank, (configs, world_size, steps, prepare, folder), world_size, start_method=method)
        return torch.load(f"{folder}/result", weights_only=False)


# %% [markdown]
# Two processes, each with half of the experts, and with half of each sequence:

# %%
import tempfile

from pithtrain.config import BalanceConfig, Qwen3MoeConfig, TrainConfig
from pithtrain.verify import verify  # a process can import a module's function, and none of a notebook's own

small = Config(
    model=Qwen3MoeConfig(vocab_size=300, layers=2, hidden=32, heads=4, head_dim=8, experts=8, expert_hidden=16),
    train=TrainConfig(steps=20, sequence_length=32, batch_size=8, micro_batch_size=2),
    balance=BalanceConfig(global_batch=0.01),
)
meshes = [MeshConfig(ep=2), MeshConfig(cp=2)]
if __name__ == "__main__":  # the processes import this file, as a script they would run it again
    for mesh, found in zip(meshes, verify([dataclasses.replace(small, mesh=mesh) for mesh in meshes], 2), strict=True):
        print(f"ep {mesh.ep}, cp {mesh.cp}: loss {found.loss:.0e}, weights {found.weight:.0e} ({found.name})")
        assert found.largest < 1e-5

# %% [markdown]
# Next: what one rank of a large job needs, [without the job](88_rehearse.py).
