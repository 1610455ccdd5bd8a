# %% [markdown]
# # Checkpoints
#
# > Everything a run needs to go on, saved so that a kill at any moment leaves the last one whole.
#
# A checkpoint holds the weights, the optimiser's two running averages, the routers' selection biases and
# the number of the step. The order of the data is a function of the step ([batches](63_batches.py)) and
# nothing else is random, so that is all: a resumed run ends with the very weights, bit for bit, that an
# uninterrupted one has.
#
# torch's distributed checkpoint (DCP) writes them. It stores each tensor under its global name,
# `model.layers.3.experts.down` with all experts in it, whatever piece of it a rank holds; so what one
# mesh saved, any other can load.

# %%
#| default_exp train.checkpoint

# %%
#| export
import errno
import os
import re
import shutil
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from pithtrain.config import UserError

# %% [markdown]
# ## Names
#
# A checkpoint is a folder, `step-00000200`. While it is being written it has another name, so a folder
# with the right name is always whole.


# %%
#| export
def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(r"step-(\d{8})", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


# %%
#| export
def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is kept."""
    return folder / f"step-{step:08d}"


# %% [markdown]
# ## Saving
#
# Write beside, flush to the disk, rename, and only then drop old ones. A disk that fills up on the way
# costs the new checkpoint, never an old one.


# %%
#| export
def disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from or wraps, says that no space is left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, dcp.api.CheckpointException):
            return any(disk_full(wrapped[0]) for wrapped in error.failures.values())
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# %%
#| export
def save_checkpoint(folder: Path, step: int, state: dict[str, Tensor], keep: int) -> Path:
    """Save `state` as that after `step` and drop all but the newest `keep` checkpoints; return the new one's path.

    `state` holds tensors by their global names, DTensors where this rank has a piece. Every rank calls this.
    Raises UserError where the disk is full; older checkpoints are then untouched."""
    many = dist.is_initialized()
    first = not many or dist.get_rank() == 0
    target, partial = checkpoint_path(folder, step), folder / f".writing-{step:08d}"
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            writer = dcp.FileSystemWriter(partial, sync_files=True)
            dcp.save(state, storage_writer=writer, no_dist=not many)
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
        shutil.rmtree(partial, ignore_errors=True)
        if disk_full(error):
            raise UserError(f"{folder}: the disk is full; free some space and run the same command again") from None
        raise
    if first:
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
        for old in checkpoint_steps(folder)[:-keep]:
            shutil.rmtree(checkpoint_path(folder, old))
    return target


# %%
import tempfile

import torch

from pithtrain.config import OptimizerConfig, Qwen3MoeConfig
from pithtrain.models.build import build
from pithtrain.models.decoder import initialise
from pithtrain.train.optimizer import make_optimizer

small = Qwen3MoeConfig(hidden=32, heads=4, head_dim=8, experts=4, expert_hidden=16, vocab_size=300, layers=1)


def new_run(seed):
    model = build(small)
    initialise(model, seed)
    return model, make_optimizer(dict(model.named_parameters()), OptimizerConfig())


def state(model, optimizer):  # what a learner's `state` is, for a model that is whole
    averages = {
        f"optimizer.{name}.{key}": optimizer.state[p][key]
        for name, p in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | averages


def some_step(model, optimizer, seed):
    ids = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(ids, torch.arange(ids.shape[1]))[0].square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name) / "checkpoints"
model, optimizer = new_run(seed=0)
for step in range(1, 5):
    some_step(model, optimizer, step)
    save_checkpoint(folder, step, state(model, optimizer), keep=2)
for path in sorted(folder.rglob("*")):
    print(path.relative_to(folder), f"{path.stat().st_size:,} bytes" if path.is_file() else "")

# %% [markdown]
# ## Loading
#
# DCP fills tensors in place, so a model and an optimiser are made first, and their own state says what is
# expected. A missing, cut-off or altered file is reported as such.


# %%
#| export
def read_checkpoint(path: Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state`, in place, from the checkpoint at `path`, whatever mesh saved it.

    Raises UserError where the checkpoint is damaged or holds other tensors than these."""
    try:
        if not (path / ".metadata").is_file():
            raise FileNotFoundError("its .metadata is missing")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
        cause = error
        if isinstance(error, dcp.api.CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        cure = "delete this folder to go on from the checkpoint before it"
        if isinstance(cause, PermissionError):
            cure = "make it readable"
        elif "ize mismatch" in reason or "Missing key" in reason:
            cure = "it is of another model than config.toml describes; restore that file"
        raise UserError(f"{path}: cannot be read ({reason}); {cure}") from None


# %%
other, other_optimizer = new_run(seed=1)
read_checkpoint(checkpoint_path(folder, 4), state(other, other_optimizer))
for seed in (7, 8):  # both go on from here alike
    some_step(model, optimizer, seed)
    some_step(other, other_optimizer, seed)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

damaged = next(checkpoint_path(folder, 4).glob("*.distcp"))
damaged.write_bytes(damaged.read_bytes()[:100])
try:
    read_checkpoint(checkpoint_path(folder, 4), state(other, other_optimizer))
except UserError as error:
    print(str(error).replace(scratch.name, "RUN"))

# %% [markdown]
# Yours to do: [a save that is whole or absent](exercises/66_checkpoint.py). Next: what a run says while it goes:
# [metrics](67_metrics.py).
