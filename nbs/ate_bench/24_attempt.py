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
from ate_bench.session import gpu_seconds, read_session, take_metrics
from ate_bench.task import PACKAGE, Agent, Framework, Rule, Task
from ate_bench.workspace import Workspace, confine, environment, make_workspace, program_paths
from pithtrain.config import UserError

# %%
import dataclasses
import tempfile

from ate_bench.task import load_framework, load_task
from ate_bench.workspace import can_confine

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
    def agents(self) -> list[Agent]:
        """The agent, and the judge where there is one."""
        return [self.agent, self.judge] if self.judge else [self.agent]

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
# An agent may print its environment, and a model may repeat what it saw. What an agent is handed, whatever of this
# machine's environment is named like a secret, and the user and password of any URL in it are struck out: line by
# line as an agent prints them, and from every file of a record when it is written. A value may stand in a session as
# it is, escaped as JSON, or so twice; and its lines may stand alone. What is shorter than 8 characters stays.

# %%
#| export
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH(?!OR)|(?:^|_)PAT(?:$|_)", re.IGNORECASE)


# %%
#| export
def find_secrets(agents: list[Agent]) -> dict[bytes, bytes]:
    """What must not stand in a record of `agents`, the longest first, and what stands there instead."""
    variables, found = dict(os.environ), {}
    for agent in agents:
        variables |= agent.set
    named = {name for agent in agents for name in agent.environment}
    for name, value in variables.items():
        users = re.findall(r"://([^/@\s]+)@", value)
        texts = users + [user.partition(":")[2] for user in users]
        if name in named or SECRET.search(name):
            texts += [value, *value.splitlines()]
        forms = {
            form
            for text in texts
            for form in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
        }
        forms |= {json.dumps(form)[1:-1] for form in forms}
        found |= {os.fsencode(form): f"[{name}]".encode() for form in forms if len(form) >= 8}
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))


# %%
#| export
def strike(data: bytes, secrets: dict[bytes, bytes]) -> bytes:
    """`data` with each secret replaced."""
    for value, name in secrets.items():
        data = data.replace(value, name)
    return data


# %%
keyed = Agent("keyed", [], "claude", set={"EXAMPLE_API_KEY": 'sk-"0123456789', "DB": "postgres://me:hunter22@host/db"})
said = json.dumps({"text": 'I used sk-"0123456789 on postgres://me:hunter22@host.'})
print(strike(said.encode(), find_secrets([keyed])).decode())
assert b"0123" not in strike(said.encode(), find_secrets([keyed]))


# %%
#| export
def strike_secrets(folder: Path, secrets: dict[bytes, bytes]) -> None:
    """Strike the secrets from all files below `folder`."""
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        if (clean := strike(data, secrets)) != data:
            path.write_bytes(clean)


# %%
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "session.jsonl").write_text(said)
    strike_secrets(Path(folder), find_secrets([keyed]))
    assert "hunter22" not in (Path(folder) / "session.jsonl").read_text()


# %% [markdown]
# ## One program in the workspace
#
# Preparation, agent, checkers and judge are all started here. Each line of output is kept with the time of its
# arrival. When the time is over the program goes, with everything that it started; without bubblewrap, a process that
# made itself a session of its own stays.
#
# Checkers and judges are *apart*: the agent may have put a module of any name into the framework, so its folder is not
# on their Python's path.


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
    apart: bool = False,
    folder: Path | None = None,
) -> Ran:
    """Run `command` in `folder`, or the framework's, confined where the plan says so; output goes to `log`, stamped."""
    paths = program_paths(command[0]) | program_paths(plan.framework.python or sys.executable) | readable
    paths |= {Path(sys.base_prefix), Path(sys.prefix)}
    if plan.sandbox:
        command = confine(command, workspace, paths, writable, network, folder)
    variables = environment(workspace, plan.framework, agent.environment if agent else [], agent.set if agent else {})
    if apart:
        del variables["PYTHONPATH"]
        variables["PYTHONNOUSERSITE"] = "1"
    secrets = find_secrets(plan.agents)
    lines: list[str] = []

    def listen(stream: Any) -> None:
        with log.open("a", encoding="utf-8") as file:
            for raw in stream:
                lines.append(raw.decode(errors="replace"))
                line = strike(raw, secrets).decode(errors="replace").rstrip("\n")
                file.write(json.dumps({"at": time.time(), "line": line}) + "\n")
                file.flush()

    def listen_to_errors(stream: Any) -> None:
        with log.with_suffix(".stderr").open("ab", buffering=0) as file:
            for raw in stream:
                file.write(strike(raw, secrets))

    started = time.time()
    (workspace.root / "stdin").write_text(stdin, encoding="utf-8")
    with (workspace.root / "stdin").open("rb") as given:
        process = subprocess.Popen(
            command,
            cwd=folder or workspace.repo,
            env=variables,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if agent else subprocess.STDOUT,
            start_new_session=True,
        )
        listeners = [threading.Thread(target=listen, args=(process.stdout,), daemon=True)]
        if agent:
            listeners.append(threading.Thread(target=listen_to_errors, args=(process.stderr,), daemon=True))
        try:
            for listener in listeners:
                listener.start()
            code: int | None = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            ended = time.time()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left behind, too
            process.wait()
            for listener in listeners:
                listener.join(10)
    return Ran(code, started, ended, "".join(lines))


# %% [markdown]
# ## The agent
#
# Its session is the transcript that it keeps in its home, or else what it printed; also where it was interrupted. A
# judge starts in an empty home, so that no file of the agent's tells it what to think.


# %%
#| export
def run_agent(plan: Plan, workspace: Workspace, record: Path, name: str, agent: Agent, model: str, text: str) -> Ran:
    """Run `agent` on the instruction `text`; its session goes to `record`/NAME.jsonl. A judge may not edit."""
    judging = name != "session"
    read_only = plan.task.read_only or judging
    text = text.replace("{repo}", str(workspace.repo)).replace("{out}", str(workspace.out))
    command = agent.arguments(model, read_only, text, workspace.home)
    log, stdin = record / f"{name}.jsonl", text if agent.stdin else ""
    folder = workspace.home if judging else workspace.repo
    if judging:
        workspace.clear()
    try:
        return run_program(
            command,
            plan,
            workspace,
            log,
            plan.task.minutes,
            agent,
            writable=not read_only,
            network=True,
            stdin=stdin,
            apart=judging,
            folder=folder,
        )
    finally:
        workspace.unlink()
        if agent.transcript and log.exists() and (kept := workspace.files(workspace.home, agent.transcript)):
            log.rename(log.with_suffix(".stdout"))
            log.write_text("\n".join(path.read_text(errors="replace") for path in kept))


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
        ran = Ran(before.get("exit_code", 1), before["started"], before["ended"], "")
        patch = (recorded / "changes.patch").read_bytes()
        shutil.copy(recorded / "session.jsonl", record)
    except KeyError as error:
        raise UserError(f"{recorded}: the attempt has not ended, its record says no {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{recorded}: not a recorded attempt: {error}") from None
    if patch:
        workspace.git("apply", "--binary", "-", data=patch)
    for name, target in (("out", workspace.out), ("logs", workspace.repo)):
        if (recorded / name).is_dir():
            shutil.copytree(recorded / name, target, dirs_exist_ok=True)
    return ran


# %% [markdown]
# ## Verdicts
#
# A checker or a judge that cannot be asked leaves its rule UNJUDGED: the attempt was paid for.


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
    log, readable = record / f"check-{rule.id}.jsonl", frozenset({plan.task.folder, common})
    if rule.given_tests:
        workspace.restore_tests()
    ran = run_program(command, plan, workspace, log, 20, readable=readable, apart=True)
    return read_outcome(rule.id, ran.code, ran.output)


# %%
#| export
def ask_judge(rule: Rule, plan: Plan, workspace: Workspace, record: Path) -> Verdict:
    """The judging agent's verdict on one rule."""
    name = f"judge-{rule.id}"
    prompt = judging_prompt(rule, plan.framework.name, plan.task.instruction(plan.variant))
    ran = run_agent(plan, workspace, record, name, plan.judge, plan.judge_model, prompt)
    if ran.code != 0:
        how = "was stopped" if ran.code is None else f"left with {ran.code}"
        return Verdict(rule.id, "UNJUDGED", f"the judge {how}")
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
    rules, name = plan.task.rules, plan.framework.name
    keyed = any(name in rule.per for rule in rules)  # else an answer is not wrong, only open
    for rule in sorted(rules, key=lambda rule: rule.kind == "judge"):
        try:
            if rule.kind != "judge":
                if not rule.per or name in rule.per or not (keyed or rule.kind == "command"):
                    found.append(check_rule(rule, plan, workspace, record, answer))
            elif plan.judge is None:
                found.append(Verdict(rule.id, "UNJUDGED", "no judge was named"))
            elif any(verdict.outcome == "FAIL" for verdict in found):
                found.append(Verdict(rule.id, "UNJUDGED", "a program said no"))
            else:
                (workspace.out / "changes.patch").write_bytes(changes)
                found.append(ask_judge(rule, plan, workspace, record))
        except Exception as error:
            found.append(Verdict(rule.id, "UNJUDGED", f"{type(error).__name__}: {error}"[:500]))
    return found


# %% [markdown]
# ## What is kept
#
# Files that the agent left in `out`, and the framework's training logs, which git ignores; up to a size. Links are not
# followed, for they may lead outside.

# %%
#| export
LARGEST = 32 << 20  # bytes of one artefact


# %%
#| export
def keep_files(paths: list[Path], folder: Path, target: Path) -> list[Path]:
    """Copy those of `paths`, below `folder`, that are not too large to `target`; return them."""
    kept = [path for path in paths if path.stat().st_size <= LARGEST]
    for path in kept:
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return kept


# %%
#| export
def keep_artefacts(workspace: Workspace, record: Path) -> list[str]:
    """Copy the files of `out` to the record; return what was left out."""
    kept = keep_files(workspace.files(workspace.out, "**/*"), workspace.out, record / "out")
    others = {path for path in workspace.out.rglob("*") if path.is_symlink() or not path.is_dir()} - set(kept)
    return sorted(str(path.relative_to(workspace.out)) for path in others)


# %% [markdown]
# ## The whole
#
# What was paid for is written down first: the metrics, before anything is judged.


# %%
#| export
def measure(plan: Plan, workspace: Workspace, record: Path, span: tuple[float, float]) -> dict[str, Any]:
    """Keep the training logs; return the metrics for the record of an agent that ran from `span`[0] to `span`[1]."""
    session = read_session(plan.agent.format, (record / "session.jsonl").read_text(errors="replace"))
    logs = [path for pattern in plan.framework.logs for path in workspace.files(workspace.repo, pattern)]
    keep_files(logs, workspace.repo, record / "logs")
    gpu = gpu_seconds(logs + workspace.files(workspace.out, "**/*.log"))
    return {"metrics": asdict(take_metrics(session, gpu, span)), "malformed_lines": session.malformed}


# %%
#| export
def decide(plan: Plan, workspace: Workspace, record: Path) -> dict[str, Any]:
    """Keep the diff and the artefacts; return the verdicts for the record."""
    changes = workspace.diff()
    (record / "changes.patch").write_bytes(changes)
    left, written = keep_artefacts(workspace, record), workspace.files(workspace.out, "answer.md")
    session = read_session(plan.agent.format, (record / "session.jsonl").read_text(errors="replace"))
    answer = written[0].read_text(errors="replace") if written else session.answer
    found = verdicts(plan, workspace, record, answer, changes)
    return {"verdict": overall(found), "rules": [asdict(v) for v in found], "artefacts_left_out": left}


# %%
#| export
def rescue(plan: Plan, workspace: Workspace, record: Path, span: tuple[float, float] | None) -> dict[str, Any]:
    """Keep what can be kept of an attempt that died; return its metrics if it had an agent, which ran for `span`."""
    facts: dict[str, Any] = {}
    with contextlib.suppress(Exception):
        workspace.unlink()
        if span and (record / "session.jsonl").exists():
            facts = measure(plan, workspace, record, span)
    with contextlib.suppress(Exception):
        keep_artefacts(workspace, record)
    with contextlib.suppress(Exception):
        (record / "changes.patch").write_bytes(workspace.diff())
    return facts


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
        strike_secrets(record, find_secrets(plan.agents))
        os.replace(beside, record / "attempt.json")

    write()
    workspace = None
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
        facts["started"] = time.time()
        if plan.recorded:
            ran = replay(plan.recorded, workspace, record)
        else:
            text = plan.task.instruction(plan.variant)
            ran = run_agent(plan, workspace, record, "session", plan.agent, plan.model, text)
        facts |= {"status": "timeout" if ran.code is None else "failed" if ran.code else "finished"}
        facts |= {"exit_code": ran.code, "started": ran.started, "ended": ran.ended}
        facts |= measure(plan, workspace, record, (ran.started, ran.ended))
        write()
        facts |= decide(plan, workspace, record)
    except BaseException as error:  # an attempt that dies is recorded, whatever killed it
        facts |= {"status": "died", "error": f"{type(error).__name__}: {error}"}
        facts.setdefault("ended", time.time())
        if workspace is not None:
            mine = "metrics" not in facts and not plan.recorded
            facts |= rescue(plan, workspace, record, (facts["started"], facts["ended"]) if mine else None)
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
plan = Plan(load_framework("pithtrain"), load_task("qa/rotary_positions"), shell, sandbox=can_confine())
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
