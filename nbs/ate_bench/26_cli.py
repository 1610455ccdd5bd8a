# %% [markdown]
# # The command line
#
# > `ate-bench static`, `run` and `report`.
#
# Three commands: what a framework costs to read, what it costs an agent, and what all that looks like.

# %%
#| default_exp cli

# %%
#| export
import argparse
import json
import signal
import sys
from pathlib import Path

from ate_bench.task import Agent
from pithtrain.config import UserError

# %% [markdown]
# ## static


# %%
#| export
def static_command(arguments: argparse.Namespace) -> int:
    """Print the static table of package folders; write JSON where asked."""
    from ate_bench.static import static_cost, static_json, static_table
    from ate_bench.task import PACKAGE

    questions = arguments.questions or PACKAGE / "questions.toml"
    costs = [static_cost(path.resolve(), questions) for path in arguments.paths]
    print(static_table(costs))
    if arguments.json:
        arguments.json.write_text(static_json(costs) + "\n")
    return 0


# %% [markdown]
# ## run
#
# All that can be wrong is found before the first attempt: a task that is not there, an agent or a judge that is not
# installed. The exit code says whether every attempt passed.


# %%
#| export
def choose_sandbox(wanted: str) -> bool:
    """Whether agents run under bubblewrap. Raises UserError where it must be and cannot."""
    from ate_bench.workspace import can_confine

    works = wanted != "never" and can_confine()
    if wanted == "always" and not works:
        raise UserError("bwrap: not installed, or not allowed here; install bubblewrap, or give --sandbox auto")
    if not works:
        print("warning: no sandbox: the agent can read and write whatever you can", file=sys.stderr)
        return False
    return True


# %%
#| export
def choose_agent(name: str, model: str) -> Agent:
    """The agent or judge `name`, which can be started. Raises UserError."""
    from ate_bench.task import load_agent
    from ate_bench.workspace import program_paths

    agent = load_agent(name)
    agent.arguments(model, False, "", Path())
    program_paths(agent.command[0])
    return agent


# %%
#| export
def recorded_format(recorded: Path) -> str:
    """The format of the session in an attempt's folder. Raises UserError for one that cannot be played again."""
    from ate_bench.session import FORMATS

    try:
        facts = json.loads((recorded / "attempt.json").read_text())
        form, ended = facts["format"], "ended" in facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{recorded}: not a recorded attempt: {error}") from None
    if form not in FORMATS or not ended:
        raise UserError(f"{recorded}: " + ("the attempt has not ended" if form in FORMATS else f"format {form!r}"))
    return form


# %%
#| export
def run_command(arguments: argparse.Namespace) -> int:
    """Make attempts; print a line for each."""
    from ate_bench.attempt import Plan, run_attempt
    from ate_bench.task import load_framework, load_task

    if arguments.attempts < 1:
        raise UserError(f"--attempts {arguments.attempts}: at least 1 is needed")
    if arguments.judge_model and not arguments.judge:
        raise UserError("--judge-model is for a judge; name one with --judge")
    framework, task = load_framework(arguments.framework, arguments.commit), load_task(arguments.task)
    if (arguments.agent == "replay") != bool(arguments.recorded):
        raise UserError("--recorded names the attempt's folder that --agent replay plays again; give both or neither")
    if arguments.recorded:
        agent = Agent("replay", [], recorded_format(arguments.recorded))
    else:
        agent = choose_agent(arguments.agent, arguments.model)
    plan = Plan(
        framework=framework,
        task=task,
        agent=agent,
        model=arguments.model,
        variant=arguments.variant,
        sandbox=choose_sandbox(arguments.sandbox),
        judge=choose_agent(arguments.judge, arguments.judge_model) if arguments.judge else None,
        judge_model=arguments.judge_model,
        recorded=arguments.recorded and arguments.recorded.resolve(),
    )
    passed = True
    for _ in range(arguments.attempts):
        folder = run_attempt(plan, arguments.results)
        facts = json.loads((folder / "attempt.json").read_text())
        passed &= facts.get("verdict") == "PASS"
        print(f"{folder}: {facts['status']}, {facts.get('verdict', facts.get('error'))}, {facts.get('metrics', '')}")
        for rule in facts.get("rules", []):
            print(f"    {rule['outcome']:8} {rule['rule']}: {rule['reason']}")
    return 0 if passed else 1


# %% [markdown]
# ## report


# %%
#| export
def report_command(arguments: argparse.Namespace) -> int:
    """Write the report of a folder of attempts."""
    from ate_bench.report import write_report

    for path in write_report(arguments.results, arguments.to or arguments.results / "report"):
        print(path)
    return 0


# %% [markdown]
# ## The parser


# %%
#| export
def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `command` to its function."""
    parser = argparse.ArgumentParser(
        prog="ate-bench", description="What a framework costs a coding agent.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    static = commands.add_parser("static", help="what frameworks cost to read, without an agent", allow_abbrev=False)
    static.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="the folder of a Python package")
    static.add_argument("--questions", type=Path, help="TOML file of entry questions (default: the package's own)")
    static.add_argument("--json", type=Path, help="write the figures to this file too")
    static.set_defaults(command=static_command)
    run = commands.add_parser("run", help="let an agent do a task", allow_abbrev=False)
    run.add_argument("--framework", required=True, help="a name such as pithtrain, or a .toml file")
    run.add_argument("--commit", default="", help="of the framework's checkout (default: its working tree)")
    run.add_argument("--task", required=True, help="SUITE/TASK, or a task's folder")
    run.add_argument("--agent", required=True, help="claude, codex, mini, replay, or a .toml file")
    run.add_argument("--model", default="", help="for the agent (default: its own)")
    run.add_argument("--recorded", type=Path, help="with --agent replay: the folder of the attempt to play again")
    run.add_argument("--variant", choices=["cpu", "gpu"], default="cpu", help="of the task (default %(default)s)")
    run.add_argument("--attempts", type=int, default=1, help="how many (default %(default)s)")
    run.add_argument("--judge", default="", help="agent for the rules that need one (default: they stay open)")
    run.add_argument("--judge-model", default="", help="for the judge")
    run.add_argument("--results", type=Path, default=Path("runs/ate"), help="attempts go here (default %(default)s)")
    run.add_argument("--sandbox", choices=["auto", "always", "never"], default="auto", help="(default %(default)s)")
    run.set_defaults(command=run_command)
    report = commands.add_parser("report", help="tables and figures of attempts", allow_abbrev=False)
    report.add_argument("results", type=Path, metavar="DIR", help="the folder given to run --results")
    report.add_argument("--to", type=Path, help="where the report goes (default DIR/report)")
    report.set_defaults(command=report_command)
    return parser


# %% [markdown]
# A scheduler that ends a job, or a closed terminal, must not leave an agent running that is paid by the minute: the
# signal becomes an exception, and the attempt ends as it does for Ctrl-C.


# %%
#| export
def leave(number: int, frame: object) -> None:
    """End the command by an exception; a second signal does not disturb what it has to put away."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


# %%
#| export
def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 1 where an attempt did not pass, 2 for a mistake, 130."""
    known = make_parser().parse_args(arguments)
    ends = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) == signal.SIG_DFL]
    try:
        for one in ends:
            signal.signal(one, leave)
        return known.command(known)
    except UserError as error:
        print(f"ate-bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ate-bench: interrupted", file=sys.stderr)
        return 130
    finally:
        for one in ends:
            signal.signal(one, signal.SIG_DFL)


# %% [markdown]
# A mistake is one line; what a framework costs to read is a table:

# %%
import ate_bench

assert main(["run", "--framework", "pithtrain", "--task", "qa/rotary_position", "--agent", "mini"]) == 2
assert main(["static", str(Path(ate_bench.__file__).parent)]) == 0

# %% [markdown]
# `python -m ate_bench.cli` does the same as `ate-bench`.

# %%
#| export
if __name__ == "__main__" and globals().get("__spec__") is not None:
    sys.exit(main())
