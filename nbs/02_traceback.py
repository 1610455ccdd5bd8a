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
# `notebook_line` reads a module up to the failing line, finds the last marker above it, and then looks the
# failing line's block up in the notebook. Where the notebooks are not installed it names the file alone.

# %%
#| export
def notebook_line(module: str, line: int) -> str | None:
    """The notebook (and line) that line `line` of an exported module comes from; None for other files."""
    path = Path(module)
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for index in range(min(line, len(lines)) - 1, -1, -1):
        if marker := re.match(r"# %% (\S+\.py) #\S+@[0-9a-f]{8}$", lines[index]):
            notebook = (path.parent / marker[1]).resolve()
            name = f"{notebook.parent.name}/{notebook.name}"
            if not notebook.exists():
                return name
            block = lines[index + 1 : line]
            # Imports are absolute in the notebook and relative in the module, so compare without them.
            source = notebook.read_text().splitlines()
            for start in range(len(source) - len(block) + 1):
                window = source[start : start + len(block)]
                if all(a == b or " import " in a for a, b in zip(block, window, strict=True)):
                    return f"{name}:{start + len(block)}"
            return name
    return None

# %% [markdown]
# The hook prints the usual traceback first and then the innermost frame that has a notebook. It calls the
# hook that was there before, so debuggers and notebooks keep theirs.

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
# Here is what that looks like for an exception out of the config notebook.

# %%
import traceback

from pithtrain.config import UserError, config_from_tables

try:
    config_from_tables({"model": {"top_k": 32}}, "example.toml")
except UserError as error:
    print(traceback.format_exc().splitlines()[-1])
    print("notebook:", notebook_of(error.__traceback__))
    assert "01_config.py:" in notebook_of(error.__traceback__)

# %% [markdown]
# The package installs the hook when it is imported (see [the first notebook](00_pithtrain.py)); under
# pytest, `tests/conftest.py` adds the same line to failure reports.
