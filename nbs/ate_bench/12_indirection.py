# %% [markdown]
# # Indirection: where reading stops and searching begins
#
# > Counts, on the syntax tree, the places where the code that runs cannot be found by reading on.
#
# At a plain call the reader follows a name to its definition. At an indirect one the name is computed, and
# the reader must search, run, or guess; an agent pays turns for it. Seven kinds are counted, each by a rule
# that fits in a sentence, so that a count can be argued with:
#
# | kind | one is counted for |
# |---|---|
# | registry | a definition under a decorator named `register…`, a call of a `register…` function at module level |
# | computed_name | `getattr`, `hasattr`, `setattr`, `globals()[…]` or `__dict__[…]` with a name that is no literal |
# | string_dispatch | a dict of two or more string keys whose values are all functions, classes or lambdas |
# | kwargs_forwarding | a call that passes on the `**` parameter of the function around it |
# | dynamic_import | `import_module(…)` or `__import__(…)` |
# | global_state | a module-level name that functions of the module rebind or change in place |
# | compiled | building or loading compiled code from Python (`load_inline`, `CUDAExtension`, `CDLL`, …) |
#
# A chain of `if kind == "x":` is no indirection by this measure: its branches name what they call.

# %%
#| default_exp indirection

# %%
#| export
import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ate_bench.source import Source

# %%
from ate_bench.source import parse, read_sources


# %%
#| export
class Finding(NamedTuple):
    """One counted place: `kind` from the table, and what stands there."""

    kind: str
    path: Path
    line: int
    what: str


# %% [markdown]
# ## Names
#
# Most rules ask for the last part of a dotted name: `importlib.import_module` and `import_module` are one.


# %%
#| export
def last_name(node: ast.expr) -> str:
    """`f` of `f`, `a.f` and `a.f(...)`; empty for anything else."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


# %%
assert [last_name(ast.parse(text, mode="eval").body) for text in ("f", "a.b.f", "a.f(1)", "a[0]")] == ["f"] * 3 + [""]

# %% [markdown]
# ## Calls and decorators
#
# These need one node and, for forwarding, the function around it.

# %%
#| export
COMPILERS = {"load_inline", "CppExtension", "CUDAExtension", "CUDA", "CDLL", "LoadLibrary", "load_library", "dlopen"}


# %%
#| export
def of_call(node: ast.Call, kwargs: str | None) -> Iterator[tuple[str, str]]:
    """(kind, what) of one call inside a function whose `**` parameter is named `kwargs`."""
    name = last_name(node.func)
    if name in ("getattr", "setattr", "hasattr") and len(node.args) > 1 and not isinstance(node.args[1], ast.Constant):
        yield "computed_name", name
    if name in ("import_module", "__import__"):
        yield "dynamic_import", name
    if name in COMPILERS or ast.unparse(node.func).endswith("cpp_extension.load"):
        yield "compiled", name
    if any(k.arg is None and isinstance(k.value, ast.Name) and k.value.id == kwargs for k in node.keywords):
        yield "kwargs_forwarding", name


# %%
call = ast.parse("build(getattr(module, name), **options)", mode="eval").body
print(list(of_call(call, "options")), list(of_call(call, "others")), list(of_call(call.args[0], None)))


# %% [markdown]
# ## Tables of functions
#
# A dict of functions under string keys is a jump whose target is chosen by data. A dict of numbers under
# string keys is data. Told apart by what its values are in this file: definitions, imports, or lambdas.
# Imported constants are written in capitals; those are data too.


# %%
#| export
def is_dispatch(node: ast.Dict, callables: set[str]) -> bool:
    """Whether a dict literal is a table of functions or classes under string keys."""
    strings = all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in node.keys)

    def runs(value: ast.expr) -> bool:
        first = value
        while isinstance(first, ast.Attribute):
            first = first.value
        named = isinstance(first, ast.Name) and first.id in callables and not last_name(value).isupper()
        return isinstance(value, ast.Lambda) or (named and isinstance(value, ast.Name | ast.Attribute))

    return len(node.keys) > 1 and strings and all(runs(value) for value in node.values)


# %%
table = ast.parse('{"relu": relu, "gelu": F.gelu, "none": lambda x: x}', mode="eval").body
assert is_dispatch(table, {"relu", "F"}) and not is_dispatch(table, {"F"})

# %% [markdown]
# ## State of a module
#
# A name bound at module level is state when a function rebinds it (`global`) or changes its value in place.
# Each such name counts once. A function that has its own variable of the name changes only that.

# %%
#| export
CHANGERS = {"append", "add", "update", "pop", "clear", "extend", "insert", "remove", "setdefault", "popitem", "discard"}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


# %%
#| export
def global_state(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, line) of each module-level name that the module's functions change."""
    bound = {}
    for node in tree.body:
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name):
                bound.setdefault(target.id, node.lineno)
    changed = set()
    for function in (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)):
        inside = list(ast.walk(function))
        shared = {name for node in inside if isinstance(node, ast.Global) for name in node.names}
        stored = {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own = (stored | {node.arg for node in inside if isinstance(node, ast.arg)}) - shared
        changed |= shared & stored
        for node in inside:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGERS:
                value = node.func.value
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                value = node.value
            else:
                continue
            if isinstance(value, ast.Name) and value.id not in own:
                changed.add(value.id)
    return ((name, line) for name, line in bound.items() if name in changed)


# %%
module = ast.parse(
    "CACHE = {}\nLIMITS = {}\nSTEP = 0\n"
    "def remember(k, v):\n    CACHE[k] = v\n"
    "def local():\n    LIMITS = {}\n    LIMITS['a'] = 1\n"
    "def count():\n    global STEP\n    STEP += 1\n"
)
assert dict(global_state(module)) == {"CACHE": 1, "STEP": 3}

# %% [markdown]
# ## A whole file


# %%
#| export
def find_indirection(source: Source) -> list[Finding]:
    """Every indirection of one source, in the order of its lines; none where it could not be parsed."""
    if source.tree is None:
        return []
    found: list[tuple[str, int, str]] = [("global_state", line, name) for name, line in global_state(source.tree)]
    defined = (FUNCTIONS, ast.ClassDef)
    callables = {node.name for node in ast.walk(source.tree) if isinstance(node, defined)}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            callables |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}

    def visit(node: ast.AST, kwargs: str | None, top: bool) -> None:
        if isinstance(node, FUNCTIONS):
            kwargs = node.args.kwarg.arg if node.args.kwarg else None
        if isinstance(node, defined):
            names = [last_name(decorator) for decorator in node.decorator_list]
            found.extend(("registry", node.lineno, name) for name in names if name.startswith("register"))
        elif top and isinstance(node, ast.Expr) and last_name(node.value).startswith("register"):
            found.append(("registry", node.lineno, last_name(node.value)))
        if isinstance(node, ast.Call):
            found.extend((kind, node.lineno, what) for kind, what in of_call(node, kwargs))
        if isinstance(node, ast.Dict) and is_dispatch(node, callables):
            found.append(("string_dispatch", node.lineno, ast.unparse(node.keys[0])))
        indexed = isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Constant)
        if indexed and last_name(node.value) in ("globals", "__dict__"):
            found.append(("computed_name", node.lineno, last_name(node.value)))
        for child in ast.iter_child_nodes(node):
            visit(child, kwargs, top and not isinstance(node, defined))

    visit(source.tree, None, True)
    return [Finding(kind, source.path, line, what) for kind, line, what in sorted(found, key=lambda f: f[1])]


# %%
example = parse("""
MODELS = {}

def register(name):
    def keep(cls):
        MODELS[name] = cls
        return cls
    return keep

@register("small")
class Small:
    def __init__(self, **kwargs):
        self.inner = make(**kwargs)

def build(kind, module, **kwargs):
    return getattr(module, kind)(**kwargs)
""")
for finding in find_indirection(example):
    print(f"line {finding.line:2}  {finding.kind:18} {finding.what}")
counts = Counter(finding.kind for finding in find_indirection(example))
assert counts == {"global_state": 1, "registry": 1, "kwargs_forwarding": 2, "computed_name": 1}

# %% [markdown]
# ## PithTrain's own
#
# What is left of each kind in this project, for a thousand lines.

# %%
import matplotlib.pyplot as plt

import pithtrain

files = read_sources(Path(pithtrain.__file__).parent)
found = [finding for source in files for finding in find_indirection(source)]
for finding in found:
    print(f"{finding.path.name}:{finding.line}  {finding.kind}  {finding.what}")
kinds = Counter(finding.kind for finding in found)
thousands = sum(len(source.text.splitlines()) for source in files) / 1000
fig, ax = plt.subplots(figsize=(6, 2.4), layout="constrained")
ax.barh(list(kinds), [number / thousands for number in kinds.values()])
ax.set(title="Indirection in PithTrain", xlabel="places per 1,000 lines")
fig

# %% [markdown]
# Next: [code that says the same thing twice](13_duplicates.py).
