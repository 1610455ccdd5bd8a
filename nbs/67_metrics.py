# %% [markdown]
# # Metrics
#
# > One JSON object for each step, appended to a file that survives anything, and loggers beside it.
#
# A run's numbers go to `metrics.jsonl`, a line for each step, flushed as it is written. A text file can be
# tailed, plotted, diffed and read by any tool; after a crash it is whole up to the last line. Each line says when
# its step ended, in seconds since 1970, so the file also tells how long the run held its device.

# %%
#| default_exp train.metrics

# %%
#| export
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pithtrain.config import Config, LogConfig, UserError

# %% [markdown]
# ## The file
#
# A run that is resumed from step 100 repeats steps 101, 102, ... that were logged but not saved. Their
# lines are dropped, so that each step stands in the file once. A step of a large model takes tens of kilobytes (the
# load of each expert), so the file is never held in memory as a whole.


# %%
#| export
def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a metrics file, in order, one at a time; a last line that a crash cut off is left out."""
    if not path.exists():
        return
    with path.open(errors="replace") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


# %%
#| export
def cut_metrics(path: Path, last_step: int) -> None:
    """Drop what was logged after `last_step`."""
    beside = path.with_suffix(".partial")
    with beside.open("w") as kept:
        kept.writelines(json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= last_step)
    os.replace(beside, path)


# %%
import tempfile

scratch = tempfile.TemporaryDirectory()
path = Path(scratch.name) / "metrics.jsonl"
path.write_text('{"step": 1, "loss": 8.3}\n{"step": 2, "loss": 8.1}\n{"step": 3, "lo')
print(list(read_metrics(path)))
cut_metrics(path, last_step=1)
print(path.read_text())

# %% [markdown]
# ## Loggers beside it
#
# TensorBoard and Weights & Biases are extras. Asking for one that is not installed is an error before any
# work is done, not after it.


# %%
#| export
def check_loggers(config: LogConfig) -> None:
    """Refuse a logger that is not installed."""
    for wanted, package in ((config.tensorboard, "tensorboard"), (config.wandb, "wandb")):
        if wanted and find_spec(package) is None:
            cure = f"pip install 'pithtrain[{package}]', or set log.{package} to false"
            raise UserError(f"log.{package}: the package {package} is not installed; {cure}")


# %%
check_loggers(LogConfig())


# %%
#| export
class Metrics:
    """Writes each step's numbers to `metrics.jsonl`, and to the loggers the config asks for."""

    def __init__(self, config: Config, last_step: int):
        path, self.opened = config.path / "metrics.jsonl", ExitStack()
        cut_metrics(path, last_step)
        self.file = self.opened.enter_context(path.open("a", buffering=1))  # a line at a time
        self.tensorboard = self.wandb = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(config.path / "tensorboard"), purge_step=last_step + 1)
            self.tensorboard = self.opened.enter_context(writer)
        if config.log.wandb:
            import wandb

            run = wandb.init(project="pithtrain", name=config.run.name, dir=config.path, resume="allow")
            self.wandb = self.opened.enter_context(run)

    def log(self, record: dict[str, Any]) -> None:
        """Write one object; `record["step"]` is its step. Loggers get the numbers, not the lists."""
        self.file.write(json.dumps(record) + "\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "time")}
        if self.tensorboard:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, record["step"])
        if self.wandb:
            self.wandb.log(numbers, step=record["step"])

    def sync(self) -> None:
        """Push what was logged to the disk: no checkpoint should be newer than the file."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Flush and close everything."""
        self.opened.close()


# %%
from pithtrain.config import RunConfig

config = Config(run=RunConfig(name="demo", folder=scratch.name))
config.path.mkdir()
metrics = Metrics(config, last_step=0)
for step in (1, 2):
    metrics.log({"step": step, "loss": 9.0 - step, "load": [[0.5, 0.5]]})
metrics.close()
print((config.path / "metrics.jsonl").read_text())

# %% [markdown]
# Next: the [figures](68_figures.py) made from that file.
