# %% [markdown]
# # Generate
#
# > Text from a model, one token at a time.
#
# A language model gives a probability to every possible next token. Generation draws one, appends it, and
# asks again. *Temperature* $\tau$ divides the scores before the softmax: below 1 the likely tokens become
# likelier, and at 0 the likeliest is always taken. Keeping only the `top_k` best scores cuts off the long
# tail of tokens that are each improbable and together are not.

# %%
#| default_exp train.generate

# %%
#| export
from collections.abc import Callable, Iterator
from itertools import islice, takewhile

import torch
from torch import Tensor

from pithtrain.config import UserError
from pithtrain.layers.attention import Cache
from pithtrain.models.decoder import Decoder
from pithtrain.train.run import Run


# %%
#| export
def pick(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token drawn from `logits` (V,); the likeliest below temperature 1e-6; `top_k` of 0 keeps all.

    Raises UserError for logits that are no numbers."""
    if not logits.isfinite().all():
        raise UserError("the model's scores are no finite numbers: its training diverged")
    if temperature < 1e-6:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=generator))


# %%
import matplotlib.pyplot as plt

scores = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5])
fig, axes = plt.subplots(1, 3, figsize=(9, 2.4), sharey=True)
for ax, (temperature, top_k) in zip(axes, ((1.0, 0), (0.5, 0), (1.0, 3)), strict=True):
    generator = torch.Generator().manual_seed(0)
    drawn = [pick(scores, temperature, top_k, generator) for _ in range(1000)]
    ax.bar(range(8), torch.tensor(drawn).bincount(minlength=8) / 1000)
    ax.set(title=f"temperature {temperature:g}, top_k {top_k or 'all'}", xlabel="token")
axes[0].set_ylabel("share of 1000 draws")
fig

# %% [markdown]
# ## Reading nothing twice
#
# The next token depends on all tokens before, and what a layer computed of those does not change when one more
# comes: no token sees the future. So each layer has a [cache](26_attention.py) of what later tokens need: keys and
# values, or [latents](28_latent_attention.py), or [the memory of the delta rule](29_delta_rule.py). The prompt is
# read at once; after it, a step reads a single token.
#
# A model was trained on positions below its `context`, and knows no others. When that many tokens stand behind the
# next one, **the newest half of them is read anew** from position 0, and decoding goes on from there. Reading half a
# context once in half a context of steps costs as much again as decoding; sliding by one token would mean reading
# the whole context for each.


# %%
#| export
@torch.no_grad()
def decode(model: Decoder, tokens: list[int], context: int, choose: Callable[[Tensor], int]) -> Iterator[int]:
    """The tokens that follow `tokens` (one at least), endlessly; `choose` takes one by its logits (V,), on the CPU.

    No more than `context` tokens are seen at once: the last ones of `tokens`, and where the context is full, the
    newest half of it."""
    device = next(model.parameters()).device
    seen, unread = [], tokens[-context:]
    caches = [Cache() for _ in model.layers]
    while True:
        if len(seen) + len(unread) > context:
            seen, unread = [], (seen + unread)[-max(1, context // 2) :]
            caches = [Cache() for _ in model.layers]
        positions = torch.arange(len(seen), len(seen) + len(unread), device=device)
        hidden, _ = model(torch.tensor([unread], device=device), positions, caches=caches)
        token = choose(model.logits(hidden[0, -1]).cpu())
        seen, unread = seen + unread, [token]
        yield token


# %% [markdown]
# Each family's cache gives the tokens that reading everything again gives. Here the likeliest token of an untrained
# model, again and again, with a context that fills up on the way (lines: where it was read anew):

# %%
from pithtrain.config import DeepseekConfig, GptOssConfig, Qwen3_5MoeConfig, Qwen3MoeConfig
from pithtrain.models.build import build
from pithtrain.models.decoder import initialise

context, shape = (
    24,
    {"hidden": 32, "experts": 4, "expert_hidden": 16, "vocab_size": 300, "init_std": 0.2, "tie_embeddings": False},
)


def greedy(logits):
    return int(logits.argmax())


def decode_reference(model, tokens, context):
    """The same tokens, and every one of them read again for each step."""
    tokens, first = list(tokens), 0
    while True:
        if len(tokens) - first > context:
            first = len(tokens) - max(1, context // 2)
        window = torch.tensor([tokens[first:]])
        with torch.no_grad():
            hidden, _ = model(window, torch.arange(window.shape[1]))
        tokens.append(greedy(model.logits(hidden[0, -1])))
        yield tokens[-1]


for family in (Qwen3MoeConfig, DeepseekConfig, GptOssConfig, Qwen3_5MoeConfig):
    model = build(family(**shape))
    initialise(model, seed=0)
    found = list(islice(decode(model, [5, 6, 7], context, greedy), 40))
    assert found == list(islice(decode_reference(model, [5, 6, 7], context), 40))
    parts = [found[:22], found[22:34], found[34:]]
    print(f"{family.family:12}", " | ".join(" ".join(f"{token:3}" for token in part[:6]) + " ..." for part in parts))

# %% [markdown]
# What it saves: seconds for each further token, by how many stand before it.

# %%
import time

model = build(Qwen3MoeConfig(layers=2, hidden=128, experts=8, expert_hidden=64, vocab_size=300))
initialise(model, seed=0)
fig, ax = plt.subplots(figsize=(6, 2.8))
for tokens_of, label in (
    (decode_reference(model, [5] * 8, 512), "everything read again"),
    (decode(model, [5] * 8, 512, greedy), "with caches"),
):
    seconds = []
    for _ in range(150):
        start = time.perf_counter()
        next(tokens_of)
        seconds.append(time.perf_counter() - start)
    smooth = [sorted(seconds[i : i + 25])[12] * 1e3 for i in range(0, 150, 25)]
    ax.plot(range(20, 170, 25), smooth, "o-", label=label)
ax.set(title="A step of decoding", xlabel="tokens before", ylabel="milliseconds, median of 25", ylim=(0, None))
ax.legend()
fig

# %% [markdown]
# ## Text
#
# In training a document follows an end-of-text token, so one stands before the prompt of a model that was trained here.
# A model from elsewhere has [its own habits](69_run.py): what opens a text, and which tokens end it.


# %%
#| export
def generate(run: Run, prompt: str, tokens: int, temperature: float = 0.8, top_k: int = 50, seed: int = 0) -> str:
    """`prompt` followed by up to `tokens` drawn tokens; ends early at a token that ends a text.

    Raises UserError for a prompt longer than the model's context. What is drawn may go beyond it: see `decode`."""
    ids, ends, generator = run.encode(prompt), run.ends, torch.Generator().manual_seed(seed)
    before = run.opened(ids)
    if len(before) > run.context:
        raise UserError(
            f"the prompt: has {len(before)} tokens, and the model knows {run.context} positions; shorten it"
        )
    choices = decode(run.model, before, run.context, lambda logits: pick(logits, temperature, top_k, generator))
    return run.tokenizer.decode(ids + list(takewhile(lambda token: token not in ends, islice(choices, tokens))))


# %% [markdown]
# An untrained model babbles, and the same seed babbles the same:

# %%
from pithtrain.config import Config
from pithtrain.train.tokenizer import train_tokenizer

tokenizer = train_tokenizer(["def run(): return 1\n", "class Run: pass\n"] * 100, vocab_size=270)
config = Config(
    model=Qwen3MoeConfig(hidden=32, heads=4, head_dim=8, experts=4, expert_hidden=16, vocab_size=270, layers=1)
)
model = build(config.model)
initialise(model, seed=0)
run = Run(config, tokenizer, model, step=0)
first = generate(run, "def ", tokens=12)
print(repr(first))
assert first == generate(run, "def ", tokens=12)

# %% [markdown]
# Next: the loop that makes it learn: the [training step](71_step.py).
