# %% [markdown]
# # Checks: what a program can tell about an answer
#
# > Follows every citation of an answer to the line it names, and runs the task's own checkers.
#
# An answer that sounds right and cites `model.py:120` for something that stands elsewhere was not read off the
# code. Whether a citation holds needs no judgement: the file exists, the line exists, and the name stands
# there. That is checked by a program; a judging agent is asked only for what is left.

# %%
#| default_exp check

# %%
#| export
import ast
import re
from dataclasses import dataclass
from pathlib import Path

from ate_bench.task import Rule

# %% [markdown]
# ## Verdicts
#
# An attempt passes when all rules do. A judge is asked last, and not at all where a program has said no: such
# a rule, like one for which no judge was named, stays UNJUDGED.


# %%
#| export
@dataclass(frozen=True)
class Verdict:
    """PASS, FAIL or UNJUDGED on one rule, and why."""

    rule: str
    outcome: str
    reason: str


# %%
#| export
def overall(verdicts: list[Verdict]) -> str:
    """The verdict on an attempt: FAIL if any rule failed, UNJUDGED if any is open, else PASS."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return "FAIL" if "FAIL" in outcomes or not outcomes else "UNJUDGED" if "UNJUDGED" in outcomes else "PASS"


# %%
assert overall([Verdict("a", "PASS", ""), Verdict("b", "UNJUDGED", ""), Verdict("c", "FAIL", "")]) == "FAIL"
assert overall([]) == "FAIL"  # nothing was checked

# %% [markdown]
# ## Citations
#
# The form is `` `path:line name` ``. Paths are from the root of the framework. A citation without a name, or
# of a name that is neither on the line nor that of a definition around it, does not hold.

# %%
#| export
CITATION = re.compile(r"`([\w./-]+\.\w+):(\d+)(?:-\d+)?(?:[ ,]+([A-Za-z_][\w.]*)(?:\(\))?)?`")
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


# %%
#| export
def definitions_around(text: str, line: int) -> list[str]:
    """Qualified names of the definitions that `line` of a Python file is in, outermost first."""
    names: list[str] = []
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return names
    while body:
        inside = [n for n in body if n.lineno <= line <= (n.end_lineno or n.lineno)]
        node = next(iter(inside), None)
        if isinstance(node, DEFINITIONS):
            names.append(f"{names[-1]}.{node.name}" if names else node.name)
        # A block such as `if` holds statements too.
        body = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)] if node else []
    return names


# %%
code = "class Rope:\n    if True:\n        def turn(self):\n            return 1\n\nx = 1\n"
assert definitions_around(code, 4) == ["Rope", "Rope.turn"] and definitions_around(code, 6) == []


# %%
#| export
@dataclass(frozen=True)
class Citation:
    """A citation followed: the definitions it is in, or what is wrong with it."""

    text: str
    around: list[str]
    wrong: str = ""


# %%
#| export
def follow_citation(match: re.Match, repo: Path) -> Citation:
    """Look a citation up in the framework at `repo`."""
    name, line, symbol = match[1], int(match[2]), match[3]
    path = (repo / name).resolve()
    if not path.is_relative_to(repo.resolve()) or not path.is_file():
        return Citation(match[0], [], f"there is no file {name}")
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.removesuffix("\n").split("\n")  # as Python counts them: a form feed ends no line
    if not 1 <= line <= len(lines):
        return Citation(match[0], [], f"{name} has {len(lines)} lines")
    if not symbol:
        return Citation(match[0], [], "it names nothing")
    around, last = definitions_around(text, line), symbol.rpartition(".")[2]
    if not re.search(rf"\b{re.escape(last)}\b", lines[line - 1]) and not any(
        at.split(".")[-1] == last for at in around
    ):
        return Citation(match[0], around, f"{symbol} is neither on line {line} nor around it")
    return Citation(match[0], around)


# %%
#| export
def citations(answer: str, repo: Path) -> list[Citation]:
    """All citations of an answer, followed, each once."""
    matches = {match[0]: match for match in CITATION.finditer(answer)}
    return [follow_citation(match, repo) for match in matches.values()]


# %%
import tempfile

holder = tempfile.TemporaryDirectory()
repo = Path(holder.name)
(repo / "rope.py").write_text(code)
answer = """Verdict: present
It is turned in `rope.py:4 Rope.turn`, set in `rope.py:6 x`; not `rope.py:6 turn`, not `rope.py:99 x`, not `no.py:1 x`.
"""
for citation in citations(answer, repo):
    print(f"{citation.text:20} {citation.wrong or citation.around}")
assert [not citation.wrong for citation in citations(answer, repo)] == [True, True, False, False, False]


# %% [markdown]
# ## Rules on answers
#
# A definition counts as cited when a citation that holds lies within it. Definitions of a task's key are
# named without their module, so that a file may move; an answer may cite the notebook or the module. What has one
# short answer is asked for as a line of its own, `Pairs: halves`, and no judge is paid to find it. Numbers are compared
# as numbers, `1e-6` is `0.000001`; of a name its last part will do, `torch.float32`.


# %%
#| export
def same_value(value: str, wanted: str) -> bool:
    """Whether a value is the one wanted: as a number where both are numbers, else by the name or its last part."""
    try:
        return float(value) == float(wanted)
    except ValueError:
        named = value[:1].isalpha() or value[:1] == "_"
        return wanted in (value, value.rpartition(".")[2] if named else value)


# %%
assert same_value("1.0e-6", "1e-6") and same_value("torch.float32", "float32")
assert not same_value("7.1", "1") and not same_value("7.x", "x")


# %%
#| export
def check_statement(rule: Rule, wanted: str, answer: str) -> Verdict:
    """The verdict of a rule of kind `states`: the answer's line `LABEL: value` has one of the values `a|b`."""
    line = re.search(
        rf"^[*_\s-]*{re.escape(rule.label)}[*_`\s]*:[*_`\s]*([\w.,+-]+)", answer, re.MULTILINE | re.IGNORECASE
    )
    if line is None:
        return Verdict(rule.id, "FAIL", f"there is no line '{rule.label}: value'")
    value = line[1].lower().rstrip(".,")
    right = any(same_value(value, one) for one in wanted.lower().split("|"))
    return Verdict(
        rule.id, "PASS" if right else "FAIL", f"{rule.label}: {value}" + f", expected {wanted}" * (not right)
    )


# %%
pairs = Rule("pairs", "states", label="Pairs")
for said in ("Pairs: halves", "**Pairs:** `Halves`.", "Pairs: neighbours", "They are halves."):
    print(check_statement(pairs, "halves|half", said))


# %%
#| export
def check_answer(rule: Rule, framework: str, answer: str, repo: Path) -> Verdict:
    """The verdict of a rule of kind `stance`, `states`, `citations` or `cites`."""
    if rule.kind != "citations" and framework not in rule.per:
        return Verdict(rule.id, "UNJUDGED", f"the task has no key for {framework}")
    if rule.kind == "states":
        return check_statement(rule, rule.per[framework], answer)
    found = citations(answer, repo)
    wrong = [citation for citation in found if citation.wrong]
    if rule.kind == "stance":
        first = next(iter(answer.strip().splitlines()), "")
        right = first.strip().lower() == f"verdict: {rule.per[framework]}"
        reason = f"the first line is {first[:80]!r}, expected 'Verdict: {rule.per[framework]}'"
        return Verdict(rule.id, "PASS", first) if right else Verdict(rule.id, "FAIL", reason)
    if rule.kind == "citations":
        if wrong:
            return Verdict(rule.id, "FAIL", "; ".join(f"{citation.text}: {citation.wrong}" for citation in wrong[:5]))
        right = len(found) >= rule.least
        return Verdict(rule.id, "PASS" if right else "FAIL", f"{len(found)} citations hold, {rule.least} are needed")
    inside = [f".{name}" for citation in found if not citation.wrong for name in citation.around]
    endings = {name: tuple(f".{one}" for one in name.split("|")) for name in rule.per[framework]}
    missing = [name for name, either in endings.items() if not any(at.endswith(either) for at in inside)]
    reason = f"no citation lies in {', '.join(missing)}" if missing else f"cited: {', '.join(rule.per[framework])}"
    return Verdict(rule.id, "FAIL" if missing else "PASS", reason)


# %%
for rule in (
    Rule("stance", "stance", per={"f": "present"}),
    Rule("all hold", "citations"),
    Rule("turn", "cites", per={"f": ["Rope.turn"]}),
    Rule("twist", "cites", per={"f": ["Rope.twist"]}),
    Rule("either", "cites", per={"f": ["Rope.twist|Rope.turn"]}),
):
    print(check_answer(rule, "f", answer, repo))
holder.cleanup()


# %% [markdown]
# ## Checkers
#
# For the rest a task brings a program. It runs after the agent has left, in the sandbox, with the task's
# folder readable, and must leave with 0 and a last line that says PASS. Code of the agent's may end its process, and
# may print PASS before it does. So a checker lets that code run in another process than the one that says the verdict,
# and wants a sign of its own that it came to its end; the framework's folder is not on the checker's path; tests are
# put back as they were given. Code that reaches into its checker's memory is not stopped: that is for a judge to see.


# %%
#| export
def read_outcome(rule: str, code: int | None, output: str) -> Verdict:
    """The verdict of a checker that left with `code` (None: it ran too long) and printed `output`."""
    last = next(iter(reversed(output.strip().splitlines())), "it printed nothing")[:500]
    if code == 0 and last.startswith("PASS"):
        return Verdict(rule, "PASS", last)
    if last.startswith("FAIL"):
        return Verdict(rule, "FAIL", last)
    return Verdict(rule, "FAIL", f"the check {'ran too long' if code is None else f'left with {code}'}: {last}")


# %%
print(read_outcome("oracle", 0, "loss falls\nPASS 12 cases"), read_outcome("oracle", 0, "").reason, sep="\n")

# %% [markdown]
# ## The judge
#
# A judging agent gets one rule, what is true of the framework, and the answer or the diff in the workspace. The
# verdict is the last line of its answer that begins with PASS or FAIL; without one there is none.


# %%
#| export
def judging_prompt(rule: Rule, framework: str, instruction: str) -> str:
    """What a judging agent is told about one rule. {repo} and {out} are still to be filled in."""
    return (
        "Judge one point of an answer to the task below. The framework is in {repo}, what was handed in is in {out}, "
        "the changes made to the framework are in {out}/changes.patch. Change nothing.\n\n"
        f"The point: {rule.question}\n"
        f"What is true of this framework: {rule.per.get(framework, 'look it up in the code')}\n\n"
        "Judge this point alone. End with one line: PASS or FAIL, a colon, and the reason in a sentence.\n\n"
        f"The task was:\n\n{instruction}"
    )


# %%
#| export
def read_judgement(rule: str, answer: str) -> Verdict:
    """The verdict that a judging agent's answer ends with."""
    for line in reversed(answer.strip().splitlines()):
        if match := re.match(r"[*`\s]*(PASS|FAIL)[*`]*\s*:?\s*(.*)", line):
            return Verdict(rule, match[1], match[2][:500])
    return Verdict(rule, "UNJUDGED", "the judge gave no verdict")


# %%
print(read_judgement("pairs", "The answer cites `rotate`, which splits halves.\n**PASS**: halves, as the code has it."))
assert read_judgement("pairs", "I am not sure.").outcome == "UNJUDGED"

# %% [markdown]
# How often would chance name the right place? Take every line of a file and ask whether `rotate` would hold there:
# the smaller the share, the more a citation that holds is worth.

# %%
import matplotlib.pyplot as plt

import pithtrain

shares = {}
for name, symbol in (("layers/rotary.py", "rotate"), ("layers/router.py", "Router"), ("layers/experts.py", "Experts")):
    path = Path(pithtrain.__file__).parent / name
    lines = range(1, len(path.read_text().splitlines()) + 1)
    wanted = "\n".join(f"`{path.name}:{line} {symbol}`" for line in lines)
    shares[symbol] = sum(not citation.wrong for citation in citations(wanted, path.parent)) / len(lines)
fig, ax = plt.subplots(figsize=(5, 1.8), layout="constrained")
ax.barh(list(shares), [100 * share for share in shares.values()])
ax.set(title="Lines on which a citation would hold", xlabel="% of the file's lines", xlim=(0, 100))
fig

# %% [markdown]
# Next: [an attempt from its start to its record](24_attempt.py).
