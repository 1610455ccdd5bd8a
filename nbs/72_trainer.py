# %% [markdown]
# # The trainer
#
# > From a config to a trained model: one step, the loop around it, and what stands at the end.

# %%
#| default_exp train.trainer

# %%
#| export
import json
import math
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pithtrain.config import Config, RunConfig, UserError
from pithtrain.layers.balance import balance_loss, expert_load, routing_entropy, update_bias
from pithtrain.layers.loss import linear_cross_entropy
from pithtrain.models.qwen3_moe import Qwen3Moe, count_parameters, initialise
from pithtrain.train.baselines import bits_per_byte, score_baselines
from pithtrain.train.batches import IGNORE, HeldOutBatches, TrainBatches
from pithtrain.train.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    disk_full,
    load_checkpoint,
    save_checkpoint,
)
from pithtrain.train.figures import save_figures
from pithtrain.train.generate import generate
from pithtrain.train.metrics import Metrics, read_metrics
from pithtrain.train.optimizer import learning_rate, make_optimizer
from pithtrain.train.run import check_run_folder, create_run_folder
from pithtrain.train.shards import Shards, prepare

# %% [markdown]
# ## What it runs on
#
# Weights are float32 everywhere. On a GPU the compute is bfloat16, on a CPU float32, unless the config
# says otherwise ([how](23_linear.py)).


# %%
#| export
class Compute(NamedTuple):
    """The device of a run and the dtype of its activations."""

    device: torch.device
    dtype: torch.dtype


# %%
#| export
def choose_compute(run: RunConfig) -> Compute:
    """Resolve `auto` for device and precision. Raises UserError for a CUDA device that is not there."""
    cuda = torch.cuda.is_available()
    if run.device == "cuda" and not cuda:
        raise UserError("run.device: 'cuda' was asked for, but torch sees no CUDA GPU; use 'auto' or 'cpu'")
    device = torch.device("cuda" if cuda and run.device != "cpu" else "cpu")
    bfloat16 = run.precision == "bfloat16" or (run.precision == "auto" and device.type == "cuda")
    return Compute(device, torch.bfloat16 if bfloat16 else torch.float32)


# %%
choose_compute(RunConfig(device="cpu"))

# %% [markdown]
# ## One step
#
# A step's batch of sequences is worked through in microbatches, whose gradients add up. The loss is the
# mean over *all* tokens of the step, so each microbatch divides its sum by that number, and the result
# does not depend on how the batch was cut:
#
# $$\mathcal{L} = \frac{1}{N} \sum_{m} \sum_{t \in m} \ell_t + \frac{1}{M} \sum_{m} \text{balance}_m,$$
#
# with $N$ tokens and $M$ microbatches in the step. Then the gradient is clipped to a global norm, the
# optimiser moves the weights, and loss-free balancing moves the selection biases.


# %%
#| export
class StepResult(NamedTuple):
    """What a step reports. L layers, E experts."""

    loss: float  #: mean cross-entropy, nats per token
    balance: float  #: mean balance loss, with its coefficients
    grad_norm: float  #: global gradient norm before clipping
    load: Tensor  #: (L, E) int64 pairs that each expert got in the step
    entropy: Tensor  #: (L,) mean routing entropy, nats


# %%
#| export
def train_step(
    model: Qwen3Moe,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    config: Config,
    rate: float,
    dtype: torch.dtype,
) -> StepResult:
    """One optimiser step at learning rate `rate` on `inputs` and `targets`, (batch_size, sequence) int64."""
    size, experts = config.train.micro_batch_size, config.model.experts
    pieces = range(0, len(inputs), size)
    tokens = (targets != IGNORE).sum()
    losses = torch.zeros(2, device=inputs.device)
    load = torch.zeros(config.model.layers, experts, dtype=torch.long, device=inputs.device)
    entropy = torch.zeros(config.model.layers, device=inputs.device)
    optimizer.zero_grad(set_to_none=True)
    for start in pieces:
        hidden, routing = model(inputs[start : start + size], dtype)
        wanted = targets[start : start + size].flatten()
        own = torch.stack([expert_load(routed.expert_ids, experts) for routed in routing])
        load += own
        entropy += torch.stack([routing_entropy(routed.probs) for routed in routing]) / len(pieces)
        loss = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, wanted) / tokens
        balance = balance_loss(routing, own, load, size, config.balance) / len(pieces)
        (loss + balance).backward()
        losses += torch.stack([loss.detach(), balance.detach()])
    clip = config.optimizer.clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    if config.balance.bias_rate:
        for layer, layer_load in zip(model.layers, load, strict=True):
            update_bias(layer.router.bias, layer_load, config.balance.bias_rate)
    return StepResult(losses[0].item(), losses[1].item(), float(grad_norm), load.cpu(), entropy.cpu())


# %% [markdown]
# Eight steps on a sentence that repeats: the loss falls, and cutting the batch in four changes nothing but
# rounding.

# %%
from pithtrain.config import BalanceConfig, ModelConfig, OptimizerConfig, TrainConfig

small = ModelConfig(hidden=64, heads=4, head_dim=16, experts=8, expert_hidden=32, vocab_size=300, layers=2)
rows = (torch.arange(4 * 33).view(4, 33) * 7) % 31
for micro_batch_size in (4, 1):
    config = Config(
        model=small,
        balance=BalanceConfig(global_batch=0.0),
        train=TrainConfig(steps=8, batch_size=4, micro_batch_size=micro_batch_size),
    )
    model = Qwen3Moe(small)
    initialise(model, 0.02, 2, seed=0)
    optimizer = make_optimizer(model, config.optimizer)
    results = [train_step(model, optimizer, rows[:, :-1], rows[:, 1:], config, 0.003, torch.float32) for _ in range(8)]
    print(f"microbatches of {micro_batch_size}:", " ".join(f"{r.loss:.4f}" for r in results))
assert results[-1].loss < results[0].loss - 1

# %% [markdown]
# ## Validation
#
# The held-out text is split off by file and never trained on. Its loss is reported in nats per token, and
# in *bits per byte* of text, which does not depend on the tokenizer: a tokenizer with longer tokens makes
# each token harder and leaves fewer of them.


# %%
#| export
@torch.no_grad()
def evaluate(model: Qwen3Moe, batches: Iterable[tuple[Tensor, Tensor]], compute: Compute) -> tuple[float, int]:
    """Summed cross-entropy in nats over all targets of `batches`, and the number of those targets."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for inputs, targets in batches:
        hidden, _ = model(inputs.to(compute.device), compute.dtype)
        wanted = targets.flatten().to(compute.device)
        total += linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, wanted).cpu()
        count += int((targets != IGNORE).sum())
    return total.item(), count


# %%
nats, count = evaluate(model, [(rows[:, :-1], rows[:, 1:])], Compute(torch.device("cpu"), torch.float32))
print(f"{nats / count:.4f} nats per token over {count} tokens")

# %% [markdown]
# ## Interrupting
#
# Ctrl-C (or the SIGTERM of a cluster's scheduler) asks the loop to stop after the step it is in; the loop
# then saves and says how to go on. A second Ctrl-C is the ordinary, immediate kind.


# %%
#| export
class StopRequest:
    """Context in which SIGINT and SIGTERM set `requested` instead of ending the process; a second one does."""

    def __enter__(self) -> "StopRequest":
        self.requested = False
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *error: object) -> None:
        self._restore()


# %%
with StopRequest() as stop:
    signal.raise_signal(signal.SIGINT)
    print("asked to stop:", stop.requested)

# %% [markdown]
# ## The loop
#
# Everything that can be refused is refused before the run folder is made. Then: make or load, step, log,
# save. What a step does depends on its number alone, so a resumed loop is the same loop, entered later.


# %%
#| export
@dataclass(frozen=True)
class Trained:
    """How a call of `train` ended: at step `step` of `steps`, in `folder`."""

    folder: Path
    step: int
    steps: int


# %%
#| export
def train(config: Config) -> Trained:
    """Train the run that `config` describes, from its newest checkpoint if it has one, and report it.

    Raises UserError for anything about the config, the data or the machine that the user can mend.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    compute = choose_compute(config.run)
    check_run_folder(config)
    corpus = Path(config.data.corpus) if config.data.corpus else None
    shards = prepare(
        Path(config.data.folder),
        corpus,
        config.data.pattern,
        config.model.vocab_size,
        config.data.held_out,
        report=print,
    )
    found = shards.manifest
    print(
        f"{found.corpus}: {found.train.documents} files to train on, {found.train.tokens:,} tokens; "
        f"{found.held_out.documents} held out; {found.empty} empty and {found.undecodable} undecodable skipped"
    )
    batches = TrainBatches(shards.train, config.train.sequence_length, config.train.batch_size, config.run.seed)
    try:
        create_run_folder(config, shards.folder / "tokenizer.json")
        return run_steps(config, compute, shards, batches)
    except OSError as error:
        if disk_full(error):
            raise UserError(f"{config.path}: the disk is full; free some space and run the same command") from None
        raise


# %%
#| export
def run_steps(config: Config, compute: Compute, shards: Shards, batches: TrainBatches) -> Trained:
    """The training loop of `train`, over opened data, in a run folder that exists."""
    folder, steps = config.path, config.train.steps
    model = Qwen3Moe(config.model)
    initialise(model, config.model.init_std, config.model.layers, config.run.seed)
    model.to(compute.device)
    optimizer = make_optimizer(model, config.optimizer)
    saved = checkpoint_steps(folder / "checkpoints")
    first = load_checkpoint(checkpoint_path(folder / "checkpoints", saved[-1]), model, optimizer) if saved else 0
    if first:
        print(f"{folder}: going on from step {first}")
    total, active = count_parameters(model, config.model.experts, config.model.top_k)
    print(f"{total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active; {compute.device}, {compute.dtype}")
    held_out = HeldOutBatches(shards.held_out, config.train.sequence_length, config.train.micro_batch_size)
    tokens = config.train.batch_size * config.train.sequence_length
    metrics = Metrics(config, first)
    bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True)
    with StopRequest() as stop, bar:
        for step in range(first + 1, steps + 1):
            start = time.perf_counter()
            inputs, targets = (t.to(compute.device) for t in batches.batch(step - 1))
            rate = learning_rate(step, steps, config.optimizer)
            result = train_step(model, optimizer, inputs, targets, config, rate, compute.dtype)
            seconds = time.perf_counter() - start
            if not math.isfinite(result.loss):
                raise UserError(
                    f"{folder}: the loss of step {step} is {result.loss}; lower optimizer.learning_rate "
                    f"(now {config.optimizer.learning_rate}) or raise optimizer.warmup, and start anew"
                )
            record = step_record(step, result, rate, tokens, seconds)
            every = config.train.evaluate_every
            if step == steps or (every and step % every == 0):
                nats, count = evaluate(model, held_out, compute)
                record["validation_loss"] = nats / count
            metrics.log(record)
            bar.set_postfix_str(f"loss {result.loss:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update()
            last = step == steps or stop.requested
            if last or (config.train.checkpoint_every and step % config.train.checkpoint_every == 0):
                save_checkpoint(folder / "checkpoints", step, model, optimizer, config.train.keep)
            if last:
                break
        else:
            step = steps  # a finished run, started again
    metrics.close()
    if step == steps:
        print(report(config, shards, model))
    return Trained(folder, step, steps)


# %% [markdown]
# What a step leaves in `metrics.jsonl`. Loads are written as fractions; the *imbalance* of a layer is its
# busiest expert over the mean, and the worst layer's is logged.


# %%
#| export
def step_record(step: int, result: StepResult, rate: float, tokens: int, seconds: float) -> dict[str, Any]:
    """The metrics of one step, ready for JSON. Every value but the last two repeats exactly in a second run."""
    share = result.load / result.load.sum(dim=1, keepdim=True)
    return {
        "step": step,
        "tokens": step * tokens,
        "loss": result.loss,
        "balance_loss": result.balance,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "imbalance": (share.max(dim=1).values * share.shape[1]).max().item(),
        "entropy": result.entropy.tolist(),
        "load": [[round(value, 5) for value in layer] for layer in share.tolist()],
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


# %%
{k: v for k, v in step_record(8, results[-1], 0.003, 128, 0.02).items() if k != "load"}

# %% [markdown]
# ## The report
#
# A loss alone says little. So it stands beside what two simple models score on the very same tokens
# ([baselines](64_baselines.py)): one that knows how frequent each token is, and one that knows which
# token tends to follow which. Then a sample, and the figures.


# %%
#| export
def report(config: Config, shards: Shards, model: Qwen3Moe) -> str:
    """Write results.json, sample.txt and the figures of a finished run; return the table to print."""
    folder, records = config.path, read_metrics(config.path / "metrics.jsonl")
    last = records[-1]
    train_tokens, held_out = (split.take(np.arange(len(split))) for split in (shards.train, shards.held_out))
    scores = score_baselines(train_tokens, held_out, config.model.vocab_size)
    baselines = {"bigram": scores.bigram, "unigram": scores.unigram}
    table = {"this model": last["validation_loss"], **baselines}
    text_bytes = shards.manifest.held_out.bytes
    bits = {name: bits_per_byte(loss, len(held_out) - 1, text_bytes) for name, loss in table.items()}
    results = {
        "step": last["step"],
        "tokens": last["tokens"],
        "nats_per_token": table,
        "bits_per_byte": bits,
        "training_seconds": sum(record["seconds"] for record in records),
        "torch": torch.__version__,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    sample = generate(model, shards.tokenizer, "def ", 200, config.train.sequence_length)
    (folder / "sample.txt").write_text(sample + "\n")
    figures = save_figures(folder, records, baselines)
    lines = [f"{'held-out text':<22}{'nats per token':>16}{'bits per byte':>16}"]
    lines += [f"{name:<22}{loss:>16.3f}{bits[name]:>16.3f}" for name, loss in table.items()]
    lines += ["", "a sample:", *(f"    {line}" for line in sample.splitlines()), ""]
    lines += [f"figures: {', '.join(str(path) for path in figures)}"]
    return "\n".join(lines)


# %% [markdown]
# ## A whole run
#
# A very small one, seconds of steps on a small corpus, in a temporary folder: from text to report. And then
# the same call again, which finds the run finished and reports it once more without a step.

# %%
import tempfile

from pithtrain.config import DataConfig

scratch = tempfile.TemporaryDirectory()
config = Config(
    run=RunConfig(name="demo", folder=scratch.name + "/runs", device="cpu"),
    data=DataConfig(pattern="[abc]*.py", folder=scratch.name + "/data", held_out=0.1),
    model=ModelConfig(hidden=64, heads=4, head_dim=16, experts=8, expert_hidden=64, vocab_size=512, layers=2),
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup=5),
    train=TrainConfig(steps=120, sequence_length=64, batch_size=16, micro_batch_size=8),
)
trained = train(config)
assert train(config).step == 120

# %% [markdown]
# Next: all of this from the [command line](90_cli.py).
