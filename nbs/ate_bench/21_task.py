# %% [markdown]
# # Tasks, frameworks and agents: three kinds of file
#
# > Reads what is to be done, in what, and by whom, from folders and TOML files that anyone can add to.
#
# Nothing here is registered anywhere. A task is a folder, a framework and an agent are a TOML file each; a
# name is looked up among those that come with the package, a path is taken as it stands.
#
# ```
# ate_bench/
#   tasks/SUITE/TASK/instruction.md      what the agent is told
#                    cpu.md, gpu.md      what it is told besides, for that variant
#                    rules.toml          what makes an answer right
#                    prepare/FRAMEWORK.sh  run in the workspace first (where there is one)
#                    ...                 checkers that rules.toml names; the agent never sees this folder
#         SUITE/suite.md, cpu.md, gpu.md   what it is told besides, in every task of the suite
#         SUITE/prepare/FRAMEWORK.sh     run first in tasks that have none of their own
#         common/                        checkers that several tasks share
#   frameworks/FRAMEWORK.toml
#   agents/AGENT.toml
# ```

# %%
#| default_exp task

# %%
#| export
import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ate_bench
from ate_bench.session import FORMATS
from pithtrain.config import UserError

# %% [markdown]
# ## Tables
#
# A misspelt key would otherwise be a rule that is never applied.

# %%
#| export
PACKAGE = Path(ate_bench.__file__).parent


# %%
#| export
def check_keys(table: dict[str, Any], cls: type, where: str) -> dict[str, Any]:
    """`table`, if it can make a `cls`: no unknown key, none missing. Raises UserError."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(fields)}")
    for name, f in fields.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and name not in table:
            raise UserError(f"{where}: {name} is missing")
    return table


# %%
#| export
def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file. Raises UserError for one that is not there or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


# %%
#| export
def find_file(kind: str, name: str) -> Path:
    """The file of a framework or agent: a path that ends in .toml, or a name among those of the package."""
    if name.endswith(".toml"):
        return Path(name).absolute()
    known = sorted(path.stem for path in (PACKAGE / kind).glob("*.toml"))
    if name not in known:
        raise UserError(f"{name}: not among the {kind} {', '.join(known)}, and no path of a .toml file")
    return PACKAGE / kind / f"{name}.toml"


# %% [markdown]
# ## Rules
#
# One rule, one judgement. Programs decide what a program can decide:
#
# | kind | passes when |
# |---|---|
# | `stance` | the answer's first line is `Verdict: present` or `Verdict: absent`, as `per` says for the framework |
# | `states` | the answer has a line `LABEL: value` with the value that `per` says, or one of them: `a|b` |
# | `citations` | at least `least` citations, and each exists and names what stands there |
# | `cites` | a citation lands in each of the definitions that `per` lists for the framework; `A|B` is either |
# | `command` | `command` leaves with 0 and a last line that begins with PASS |
# | `judge` | a judging agent says so, told the `question` and what is true of the framework |
#
# A program's rule whose `per` does not name the framework does not apply to it, a judge's does: he looks the truth up.
# Where no rule of a task names the framework, there is no key to its answers, and they stay UNJUDGED.

# %%
#| export
RULE_KINDS = ("stance", "states", "citations", "cites", "command", "judge")


# %%
#| export
@dataclass(frozen=True)
class Rule:
    """One thing that must hold of an attempt."""

    id: str
    kind: str
    least: int = 1  #: citations that are needed
    label: str = ""  #: of the answer's line
    question: str = ""  #: to the judging agent
    command: list[str] = field(default_factory=list)  #: with {python} {task} {common} {repo} {out}
    given_tests: bool = False  #: whether the framework's tests are put back as they were given, before `command`
    per: dict[str, Any] = field(default_factory=dict)  #: by framework: value, definitions, truth, or more arguments


# %%
#| export
@dataclass(frozen=True)
class Task:
    """A folder of tasks/SUITE/TASK, read."""

    folder: Path
    title: str
    rules: list[Rule]
    read_only: bool = False  #: no edits of the framework
    minutes: float = 60  #: until the agent is stopped

    @property
    def suite(self) -> str:
        """The folder above."""
        return self.folder.parent.name

    def instruction(self, variant: str) -> str:
        """What the agent is told, for the variant `cpu` or `gpu`; {repo} and {out} are still to be filled in."""
        names = ("instruction.md", f"{variant}.md", "../suite.md", f"../{variant}.md")
        parts = [self.folder / name for name in names]
        return "\n".join(part.read_text(encoding="utf-8") for part in parts if part.exists())


# %%
#| export
def load_task(name: str) -> Task:
    """The task `SUITE/TASK` of the package, or of a folder by its path. Raises UserError."""
    folder = Path(name).absolute() if Path(name, "rules.toml").exists() else PACKAGE / "tasks" / name
    if not (folder / "rules.toml").exists():
        known = sorted(f"{p.parent.parent.name}/{p.parent.name}" for p in (PACKAGE / "tasks").glob("*/*/rules.toml"))
        raise UserError(f"{name}: no such task; there are {', '.join(known)}")
    where = str(folder / "rules.toml")
    values = read_toml(folder / "rules.toml")
    rules = []
    for table in values.pop("rule", []):
        rule = Rule(**check_keys(table, Rule, f"{where}: rule {table.get('id', len(rules) + 1)}"))
        if rule.kind not in RULE_KINDS:
            raise UserError(f"{where}: rule {rule.id}: kind {rule.kind!r} is not one of {', '.join(RULE_KINDS)}")
        rules.append(rule)
    return Task(**check_keys({"folder": folder, "rules": rules, **values}, Task, where))


# %%
task = load_task("qa/rotary_positions")
print(f"{task.suite}: {task.title}", *(f"  {rule.kind:9} {rule.id}" for rule in task.rules), sep="\n")

# %% [markdown]
# The tasks that come with the package: twelve questions, four things to do with a framework, four to add to it. What
# programs decide stands beside what is left to a judge.

# %%
for path in sorted((PACKAGE / "tasks").glob("*/*/rules.toml")):
    task = load_task(str(path.parent))
    judged = sum(rule.kind == "judge" for rule in task.rules)
    print(f"{task.suite:8} {task.title:52} {len(task.rules) - judged} by program, {judged} by judge")

# %% [markdown]
# ## Frameworks
#
# One of `checkout` (a git repository; at `commit`, or the working tree with what is not ignored) and `pip` (a
# pinned requirement). `exclude` keeps an answer book out of the workspace, such as this package's own tasks.


# %%
#| export
@dataclass(frozen=True)
class Framework:
    """Where a framework comes from, and what is peculiar to it."""

    name: str
    checkout: str = ""  #: relative to the TOML file
    commit: str = ""
    pip: str = ""
    exclude: list[str] = field(default_factory=list)
    python: str = ""  #: interpreter for the workspace; empty for the one that runs ate-bench
    logs: list[str] = field(default_factory=list)  #: patterns of training logs in its folder


# %%
#| export
def load_framework(name: str, commit: str = "") -> Framework:
    """A framework by name or path, at `commit` if one is given. Raises UserError."""
    path = find_file("frameworks", name)
    found = Framework(**check_keys(read_toml(path), Framework, str(path)))
    if bool(found.checkout) == bool(found.pip):
        raise UserError(f"{path}: give one of checkout and pip")
    if commit and found.pip:
        raise UserError(f"{path}: a package has no commit {commit}; name a version in pip")
    checkout = str((path.parent / found.checkout).resolve()) if found.checkout else ""
    return dataclasses.replace(found, checkout=checkout, commit=commit or found.commit)


# %%
print(load_framework("torchtitan"))

# %% [markdown]
# ## Agents
#
# A command, with `{instruction}`, `{model}` and `{home}` to fill in, and what else the harness must know. Of the
# environment an agent gets what it names, and nothing more.


# %%
#| export
@dataclass(frozen=True)
class Agent:
    """How to start an agent, and how to read what it leaves."""

    name: str
    command: list[str]
    format: str  #: of its session: claude, codex or mini
    model: list[str] = field(default_factory=list)  #: arguments that choose a model
    read_only: list[str] = field(default_factory=list)  #: arguments that forbid edits
    stdin: bool = False  #: whether the instruction comes on standard input
    transcript: str = ""  #: pattern of its own session file, below its home
    environment: list[str] = field(default_factory=list)  #: variables handed on to it
    set: dict[str, str] = field(default_factory=dict)  #: variables it gets

    def arguments(self, model: str, read_only: bool, instruction: str, home: Path) -> list[str]:
        """The command line. Raises UserError where a model was named and the agent has no argument for it."""
        if model and not self.model:
            raise UserError(f"agent {self.name}: its file does not say how to choose a model")
        parts = self.command + (self.model if model else []) + (self.read_only if read_only else [])
        filled = [("{home}", str(home)), ("{model}", model), ("{instruction}", instruction)]
        for placeholder, value in filled:  # the instruction last: what it holds is not filled in
            parts = [part.replace(placeholder, value) for part in parts]
        return parts


# %%
#| export
def load_agent(name: str) -> Agent:
    """An agent by name or path. Raises UserError."""
    path = find_file("agents", name)
    agent = Agent(**check_keys(read_toml(path), Agent, str(path)))
    if agent.format not in FORMATS:
        raise UserError(f"{path}: format {agent.format!r} is not one of {', '.join(FORMATS)}")
    if not isinstance(agent.command, list) or not agent.command:
        raise UserError(f"{path}: command {agent.command!r} is not a list of a program and its arguments")
    return agent


# %%
for path in sorted((PACKAGE / "agents").glob("*.toml")):
    agent = load_agent(path.stem)
    print(f"{agent.name:7} {' '.join(agent.arguments('M', True, 'I', Path('H')))}")

# %% [markdown]
# A mistake in a file is found before anything is started:

# %%
try:
    check_keys({"id": "a", "kind": "cites", "lest": 2}, Rule, "rules.toml: rule a")
except UserError as error:
    print(error)

# %% [markdown]
# Next: [a place to work in that can be thrown away](22_workspace.py).
