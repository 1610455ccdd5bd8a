# %% [markdown]
# # In the evaluation harness
#
# > An adapter, so that lm-evaluation-harness can ask its tasks of a run.
#
# [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness) holds hundreds of tasks, and published
# scores come from it. It asks a model three things: how likely a continuation is, how likely a whole text is, and what
# the model would write. `pip install "pithtrain[eval]"`, and then
#
# ```python
# from pathlib import Path
#
# import lm_eval
#
# from pithtrain.harness import HarnessModel
# from pithtrain.train.run import open_run
#
# lm_eval.simple_evaluate(HarnessModel(open_run(Path("runs/mine"))), tasks=["hellaswag"])
# ```

# %%
#| default_exp harness

# %%
#| export
import warnings
from functools import partial
from itertools import islice
from typing import Any

import torch

from pithtrain.evaluate import count_cut, encode_pair, likelihoods, use_accelerator
from pithtrain.train.generate import decode, pick
from pithtrain.train.run import Run

# %%
#| export
try:
    from lm_eval.api.model import LM
except ImportError:  # the extra `eval`: without it the class below works, but no harness is there to use it
    LM = object

# %% [markdown]
# A whole text may be longer than the model's context. It is then cut into pieces of that length, and each is scored
# behind as many tokens as there is room for, so that every token counts once.


# %%
#| export
class HarnessModel(LM):
    """A run as the harness sees it; `batch` rows are computed at once."""

    def __init__(self, run: Run, batch: int = 16):
        super().__init__()
        self.run, self.batch = use_accelerator(run), batch

    def likelihoods(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of tokens behind tokens. Warns where the model's context is too short for what stands before."""
        if cut := count_cut(pairs, self.run.context):
            warnings.warn(f"{cut} texts lose their start: longer than the context, {self.run.context}", stacklevel=3)
        return [tuple(found) for found in likelihoods(self.run.model, pairs, self.run.context, self.batch)]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each request's (context, continuation): the log-likelihood in nats, and whether it is greedy."""
        return self.likelihoods([encode_pair(self.run, *request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """For each request's (text,): its log-likelihood in nats."""
        pairs, owners, context = [], [], self.run.context
        for number, request in enumerate(requests):
            before, tokens = self.run.opened([]), self.run.encode(request.args[0])
            for start in range(0, len(tokens), context):
                after = tokens[start : start + context]
                pairs.append(((before + tokens[:start])[len(after) - context - 1 :], after))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (log, _) in zip(owners, self.likelihoods(pairs), strict=True):
            totals[owner] += log
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """For each request's (context, settings): what the model writes, up to the first text of `until`."""
        return [self.write(*request.args) for request in requests]

    def write(self, context: str, settings: dict[str, Any]) -> str:
        """What follows `context`; settings: until, max_gen_toks, do_sample, temperature, top_k."""
        run, until, drawn, text = self.run, settings.get("until") or [], [], ""
        until = [until] if isinstance(until, str) else until
        temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
        generator, before = torch.Generator().manual_seed(0), run.opened(run.encode(context))
        if len(before) > run.context:
            warnings.warn(f"a prompt loses its start: longer than the context, {run.context}", stacklevel=3)
        draw = partial(pick, temperature=temperature, top_k=settings.get("top_k", 0), generator=generator)
        for token in islice(decode(run.model, before, run.context, draw), settings.get("max_gen_toks", 256)):
            if token in run.ends:
                break
            drawn.append(token)
            text = run.tokenizer.decode(drawn)
            if found := [text.index(stop) for stop in until if stop in text]:
                return text[: min(found)]
        return text


# %% [markdown]
# ## Three questions
#
# The three questions, asked as the harness asks them, of an untrained model. (tests/test_evaluate.py lets the harness
# itself ask them, with tasks from a file: no data is fetched.)

# %%
from types import SimpleNamespace

from pithtrain.config import Config, Qwen3MoeConfig, RunConfig, TrainConfig
from pithtrain.models.build import build
from pithtrain.models.decoder import initialise
from pithtrain.train.tokenizer import train_tokenizer

tokenizer = train_tokenizer(["the cat sat on the mat\n", "the dog ran to the park\n"] * 100, vocab_size=275)
config = Config(
    run=RunConfig(device="cpu"),
    model=Qwen3MoeConfig(hidden=32, heads=4, head_dim=8, experts=4, expert_hidden=16, vocab_size=275, layers=1),
    train=TrainConfig(sequence_length=16),
)
model = build(config.model)
initialise(model, seed=0)
harness = HarnessModel(Run(config, tokenizer, model, 0))


def ask(*arguments):
    return [SimpleNamespace(args=arguments)]


print("continuation", harness.loglikelihood(ask("the cat", " sat on")))
print("whole text  ", harness.loglikelihood_rolling(ask("the cat sat on the mat " * 10)))
print("writes      ", harness.generate_until(ask("the cat", {"until": ["\n"], "max_gen_toks": 8})))
whole, first, second = (
    harness.loglikelihood(ask(*pair))[0][0]
    for pair in (("", "the cat sat on"), ("", "the cat"), ("the cat", " sat on"))
)
assert abs(whole - first - second) < 1e-5

# %% [markdown]
# ## How it scores a long text
#
# The model's context is 16 tokens. It is taught two sentences for a moment, so that it is surprised by something. Then
# the surprise of each token of a longer text, in nats: as the pieces are scored, the first token of each has one to go
# by; were each token scored behind the newest 16 instead, there would be no such peaks, and sixteen times the work.

# %%
import matplotlib.pyplot as plt

lines = tokenizer.encode("the cat sat on the mat the dog ran to the park " * 40, add_special_tokens=False).ids
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(60):
    rows = torch.tensor([harness.run.opened([]) + lines[start : start + 16] for start in range(step, step + 64, 4)])
    (model(rows[:, :-1], torch.arange(16), targets=rows[:, 1:])[0] / 256).backward()
    optimizer.step()
    optimizer.zero_grad()

ids = lines[:64]
text, before = tokenizer.decode(ids), harness.run.opened([])
by_token = [-found.log for found in likelihoods(model, [(before + ids[:n], [ids[n]]) for n in range(64)], 16)]
starts = [n // 16 * 16 for n in range(64)]
in_pieces = [((before + ids[:start])[-1:] + ids[start:n], [ids[n]]) for n, start in enumerate(starts)]
by_piece = [-found.log for found in likelihoods(model, in_pieces, 16)]
assert abs(sum(by_piece) + harness.loglikelihood_rolling(ask(text))[0]) < 1e-3
fig, ax = plt.subplots(figsize=(7, 2.6))
ax.plot(by_piece, ".-", label="in pieces")
ax.plot(by_token, ".-", label="behind the newest 16 tokens")
for start in range(0, 64, 16):
    ax.axvline(start - 0.5, color="0.7", ls=":")
ax.set(title="A text longer than the context (dotted: pieces)", xlabel="token", ylabel="surprise, nats", ylim=(0, None))
ax.legend()
fig

# %% [markdown]
# Next: the [speed of a Mixture-of-Experts block](85_bench.py).
