# %% [markdown]
# # Traceback: from an error to its notebook
#
# > When an exception leaves an exported function, its traceback ends with the notebook line to edit.
#
# Modules under `pithtrain/` are made from notebooks, so the file a Python traceback names is never the
# file to change. Each block of a module begins with a marker that names its notebook:
#
# ```
# # %% ../../nbs/20_router.py #route@1f0c93ab
# ```
#
# Following it by hand is easy. Having it followed for you is easier: `pithtrain` adds one line below an
# uncaught traceback, with the notebook and the line in it.

# %%
#| default_exp traceback

# %%
#| export
import re
import sys
from pathlib import Path
from types import TracebackType

# %% [markdown]
# A module and its notebook differ in one place only: imports are absolute in the notebook and relative in
# the module. So the two are compared without the name of the module that is imported from.


# %%
#| export
def lines_of(path: Path) -> list[str]:
    """The lines of a source file, with the module's name cut from each `from ... import`."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [re.sub(r"^(\s*from )[\w.]+( import )", r"\1\2", line) for line in text.split("\n")]


# %%
import pithtrain.config

config_module = Path(pithtrain.config.__file__)
print([line for line in lines_of(config_module) if " import " in line])

# %% [markdown]
# `notebook_line` reads a module up to the failing line, finds the last marker above it, and looks that block
# up in the notebook. An exported cell begins with a `#|` line, so a block is looked for only below such a
# line: a notebook often shows the same first lines in a smaller version. Where the notebooks are not
# installed, or the module is not what they export now, it names the notebook without a line.


# %%
#| export
def notebook_line(module: str, line: int) -> str | None:
    """The notebook (and line) that line `line` of an exported module comes from; None for other files."""
    try:
        lines = lines_of(Path(module))
    except OSError:
        return None
    for index in range(min(line, len(lines)) - 1, -1, -1):
        if marker := re.fullmatch(r"# %% ([./]*)(\S+\.py) #\S+@[0-9a-f]{8}", lines[index]):
            notebook = Path(module).parent / marker[1] / marker[2]
            block = lines[index + 1 : line]
            source = lines_of(notebook) if notebook.exists() else []
            for start in range(1, len(source) - len(block) + 1):
                if source[start - 1].startswith("#|") and source[start : start + len(block)] == block:
                    return f"{marker[2]}:{start + len(block)}"
            return marker[2]
    return None


# %%
for line in (20, 120, 220):
    print(f"pithtrain/config.py:{line} is {notebook_line(str(config_module), line)}")

# %% [markdown]
# `notebook_of` asks this of every frame of a traceback and keeps the innermost answer: an error raised inside
# PyTorch is traced to the line of ours that called it.


# %%
#| export
def notebook_of(trace: TracebackType | None) -> str | None:
    """The notebook line of the innermost frame of `trace` that lies in an exported module."""
    found = None
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if "pithtrain" in filename or "ate_bench" in filename:
            found = notebook_line(filename, trace.tb_lineno) or found
        trace = trace.tb_next
    return found


# %% [markdown]
# Here is what that gives for an exception out of the config notebook.

# %%
import traceback

from pithtrain.config import UserError, config_from_tables

try:
    config_from_tables({"model": {"top_k": 32}}, "example.toml")
except UserError as error:
    print(traceback.format_exc().splitlines()[-1])
    print("notebook:", notebook_of(error.__traceback__))
    assert notebook_of(error.__traceback__).startswith("nbs/01_config.py:")

# %% [markdown]
# The hook prints the usual traceback first and then that line. It calls the hook that was there before, so
# that debuggers keep theirs.


# %%
#| export
def name_notebooks_in_tracebacks() -> None:
    """Make uncaught exceptions of this process name the notebook they come from."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        if found := notebook_of(trace):
            print(f"notebook: {found}", file=sys.stderr)

    sys.excepthook = hook


# %% [markdown]
# A process that imports `pithtrain` has the hook. This one dies, and says where to look.

# %%
import subprocess

program = 'from pithtrain.config import config_from_tables; config_from_tables({"model": {"top_k": 32}}, "a.toml")'
dead = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
print(*dead.stderr.splitlines()[-2:], sep="\n")
assert "notebook: nbs/01_config.py:" in dead.stderr

# %% [markdown]
# The package installs the hook when it is imported (see [the first notebook](00_pithtrain.py)); under
# pytest, `tests/conftest.py` adds the same line to failure reports.
