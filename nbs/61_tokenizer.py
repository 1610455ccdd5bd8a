# %% [markdown]
# # The tokenizer
#
# > Learns a byte-level BPE vocabulary from the training documents, and stores it as one `tokenizer.json`.

# %%
#| default_exp train.tokenizer

# %% [markdown]
# ## The idea
#
# A model wants few, informative symbols; a text is many, dull bytes. **Byte-pair encoding** (Sennrich et al.,
# arXiv 1508.07909) starts from bytes and repeats one step: find the pair of neighbouring symbols that occurs
# most often, and make it a new symbol. Starting from *bytes* (as GPT-2 did) means that any text at all can
# be encoded, and nothing is ever "unknown".
#
# If $c(a, b)$ counts how often symbol $a$ is followed by symbol $b$, one step of training is
#
# $$ (a^*, b^*) = \arg\max_{(a, b)} c(a, b), \qquad a^* b^* \to ab $$
#
# and a vocabulary of $V$ symbols is 256 bytes, one end-of-text, and $V - 257$ such merges.

# %% [markdown]
# ## The smallest true implementation
#
# Words (a word carries the space before it) are counted once, and merges never cross a word's border.

# %%
import re
from collections import Counter


def learn_merges(text: str, merges: int) -> list[tuple[bytes, bytes]]:
    words = Counter(re.findall(r" ?\w+| ?[^\s\w]+|\s+(?!\S)|\s+", text))
    split = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    learned = []
    for _ in range(merges):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(split[word], split[word][1:], strict=False):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        learned.append(best)
        for symbols in split.values():
            at = 0
            while at < len(symbols) - 1:
                if (symbols[at], symbols[at + 1]) == best:
                    symbols[at : at + 2] = [best[0] + best[1]]
                at += 1
    return learned


import inspect

for left, right in learn_merges(inspect.getsource(re), merges=12):
    print(f"{left!r:12} + {right!r:12} -> {left + right!r}")

# %% [markdown]
# ## The one to use
#
# The `tokenizers` library does the same in Rust on all cores. Training is deterministic: ties between pairs
# are broken by symbol number, whatever the number of threads.

# %%
#| export
import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pithtrain.config import UserError

# %%
#| export
END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # one token per byte, and end-of-text


# %%
#| export
def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens; end-of-text is token 0.

    Raises UserError when `vocab_size` is too small for single bytes, or larger than the texts can fill."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"model.vocab_size = {vocab_size}: too small: 256 bytes and end-of-text need {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (filled := tokenizer.get_vocab_size()) < vocab_size:
        raise UserError(f"model.vocab_size = {vocab_size}: the text only fills {filled}: lower it, or give more text")
    tokenizer.encode_special_tokens = True
    return tokenizer


# %% [markdown]
# One trap: a document may *contain* the characters `<|endoftext|>` (this notebook does). They must be encoded
# as the text they are, and never as the token that ends a document. That is `encode_special_tokens`; it is not saved,
# so it is set anew where a tokenizer is loaded.

# %%
import time

from pithtrain.train.corpus import find_corpus

corpus = find_corpus(None, "*.py", held_out=0.05)
texts = [document.text() for document in corpus.train[::6]]
start = time.perf_counter()
tokenizer = train_tokenizer(texts, vocab_size=2048)
print(f"{len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f}M characters: {time.perf_counter() - start:.1f} s")

snippet = 'def is_odd(n: int) -> bool:\n    """Whether n is odd."""\n    return n % 2 == 1  # <|endoftext|>\n'
ids = tokenizer.encode(snippet).ids
assert tokenizer.decode(ids, skip_special_tokens=False) == snippet
assert tokenizer.token_to_id(END_OF_TEXT) == 0 and 0 not in ids
print(len(snippet.encode()), "bytes,", len(ids), "tokens")

# %% [markdown]
# ## What it learned
#
# Every merge gets the next free number, so the table reads as the history of training. First come runs of
# spaces and letter pairs, then keywords, at the end whole identifiers. (`Ġ` stands for a space and `Ċ` for a
# line's end: byte-level BPE writes each byte as one printable character.)

# %%
pieces = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
for first in (257, 400, 800, 1600, 2032):
    print(f"{first:5d}", " ".join(f"{piece:<12.12s}" for piece in pieces[first : first + 7]))

# %% [markdown]
# Here is a snippet as the model sees it, one coloured box to a token. Indentation is one token, `def` and
# `return` are one token each; a word the training text seldom used falls apart into pieces.

# %%
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle


def draw_tokens(tokenizer, text: str):
    """Each token of an ASCII text as a coloured box, in the place where its characters stand."""
    lines = text.splitlines()
    columns = max(map(len, lines)) + 1
    fig, axis = plt.subplots(figsize=(0.1 * columns, 0.26 * len(lines) + 0.3))
    colours = plt.get_cmap("Pastel1").colors
    row = column = 0
    for number, (start, stop) in enumerate(tokenizer.encode(text).offsets):
        for character in text[start:stop]:
            axis.add_patch(Rectangle((column, row), 1, 0.9, color=colours[number % len(colours)], linewidth=0))
            if character == "\n":
                row, column = row + 1, 0
                continue
            axis.text(column + 0.5, row + 0.5, character, family="monospace", size=9, ha="center", va="center")
            column += 1
    axis.set(xlim=(0, columns), ylim=(len(lines), 0), title="One box, one token")
    axis.axis("off")
    return fig


example = '''def quantiles(data, *, n=4, method="exclusive"):
    """Divide *data* into *n* continuous intervals with equal probability.

    Kumquats are not statistical."""
    if n < 1:
        raise StatisticsError("n must be at least 1")
    return [data[i * len(data) // n] for i in range(1, n)]
'''
fig = draw_tokens(tokenizer, example)
fig
# %% [markdown]
# ## How large a vocabulary?
#
# More merges mean fewer tokens for the same text: each token carries more bytes. The gain flattens, while the
# embedding and the output layer grow in proportion. The figure shows bytes per token on *held-out* text for
# tokenizers of several sizes; each doubling of $V$ buys less than the one before.

# %%
held_out = [document.text() for document in corpus.held_out]
held_out_bytes = sum(len(text.encode()) for text in held_out)
sizes = [257, 512, 1024, 2048, 4096]
ratios = []
for size in sizes:
    encodings = train_tokenizer(texts, size).encode_batch(held_out)
    ratios.append(held_out_bytes / sum(len(encoding.ids) for encoding in encodings))
    print(f"V = {size:5d}: {ratios[-1]:.2f} bytes per token")

fig, axis = plt.subplots(figsize=(6, 3))
axis.plot(sizes, ratios, "o-")
axis.set_xscale("log", base=2)
axis.set(xlabel="vocabulary size V", ylabel="bytes per token", title="Each doubling of the vocabulary buys less")
axis.grid(alpha=0.3)
fig.tight_layout()
fig

# %% [markdown]
# ## On disk
#
# `tokenizer.json` is the library's own format, so that any other tool reads it. Its **hash** is the SHA-256 of
# the file. Token shards and runs carry it: token numbers mean nothing without the vocabulary they index.


# %%
#| export
def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `tokenizer.json`. OSError (a full disk) is left to the caller."""
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


# %%
#| export
def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The number of the token that ends a text: ours, or that of a published model (DeepSeek's has another name)."""
    ids = (tokenizer.token_to_id(name) for name in (END_OF_TEXT, "<｜end▁of▁sentence｜>"))
    return next((number for number in ids if number is not None), None)


# %%
#| export
def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`. Raises UserError when it is missing, broken, or has no end-of-text token."""
    if not path.is_file():
        raise UserError(f"{path}: no such file: expected a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(path.read_bytes().decode())
    except Exception as error:  # the library raises bare Exception for a file that it cannot parse
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable tokenizer ({reason}): restore it or prepare again") from None
    if end_of_text(tokenizer) is None:
        raise UserError(f"{path}: has no {END_OF_TEXT} token: give the tokenizer.json of a prepared corpus")
    tokenizer.encode_special_tokens = True
    return tokenizer


# %%
#| export
def tokenizer_hash(path: Path) -> str:
    """SHA-256 of a tokenizer.json, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "tokenizer.json"
    save_tokenizer(tokenizer, path)
    loaded = load_tokenizer(path)
    assert loaded.encode(example).ids == tokenizer.encode(example).ids
    print(f"{path.name}: {path.stat().st_size:,} bytes, {tokenizer_hash(path)[:16]}")

    again = Path(folder) / "again.json"
    save_tokenizer(train_tokenizer(texts, vocab_size=2048), again)
    assert tokenizer_hash(again) == tokenizer_hash(path)  # training twice gives the same bytes

    path.write_text(path.read_text()[:1000])
    try:
        load_tokenizer(path)
    except UserError as error:
        print(error)

# %% [markdown]
# ## Where to go next
#
# `62_shards` turns documents into memory-mapped token shards with this tokenizer.
