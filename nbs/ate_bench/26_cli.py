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
import shutil
import sys
from pathlib import Path

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
# All that can be wrong is found before the first attempt: a task that is not there, an agent that is not
# installed. The exit code says whether every attempt passed.


# %%
#| export
def choose_sandbox(wanted: str) -> bool:
    """Whether agents run under bubblewrap. Raises UserError where it must be and is not installed."""
    installed = shutil.which("bwrap") is not None
    if wanted == "always" and not installed:
        raise UserError("bwrap: not installed; install bubblewrap, or give --sandbox auto")
    if wanted == "never" or not installed:
        print("warning: no sandbox: the agent can read and write whatever you can", file=sys.stderr)
        return False
    return True


# %%
#| export
def run_command(arguments: argparse.Namespace) -> int:
    """Make attempts; print a line for each."""
    from ate_bench.attempt import Plan, run_attempt
    from ate_bench.task import Agent, load_agent, load_framework, load_task
    from ate_bench.workspace import program_paths

    framework, task = load_framework(arguments.framework, arguments.commit), load_task(arguments.task)
    if (arguments.agent == "replay") != bool(arguments.recorded):
        raise UserError("--recorded names the attempt's folder that --agent replay plays again; give both or neither")
    if arguments.recorded:
        try:
            form = json.loads((arguments.recorded / "attempt.json").read_text())["format"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{arguments.recorded}: not a recorded attempt: {error}") from None
        agent = Agent("replay", [], form)
    else:
        agent = load_agent(arguments.agent)
        program_paths(agent.command[0])  # is it installed?
        agent.arguments(arguments.model, False, "", Path())
    plan = Plan(
        framework=framework,
        task=task,
        agent=agent,
        model=arguments.model,
        variant=arguments.variant,
        sandbox=choose_sandbox(arguments.sandbox),
        judge=load_agent(arguments.judge) if arguments.judge else None,
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


# %%
#| export
def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 1 where an attempt did not pass, 2 for a mistake, 130."""
    try:
        known = make_parser().parse_args(arguments)
        return known.command(known)
    except UserError as error:
        print(f"ate-bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ate-bench: interrupted", file=sys.stderr)
        return 130


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
