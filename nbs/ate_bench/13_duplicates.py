# %% [markdown]
# # Duplicates: what must be changed twice
#
# > Finds stretches of code that are equal once names and literals are set aside.
#
# Code that was copied and adapted is read twice and must be mended twice, and nothing tells a reader of one
# copy that there is another. Copies keep the shape and change the names, so the comparison sets names
# aside, but consistently: $x = f(x)$ equals $y = g(y)$ and not $y = g(x)$.

# %%
#| default_exp duplicates

# %%
#| export
import io
import keyword
import tokenize
from dataclasses import dataclass
from pathlib import Path

from ate_bench.source import Source

# %%
from ate_bench.source import parse, read_sources


# %% [markdown]
# ## The tokens that count
#
# Comments, docstrings and imports are left out: equal import lines are no sign of copied code. What remains
# is a list of `(token, line)`, and the places where a statement begins.


# %%
#| export
def code_tokens(text: str) -> tuple[list[tuple[str, int]], list[int]]:
    """The tokens of `text` that count as (kind, line), and the index at which each statement begins.

    Names are `n:NAME`; numbers and strings are `0` and `s`, whatever they say."""
    tokens: list[tuple[str, int]] = []
    starts: list[int] = []
    statement: list[tuple[str, int]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NEWLINE:
            first = statement[0][0] if statement else ""
            if statement and first not in ("import", "from") and [kind for kind, _ in statement] != ["s"]:
                starts.append(len(tokens))
                tokens += statement
            statement = []
        elif token.type == tokenize.NAME:
            kind = token.string if keyword.iskeyword(token.string) else f"n:{token.string}"
            statement.append((kind, token.start[0]))
        elif token.type in (tokenize.NUMBER, tokenize.STRING, tokenize.OP):
            kind = {tokenize.NUMBER: "0", tokenize.STRING: "s"}.get(token.type, token.string)
            statement.append((kind, token.start[0]))
    return tokens, starts


# %%
print(code_tokens('"""Doc."""\nimport os\nx = f(x, 3)  # a remark\n'))


# %% [markdown]
# ## The shape of a window
#
# Each name becomes the number of its first appearance in the window. A window must not be a list of like
# things, such as a long table of numbers, which is like any other table: at least `VARIETY` different
# shapes of token must occur in it.

# %%
#| export
WINDOW, VARIETY = 60, 14


# %%
#| export
def shape(window: list[tuple[str, int]]) -> tuple[str, ...]:
    """The window with each name replaced by the order in which it first appears."""
    order: dict[str, str] = {}
    return tuple(order.setdefault(kind, str(len(order))) if kind[:2] == "n:" else kind for kind, _ in window)


# %%
same, other = (code_tokens(text)[0] for text in ("x = f(x)\n", "y = g(y)\n"))
assert shape(same) == shape(other) != shape(code_tokens("y = g(x)\n")[0])


# %% [markdown]
# ## All windows of a framework
#
# A window begins with every statement. When its shape was seen before, elsewhere, the tokens of both count
# as duplicate; overlapping windows count their tokens once.


# %%
#| export
@dataclass(frozen=True)
class Duplicates:
    """`share` of the `tokens` stand in a window seen elsewhere; `pairs` of (path, line) begin such windows."""

    tokens: int
    share: float
    pairs: list[tuple[tuple[Path, int], tuple[Path, int]]]


# %%
#| export
def find_duplicates(sources: list[Source], size: int = WINDOW) -> Duplicates:
    """Duplicate code within and across `sources`, in windows of `size` tokens."""
    seen: dict[tuple[str, ...], tuple[int, int]] = {}
    files, marked, pairs = [], [], []
    for index, source in enumerate(source for source in sources if source.tree is not None):
        tokens, starts = code_tokens(source.text)
        files.append((source.path, tokens))
        marked.append(bytearray(len(tokens)))
        for start in starts:
            window = tokens[start : start + size]
            form = shape(window)
            if len(window) < size or len(set(form)) < VARIETY:
                continue
            file, first = seen.setdefault(form, (index, start))
            if file == index and start - first < size:
                continue  # itself, or a part of itself
            before = marked[index][start] and marked[file][first]
            marked[file][first : first + size] = marked[index][start : start + size] = b"\1" * size
            if not before:
                path, others = files[file]
                pairs.append(((path, others[first][1]), (source.path, tokens[start][1])))
    total = sum(len(marks) for marks in marked)
    return Duplicates(total, sum(map(sum, marked)) / max(total, 1), pairs)


# %%
loop = """
def total_{0}(items, limit):
    result = []
    for {1} in items:
        if {1}.weight > limit and not {1}.hidden:
            result.append({1}.weight * {1}.count + limit)
        elif {1}.count == 0:
            raise ValueError("no count for " + {1}.label)
    return sorted(result, key=lambda pair: -pair)[:limit]
"""
twice = find_duplicates([parse(loop.format("a", "item")), parse(loop.format("b", "entry"), Path("copy.py"))])
print(f"{twice.share:.0%} of {twice.tokens} tokens, {twice.pairs}")
assert twice.share > 0.7 and len(twice.pairs) == 1
assert find_duplicates([parse(loop.format("a", "item"))]).share == 0

# %% [markdown]
# ## How long a window?
#
# A short window finds idioms, a long one only whole copies. The measure is of use where it does not hang on
# the choice: beyond the idioms, the curve is low and flat.

# %%
import matplotlib.pyplot as plt

import pithtrain

files = read_sources(Path(pithtrain.__file__).parent)
sizes = [30, 40, 60, 90, 140]
shares = [find_duplicates(files, size).share for size in sizes]
fig, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
ax.plot(sizes, [100 * share for share in shares], marker="o")
ax.axvline(WINDOW, color="grey", lw=1)
ax.set(title="Duplicate code in PithTrain", xlabel="window, tokens", ylabel="share of tokens, %", ylim=(0, None))
fig

# %% [markdown]
# Next: [what an error says](14_errors.py).
