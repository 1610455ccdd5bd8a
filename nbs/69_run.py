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
# a run folder belongs to one config, and no run overwrites another's files. One setting may still change, the number
# of steps, as long as the run cannot know it: [the learning rate](65_optimizer.py) is constant until it falls towards
# the end, so up to there a long run and a short one are the same, to the bit.

# %%
#| default_exp train.run

# %%
#| export
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from pithtrain.config import Config, UserError, differences, load_run_config, to_toml
from pithtrain.models.build import build
from pithtrain.models.decoder import Decoder
from pithtrain.train.checkpoint import checkpoint_path, checkpoint_steps, read_checkpoint
from pithtrain.train.optimizer import learning_rate
from pithtrain.train.tokenizer import end_of_text, load_tokenizer

# %% [markdown]
# ## Whose folder is it?


# %%
#| export
def end_is_open(config: Config, other: Config, done: int) -> bool:
    """Whether the first `done` steps have the same learning rates in both configs, and more are to come."""
    rates = [[learning_rate(step, c.train.steps, c.optimizer) for step in range(1, done + 1)] for c in (config, other)]
    return rates[0] == rates[1] and done < config.train.steps


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
    if (kept := folder / "checkpoints").exists() and not (kept.is_dir() and os.access(kept, os.W_OK)):
        raise UserError(f"{kept}: is no folder that can be written; mend that, or set run.name to another name")
    saved, other = checkpoint_steps(kept), load_run_config(folder)
    changed = differences(config, other)
    if saved[-1:] == [0]:  # imported and not trained yet: only the model is settled
        changed = [line for line in changed if line.startswith("model.")]
    others = [line for line in changed if not line.startswith("train.steps:")]
    fit = [step for step in saved if others != changed and end_is_open(config, other, step)]
    if not saved or (fit and fit[-1] == saved[-1]):
        changed = others
    if changed:
        cure = "set run.name to another name"
        if others:
            cure += ", or delete the folder"
        elif fit:
            cure += f", or delete its checkpoints after step {fit[-1]}, to go on from there"
        else:
            cure += f"; none of its checkpoints belongs to a run of {config.train.steps} steps"
        raise UserError(f"{folder}: belongs to a run with another config ({'; '.join(changed)}); {cure}")


# %%
#| export
def create_run_folder(config: Config, tokenizer: Path, fingerprint: str) -> None:
    """Make the run's folder, whole or not at all: the config, the corpus's fingerprint, a copy of the tokenizer.

    A folder that is there gets the first two anew, because free settings may have changed. Raises UserError where
    nothing can be written."""
    partial = config.path.with_name(f".{config.run.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "config.toml").write_text(to_toml(config))
        (partial / "corpus.sha256").write_text(fingerprint)
        if (config.path / "config.toml").exists():
            for file in sorted(partial.iterdir()):
                os.replace(file, config.path / file.name)
        else:
            shutil.copyfile(tokenizer, partial / "tokenizer.json")
            os.rename(partial, config.path)
    except OSError as error:
        raise UserError(f"{config.path}: cannot be written ({error.strerror}); mend that or set run.folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# %%
#| export
@contextmanager
def hold_run_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from training the run in `folder`. Raises UserError where one is at it."""
    with (folder / "tokenizer.json").open("r+") as lock:  # a file that is never replaced
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cure = "wait for it, or set run.name to another name"
            raise UserError(f"{folder}: another process is training this run; {cure}") from None
        except OSError:
            pass  # a file system without locks
        yield


# %%
import tempfile
from dataclasses import replace

from pithtrain.config import Qwen3MoeConfig, RunConfig, TrainConfig
from pithtrain.train.tokenizer import save_tokenizer, train_tokenizer

scratch = tempfile.TemporaryDirectory()
tokenizer_path = Path(scratch.name) / "tokenizer.json"
save_tokenizer(train_tokenizer(["def run(): return 1\n"] * 100, vocab_size=270), tokenizer_path)
small = Qwen3MoeConfig(hidden=32, heads=4, head_dim=8, experts=4, expert_hidden=16, vocab_size=270, layers=1)
config = Config(run=RunConfig(name="demo", folder=scratch.name), model=small)
check_run_folder(config)
create_run_folder(config, tokenizer_path, "0123")
check_run_folder(config)  # the same config: its own folder
for steps in (1000, 160):
    longer = replace(config, train=TrainConfig(steps=steps))
    print(f"of 200 steps 100 are done; {steps} instead: {'go on' if end_is_open(longer, config, 100) else 'refused'}")
try:
    check_run_folder(Config(run=RunConfig(name="demo", folder=scratch.name)))
except UserError as error:
    print(str(error).replace(scratch.name, "runs"))

# %% [markdown]
# ## Opening a run
#
# To use a trained model one needs its config, its tokenizer and its newest weights. Models
# [that come from elsewhere](80_hub.py) have habits of their own: how many positions they know, which tokens end what
# they say (often more than one), and whether a token stands before every text. Their published settings say so.


# %%
#| export
class Run(NamedTuple):
    """A trained run, opened."""

    config: Config
    tokenizer: Tokenizer
    model: Decoder  #: on the CPU, fp32, with the newest checkpoint's weights
    step: int
    published: dict[str, Any] = {}  # noqa: RUF012 (only read)  #: settings of the folder that it was imported from

    @property
    def context(self) -> int:
        """Positions that the model knows, published with it or trained on here."""
        return max(self.config.train.sequence_length, self.published.get("max_position_embeddings") or 0)

    @property
    def ends(self) -> set[int]:
        """The tokens that end a text: end-of-text, and all that were published as such."""
        named = self.published.get("eos_token_id")
        return {end_of_text(self.tokenizer), *(named if isinstance(named, list) else [named])} - {None}

    def encode(self, text: str) -> list[int]:
        """The tokens of a text alone."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise UserError(f"{text[:40]!r}: is not UTF-8 text") from None

    def opened(self, tokens: list[int]) -> list[int]:
        """`tokens` behind what stands before every text; at least one token, end-of-text where there is no other."""
        end = [end_of_text(self.tokenizer)]
        bos = self.published.get("add_bos_token") and self.published.get("bos_token")
        number = self.tokenizer.token_to_id(bos["content"] if isinstance(bos, dict) else bos or "")
        first = end if not self.published else [] if number is None else [number]  # ours were trained behind an end
        return (self.tokenizer.encode("").ids or first) + tokens or end


# %%
#| export
def published_settings(folder: Path) -> dict[str, Any]:
    """The text model's settings that came with an import, the later file's where two disagree; none for our own run."""
    found: dict[str, Any] = {}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "dtypes.json"):
        path = folder / "published" / name
        try:
            table = json.loads(path.read_text()) if path.is_file() else {}
            found |= table | table.get("text_config", {})
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{path}: not a table of settings; mend it, or import the model again") from None
    return found


# %%
#| export
def open_run(folder: Path) -> Run:
    """Open the run in `folder` at its newest checkpoint. Raises UserError where there is none."""
    config = load_run_config(folder)
    steps = checkpoint_steps(folder / "checkpoints")
    if not steps:
        raise UserError(f"{folder}: has no checkpoint yet; train it first")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if (tokens := tokenizer.get_vocab_size()) > config.model.vocab_size:
        problem = f"has {tokens} tokens, and the model {config.model.vocab_size}"
        raise UserError(f"{folder / 'tokenizer.json'}: {problem}; copy the run's own there")
    model = build(config.model)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    read_checkpoint(checkpoint_path(folder / "checkpoints", steps[-1]), weights)
    return Run(config, tokenizer, model, steps[-1], published_settings(folder))


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
print("context", run.context, "opening", run.opened([]), "ends", run.ends)
(config.path / "published").mkdir()
(config.path / "published" / "config.json").write_text('{"max_position_embeddings": 4096, "eos_token_id": [1, 2]}')
run = open_run(config.path)
print("context", run.context, "tokens", run.opened([5]), "ends", run.ends)
assert (run.context, run.opened([5]), run.opened([]), run.ends) == (4096, [5], [0], {0, 1, 2})

# %% [markdown]
# Next: [text out of it](70_generate.py).
