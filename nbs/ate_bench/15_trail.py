# %% [markdown]
# # Trails: from an entry point to the code that does the work
#
# > Finds the shortest chain of references between two symbols, and what must be read to follow it.
#
# "Which kernel runs when I call train?" An agent answers by following names: from the entry point to what it
# refers to, and on. How long is that way, how many files does it open, how many tokens stand in them, and
# how often does the chain break, so that the next link is found only by searching?

# %%
#| default_exp trail

# %%
#| export
import ast
import heapq
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ate_bench.source import Source
from pithtrain.config import UserError

# %%
from ate_bench.source import load_tokenizer, parse, read_sources

# %% [markdown]
# ## The graph
#
# A node is a definition: a class, a function, a method, or a module's value, each by its dotted name. Its edges are
# the names that its body mentions, which the reader can resolve from the file in front of him:
#
# - a name defined in the module (functions, classes, assigned values) or imported into it, also `module.name`;
# - `self.name`, where the class or a base of it has such a method;
# - a class leads to its methods, its bases and what its fields mention.
#
# Whether the name is called or only mentioned does not matter: either way the reader goes and looks.
# What he cannot resolve are methods of values, `layer.attend(...)`: the type of `layer` is not written at the
# call. Those are *searches*: edges to every method of that name. A chain uses as few of them as it can.
#
# The trail is a lower bound: no reader who starts with the entry alone gets there with less, and what runs may go
# another way. A large framework has more side doors, so the bound is kinder to it than to a small one.

# %%
#| export
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
SEARCH = 1000  # more than any chain has links: fewer searches win over fewer links


# %%
#| export
@dataclass
class Graph:
    """Definitions and what they mention. All names are dotted and absolute."""

    paths: dict[str, Path] = field(default_factory=dict)  #: of each definition, where it stands
    modules: dict[str, Path] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)  #: definition -> its line
    aliases: dict[str, str] = field(default_factory=dict)  #: imported name -> what was imported
    bases: dict[str, list[str]] = field(default_factory=dict)  #: of each class, as it names them
    mentions: dict[str, set[str]] = field(default_factory=dict)  #: names that may be definitions or aliases
    unresolved: dict[str, set[str]] = field(default_factory=dict)  #: methods called on values
    methods: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  #: by their last name


# %% [markdown]
# ## One file
#
# Imports anywhere in a file count for all of it: those inside functions are how slow imports are put off.


# %%
#| export
def imports(source: Source) -> dict[str, str]:
    """What each imported name of a file stands for."""
    package = source.module if source.path.name == "__init__.py" else source.module.rpartition(".")[0]
    found = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            module = ".".join(filter(None, [base if node.level else "", node.module]))
            found |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
    return found


# %%
code = "import torch\nfrom .rotary import rotate as turn\nfrom ..config import Config\n"
print(imports(parse(code, Path("layers/attention.py"), "pith.layers.attention")))


# %%
#| export
def targets(node: ast.stmt) -> list[ast.Name]:
    """The plain names that a statement assigns to."""
    places = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [place for place in places if isinstance(place, ast.Name)]


# %%
assert [name.id for name in targets(ast.parse("a = b = 1").body[0])] == ["a", "b"]


# %% [markdown]
# An `isinstance` names what may come, not what runs next; a reader does not go there, and neither does the graph.


# %%
#| export
def reading(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes at and below `node`, but for type tests."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass")):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from reading(child)


# %%
body = ast.parse("if isinstance(layer, Dense): run(layer)")
assert {node.id for node in reading(body) if isinstance(node, ast.Name)} == {"run", "layer"}


# %%
#| export
def add_source(graph: Graph, source: Source) -> None:
    """Add the definitions of one file, and what each mentions, to `graph`."""
    own = {node.name for node in source.tree.body if isinstance(node, FUNCTIONS | ast.ClassDef)}
    values = {target.id: node for node in source.tree.body for target in targets(node)}
    own |= values.keys()
    names = imports(source) | {name: f"{source.module}.{name}" for name in own}
    graph.modules[source.module] = source.path
    graph.aliases |= {f"{source.module}.{name}": target for name, target in names.items() if name not in own}

    def define(node: ast.AST, name: str, scope: str | None, line: int) -> None:
        graph.paths[name], graph.lines[name] = source.path, line
        mentions, unresolved = graph.mentions.setdefault(name, set()), graph.unresolved.setdefault(name, set())
        for part in reading(node):
            if isinstance(part, ast.Name) and part.id in names:
                mentions.add(names[part.id])
            elif isinstance(part, ast.Attribute):
                head, _, rest = ast.unparse(part).partition(".")
                if head in names:
                    mentions.add(f"{names[head]}.{rest}")
                elif head in ("self", "cls") and scope and "." not in rest:
                    mentions.add(f"{scope}.{rest}")
                elif not part.attr.startswith("__"):
                    unresolved.add(part.attr)

    for name, node in values.items():
        define(node, f"{source.module}.{name}", None, node.lineno)
    for node in source.tree.body:
        name = f"{source.module}.{getattr(node, 'name', '')}"
        if isinstance(node, FUNCTIONS):
            define(node, name, None, node.lineno)
        elif isinstance(node, ast.ClassDef):
            define(ast.Tuple([*node.bases, *node.decorator_list]), name, None, node.lineno)
            heads = [ast.unparse(base).partition(".") for base in node.bases]
            graph.bases[name] = [names[head] + dot + rest for head, dot, rest in heads if head in names]
            for member in node.body:
                if isinstance(member, FUNCTIONS):
                    graph.mentions[name].add(f"{name}.{member.name}")
                    graph.methods[member.name].add(f"{name}.{member.name}")
                    define(member, f"{name}.{member.name}", name, member.lineno)
                else:  # fields, and what classes inside the class say
                    inside = [part.id for part in ast.walk(member) if isinstance(part, ast.Name)]
                    graph.mentions[name] |= {names[part] for part in inside if part in names}


# %%
#| export
def build_graph(sources: list[Source]) -> Graph:
    """The graph of all files that could be parsed."""
    graph = Graph()
    for source in sources:
        if source.tree is not None:
            add_source(graph, source)
    return graph


# %% [markdown]
# ## Following a name
#
# A mention may go through `from .experts import Experts` in a package's `__init__`, which the reader opens
# too. It may also name something inside a definition: `Experts.apply` leads to a base class, or outside.


# %%
#| export
def follow(graph: Graph, name: str, depth: int = 0) -> list[str]:
    """The chain of definitions and aliases from a mentioned name to a definition; empty if it leads outside."""
    seen: list[str] = []
    while name not in graph.paths:
        head, rest = name, ""
        while head and head not in graph.aliases and head not in graph.paths:
            head, _, last = head.rpartition(".")
            rest = f".{last}{rest}"
        if not head or head in seen or depth > 5:
            return []
        seen.append(head)
        if head in graph.paths:  # a member that its class does not define: inherited, or made at run time
            chains = (follow(graph, base + rest, depth + 1) for base in graph.bases.get(head, ()))
            return seen + next((chain for chain in chains if chain and chain[-1].endswith(rest)), [])
        name = graph.aliases[head] + rest
    return [*seen, name]


# %%
files = [
    parse("from .core import Engine\n", Path("lib/__init__.py"), "lib"),
    parse("class Base:\n    def run(self): work()\ndef work(): pass\n", Path("lib/base.py"), "lib.base"),
    parse("from .base import Base\nclass Engine(Base):\n    pass\n", Path("lib/core.py"), "lib.core"),
    parse("import lib\ndef main():\n    lib.Engine().run()\n", Path("lib/cli.py"), "lib.cli"),
]
graph = build_graph(files)
assert follow(graph, "lib.Engine") == ["lib.Engine", "lib.core.Engine"]
assert follow(graph, "lib.core.Engine.run") == ["lib.core.Engine", "lib.base.Base.run"]
assert follow(graph, "lib.core.Engine.walk") == ["lib.core.Engine"] and follow(graph, "torch.nn.Linear") == []


# %% [markdown]
# ## The shortest trail
#
# Dijkstra's algorithm over these edges: a link costs one, a search a thousand.


# %%
#| export
@dataclass(frozen=True)
class Trail:
    """A chain of definitions from entry to target; `searches` of its links had to be searched for."""

    names: list[str]
    places: list[tuple[Path, int]]  #: file and line of each; line 0 where an import hands a name on
    searches: int

    @property
    def files(self) -> list[Path]:
        """The files on the way, each once."""
        return list(dict.fromkeys(path for path, _ in self.places))

    @property
    def found(self) -> bool:
        """Whether there is a chain at all, even with searches."""
        return bool(self.names)


# %%
#| export
def find_trail(graph: Graph, entry: str, target: str) -> Trail:
    """The chain from `entry` to `target` with the fewest searches, then links. Raises UserError for unknown names."""
    for name in (entry, target):
        if name not in graph.paths and not follow(graph, name):
            raise UserError(f"{name}: no such definition; give the dotted name of a function, class or method")
    start, goal = (follow(graph, name)[-1] for name in (entry, target))
    queue, best, came = [(0, start)], {start: 0}, {}
    while queue:
        cost, name = heapq.heappop(queue)
        if name == goal:
            break
        if cost > best[name]:
            continue
        steps = [(len(chain), chain) for mention in graph.mentions[name] if (chain := follow(graph, mention))]
        steps += [(SEARCH, [m]) for method in graph.unresolved[name] for m in graph.methods.get(method, ())]
        for price, chain in sorted(steps):
            if cost + price < best.get(chain[-1], 1 << 60):
                best[chain[-1]] = cost + price
                came[chain[-1]] = (name, chain)
                heapq.heappush(queue, (cost + price, chain[-1]))
    if goal not in best:
        return Trail([], [], 0)
    names = [goal]
    while names[0] != start:
        before, chain = came[names[0]]
        names[:1] = [before, *chain]
    paths = [graph.paths.get(name) or graph.modules[name.rpartition(".")[0]] for name in names]
    lines = [graph.lines.get(name, 0) for name in names]
    return Trail(names, list(zip(paths, lines, strict=True)), best[goal] // SEARCH)


# %%
trail = find_trail(graph, "lib.cli.main", "lib.base.work")
print(" -> ".join(trail.names), trail.searches)
assert trail.searches == 0 and trail.names[-1] == "lib.base.work"

# %% [markdown]
# ## Questions
#
# A TOML file holds the questions, and for each framework where one starts and where the answer is:


# %%
#| export
@dataclass(frozen=True)
class Question:
    """An entry question for one framework: the dotted names between which a reader must find the way."""

    text: str
    entry: str
    target: str


# %%
#| export
def read_questions(path: Path, framework: str) -> list[Question]:
    """The questions of a TOML file that name a way in `framework`."""
    try:
        tables = tomllib.loads(path.read_text())["question"]
        own = [(table["text"], table[framework]) for table in tables if framework in table]
        return [Question(text, way["entry"], way["target"]) for text, way in own]
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise UserError(
            f"{path}: expected [[question]] with text, FRAMEWORK.entry, FRAMEWORK.target: {error}"
        ) from None


# %% [markdown]
# PithTrain's questions, and the way that a reader goes for each. The files of a trail are what is opened,
# their tokens what is paid.

# %%
import matplotlib.pyplot as plt

import ate_bench
import pithtrain

sources = read_sources(Path(pithtrain.__file__).parent)
graph, count = build_graph(sources), load_tokenizer()
texts = {source.path: source.text for source in sources}
questions = read_questions(Path(ate_bench.__file__).parent / "questions.toml", "pithtrain")
tokens = []
for question in questions:
    trail = find_trail(graph, question.entry, question.target)
    tokens.append([count(texts[path]) for path in trail.files])
    print(f"{question.text}\n    {' -> '.join(trail.names)}; {trail.searches} searches")
fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
for row, parts in enumerate(tokens):
    left = 0
    for part in parts:
        ax.barh(row, part, left=left, edgecolor="white", color="C0")
        left += part
ax.set_yticks(range(len(questions)), [question.text for question in questions], fontsize=7)
ax.set(title="Files to read for an answer, one box each", xlabel="tokens")
fig

# %% [markdown]
# Next: [all of it in one table](16_static.py).
