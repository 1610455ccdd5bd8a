# %% [markdown]
# # The command line
#
# > `pithtrain train`, `generate` and what else there is, answering at once and importing late.
#
# A command line should answer in the time it takes to ask. Importing torch takes seconds, so no command
# imports it before it knows that it will be needed: help, versions and mistakes in a config come at once.

# %%
#| default_exp cli

# %%
#| export
import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import pithtrain
from pithtrain.config import (
    MeshConfig,
    UserError,
    describe_settings,
    differences,
    load_config,
    load_run_config,
    parse_override,
    section_from_table,
)
from pithtrain.parallel.launch import find_launch, launch


# %% [markdown]
# ## Overrides
#
# Any setting of the config can be given as `--section.key value` or `--section.key=value`. argparse would
# need to know them all beforehand and would accept abbreviations; a loop over what is left is plainer and
# leaves the checking to the config.


# %%
#| export
def parse_overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """`--section.key value` and `--section.key=value` pairs as (key, text). Raises UserError for others."""
    pairs = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise UserError(f"{argument}: unexpected; settings are given as --SECTION.KEY VALUE")
        key, equals, text = argument[2:].partition("=")
        if not equals and (text := next(rest, None)) is None:
            raise UserError(f"{argument}: has no value; settings are given as --SECTION.KEY VALUE")
        pairs.append((key, text))
    return pairs


# %%
parse_overrides(["--train.steps", "500", "--run.name=wide"])


# %%
#| export
def refuse_overrides(arguments: list[str], command: str) -> None:
    """For commands without settings: whatever is left over is a mistake."""
    if arguments:
        raise UserError(f"{arguments[0]}: unexpected; pithtrain {command} --help lists the options")


# %%
#| export
def check_output(path: Path | None, *endings: str) -> None:
    """Refuse a file that could not be written, before the work that it is to hold."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or choose another place")
    if path.suffix not in endings:
        raise UserError(f"{path}: expected a name that ends in {' or '.join(endings)}")


# %%
#| export
def save_json(result: dict, path: Path | None) -> None:
    """Write a benchmark's result, where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")


# %% [markdown]
# ## Commands
#
# Each is a function that imports what it needs.


# %%
#| export
def train_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Train a run, or go on with it: alone, or as one rank of a job that a launcher started."""
    launch = find_launch(os.environ)
    if launch.world_size == 1:
        config = load_config(arguments.config, parse_overrides(overrides))
        from pithtrain.train.trainer import train

        trained = train(config)
    else:
        from pithtrain.parallel.watch import watch

        with watch(launch) as store:
            config = load_config(arguments.config, parse_overrides(overrides))
            from pithtrain.train.trainer import train

            trained = train(config, launch, store)
    if trained.step < trained.steps:
        if launch.rank == 0:
            print(f"stopped and saved at step {trained.step} of {trained.steps}; the same command goes on from there")
        return 130
    return 0


# %%
#| export
def launch_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Start `pithtrain train` as several ranks on this host."""
    config = load_config(arguments.config, parse_overrides(overrides))  # a mistake is answered once
    from pithtrain.parallel.mesh import check_axes, fit_axes

    check_axes(config, fit_axes(config.mesh, arguments.nproc))
    return launch(arguments.nproc, ["-m", "pithtrain.cli", "train", str(arguments.config), *overrides])


# %%
#| export
def parse_mesh(text: str) -> tuple[MeshConfig, int]:
    """`dp=2,ep=2` as a mesh, and the ranks that it takes. Raises UserError for what is not a mesh."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    mesh = section_from_table(MeshConfig, "--mesh", {key: parse_override(value) for key, _, value in pairs})
    ranks = mesh.pp * (mesh.dp or mesh.copies) * mesh.cp * mesh.ep
    if mesh.dp % mesh.copies:
        raise UserError(f"--mesh.copies: {mesh.copies} does not divide dp, {mesh.dp}")
    return mesh, ranks


# %%
#| export
def verify_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Compare a mesh of CPU processes with one process; 0 where they agree."""
    config = load_config(arguments.config, parse_overrides(overrides))
    mesh, ranks = parse_mesh(arguments.mesh)
    from pithtrain.verify import fit_config, verify

    config = dataclasses.replace(config, mesh=mesh)
    fitted = fit_config(config, ranks)
    for change in differences(fitted, config):
        print(f"for this mesh: {change}")
    (found,) = verify([fitted], ranks, arguments.steps)
    print(f"{arguments.steps} steps on {ranks} processes ({arguments.mesh}) against one, largest relative differences")
    for what, value in (("loss", found.loss), ("balance loss", found.balance), ("gradient norm", found.grad_norm)):
        print(f"  {what:<16}{value:.1e}")
    print(f"  {'weights':<16}{found.weight:.1e}  ({found.name})")
    print(f"  {'routing':<16}{found.load:.1e}  of the pairs went to another expert")
    passed = found.largest <= arguments.tolerance
    print(f"{'PASS' if passed else 'FAIL'}: {found.largest:.1e}, tolerance {arguments.tolerance:.1e}")
    return 0 if passed else 1


# %%
#| export
def rehearse_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run one rank of a mesh on this device, without its peers."""
    check_output(arguments.json, ".json")
    config = load_config(arguments.config, parse_overrides(overrides))
    from pithtrain.rehearse import describe_rehearsal, rehearse

    result = rehearse(config, arguments.rank, arguments.ranks, arguments.steps)
    print(describe_rehearsal(result))
    save_json(result._asdict(), arguments.json)
    return 0


# %%
#| export
def generate_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print a prompt and what the model makes of it."""
    refuse_overrides(overrides, "generate")
    load_run_config(arguments.run)  # a mistake is answered before torch is imported
    from pithtrain.train.generate import generate
    from pithtrain.train.run import open_run

    run = open_run(arguments.run)
    text = generate(
        run.model,
        run.tokenizer,
        arguments.prompt,
        arguments.tokens,
        run.config.train.sequence_length,
        arguments.temperature,
        arguments.top_k,
        arguments.seed,
    )
    print(text)
    return 0


# %%
#| export
def import_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Make a run of a published model's folder."""
    refuse_overrides(overrides, "import")
    from pithtrain.hub import import_model

    import_model(arguments.folder, arguments.run)
    return 0


# %%
#| export
def export_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Write a run's newest checkpoint as a published model."""
    refuse_overrides(overrides, "export")
    load_run_config(arguments.run)  # a mistake is answered before torch is imported
    from pithtrain.hub import export_model

    dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", None: ""}[arguments.dtype]
    export_model(arguments.run, arguments.folder, dtype, int(arguments.shard_gb * 1e9))
    return 0


# %%
#| export
def evaluate_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print a run's held-out loss, and its score on questions where a file of them is given."""
    check_output(arguments.json, ".json")
    refuse_overrides(overrides, "evaluate")
    load_run_config(arguments.run)
    from pithtrain.evaluate import evaluate

    result = evaluate(arguments.run, arguments.choices, arguments.batch)
    for what, values in result.items():
        print(f"{what}: " + ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in values.items()))
    save_json(result, arguments.json)
    return 0


# %%
#| export
def bench_step_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Time a training step beside transformers; print a table, write JSON where asked."""
    check_output(arguments.json, ".json")
    config = load_config(arguments.config, parse_overrides(overrides))
    from pithtrain.bench_step import bench_step, describe_bench_step

    result = bench_step(config, arguments.rounds)
    print(describe_bench_step(result))
    save_json(result, arguments.json)
    return 0


# %%
#| export
def bench_moe_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Time one Mixture-of-Experts block beside its floor and its peers; write JSON where asked."""
    check_output(arguments.json, ".json")
    refuse_overrides(overrides, "bench moe")
    import torch

    from pithtrain.bench import bench_moe, entrants, shape_named

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = bench_moe(shape_named(arguments.shape), device, entrants(), arguments.rounds)
    save_json(result, arguments.json)
    return 0


# %%
#| export
def schedule_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print a pipeline schedule's bubble and peak activations, and save its picture."""
    check_output(arguments.picture, ".png", ".svg", ".pdf")
    refuse_overrides(overrides, "schedule")
    from pithtrain.parallel.pipeline.describe import describe
    from pithtrain.parallel.pipeline.draw import draw
    from pithtrain.parallel.pipeline.generate import generate
    from pithtrain.parallel.pipeline.schedule import ScheduleError

    try:
        schedule = generate(arguments.kind, arguments.pp, arguments.microbatches, arguments.chunks)
        print(describe(schedule))
    except ScheduleError as error:
        raise UserError(str(error)) from None
    picture = arguments.picture or Path(f"{arguments.kind}-pp{arguments.pp}-m{arguments.microbatches}.png")
    draw(schedule, path=picture)
    print(f"picture: {picture}")
    return 0


# %% [markdown]
# ## The parser


# %%
#| export
def ranged(kind: type, low: float) -> object:
    """An argparse type: a number of type `kind` that is at least `low`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected at least {low}")
        return value

    parse.__name__ = kind.__name__
    return parse


# %%
#| export
def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `command` to its function."""
    parser = argparse.ArgumentParser(prog="pithtrain", description=pithtrain.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pithtrain {pithtrain.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a run, or go on with one that was interrupted",
        usage="pithtrain train CONFIG [--SECTION.KEY VALUE ...]",
        description="Train the run that a TOML config describes. Any setting can be overridden:\n\n"
        + describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("config", type=Path, help="the run's TOML file, for one configs/tiny.toml")
    train.set_defaults(command=train_command)

    several = commands.add_parser(
        "launch",
        help="train as several ranks on this host",
        usage="pithtrain launch --nproc N CONFIG [--SECTION.KEY VALUE ...]",
        description="Start N ranks of `pithtrain train` here. On many hosts use torchrun or srun instead.",
        allow_abbrev=False,
    )
    several.add_argument("--nproc", type=ranged(int, 1), required=True, help="number of ranks")
    several.add_argument("config", type=Path, help="the run's TOML file; settings can be overridden as in train")
    several.set_defaults(command=launch_command)

    verify = commands.add_parser(
        "verify", help="check that a mesh of processes trains as one process does", allow_abbrev=False
    )
    verify.add_argument("config", type=Path, help="the run's TOML file; settings can be overridden as in train")
    verify.add_argument("--mesh", required=True, help="sizes of the axes, for one dp=2,ep=2")
    verify.add_argument("--steps", type=ranged(int, 1), default=3, help="optimiser steps (default %(default)s)")
    verify.add_argument(
        "--tolerance", type=ranged(float, 0), default=1e-5, help="largest relative difference (default %(default)s)"
    )
    verify.set_defaults(command=verify_command)

    rehearse = commands.add_parser(
        "rehearse", help="run one rank of a mesh without its peers: does it fit?", allow_abbrev=False
    )
    rehearse.add_argument("config", type=Path, help="the run's TOML file; settings can be overridden as in train")
    rehearse.add_argument("--ranks", type=ranged(int, 1), required=True, help="ranks of the job")
    rehearse.add_argument("--rank", type=ranged(int, 0), default=0, help="the one to be (default %(default)s)")
    rehearse.add_argument(
        "--steps", type=ranged(int, 1), default=3, help="steps, the first warms up (default %(default)s)"
    )
    rehearse.add_argument("--json", type=Path, help="write the result to this file")
    rehearse.set_defaults(command=rehearse_command)

    generate = commands.add_parser("generate", help="text from a trained run", allow_abbrev=False)
    generate.add_argument("run", type=Path, help="the run's folder, runs/NAME")
    generate.add_argument("--prompt", default="def ", help="text to go on from (default %(default)r)")
    generate.add_argument("--tokens", type=ranged(int, 1), default=200, help="tokens at most (default %(default)s)")
    generate.add_argument(
        "--temperature", type=ranged(float, 0), default=0.8, help="0 takes the likeliest (default %(default)s)"
    )
    generate.add_argument(
        "--top-k", type=ranged(int, 0), default=50, help="draw from so many; 0: all (default %(default)s)"
    )
    generate.add_argument("--seed", type=ranged(int, 0), default=0, help="seed of the draws (default %(default)s)")
    generate.set_defaults(command=generate_command)

    bring = commands.add_parser("import", help="make a run of a published model's folder", allow_abbrev=False)
    bring.add_argument("folder", type=Path, help="the folder: config.json, safetensors files, tokenizer.json")
    bring.add_argument("run", type=Path, help="the run's folder to make, runs/NAME")
    bring.set_defaults(command=import_command)

    export = commands.add_parser("export", help="a run's newest checkpoint as a published model", allow_abbrev=False)
    export.add_argument("run", type=Path, help="the run's folder, runs/NAME")
    export.add_argument("folder", type=Path, help="the folder to make")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as imported, or float32)"
    )
    export.add_argument(
        "--shard-gb", type=ranged(float, 0.001), default=5.0, help="largest file, in GB (default %(default)s)"
    )
    export.set_defaults(command=export_command)

    evaluate = commands.add_parser("evaluate", help="held-out loss and multiple choice", allow_abbrev=False)
    evaluate.add_argument("run", type=Path, help="the run's folder, runs/NAME")
    evaluate.add_argument("--choices", type=Path, help="questions: JSON lines of context, choices and answer")
    evaluate.add_argument(
        "--batch", type=ranged(int, 1), default=16, help="choices scored at once (default %(default)s)"
    )
    evaluate.add_argument("--json", type=Path, help="write the result to this file")
    evaluate.set_defaults(command=evaluate_command)

    bench = commands.add_parser("bench", help="measure speed beside other systems", allow_abbrev=False)
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    step = benches.add_parser("step", help="a training step beside transformers", allow_abbrev=False)
    step.add_argument("config", type=Path, help="the run's TOML file; settings can be overridden as in train")
    step.add_argument("--rounds", type=ranged(int, 1), default=9, help="timed steps of each (default %(default)s)")
    step.add_argument("--json", type=Path, help="write the result to this file")
    step.set_defaults(command=bench_step_command)
    block = benches.add_parser("moe", help="one Mixture-of-Experts block, GPU or CPU", allow_abbrev=False)
    block.add_argument("--shape", default="qwen3-30b-a3b", help="name of the shape (default %(default)s)")
    block.add_argument("--rounds", type=ranged(int, 1), default=20, help="timed rounds (default %(default)s)")
    block.add_argument("--json", type=Path, help="write the result to this file")
    block.set_defaults(command=bench_moe_command)

    schedule = commands.add_parser("schedule", help="a pipeline schedule as a table and a picture", allow_abbrev=False)
    schedule.add_argument("--kind", default="dualpipev", help="the schedule (default %(default)s)")
    schedule.add_argument("--pp", type=ranged(int, 1), default=4, help="pipeline ranks (default %(default)s)")
    schedule.add_argument(
        "--microbatches", type=ranged(int, 1), default=16, help="microbatches of a step (default %(default)s)"
    )
    schedule.add_argument(
        "--chunks", type=ranged(int, 1), default=2, help="stages of a rank, interleaved only (default %(default)s)"
    )
    schedule.add_argument("--picture", type=Path, help="where to save the picture (default KIND-ppP-mM.png)")
    schedule.set_defaults(command=schedule_command)
    return parser


# %%
#| export
def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    try:
        known, overrides = make_parser().parse_known_args(arguments)
        return known.command(known, overrides)
    except UserError as error:
        print(f"pithtrain: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pithtrain: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        return 141


# %% [markdown]
# A mistake is one line and exit code 2, and no torch was imported to find it:

# %%
print("exit code", main(["train", "configs/none.toml"]))
print("exit code", main(["generate", "runs/none"]))

# %% [markdown]
# `python -m pithtrain.cli` does the same as `pithtrain`; launchers such as torchrun want a module. Running this
# notebook must not, and a notebook has no `__spec__`.

# %%
#| export
if __name__ == "__main__" and globals().get("__spec__") is not None:
    sys.exit(main())
