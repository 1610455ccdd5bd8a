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
import torch
from tokenizers import Tokenizer
from torch import Tensor

from pithtrain.models.decoder import Decoder
from pithtrain.train.tokenizer import END_OF_TEXT


# %%
#| export
def pick(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token drawn from `logits` (V,); the likeliest at temperature 0; `top_k` of 0 keeps all."""
    if temperature == 0:
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
    ax.hist(drawn, bins=range(9), density=True, rwidth=0.8)
    ax.set(title=f"temperature {temperature:g}, top_k {top_k or 'all'}", xlabel="token")
axes[0].set_ylabel("share of 1000 draws")
fig

# %% [markdown]
# The model sees at most `context` tokens, the length it was trained on; older ones slide out.


# %%
#| export
@torch.no_grad()
def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    context: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """`prompt` followed by up to `tokens` drawn tokens; ends early at an end-of-text token."""
    device = next(model.parameters()).device
    end = tokenizer.token_to_id(END_OF_TEXT)
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    begin = [end, *ids]  # documents follow an end-of-text in training, so an empty prompt has a start too
    drawn: list[int] = []
    while len(drawn) < tokens:
        window = torch.tensor([(begin + drawn)[-context:]], device=device)
        hidden, _ = model(window, torch.arange(window.shape[1], device=device))
        token = pick(model.logits(hidden[0, -1]).cpu(), temperature, top_k, generator)
        if token == end:
            break
        drawn.append(token)
    return tokenizer.decode(ids + drawn)


# %% [markdown]
# An untrained model babbles, and the same seed babbles the same:

# %%
from pithtrain.config import Qwen3MoeConfig
from pithtrain.models.build import build
from pithtrain.models.decoder import initialise
from pithtrain.train.tokenizer import train_tokenizer

tokenizer = train_tokenizer(["def run(): return 1\n", "class Run: pass\n"] * 100, vocab_size=270)
model = build(
    Qwen3MoeConfig(
        hidden=32, heads=4, head_dim=8, experts=4, expert_hidden=16, vocab_size=tokenizer.get_vocab_size(), layers=1
    )
)
initialise(model, seed=0)
first = generate(model, tokenizer, "def ", tokens=12, context=64)
print(repr(first))
assert first == generate(model, tokenizer, "def ", tokens=12, context=64)

# %% [markdown]
# Next: the loop that makes it learn: the [trainer](71_trainer.py).
