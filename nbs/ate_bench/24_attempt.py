# %% [markdown]
# # Attempts: run an agent once, and lose nothing
#
# > From a fresh workspace to a folder with the diff, the session, the verdicts and the five metrics.
#
# An attempt costs money and an hour. So its folder is claimed before anything starts, its record is written
# then and again at the end, and whatever happens between, the end is reached: what there is of the session
# and of the diff is kept, and the record says how it ended.
#
# | status | means |
# |---|---|
# | `finished` | the agent left by itself, with 0 |
# | `failed` | it left with another code |
# | `timeout` | it was stopped when its minutes were over |
# | `died` | the harness could not go on; `error` says why |
# | `running` | it runs; or the harness itself was killed |

# %%
#| default_exp attempt

# %%
#| export
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ate_bench.check import Verdict, check_answer, judging_prompt, overall, read_judgement, read_outcome
from ate_bench.session import Session, gpu_seconds, read_session, take_metrics
from ate_bench.task import PACKAGE, Agent, Framework, Rule, Task
from ate_bench.workspace import Workspace, confine, environment, make_workspace, program_paths
from pithtrain.config import UserError

# %%
import dataclasses
import tempfile

from ate_bench.task import load_framework, load_task

# %% [markdown]
# ## What is run


# %%
#| export
@dataclass(frozen=True)
class Plan:
    """One cell of the benchmark: everything that two of its attempts have in common."""

    framework: Framework
    task: Task
    agent: Agent
    model: str = ""
    variant: str = "cpu"
    sandbox: bool = True
    judge: Agent | None = None
    judge_model: str = ""
    recorded: Path | None = None  #: an attempt's folder to play again, in place of the agent

    @property
    def folder(self) -> Path:
        """Where its attempts go, below the results."""
        agent = f"{self.agent.name}-{self.model}" if self.model else self.agent.name
        name = re.sub(r"[^\w.-]", "_", agent)
        return Path(self.framework.name, self.task.suite, self.task.folder.name, self.variant, name)


# %% [markdown]
# ## A folder of its own
#
# Creating a folder either succeeds or finds it there: two harnesses side by side cannot claim the same one,
# and none is ever written over.


# %%
#| export
def claim(folder: Path) -> Path:
    """Create and return the next free numbered folder in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
    while True:
        number += 1
        try:
            (folder / f"{number:03}").mkdir()
        except FileExistsError:
            continue
        return folder / f"{number:03}"


# %%
with tempfile.TemporaryDirectory() as folder:
    print([claim(Path(folder)).name for _ in range(3)])


# %% [markdown]
# ## Secrets
#
# An agent may print its environment, and a model may repeat what it saw. Whatever of this machine's environment
# is named like a secret is struck out of every file of a record.

# %%
#| export
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


# %%
#| export
def strike_secrets(folder: Path) -> None:
    """Replace the values of secret variables in all files below `folder` by their names."""
    found = {value.encode(): f"[{name}]".encode() for name, value in os.environ.items() if SECRET.search(name)}
    secrets = {value: name for value, name in found.items() if len(value) >= 8}
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        clean = data
        for value, name in secrets.items():
            clean = clean.replace(value, name)
        if clean != data:
            path.write_bytes(clean)


# %%
os.environ["EXAMPLE_API_KEY"] = "sk-0123456789"
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "session.jsonl").write_text("I used sk-0123456789.")
    strike_secrets(Path(folder))
    print((Path(folder) / "session.jsonl").read_text())
    assert "0123" not in (Path(folder) / "session.jsonl").read_text()
del os.environ["EXAMPLE_API_KEY"]


# %% [markdown]
# ## One program in the workspace
#
# Preparation, agent, checkers and judge are all started here. Each line of output is kept with the time of its
# arrival. When the time is over the program goes, with everything that it started.


# %%
#| export
@dataclass(frozen=True)
class Ran:
    """How a program ended: its exit code, None if it was stopped; when it started and ended, seconds since 1970."""

    code: int | None
    started: float
    ended: float
    output: str


# %%
#| export
def run_program(
    command: list[str],
    plan: Plan,
    workspace: Workspace,
    log: Path,
    minutes: float,
    agent: Agent | None = None,
    writable: bool = True,
    network: bool = False,
    readable: frozenset[Path] = frozenset(),
    stdin: str = "",
) -> Ran:
    """Run `command` in the framework's folder, confined where the plan says so; output goes to `log`, stamped."""
    paths = program_paths(command[0]) | program_paths(plan.framework.python or sys.executable) | readable
    paths |= {Path(sys.base_prefix), Path(sys.prefix)}
    if plan.sandbox:
        command = confine(command, workspace, paths, writable, network)
    variables = environment(workspace, plan.framework, agent.environment if agent else [], agent.set if agent else {})
    lines: list[str] = []

    def listen(stream: Any) -> None:
        with log.open("a", encoding="utf-8") as file:
            for raw in stream:
                lines.append(raw.decode(errors="replace"))
                file.write(json.dumps({"at": time.time(), "line": lines[-1].rstrip("\n")}) + "\n")
                file.flush()

    started = time.time()
    (workspace.root / "stdin").write_text(stdin, encoding="utf-8")
    with (workspace.root / "stdin").open("rb") as given, log.with_suffix(".stderr").open("ab") as errors:
        process = subprocess.Popen(
            command,
            cwd=workspace.repo,
            env=variables,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=errors if agent else subprocess.STDOUT,
            start_new_session=True,
        )
        listener = threading.Thread(target=listen, args=(process.stdout,), daemon=True)
        listener.start()
        try:
            code: int | None = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            ended = time.time()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left behind, too
            process.wait()
            listener.join(10)
    return Ran(code, started, ended, "".join(lines))


# %% [markdown]
# ## The agent
#
# Its session is the transcript that it keeps in its home, or else what it printed.


# %%
#| export
def run_agent(plan: Plan, workspace: Workspace, record: Path, name: str, agent: Agent, model: str, text: str) -> Ran:
    """Run `agent` on the instruction `text`; its session goes to `record`/NAME.jsonl. A judge may not edit."""
    read_only = plan.task.read_only or name != "session"
    text = text.replace("{repo}", str(workspace.repo)).replace("{out}", str(workspace.out))
    command = agent.arguments(model, read_only, text, workspace.home)
    log, stdin = record / f"{name}.jsonl", text if agent.stdin else ""
    ran = run_program(command, plan, workspace, log, plan.task.minutes, agent, not read_only, True, stdin=stdin)
    workspace.unlink()
    if agent.transcript and (kept := workspace.files(workspace.home, agent.transcript)):
        log.rename(log.with_suffix(".stdout"))
        log.write_text("\n".join(path.read_text(errors="replace") for path in kept))
    return ran


# %% [markdown]
# ## A recorded session
#
# `replay` puts the changes and artefacts of an earlier attempt into a new workspace. So that a rule can be
# mended, or a judge asked, without paying the agent again.


# %%
#| export
def replay(recorded: Path, workspace: Workspace, record: Path) -> Ran:
    """Do again what the attempt in the folder `recorded` left. Raises UserError if it is none."""
    try:
        before = json.loads((recorded / "attempt.json").read_text())
        patch = (recorded / "changes.patch").read_bytes()
        shutil.copy(recorded / "session.jsonl", record)
    except (OSError, ValueError) as error:
        raise UserError(f"{recorded}: not a recorded attempt: {error}") from None
    if patch:
        workspace.git("apply", "--binary", "-", data=patch)
    if (recorded / "out").is_dir():
        shutil.copytree(recorded / "out", workspace.out, dirs_exist_ok=True)
    return Ran(before.get("exit_code"), before["started"], before["ended"], "")


# %% [markdown]
# ## Verdicts


# %%
#| export
def check_rule(rule: Rule, plan: Plan, workspace: Workspace, record: Path, answer: str) -> Verdict:
    """The verdict of a program on one rule."""
    if rule.kind != "command":
        return check_answer(rule, plan.framework.name, answer, workspace.repo)
    common = PACKAGE / "tasks" / "common"
    places = {"python": plan.framework.python or sys.executable, "task": plan.task.folder, "common": common}
    places |= {"repo": workspace.repo, "out": workspace.out}
    command = [*rule.command, *rule.per.get(plan.framework.name, [])]
    for name, value in places.items():
        command = [part.replace(f"{{{name}}}", str(value)) for part in command]
    log = record / f"check-{rule.id}.jsonl"
    ran = run_program(command, plan, workspace, log, 20, readable=frozenset({plan.task.folder, common}))
    return read_outcome(rule.id, ran.code, ran.output)


# %%
#| export
def ask_judge(rule: Rule, plan: Plan, workspace: Workspace, record: Path) -> Verdict:
    """The judging agent's verdict on one rule."""
    name = f"judge-{rule.id}"
    prompt = judging_prompt(rule, plan.framework.name, plan.task.instruction(plan.variant))
    run_agent(plan, workspace, record, name, plan.judge, plan.judge_model, prompt)
    text = (record / f"{name}.jsonl").read_text(errors="replace")
    return read_judgement(rule.id, read_session(plan.judge.format, text).answer)


# %%
#| export
def verdicts(plan: Plan, workspace: Workspace, record: Path, answer: str, changes: bytes) -> list[Verdict]:
    """All verdicts on an attempt: programs first, then the judge where none of them said no."""
    found = []
    if plan.task.read_only:
        reason = "the framework was changed" if changes else "the framework is as it was"
        found.append(Verdict("read-only", "FAIL" if changes else "PASS", reason))
    rules = [rule for rule in plan.task.rules if not rule.per or plan.framework.name in rule.per]
    found += [check_rule(rule, plan, workspace, record, answer) for rule in rules if rule.kind != "judge"]
    for rule in (rule for rule in rules if rule.kind == "judge"):
        if plan.judge and overall(found) != "FAIL":
            (workspace.out / "changes.patch").write_bytes(changes)
            found.append(ask_judge(rule, plan, workspace, record))
        else:
            found.append(Verdict(rule.id, "UNJUDGED", "a program said no" if plan.judge else "no judge was named"))
    return found


# %% [markdown]
# ## What is kept
#
# Files that the agent left in `out`, up to a size; links are not followed, for they may lead outside.

# %%
#| export
LARGEST = 32 << 20  # bytes of one artefact


# %%
#| export
def keep_artefacts(workspace: Workspace, record: Path) -> list[str]:
    """Copy the files of `out` to the record; return what was left out."""
    kept = [path for path in workspace.files(workspace.out, "**/*") if path.stat().st_size <= LARGEST]
    for path in kept:
        target = record / "out" / path.relative_to(workspace.out)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    others = {path for path in workspace.out.rglob("*") if path.is_symlink() or not path.is_dir()} - set(kept)
    return sorted(str(path.relative_to(workspace.out)) for path in others)


# %% [markdown]
# ## The whole


# %%
#| export
def capture(plan: Plan, workspace: Workspace, record: Path, ran: Ran | None) -> dict[str, Any]:
    """Keep the diff and the artefacts; return the verdicts and metrics for the record."""
    changes = workspace.diff()
    (record / "changes.patch").write_bytes(changes)
    left = keep_artefacts(workspace, record)
    log = record / "session.jsonl"
    session = read_session(plan.agent.format, log.read_text(errors="replace")) if log.exists() else Session()
    logs = [path for pattern in plan.framework.logs for path in workspace.files(workspace.repo, pattern)]
    gpu = gpu_seconds(logs + workspace.files(workspace.out, "**/*.log"))
    written = workspace.files(workspace.out, "answer.md")
    answer = written[0].read_text(errors="replace") if written else session.answer
    found = verdicts(plan, workspace, record, answer, changes)
    return {
        "verdict": overall(found),
        "rules": [asdict(verdict) for verdict in found],
        "metrics": asdict(take_metrics(session, gpu, (ran.started, ran.ended) if ran else None)),
        "malformed_lines": session.malformed,
        "artefacts_left_out": left,
    }


# %%
#| export
def run_attempt(plan: Plan, results: Path) -> Path:
    """Make one attempt; return its folder below `results`. What goes wrong on the way is in its record."""
    record = claim(results / plan.folder)
    facts: dict[str, Any] = {
        "framework": plan.framework.name,
        "suite": plan.task.suite,
        "task": plan.task.folder.name,
        "variant": plan.variant,
        "agent": plan.agent.name,
        "model": plan.model,
        "format": plan.agent.format,
        "sandbox": plan.sandbox,
        "replayed": str(plan.recorded or ""),
        "status": "running",
        "started": time.time(),
    }

    def write() -> None:
        beside = record / "attempt.partial"
        beside.write_text(json.dumps(facts, indent=2) + "\n")
        strike_secrets(record)
        os.replace(beside, record / "attempt.json")

    write()
    workspace, ran = None, None
    try:
        workspace, facts["version"] = make_workspace(plan.framework)
        folders = (plan.task.folder, plan.task.folder.parent)
        scripts = [folder / "prepare" / f"{plan.framework.name}.sh" for folder in folders]
        if prepare := next(filter(Path.exists, scripts), None):
            command, log, readable = ["bash", str(prepare)], record / "prepare.jsonl", frozenset({prepare.parent})
            done = run_program(command, plan, workspace, log, 60, network=True, readable=readable)
            if done.code != 0:
                raise UserError(f"{prepare}: left with {done.code}: {done.output.strip()[-200:]}")
        workspace.remember()
        if plan.recorded:
            ran = replay(plan.recorded, workspace, record)
        else:
            text = plan.task.instruction(plan.variant)
            ran = run_agent(plan, workspace, record, "session", plan.agent, plan.model, text)
        facts |= {"status": "timeout" if ran.code is None else "failed" if ran.code else "finished"}
        facts |= {"exit_code": ran.code, "started": ran.started, "ended": ran.ended}
        facts |= capture(plan, workspace, record, ran)
    except BaseException as error:  # an attempt that dies is recorded, whatever killed it
        facts |= {"status": "died", "error": f"{type(error).__name__}: {error}", "ended": time.time()}
        if workspace is not None and (workspace.root / "baseline.git").exists():
            workspace.unlink()
            (record / "changes.patch").write_bytes(workspace.diff())
            keep_artefacts(workspace, record)
        if not isinstance(error, Exception):
            raise
    finally:
        write()
        if workspace is not None:
            shutil.rmtree(workspace.root, ignore_errors=True)
    return record


# %% [markdown]
# ## An attempt, with a shell for an agent
#
# The agent here is a shell script that has read the code for us: it greps the lines that it cites, and prints
# two replies in Claude Code's form. The judging rule stays open, as no judge was named. Played again, the recorded
# attempt gives the same verdicts and the same metrics.

# %%
session = [
    {"type": "assistant", "message": {"id": "a", "usage": {"input_tokens": 800, "output_tokens": 60}}},
    {"type": "assistant", "message": {"id": "b", "usage": {"input_tokens": 1200, "output_tokens": 90}}},
]
script = r"""
cite() { echo "\`$1:$(grep -n "$3" $1 | head -1 | cut -d: -f1) $2\`"; }
{
    echo "Verdict: present"; echo "Pairs: halves"
    cite pithtrain/layers/rotary.py rotary_table "def rotary_table"
    cite pithtrain/layers/rotary.py rotate "def rotate("
    cite pithtrain/layers/attention.py Attention "^class Attention("
} > $ATE_OUT/answer.md
"""
script += "\n".join(f"echo '{json.dumps(line)}'" for line in session)
shell = Agent("shell", ["bash", "-c", script], "claude")
plan = Plan(load_framework("pithtrain"), load_task("qa/rotary_positions"), shell, sandbox=bool(shutil.which("bwrap")))
with tempfile.TemporaryDirectory() as results:
    record = run_attempt(plan, Path(results))
    facts = json.loads((record / "attempt.json").read_text())
    print(record.relative_to(results), *sorted(path.name for path in record.iterdir()))
    print((record / "out" / "answer.md").read_text())
    again = run_attempt(dataclasses.replace(plan, recorded=record), Path(results))
    played = json.loads((again / "attempt.json").read_text())
for rule in facts["rules"]:
    print(f"{rule['outcome']:9} {rule['rule']}: {rule['reason']}")
print(facts["status"], facts["verdict"], facts["metrics"])
assert played["rules"] == facts["rules"] and played["metrics"] == facts["metrics"]
assert facts["verdict"] == "UNJUDGED" and facts["metrics"]["turns"] == 2 and facts["metrics"]["context_tokens"] == 1000

# %% [markdown]
# Where the time of an attempt goes when the agent takes none: copying, starting, checking.

# %%
import matplotlib.pyplot as plt

begin = time.time()
workspace, _ = make_workspace(plan.framework)
copied = time.time()
workspace.remember()
remembered = time.time()
workspace.diff()
shutil.rmtree(workspace.root)
steps = {"copy": copied - begin, "baseline": remembered - copied, "diff and removal": time.time() - remembered}
fig, ax = plt.subplots(figsize=(5, 1.8), layout="constrained")
ax.barh(list(steps), list(steps.values()))
ax.set(title="What the harness adds to an attempt", xlabel="seconds")
fig

# %% [markdown]
# Next: [many attempts on one page](25_report.py).
