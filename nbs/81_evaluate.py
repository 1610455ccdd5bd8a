# %% [markdown]
# # Evaluation
#
# > What a run's model is worth: its loss on held-out text, and how often it prefers the right answer.
#
# Two questions are asked of a language model without training it further. *How well does it predict text that it
# has not seen?* And, as that says little of what it can do: *of several ways to go on, does it find the right one
# the likeliest?*

# %%
#| default_exp evaluate

# %%
#| export
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from pithtrain.config import DataConfig, UserError
from pithtrain.models.decoder import Decoder
from pithtrain.train.baselines import bits_per_byte
from pithtrain.train.batches import IGNORE, HeldOutBatches
from pithtrain.train.run import Run, open_run
from pithtrain.train.shards import open_shards, prepare
from pithtrain.train.trainer import choose_compute

# %% [markdown]
# ## Where it is computed
#
# On a GPU where there is one, in the precision of training. There a model as it was imported in bf16 keeps its matrices
# so: half the memory, and the same numbers, for every product takes them in bf16.


# %%
#| export
def use_accelerator(run: Run) -> Run:
    """The same run with its model where it computes fastest, in the precision of its training."""
    device, dtype = choose_compute(replace(run.config.run, device="auto", threads=0))
    if dtype is torch.bfloat16 and run.step == 0 and run.published.get("dtype") == "BF16":
        for matrix in (weight for weight in run.model.parameters() if weight.dim() > 1):
            matrix.data = matrix.data.to(device, torch.bfloat16)
    run.model.to(device)
    run.model.place = replace(run.model.place, dtype=dtype)
    return run


# %% [markdown]
# ## Held-out text
#
# The mean cross-entropy per token, $\ell$, and the same figure in other dress: the *perplexity* $e^\ell$, the number of
# equally likely tokens that would be as hard to guess; and bits per byte of text, which can be compared between
# tokenizers. The tokens are those that [the trainer](72_trainer.py) validates on, once each. Where there are none yet,
# or other text is asked for, shards are made of it with the run's own tokenizer.


# %%
#| export
@torch.no_grad()
def validate(
    run: Run, folder: Path, data: DataConfig | None = None, report: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """How well a run predicts its held-out text, or that of `data`; `folder` is the run's.

    `loss` is in nats per token, `tokens` counts those predicted. Raises UserError for text that cannot be had."""
    train, shards = run.config.train, Path(run.config.data.folder)
    if data is None and (shards / "manifest.json").is_file():
        shards = open_shards(shards, tokenizer=folder / "tokenizer.json")
    else:
        shards = prepare(data or run.config.data, run.config.model.vocab_size, folder / "tokenizer.json", report)
    report(f"predicting {len(shards.held_out):,} held-out tokens of {shards.manifest.corpus}")
    device, total, count = next(run.model.parameters()).device, 0.0, 0
    positions = torch.arange(train.sequence_length, device=device)
    for inputs, targets in HeldOutBatches(shards.held_out, train.sequence_length, train.micro_batch_size):
        loss, _ = run.model(inputs.to(device), positions, targets=targets.to(device))
        total, count = total + loss.item(), count + int((targets != IGNORE).sum())
    loss, bits = total / count, float(bits_per_byte(total / count, count, shards.manifest.held_out.bytes))
    return {"loss": loss, "perplexity": math.exp(min(loss, 709)), "bits_per_byte": bits, "tokens": count}


# %% [markdown]
# ## The likelihood of a continuation
#
# By the chain rule, the log-likelihood of a text $y_1 \dots y_n$ behind a context $x$ is the sum
#
# $$\log p(y \mid x) = \sum_i \log p(y_i \mid x, y_{<i}),$$
#
# all terms of which one forward pass gives. Rows of different lengths make a batch by filling up at the end: no
# token sees what comes after it. Only the states before a continuation's tokens are turned into scores, some at a
# time.


# %%
#| export
class Likelihood(NamedTuple):
    """Of a continuation: the log of its probability, in nats, and whether each token was the likeliest."""

    log: float
    greedy: bool


# %%
#| export
@torch.no_grad()
def likelihoods(
    model: Decoder, requests: list[tuple[list[int], list[int]]], context: int, batch: int = 16
) -> list[Likelihood]:
    """For each pair of tokens before (one at least) and tokens to score, the likelihood of the latter.

    No more than `context` tokens are read at once: the oldest before a long continuation are cut off. Raises
    ValueError for a continuation that is empty or longer than that."""
    device = next(model.parameters()).device
    for before, after in requests:
        if not before or not 0 < len(after) <= context:
            raise ValueError(f"{len(before)} tokens before {len(after)}: need one at least, at most {context} after")
    rows = [(before + after)[-context - 1 :] for before, after in requests]
    found: list[Likelihood | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))  # similar lengths share a batch
    for some in (order[start : start + batch] for start in range(0, len(order), batch)):
        inputs = pad_sequence([torch.tensor(rows[n][:-1]) for n in some], batch_first=True).to(device)
        hidden, _ = model(inputs, torch.arange(inputs.shape[1], device=device))
        for n, states in zip(some, hidden, strict=True):
            after = torch.tensor(requests[n][1], device=device)
            end, log, greedy = len(rows[n]) - 1, 0.0, True
            for part, targets in zip(states[end - len(after) : end].split(512), after.split(512), strict=True):
                logs = model.logits(part).log_softmax(dim=-1)
                log += logs.gather(1, targets.unsqueeze(1)).double().sum().item()
                greedy &= bool((logs.argmax(dim=-1) == targets).all())
            found[n] = Likelihood(log, greedy)
    return found


# %% [markdown]
# The probabilities of all tokens that may come next add up to 1, and those of two tokens are a product, whatever else
# stands in the batch:

# %%
from pithtrain.config import Qwen3MoeConfig
from pithtrain.models.build import build
from pithtrain.models.decoder import initialise

model = build(Qwen3MoeConfig(hidden=16, layers=1, experts=4, expert_hidden=16, vocab_size=257, init_std=0.2))
initialise(model, seed=0)
pairs = [([3, 5, 8], [token]) for token in range(257)] + [([3, 5, 8], [7, 1]), ([3, 5, 8, 7], [1])]
found = likelihoods(model, pairs, context=8, batch=100)
print(f"sum over all next tokens {sum(math.exp(one.log) for one in found[:257]):.6f}")
print(f"log p(7, 1) = {found[257].log:.6f}, log p(7) + log p(1 after 7) = {found[7].log + found[258].log:.6f}")
assert abs(sum(math.exp(one.log) for one in found[:257]) - 1) < 1e-5
assert abs(found[257].log - found[7].log - found[258].log) < 1e-5
assert sum(one.greedy for one in found[:257]) == 1

# %% [markdown]
# ## Multiple choice
#
# A file of questions is JSON lines, each with a text, some ways to go on, and the number of the right one:
#
# ```json
# {"context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}
# ```
#
# The model chooses what it finds likeliest. Long answers are unlikely for their length alone, so a second figure
# divides by the length in bytes of UTF-8, which no tokenizer changes.


# %%
#| export
class Question(NamedTuple):
    """A text and several ways to go on."""

    context: str
    choices: list[str]
    answer: int


# %%
#| export
def read_questions(path: Path) -> list[Question]:
    """The questions of a file of JSON lines. Raises UserError that names the line which is not one."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold the other ends of lines in a text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a file of JSON lines") from None
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            table = json.loads(line)
            question = Question(table["context"], table["choices"], table["answer"])
            texts = [question.context, *question.choices] if isinstance(question.choices, list) else [None]
            fits = type(question.answer) is int and 0 <= question.answer < len(question.choices)
            if not (fits and all(isinstance(text, str) for text in texts) and all(question.choices)):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f'{path}: line {number}: expected {{"context": TEXT, "choices": [TEXT, ...], "answer": NUMBER}}'
            ) from None
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: holds no question")
    return questions


# %% [markdown]
# Where a context ends within what would be one token, that token counts to the continuation: both are encoded
# together, as the model has read text in training. Spaces at the end of a context go with what follows for the same
# reason.


# %%
#| export
def encode_pair(run: Run, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens before, with what opens a text, and tokens of the continuation, one at least on either side."""
    whole, before = run.encode(context + continuation), run.encode(context.rstrip())
    same = 0
    while same < min(len(before), len(whole) - 1) and before[same] == whole[same]:
        same += 1
    return run.opened(whole[:same]), whole[same:]


# %%
#| export
def count_cut(pairs: list[tuple[list[int], list[int]]], context: int) -> int:
    """How many of `pairs` are too long for `likelihoods` to read their first tokens."""
    return sum(len(before) + len(after) > context + 1 for before, after in pairs)


# %%
#| export
def choose(run: Run, questions: list[Question], batch: int = 16) -> dict[str, float]:
    """How often the right choice was the likeliest: in all, and per byte; `cut`: choices whose context lost its start.

    Raises UserError for a choice that is longer than the model's context."""
    pairs = [encode_pair(run, question.context, choice) for question in questions for choice in question.choices]
    if (longest := max(len(after) for _, after in pairs)) > run.context:
        raise UserError(f"a choice of {longest} tokens is longer than the model's context, {run.context}; shorten it")
    logs = iter([found.log for found in likelihoods(run.model, pairs, run.context, batch)])
    right = {"accuracy": 0, "accuracy_per_byte": 0}
    for question in questions:
        scores = [next(logs) for _ in question.choices]
        per_byte = [score / len(choice.encode()) for score, choice in zip(scores, question.choices, strict=True)]
        for kind, values in zip(right, (scores, per_byte), strict=True):
            right[kind] += values.index(max(values)) == question.answer
    shares = {kind: count / len(questions) for kind, count in right.items()}
    return {"questions": len(questions), **shares, "cut": count_cut(pairs, run.context)}


# %% [markdown]
# ## Both of them
#
# A run that was imported has no held-out text of its own. It gets some when its loss is asked for; where only questions
# are asked, nothing is prepared.


# %%
#| export
def evaluate(
    folder: Path,
    questions: Path | None = None,
    batch: int = 16,
    data: DataConfig | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, float]]:
    """The score of the run in `folder` on a file of questions, and its held-out loss, of `data` where that is given.

    With questions alone, the loss is told only where the run's shards are there. Raises UserError where the run or a
    file is broken."""
    asked = read_questions(questions) if questions else []
    run, result = use_accelerator(open_run(folder)), {}
    if not asked or data or (Path(run.config.data.folder) / "manifest.json").is_file():
        result["held-out text"] = validate(run, folder, data, report)
    if asked:
        result["choices"] = choose(run, asked, batch)
    return result


# %% [markdown]
# ## A model that has learned something
#
# A run of a few seconds on three sentences, then asked to end them. It is given its training text on purpose: it
# should be right. Its untrained copy guesses.

# %%
import tempfile

from pithtrain.config import Config, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from pithtrain.train.trainer import train

scratch = tempfile.TemporaryDirectory()
here = Path(scratch.name)
(here / "text").mkdir()
sentences = ["The cat sleeps on the warm roof.", "A fish swims in the cold river.", "The old bird sings at dawn."]
for number in range(40):
    (here / "text" / f"{number}.txt").write_text("\n".join(sentences[number % 3 :] + sentences[: number % 3]) + "\n")
config = Config(
    run=RunConfig(name="demo", folder=str(here / "runs"), device="cpu"),
    data=DataConfig(corpus=str(here / "text"), pattern="*.txt", folder=str(here / "data"), held_out=0.1),
    model=Qwen3MoeConfig(hidden=32, heads=4, head_dim=8, experts=4, expert_hidden=32, vocab_size=280, layers=2),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup=5),
    train=TrainConfig(steps=60, sequence_length=32, batch_size=8, micro_batch_size=8),
)
import contextlib
import io

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    train(config)
ends = [sentence.rsplit(" ", 1) for sentence in sentences]
lines = [
    {"context": start, "choices": [" " + end for _, end in ends], "answer": n} for n, (start, _) in enumerate(ends)
]
(here / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
questions = read_questions(here / "questions.jsonl")
run = open_run(config.path)
for what, values in evaluate(config.path, here / "questions.jsonl").items():
    print(what, values)
told = json.loads((config.path / "results.json").read_text())["nats_per_token"]["this model"]
assert abs(validate(run, config.path)["loss"] - told) < 1e-5

# %% [markdown]
# What it found of each question: the log-likelihood per byte of each end, the right one on the diagonal.

# %%
import matplotlib.pyplot as plt

untrained = Run(config, run.tokenizer, build(config.model), 0)
initialise(untrained.model, seed=0)
fig, axes = plt.subplots(1, 2, figsize=(8, 2.8))
for ax, (name, one) in zip(axes, (("untrained", untrained), ("trained", run)), strict=True):
    pairs = [encode_pair(one, q.context, choice) for q in questions for choice in q.choices]
    logs = torch.tensor([found.log for found in likelihoods(one.model, pairs, 32)]).view(3, 3)
    per_byte = logs / torch.tensor([len(choice.encode()) for choice in questions[0].choices])
    image = ax.imshow(per_byte, cmap="viridis")
    ax.set(title=f"{name}, nats per byte")
    ax.set_xticks(range(3), questions[0].choices)
    ax.set_yticks(range(3), [f"... {question.context.split()[-1]}" for question in questions])
    fig.colorbar(image, ax=ax)
fig.tight_layout()
fig

# %% [markdown]
# Next: the same model, asked by [a harness that many use](82_harness.py).
