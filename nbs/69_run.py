# %% [markdown]
# # The run folder
#
# > What a run leaves on disk, who may write to it, and how to open it again.
#
# Everything a run makes is in `runs/NAME/`:
#
# | file | holds |
# |---|---|
# | `config.toml` | the complete config, defaults and overrides resolved |
# | `tokenizer.json` | the tokenizer its shards were made with |
# | `metrics.jsonl` | one object a step |
# | `checkpoints/step-XXXXXXXX/` | weights, optimiser, step |
# | `results.json`, `*.png`, `sample.txt` | written at the end |
#
# The same command that started a run goes on with it. A *different* config under the same name is refused:
# a run folder belongs to one config, and no run overwrites another's files.

# %%
#| default_exp train.run

# %%
#| export
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from pithtrain.config import Config, UserError, differences, load_run_config, to_toml
from pithtrain.models.build import build
from pithtrain.models.decoder import Decoder
from pithtrain.train.checkpoint import checkpoint_path, checkpoint_steps, load_weights
from pithtrain.train.tokenizer import load_tokenizer

# %% [markdown]
# ## Whose folder is it?


# %%
#| export
def check_run_folder(config: Config) -> None:
    """Refuse a run folder that holds something else than this config's run. Touches nothing."""
    folder = config.path
    if not folder.exists():
        return
    if not (folder / "config.toml").is_file():
        if not folder.is_dir() or any(folder.iterdir()):
            raise UserError(f"{folder}: exists and is not a run (no config.toml); set run.name to another name")
        return
    changed = differences(config, load_run_config(folder))
    if checkpoint_steps(folder / "checkpoints")[-1:] == [0]:  # imported and not trained yet: only the model is settled
        changed = [line for line in changed if line.startswith("model.")]
    if changed:
        raise UserError(
            f"{folder}: belongs to a run with another config ({'; '.join(changed)}); "
            "set run.name to another name, or delete the folder"
        )


# %%
#| export
def create_run_folder(config: Config, tokenizer: Path) -> None:
    """Make the run's folder, whole or not at all, with the config and a copy of the tokenizer in it.

    A folder that is there gets the config anew, because free settings may have changed. Raises UserError where
    nothing can be written.
    """
    partial = config.path.with_name(f".{config.run.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "config.toml").write_text(to_toml(config))
        if (config.path / "config.toml").exists():
            os.replace(partial / "config.toml", config.path / "config.toml")
        else:
            shutil.copyfile(tokenizer, partial / "tokenizer.json")
            os.rename(partial, config.path)
    except OSError as error:
        raise UserError(f"{config.path}: cannot be written ({error.strerror}); mend that or set run.folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# %%
import tempfile

from pithtrain.config import Qwen3MoeConfig, RunConfig
from pithtrain.train.tokenizer import save_tokenizer, train_tokenizer

scratch = tempfile.TemporaryDirectory()
tokenizer_path = Path(scratch.name) / "tokenizer.json"
save_tokenizer(train_tokenizer(["def run(): return 1\n"] * 100, vocab_size=270), tokenizer_path)
small = Qwen3MoeConfig(hidden=32, heads=4, head_dim=8, experts=4, expert_hidden=16, vocab_size=270, layers=1)
config = Config(run=RunConfig(name="demo", folder=scratch.name), model=small)
check_run_folder(config)
create_run_folder(config, tokenizer_path)
check_run_folder(config)  # the same config: its own folder
try:
    check_run_folder(Config(run=RunConfig(name="demo", folder=scratch.name)))
except UserError as error:
    print(str(error).replace(scratch.name, "runs"))

# %% [markdown]
# ## Opening a run
#
# To use a trained model one needs its config, its tokenizer and its newest weights.


# %%
#| export
class Run(NamedTuple):
    """A trained run, opened."""

    config: Config
    tokenizer: Tokenizer
    model: Decoder  #: on the CPU, fp32, with the newest checkpoint's weights
    step: int


# %%
#| export
def open_run(folder: Path) -> Run:
    """Open the run in `folder` at its newest checkpoint. Raises UserError where there is none."""
    config = load_run_config(folder)
    steps = checkpoint_steps(folder / "checkpoints")
    if not steps:
        raise UserError(f"{folder}: has no checkpoint yet; train it first")
    model = build(config.model)
    load_weights(checkpoint_path(folder / "checkpoints", steps[-1]), model)
    return Run(config, load_tokenizer(folder / "tokenizer.json"), model, steps[-1])


# %%
from pithtrain.train.checkpoint import save_checkpoint

try:
    open_run(config.path)
except UserError as error:
    print(str(error).replace(scratch.name, "runs"))
model = build(small)
save_checkpoint(config.path / "checkpoints", 7, {f"model.{n}": t for n, t in model.state_dict().items()}, keep=1)
run = open_run(config.path)
print(f"step {run.step}, {sum(p.numel() for p in run.model.parameters()):,} parameters")

# %% [markdown]
# Next: [text out of it](70_generate.py).
