# %% [markdown]
# # The trainer
#
# > From a config to a trained model: the loop around the training step, and what stands at the end.

# %%
#| default_exp train.trainer

# %%
#| export
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from pithtrain.config import Config, RunConfig, UserError
from pithtrain.models.build import build
from pithtrain.models.decoder import Decoder, count_parameters
from pithtrain.parallel.launch import Launch
from pithtrain.parallel.mesh import Mesh, check_axes, fit_axes, make_mesh
from pithtrain.parallel.watch import process_group
from pithtrain.train.baselines import bits_per_byte, score_baselines
from pithtrain.train.batches import HeldOutBatches, TrainBatches
from pithtrain.train.checkpoint import checkpoint_path, checkpoint_steps, disk_full, read_checkpoint, save_checkpoint
from pithtrain.train.figures import save_figures
from pithtrain.train.generate import generate
from pithtrain.train.metrics import Metrics, check_loggers, read_metrics
from pithtrain.train.optimizer import learning_rate
from pithtrain.train.run import Run, check_run_folder, create_run_folder, hold_run_folder
from pithtrain.train.shards import Shards, prepare
from pithtrain.train.step import Learner, StepResult, check_memory, memory_error, read_microbatches

# %% [markdown]
# ## What it runs on
#
# Weights are float32 everywhere. On a GPU the compute is bfloat16, on a CPU float32, unless the config
# says otherwise ([how](23_linear.py)).


# %%
#| export
def choose_compute(run: RunConfig) -> tuple[torch.device, torch.dtype]:
    """The device of a run and the dtype of its activations, `auto` resolved; sets the number of threads.

    Raises UserError for a CUDA device that is not there."""
    if run.threads:
        torch.set_num_threads(run.threads)
    cuda = torch.cuda.is_available()
    if run.device == "cuda" and not cuda:
        raise UserError("run.device: 'cuda' was asked for, but torch sees no CUDA GPU; use 'auto' or 'cpu'")
    device = torch.device("cuda" if cuda and run.device != "cpu" else "cpu")
    bfloat16 = run.precision == "bfloat16" or (run.precision == "auto" and device.type == "cuda")
    return device, torch.bfloat16 if bfloat16 else torch.float32


# %%
choose_compute(RunConfig(device="cpu"))

# %% [markdown]
# ## Interrupting
#
# Ctrl-C (or the SIGTERM of a cluster's scheduler) asks the loop to stop after the step it is in; the loop
# then saves and says how to go on. A second Ctrl-C ends the process at once, whatever it is doing; an exception would
# not do, since the writer of checkpoints turns it into one of its own. Checkpoints are there whole or not at all.


# %%
#| export
class StopRequest:
    """Context in which SIGINT and SIGTERM set `requested` instead of ending the process; a second one does.

    `speak`: say so."""

    def __init__(self, speak: bool):
        self.speak = speak

    def __enter__(self) -> "StopRequest":
        self.requested = False
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.requested:
            os._exit(130)
        self.requested = True
        if self.speak:
            print("\nstopping and saving after this step; once more ends without saving", file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# %%
with StopRequest(speak=True) as stop:
    signal.raise_signal(signal.SIGINT)
    print("asked to stop:", stop.requested)

# %% [markdown]
# ## The loop
#
# Make or load, step, log, save. What a step does depends on its number alone, so a resumed loop is the same
# loop, entered later. The run folder is made last of all that comes before the first step, so that whatever is
# refused leaves none behind: a mesh that does not fit, data that is too short, a logger that is not installed.


# %%
#| export
def train(config: Config, launch: Launch = Launch(), store: dist.Store | None = None) -> int:
    """Train the run that `config` describes, from its newest checkpoint if it has one, and report it.

    Every rank of a job calls this with its own `launch` and the job's `store`. Returns the step that it ended at,
    which is not the last where it was interrupted. Raises UserError for anything about the config, the data or the
    machine that the user can mend."""
    device, dtype = choose_compute(config.run)
    check_axes(config, fit_axes(config.mesh, launch.world_size))
    check_memory(config, launch.world_size, device)
    check_loggers(config.log)
    if launch.rank == 0:
        shards = open_data(config, report=print)
    if store:  # rank 0 makes what is not there; only then do the others look
        store.set("data", "") if launch.rank == 0 else store.wait(["data"], timedelta(days=1))
    if launch.rank:
        shards = open_data(config)
    batches = TrainBatches(shards.train, config.train.sequence_length, config.train.batch_size, config.run.seed)
    try:
        with process_group(launch, store, device) as own_device, ExitStack() as held:
            mesh = make_mesh(config.mesh, launch.rank, launch.world_size, own_device)
            return run_steps(config, mesh, dtype, shards, batches, held)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if problem := memory_error(error):
            raise problem from None
        raise
    except OSError as error:
        if disk_full(error):
            raise UserError(f"{config.path}: the disk is full; free some space and run the same command") from None
        raise


# %%
#| export
def open_data(config: Config, report: Callable[[str], None] = lambda line: None) -> Shards:
    """The run's shards, made if they are not there; refuses a run folder that is another run's first."""
    check_run_folder(config)
    own, trained_on = config.path / "tokenizer.json", config.path / "corpus.sha256"
    if (config.path / "config.toml").is_file() and not own.is_file():
        raise UserError(f"{own}: no such file, and another tokenizer would not suit the run; copy its own there")
    shards = prepare(config.data, config.model.vocab_size, own if own.is_file() else None, report)
    found = shards.manifest
    known = (trained_on.read_text() if trained_on.is_file() else "") or found.fingerprint
    if known != found.fingerprint and any(checkpoint_steps(config.path / "checkpoints")):
        problem = f"was trained on other text than {found.corpus} holds now"
        raise UserError(f"{config.path}: {problem}; restore that, or set run.name to another name")
    train = f"{found.train.documents} files to train on, {found.train.tokens:,} tokens"
    skipped = f"{found.empty} empty and {found.undecodable} undecodable skipped"
    report(f"{found.corpus}: {train}; {found.held_out.documents} held out; {skipped}")
    return shards


# %% [markdown]
# The loop runs on every rank; the first one also speaks and writes. Whether to stop is agreed on in every
# step, because a signal reaches ranks at different moments.


# %%
#| export
def run_steps(
    config: Config, mesh: Mesh, dtype: torch.dtype, shards: Shards, batches: TrainBatches, held: ExitStack
) -> int:
    """The training loop of `train`, over opened data; makes the run folder once nothing is left to refuse.

    The folder is in `held`, where no other process can train the run, from before its checkpoints are looked at."""
    folder, steps, first_rank = config.path, config.train.steps, mesh.rank == 0
    if first_rank and not (new := not (folder / "config.toml").exists()):
        held.enter_context(hold_run_folder(folder))
    learner = Learner(config, mesh, dtype)
    saved = checkpoint_steps(folder / "checkpoints")
    first = step = saved[-1] if saved else 0
    if saved:
        state = learner.state()
        if not first:  # an imported model: weights alone
            state = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
        read_checkpoint(checkpoint_path(folder / "checkpoints", first), state)
        learner.resume(first)
    rows = config.train.micro_batch_size * mesh.axes.batch_ranks
    held_out = HeldOutBatches(shards.held_out, config.train.sequence_length, rows)
    if first_rank:
        create_run_folder(config, shards.folder / "tokenizer.json", shards.manifest.fingerprint)
        if new:
            held.enter_context(hold_run_folder(folder))
        print(describe_run(config, mesh, dtype, first))
    tokens = config.train.batch_size * config.train.sequence_length
    silent = not first_rank or first == steps
    metrics = Metrics(config, first) if first_rank else None
    bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=silent)
    with StopRequest(first_rank) as stop, bar:
        for step in range(first + 1, steps + 1):
            start = time.perf_counter()
            own = read_microbatches(batches, step - 1, config.train.micro_batch_size, mesh)
            rate = learning_rate(step, steps, config.optimizer)
            result = learner.step(own, rate)
            seconds = time.perf_counter() - start
            check_finite(config, f"the loss of step {step}", result.loss)
            check_finite(config, f"the gradients' norm of step {step}", result.grad_norm)
            record = step_record(step, result, rate, tokens, seconds)
            every = config.train.evaluate_every
            if step == steps or (every and step % every == 0):
                nats, count = learner.evaluate(held_out)
                record["validation_loss"] = nats / count
                check_finite(config, f"the held-out loss behind step {step}", nats / count)
            if metrics:
                metrics.log(record)
            bar.set_postfix_str(f"loss {result.loss:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update()
            last = torch.tensor(step == steps or stop.requested, dtype=torch.int32, device=mesh.device)
            if mesh.world_size > 1:
                dist.all_reduce(last)
            if last or (config.train.checkpoint_every and step % config.train.checkpoint_every == 0):
                check_finite(config, f"a weight behind step {step}", 0.0 if learner.finite() else math.nan)
                if metrics:
                    metrics.sync()
                state = learner.state() | {"step": torch.tensor(step)}
                save_checkpoint(folder / "checkpoints", step, state, config.train.keep)
            if last:
                break
    if metrics:
        metrics.close()
        if step == steps:
            print(report(config, shards, learner.parts[0] if mesh.world_size == 1 else None))
    return step


# %%
#| export
def check_finite(config: Config, what: str, value: float) -> None:
    """Refuse to go on with a run that diverged, before worse weights replace its checkpoints."""
    if not math.isfinite(value):
        cure = f"lower optimizer.learning_rate (now {config.optimizer.learning_rate}) or raise optimizer.warmup"
        raise UserError(f"{config.path}: {what} is {value}; {cure}, under another run.name")


# %%
#| export
def describe_run(config: Config, mesh: Mesh, dtype: torch.dtype, first: int) -> str:
    """A run's size and where it runs, in a line or two."""
    with torch.device("meta"):
        whole = build(config.model)
    total, active = count_parameters(whole, config.model.experts, config.model.top_k)
    where = f"{mesh.device.type}, {dtype}"
    if mesh.world_size > 1:
        sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.axes._asdict().items() if size > 1)
        where = f"{mesh.world_size} ranks ({sizes}), {where}"
    resumed = "finished" if first == config.train.steps else f"going on from step {first}"
    begun = f"{config.path}: {resumed}\n" if first else ""
    return f"{begun}{total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active; {where}"


# %% [markdown]
# What a step leaves in `metrics.jsonl`. Loads are written as fractions; the *imbalance* of a layer is its
# busiest expert over the mean, and the worst layer's is logged.


# %%
#| export
def step_record(step: int, result: StepResult, rate: float, tokens: int, seconds: float) -> dict[str, Any]:
    """The metrics of one step, ready for JSON. Every value but the last three repeats exactly in a second run."""
    share = result.load / result.load.sum(dim=1, keepdim=True)
    return {
        "step": step, "tokens": step * tokens, "loss": result.loss, "balance_loss": result.balance,
        "learning_rate": rate, "grad_norm": result.grad_norm,
        "imbalance": (share.max(dim=1).values * share.shape[1]).max().item(),
        "entropy": result.entropy.tolist(),
        "load": [[round(value, 5) for value in layer] for layer in share.tolist()],
        "seconds": seconds, "tokens_per_second": tokens / seconds, "time": time.time(),
    }  # fmt: skip


# %%
load = torch.tensor([[30, 10, 12, 12]])
step_record(8, StepResult(2.5, 0.01, 0.7, load, torch.tensor([1.2])), 0.003, 64, 0.02)

# %% [markdown]
# ## The report
#
# A loss alone says little. So it stands beside what two simple models score on the very same tokens
# ([baselines](64_baselines.py)): one that knows how frequent each token is, and one that knows which
# token tends to follow which. Then a sample, and the figures.


# %%
#| export
def report(config: Config, shards: Shards, model: Decoder | None) -> str:
    """Write results.json, sample.txt and the figures of a finished run; return the table to print.

    Without the whole model on this rank there is no sample; `pithtrain generate` gives one."""
    folder, file, seconds, records = config.path, config.path / "metrics.jsonl", 0.0, []
    every = max(1, config.train.steps // 2000)  # what figures can show
    for record in read_metrics(file):
        seconds += record["seconds"]
        if record["step"] % every == 0 or "validation_loss" in record:
            records.append(record)
    if not records or records[-1]["step"] != config.train.steps:
        raise UserError(f"{file}: lacks the last step; pithtrain evaluate {folder} tells the loss all the same")
    last = records[-1]
    # Of a large corpus the baselines see the first 33 million tokens: their pairs are sorted, in 64 bytes a token.
    train_tokens = shards.train.take(np.arange(min(len(shards.train), 2**25)))
    baselines = score_baselines(train_tokens, shards.held_out, config.model.vocab_size)
    table = {"this model": last["validation_loss"], **baselines}
    text_bytes = shards.manifest.held_out.bytes
    bits = {name: bits_per_byte(loss, len(shards.held_out) - 1, text_bytes) for name, loss in table.items()}
    results = {
        "step": last["step"], "tokens": last["tokens"], "nats_per_token": table, "bits_per_byte": bits,
        "training_seconds": seconds, "baselines_fitted_on": len(train_tokens), "torch": torch.__version__,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    figures = save_figures(folder, records, baselines)
    lines = [f"{'held-out text':<22}{'nats per token':>16}{'bits per byte':>16}"]
    lines += [f"{name:<22}{loss:>16.3f}{bits[name]:>16.3f}" for name, loss in table.items()]
    if model:
        try:
            sample = generate(Run(config, shards.tokenizer, model, last["step"]), "def ", 200)
            (folder / "sample.txt").write_text(sample + "\n")
            lines += ["", "a sample:", *(f"    {line}" for line in sample.splitlines()), ""]
        except UserError as error:  # the model knows fewer positions than the prompt has
            lines += ["", f"no sample: {error}"]
    else:
        lines += ["", f"a sample: pithtrain generate {folder}"]
    lines += [f"figures: {', '.join(str(path) for path in figures)}"]
    return "\n".join(lines)


# %% [markdown]
# ## A whole run
#
# A very small one, seconds of steps on a small corpus, in a temporary folder: from text to report. And then
# the same call again, which finds the run finished and reports it once more without a step.

# %%
import tempfile

from pithtrain.config import DataConfig, OptimizerConfig, Qwen3MoeConfig, TrainConfig

scratch = tempfile.TemporaryDirectory()
config = Config(
    run=RunConfig(name="demo", folder=scratch.name + "/runs", device="cpu"),
    data=DataConfig(pattern="[abc]*.py", folder=scratch.name + "/data", held_out=0.1),
    model=Qwen3MoeConfig(hidden=64, heads=4, head_dim=16, experts=8, expert_hidden=64, vocab_size=512, layers=2),
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup=5),
    train=TrainConfig(steps=120, sequence_length=64, batch_size=16, micro_batch_size=8),
)
train(config)
assert train(config) == 120

# %% [markdown]
# Next: all of this from the [command line](90_cli.py).
