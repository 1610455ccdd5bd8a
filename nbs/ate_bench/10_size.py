# %% [markdown]
# # Size: what there is to read
#
# > Counts the files and lines of a Python package: the first cost of understanding it.
#
# Agent-task efficiency asks what a framework costs the one who works on it. The first part of that cost
# needs no agent to measure: how much there is to read. Lines are counted as they stand in the file,
# because that is how they are read; blank and comment lines are told apart, because they cost little.

# %%
#| default_exp size

# %%
#| export
import ast
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path


# %%
#| export
@dataclass(frozen=True)
class Size:
    """What a package has to read: `lines` are all, `code` those with code on them."""

    files: int
    lines: int
    code: int


# %% [markdown]
# The tokenizer of the standard library tells which lines carry more than comments and white space, for a comment
# inside a string is not a comment. Of those, a statement that is nothing but a string is documentation, not code: a
# package must not seem larger for explaining itself.


# %%
#| export
def code_lines(source: str) -> int:
    """Lines of `source` that carry something other than comments, docstrings or white space."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


# %%
source = '''"""Doc.

Still doc."""
x = 1  # a remark

# only a remark
y = "# not a remark"
'''
assert code_lines(source) == 2


# %%
#| export
def measure(package: Path) -> Size:
    """The size of every `*.py` below `package`; a single file is measured too."""
    paths = [package] if package.is_file() else sorted(package.rglob("*.py"))
    sources = [path.read_text() for path in paths]
    return Size(len(paths), sum(len(s.splitlines()) for s in sources), sum(code_lines(s) for s in sources))


# %% [markdown]
# Where PithTrain's own lines are:

# %%
import matplotlib.pyplot as plt

import pithtrain

root = Path(pithtrain.__file__).parent
parts = {path.name: measure(path) for path in sorted(root.iterdir()) if path.is_dir() and any(path.glob("*.py"))}
parts["top level"] = Size(
    len(list(root.glob("*.py"))),
    sum(measure(path).lines for path in root.glob("*.py")),
    sum(measure(path).code for path in root.glob("*.py")),
)
whole = measure(root)
print(f"{whole.files} files, {whole.lines:,} lines, {whole.code:,} of them code")
assert sum(part.lines for part in parts.values()) == whole.lines
fig, ax = plt.subplots(figsize=(6, 2.6))
ax.barh(list(parts), [part.lines for part in parts.values()])
ax.set(title="Lines of the package", xlabel="lines")
fig
