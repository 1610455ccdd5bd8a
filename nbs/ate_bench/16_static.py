# %% [markdown]
# # The static table: what a framework costs before any agent moves
#
# > Puts size, indirection, duplicates, errors and trails of several frameworks side by side.
#
# None of these figures needs a model, a GPU or a run; they repeat exactly. They do not say how an agent will
# fare, they say what it will meet. Counts that grow with a framework's size stand for 1,000 lines, since a
# large framework may do more.

# %%
#| default_exp static

# %%
#| export
import json
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import distributions
from pathlib import Path

from ate_bench.duplicates import find_duplicates
from ate_bench.errors import Errors, count_errors
from ate_bench.indirection import find_indirection
from ate_bench.source import load_tokenizer, read_sources
from ate_bench.trail import build_graph, find_trail, read_questions

# %% [markdown]
# ## One framework
#
# Compiled code is counted by its files as well: what stands in `.cpp` and `.cu` cannot be stepped through.

# %%
#| export
KINDS = [
    "registry",
    "computed_name",
    "string_dispatch",
    "kwargs_forwarding",
    "dynamic_import",
    "global_state",
    "compiled",
]
COMPILED = (".c", ".cc", ".cpp", ".cu", ".cuh", ".pyx", ".so", ".pyd")


# %%
#| export
@dataclass(frozen=True)
class Way:
    """The answer's trail to one question; `links` 0 means that there is none."""

    question: str
    links: int
    searches: int
    files: int
    tokens: int
    trail: list[str]  #: `file:line name` of each definition on the way


# %%
#| export
@dataclass(frozen=True)
class StaticCost:
    """What one framework costs to read. Counts are absolute."""

    name: str
    version: str
    files: int
    unparsed: int
    lines: int
    tokens: int
    indirection: dict[str, int]
    duplicate_share: float
    errors: Errors
    ways: list[Way]


# %%
#| export
def version_of(root: Path) -> str:
    """The version of the distribution that installed the package folder `root`; empty where none did."""
    for found in distributions(path=[str(root.parent)]):
        if root.name in (found.read_text("top_level.txt") or found.name).split():
            return found.version
    return ""


# %%
import numpy

print("numpy", version_of(Path(numpy.__file__).parent))


# %%
#| export
def static_cost(root: Path, questions: Path) -> StaticCost:
    """Measure the package folder `root`; its questions are those that name its folder. Raises UserError."""
    sources, count = read_sources(root), load_tokenizer()
    tokens = {source.path: count(source.text) for source in sources}
    kinds = Counter(finding.kind for source in sources for finding in find_indirection(source))
    kinds["compiled"] += sum(path.suffix in COMPILED for path in root.rglob("*"))
    graph, ways = build_graph(sources), []
    for question in read_questions(questions, root.name):
        trail = find_trail(graph, question.entry, question.target)
        links, files = max(len(trail.names) - 1, 0), trail.files
        steps = zip(trail.names, trail.places, strict=True)
        places = [f"{path.relative_to(root.parent)}:{line} {name}" for name, (path, line) in steps if line]
        ways.append(Way(question.text, links, trail.searches, len(files), sum(tokens[p] for p in files), places))
    return StaticCost(
        name=root.name,
        version=version_of(root),
        files=len(sources),
        unparsed=sum(source.tree is None for source in sources),
        lines=sum(len(source.text.splitlines()) for source in sources),
        tokens=sum(tokens.values()),
        indirection={kind: kinds[kind] for kind in KINDS},
        duplicate_share=find_duplicates(sources).share,
        errors=count_errors(sources),
        ways=ways,
    )


# %%
import ate_bench
import pithtrain

package = Path(ate_bench.__file__).parent
costs = [static_cost(Path(pithtrain.__file__).parent, package / "questions.toml")]
print(f"{costs[0].tokens:,} tokens in {costs[0].lines:,} lines")
assert costs[0].unparsed == 0

# %% [markdown]
# ## The table


# %%
#| export
def static_table(costs: list[StaticCost]) -> str:
    """The costs as a Markdown table with a column for each framework."""

    def rate(kind: str) -> list[str]:
        return [f"{1000 * c.indirection[kind] / c.lines:.2f} ({c.indirection[kind]:,})" for c in costs]

    rows = [("", [f"{c.name} {c.version}".strip() for c in costs]), ("---", ["---:"] * len(costs))]
    rows.append(("Python files", [f"{c.files:,}" for c in costs]))
    rows.append(("lines", [f"{c.lines:,}" for c in costs]))
    rows.append(("tokens to read it all", [f"{c.tokens:,}" for c in costs]))
    rows += [(f"{kind} per 1,000 lines (all)", rate(kind)) for kind in KINDS]
    rows.append(("duplicate code", [f"{c.duplicate_share:.1%}" for c in costs]))
    rows.append(("raising places whose message holds a value", [f"{c.errors.telling:.0%}" for c in costs]))
    rows.append(("raising places without a message", [f"{c.errors.mute:,}" for c in costs]))
    rows.append(("handlers that swallow", [f"{c.errors.swallow:,}" for c in costs]))
    for question in dict.fromkeys(way.question for c in costs for way in c.ways):
        ways = [next((way for way in c.ways if way.question == question), None) for c in costs]
        cells = [
            "not asked" if w is None
            else "no trail" if not w.links
            else f"{w.files} files, {w.tokens:,} tokens, {w.links} links, {w.searches} searches"
            for w in ways
        ]  # fmt: skip
        rows.append((question, cells))
    return "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)


# %%
costs.append(static_cost(package, package / "questions.toml"))
print(static_table(costs))


# %% [markdown]
# The same for programs, complete:


# %%
#| export
def static_json(costs: list[StaticCost]) -> str:
    """The costs as JSON, with today's date."""
    return json.dumps({"date": str(date.today()), "frameworks": [asdict(cost) for cost in costs]}, indent=2)


# %%
assert json.loads(static_json(costs))["frameworks"][0]["name"] == "pithtrain"

# %% [markdown]
# ## Three frameworks
#
# PithTrain beside TorchTitan 0.3 and Megatron-Core 0.16.1, both as PyPI has them. The figures are read from the file
# that this command wrote, so that they are those of one day and one state:
#
# ```bash
# pip install --no-deps --no-compile --target /tmp/ate/torchtitan torchtitan==0.3.0
# pip install --no-deps --no-compile --target /tmp/ate/megatron-core megatron-core==0.16.1
# ate-bench static pithtrain /tmp/ate/torchtitan/torchtitan /tmp/ate/megatron-core/megatron \
#     --json docs/benchmarks/ate-static.json
# ```
#
# Megatron-Core is a library without a training script: what other frameworks have in one, its users write.

# %%
kept = json.loads((package.parent / "docs" / "benchmarks" / "ate-static.json").read_text())
frameworks = []
for table in kept["frameworks"]:
    ways = [Way(**way) for way in table["ways"]]
    frameworks.append(StaticCost(**{**table, "errors": Errors(**table["errors"]), "ways": ways}))
print(f"measured {kept['date']}\n\n{static_table(frameworks)}")

# %% [markdown]
# And the lines that each entry question goes through: what a reader, or an agent, opens on the shortest way from the
# entry point to the answer. A name that only an `__init__` hands on has no line here.

# %%
for question in dict.fromkeys(way.question for cost in frameworks for way in cost.ways):
    print(question)
    for cost in frameworks:
        for way in cost.ways:
            if way.question == question:
                print(f"  {cost.name}", *way.trail, sep="\n      ")

# %% [markdown]
# Where the frameworks differ from a line of their own kind: each bar is a kind of indirection, for a thousand lines.

# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for shift, cost in zip((-0.27, 0, 0.27), frameworks, strict=True):
    rates = [1000 * cost.indirection[kind] / cost.lines for kind in KINDS]
    ax.barh([i + shift for i in range(len(KINDS))], rates, height=0.27, label=cost.name)
ax.set_yticks(range(len(KINDS)), KINDS)
ax.set(title="Indirection", xlabel="places per 1,000 lines")
ax.legend()
fig

# %% [markdown]
# Next: [what an agent's session costs](20_session.py).
