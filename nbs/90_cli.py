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
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import pithtrain
from pithtrain.config import REFUSALS, MeshConfig, UserError, describe_refusal, describe_settings, differences
from pithtrain.config import load_config, load_run_config, parse_override, section_from_table
from pithtrain.parallel.launch import find_launch, launch
from pithtrain.parallel.pipeline.generate import KINDS


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
            raise UserError(f"{argument}: has no value, or no CONFIG stands before it; see --help")
        pairs.append((key, text))
    return pairs


# %%
parse_overrides(["--train.steps", "500", "--run.name=wide"])


# %%
#| export
@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal of a file into the user's mistake."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


# %%
#| export
def save_json(result: dict, path: Path | None) -> None:
    """Write a result, where a file was asked for."""
    if path is not None:
        with writing(path):
            path.write_text(json.dumps(result, indent=2) + "\n")


# %% [markdown]
# ## Commands
#
# Each is a function that imports what it needs. Its exit code is 0 unless it says otherwise.


# %%
#| export
def train_command(arguments: argparse.Namespace) -> int:
    """Train a run, or go on with it: alone, or as one rank of a job that a launcher started."""
    launch, store = find_launch(os.environ), None
    with ExitStack() as stack:
        if launch.world_size > 1:
            from pithtrain.parallel.watch import watch

            store = stack.enter_context(watch(launch))
        config = load_config(arguments.config, arguments.overrides)
        from pithtrain.train.trainer import train

        step, steps = train(config, launch, store), config.train.steps
    if step < steps and launch.rank == 0:
        print(f"stopped and saved at step {step} of {steps}; the same command goes on from there")
    return 130 if step < steps else 0


# %%
#| export
def launch_command(arguments: argparse.Namespace) -> int:
    """Start `pithtrain train` as several ranks on this host."""
    config = load_config(arguments.config, arguments.overrides)  # a mistake is answered once
    from pithtrain.parallel.mesh import check_axes, fit_axes
    from pithtrain.train.step import check_memory
    from pithtrain.train.trainer import choose_compute

    check_axes(config, fit_axes(config.mesh, arguments.nproc))
    device, _ = choose_compute(config.run)
    check_memory(config, arguments.nproc, device, beside=arguments.nproc if device.type == "cpu" else 1)
    given = [f"--{key}={text}" for key, text in arguments.overrides]
    return launch(arguments.nproc, ["-m", "pithtrain.cli", "train", str(arguments.config), *given])


# %%
#| export
def parse_mesh(text: str, mesh: MeshConfig, overrides: list[tuple[str, str]]) -> tuple[MeshConfig, int]:
    """`mesh` with what `dp=2,ep=2` says, and the ranks that it takes.

    Raises UserError for what is not a mesh, and for what `overrides` say too."""
    pairs = [[word.strip() for word in pair.partition("=")] for pair in text.split(",")]
    said = {key: parse_override(value) for key, _, value in pairs}
    if len(said) < len(pairs) or not all(equals for _, equals, _ in pairs):
        raise UserError(f"--mesh: {text!r} is not a list of axes and sizes, each axis once, as in dp=2,ep=2")
    if twice := [key for key, _ in overrides if key.removeprefix("mesh.") in said]:
        raise UserError(f"--{twice[0]}: is also in --mesh {text}; give it once")
    mesh = section_from_table(MeshConfig, "--mesh", vars(mesh) | said)
    ranks = mesh.pp * (mesh.dp or mesh.copies) * mesh.cp * mesh.ep
    if ranks == 1:
        raise UserError(f"--mesh: {text!r} is one rank, with which others are compared; give an axis 2 or more")
    return mesh, ranks


# %%
#| export
def verify_command(arguments: argparse.Namespace) -> int:
    """Compare a mesh of CPU processes with one process; 0 where they agree."""
    config = load_config(arguments.config, arguments.overrides)
    mesh, ranks = parse_mesh(",".join(arguments.mesh), config.mesh, arguments.overrides)
    from pithtrain.verify import fit_config, verify

    config = dataclasses.replace(config, mesh=mesh)
    fitted = fit_config(config, ranks)
    for change in differences(fitted, config):
        why = " (a smaller one turns rounding into steps)" if change.startswith("optimizer.eps") else ""
        print(f"for this comparison: {change}{why}")
    (found,) = verify([fitted], ranks, arguments.steps)
    sizes = [f"{k}={v}" for k, v in vars(mesh).items() if v not in (0, 1) and (k != "schedule" or mesh.pp > 1)]
    print(f"{arguments.steps} steps on {ranks} processes ({','.join(sizes)}) against one, largest relative differences")
    for what, value in (("loss", found.loss), ("balance loss", found.balance), ("gradient norm", found.grad_norm)):
        print(f"  {what:<16}{value:.1e}")
    print(f"  {'weights':<16}{found.weight:.1e}  ({found.name})")
    print(f"  {'routing':<16}{found.load:.1e}  of the pairs went to another expert")
    passed = found.largest <= arguments.tolerance
    print(f"{'PASS' if passed else 'FAIL'}: {found.largest:.1e}, tolerance {arguments.tolerance:.1e}")
    return 0 if passed else 1


# %%
#| export
def rehearse_command(arguments: argparse.Namespace) -> None:
    """Run one rank of a mesh on this device, without its peers."""
    config = load_config(arguments.config, arguments.overrides)
    ranks = arguments.ranks or config.mesh.pp * config.mesh.dp * config.mesh.cp * config.mesh.ep
    if not ranks:
        raise UserError("--ranks: not given, and mesh.dp is 0, to be inferred from it; give one of the two")
    from pithtrain.rehearse import describe_rehearsal, rehearse

    result = rehearse(config, arguments.rank, ranks, arguments.steps)
    print(describe_rehearsal(result))
    save_json(result._asdict(), arguments.json)


# %%
#| export
def generate_command(arguments: argparse.Namespace) -> None:
    """Print a prompt and what the model makes of it."""
    load_run_config(arguments.run)  # a mistake is answered before torch is imported
    from pithtrain.evaluate import use_accelerator
    from pithtrain.train.generate import generate
    from pithtrain.train.run import open_run

    run, draw = use_accelerator(open_run(arguments.run)), (arguments.temperature, arguments.top_k, arguments.seed)
    print(generate(run, arguments.prompt, arguments.tokens, *draw))


# %%
#| export
def import_command(arguments: argparse.Namespace) -> None:
    """Make a run of a published model's folder."""
    from pithtrain.hub import import_model

    import_model(arguments.folder, arguments.run)


# %%
#| export
def export_command(arguments: argparse.Namespace) -> None:
    """Write a run's newest checkpoint as a published model."""
    load_run_config(arguments.run)  # a mistake is answered before torch is imported
    from pithtrain.hub import export_model

    dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", None: ""}[arguments.dtype]
    export_model(arguments.run, arguments.folder, dtype, int(arguments.shard_gb * 1e9))


# %%
#| export
def evaluate_command(arguments: argparse.Namespace) -> None:
    """Print a run's held-out loss, on other text where --data.KEY says so, and its score on a file of questions."""
    load_run_config(arguments.run)
    for key in (key for key, _ in arguments.overrides if not key.startswith("data.")):
        arguments.parser.error(f"--{key}: unexpected")
    data = load_config(arguments.run / "config.toml", arguments.overrides).data if arguments.overrides else None
    from pithtrain.evaluate import evaluate

    result = evaluate(arguments.run, arguments.choices, arguments.batch, data, report=print)
    for what, values in result.items():
        print(f"{what}: " + ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in values.items()))
    save_json(result, arguments.json)


# %%
#| export
def bench_step_command(arguments: argparse.Namespace) -> None:
    """Time a training step beside transformers; print a table, write JSON where asked."""
    config = load_config(arguments.config, arguments.overrides)
    if meant := [key for key, _ in arguments.overrides if key.startswith("mesh.")]:
        raise UserError(f"--{meant[0]}: bench step measures one process; leave it out")
    from pithtrain.bench_step import bench_step, describe_bench_step

    result = bench_step(config, arguments.rounds)
    print(describe_bench_step(result))
    save_json(result, arguments.json)


# %%
#| export
def bench_moe_command(arguments: argparse.Namespace) -> None:
    """Time one Mixture-of-Experts block beside its floor and its peers; write JSON where asked."""
    import torch

    from pithtrain.bench import bench_moe, shape_named

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = bench_moe(shape_named(arguments.shape), device, arguments.rounds)
    save_json(result, arguments.json)


# %%
#| export
def schedule_command(arguments: argparse.Namespace) -> None:
    """Print a pipeline schedule's bubble and peak activations, and save its picture."""
    from pithtrain.parallel.pipeline.describe import compare, describe
    from pithtrain.parallel.pipeline.draw import draw
    from pithtrain.parallel.pipeline.generate import generate
    from pithtrain.parallel.pipeline.lower import lower
    from pithtrain.parallel.pipeline.simulate import Costs

    kind, pp, microbatches, chunks = arguments.kind, arguments.pp, arguments.microbatches, arguments.chunks
    costs = Costs(hidden=arguments.hidden, send=arguments.send)
    unit = f"unit of time: the forward of 1/{pp} of the model, also taken by each half of its backward"
    if chunks and kind != "interleaved":
        raise UserError(f"--chunks: only interleaved has a choice, {kind} has not; leave it out")
    if kind == "all" and arguments.picture:
        raise UserError("--picture: of all kinds there is a table and no picture; leave it out, or choose a kind")
    if kind == "all":
        print(compare(pp, microbatches, costs), unit, sep="\n")
        return
    schedule = lower(generate(kind, pp, microbatches, chunks or 2))
    costs = costs.split(schedule.stages // pp)
    print(describe(schedule, costs), unit, sep="\n")
    size = f"pp{pp}-m{microbatches}" + f"-chunks{chunks or 2}" * (kind == "interleaved")
    picture = arguments.picture or Path(f"{kind}-{size}.png")
    with writing(picture):
        draw(schedule, costs, path=picture)
    print(f"picture: {picture}")


# %% [markdown]
# ## The parser
#
# A number out of range and a file that could not be written are refused while the arguments are read.


# %%
#| export
def ranged(kind: type, low: float, high: float = 2**63 - 1) -> Callable[[str], float]:
    """An argparse type: a number of type `kind` from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            wanted = "a finite number" if value - value else f"at most {high}" if value > high else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {wanted}")
        return value

    parse.__name__ = kind.__name__
    return parse


# %%
#| export
def output(*endings: str) -> Callable[[str], Path]:
    """An argparse type: a file to write; one that could not be is refused before the work that it is to hold."""

    def parse(text: str) -> Path:
        path = Path(text)
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}; make it, or choose another place")
        if path.is_dir():
            raise UserError(f"{path}: is a folder; expected a file to write")
        if path.suffix not in endings:
            raise UserError(f"{path}: expected a name that ends in {' or '.join(endings)}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{path}: cannot be written (no permission); choose another place")
        return path

    return parse


# %% [markdown]
# What argparse refuses it refuses with its usage, lines of it before the mistake. Ours says what is wrong and no more.


# %%
#| export
class Parser(argparse.ArgumentParser):
    """argparse's, whose mistakes are a UserError, with methods for what several commands take."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments in one line that names the option."""
        raise UserError(f"{message.removeprefix('argument ')}; {self.prog} --help lists the options")

    def config(self) -> None:
        """The config of a run, and with it every setting as an option."""
        self.usage = f"{self.prog} [OPTION ...] CONFIG [--SECTION.KEY VALUE ...]"
        self.add_argument("config", type=Path, help="the run's TOML file, for one configs/tiny.toml")
        self.set_defaults(overrides=())

    def number(self, flag: str, default: float, low: float, help: str, high: float = 2**63 - 1) -> None:
        """A number from `low` to `high`, of the type of its default."""
        kind = ranged(type(default), low, high)
        self.add_argument(flag, type=kind, default=default, help=f"{help} (default {default})")

    def json(self) -> None:
        """Where to write the result."""
        self.add_argument("--json", type=output(".json"), help="write the result to this file")


# %%
#| export
def make_parser() -> Parser:
    """The parser of all commands; each sets `command` to its function and `parser` to its own parser."""
    whole = Parser(prog="pithtrain", description=pithtrain.__doc__, allow_abbrev=False)
    whole.add_argument("--version", action="version", version=f"pithtrain {pithtrain.__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def add(group: argparse._SubParsersAction, name: str, command: Callable, help: str) -> Parser:
        parser = group.add_parser(name, help=help, description=command.__doc__, allow_abbrev=False)
        parser.set_defaults(command=command, parser=parser)
        return parser

    train = add(commands, "train", train_command, "train a run, or go on with one that was interrupted")
    train.description = f"{train.description} Any setting can be overridden:\n\n{describe_settings()}"
    train.formatter_class = argparse.RawDescriptionHelpFormatter
    train.config()

    several = add(commands, "launch", launch_command, "train as several ranks on this host")
    several.add_argument("--nproc", type=ranged(int, 1), required=True, help="number of ranks")
    several.config()

    verify = add(commands, "verify", verify_command, "check that a mesh of processes trains as one process does")
    verify.config()
    verify.add_argument("--mesh", required=True, action="append", help="sizes of the axes, for one dp=2,ep=2")
    verify.number("--steps", 3, 1, "optimiser steps")
    verify.number("--tolerance", 1e-5, 0, "largest relative difference")

    rehearse = add(commands, "rehearse", rehearse_command, "run one rank of a mesh without its peers: does it fit?")
    rehearse.config()
    rehearse.add_argument("--ranks", type=ranged(int, 1), help="ranks of the job (default: pp x dp x cp x ep)")
    rehearse.number("--rank", 0, 0, "the one to be")
    rehearse.number("--steps", 3, 1, "steps, the first warms up")
    rehearse.json()

    generate = add(commands, "generate", generate_command, "text from a trained run")
    generate.add_argument("run", type=Path, help="the run's folder, runs/NAME")
    generate.add_argument("--prompt", default="def ", help="text to go on from (default %(default)r)")
    generate.number("--tokens", 200, 1, "tokens at most")
    generate.number("--temperature", 0.8, 0, "0 takes the likeliest")
    generate.number("--top-k", 50, 0, "draw from so many; 0: all")
    generate.number("--seed", 0, 0, "seed of the draws")

    bring = add(commands, "import", import_command, "make a run of a published model's folder")
    bring.add_argument("folder", type=Path, help="the folder: config.json, safetensors files, tokenizer.json")
    bring.add_argument("run", type=Path, help="the run's folder to make, runs/NAME")

    export = add(commands, "export", export_command, "a run's newest checkpoint as a published model")
    export.add_argument("run", type=Path, help="the run's folder, runs/NAME")
    export.add_argument("folder", type=Path, help="the folder to make")
    dtypes = ("float32", "bfloat16", "float16")
    export.add_argument("--dtype", choices=dtypes, help="of the weights (default: as imported, or float32)")
    export.number("--shard-gb", 5.0, 0.001, "largest file, in GB")

    evaluate = add(commands, "evaluate", evaluate_command, "held-out loss and multiple choice")
    evaluate.add_argument("run", type=Path, help="the run's folder, runs/NAME")
    evaluate.add_argument("--choices", type=Path, help="questions: JSON lines of context, choices and answer")
    evaluate.number("--batch", 16, 1, "choices scored at once")
    evaluate.json()
    evaluate.usage = f"{evaluate.prog} [OPTION ...] RUN [--data.KEY VALUE ...]"
    evaluate.set_defaults(overrides=())

    bench = commands.add_parser("bench", help="measure speed beside other systems", allow_abbrev=False)
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    step = add(benches, "step", bench_step_command, "a training step beside transformers")
    step.config()
    step.number("--rounds", 9, 1, "timed steps of each")
    step.json()
    block = add(benches, "moe", bench_moe_command, "one Mixture-of-Experts block, GPU or CPU")
    shapes = "qwen3-30b-a3b, deepseek-v2-lite, gpt-oss-like or tiny"
    block.add_argument("--shape", default="qwen3-30b-a3b", help=f"{shapes} (default %(default)s)")
    block.number("--rounds", 20, 1, "timed passes in each turn, of one turn for each entrant; on a GPU 10 ms for each")
    block.json()

    schedule = add(commands, "schedule", schedule_command, "a pipeline schedule as a table and a picture")
    kinds = ", ".join(KINDS)
    schedule.add_argument("--kind", default="dualpipev", help=f"{kinds}, or all, compared (default %(default)s)")
    schedule.number("--pp", 4, 1, "pipeline ranks")
    schedule.number("--microbatches", 16, 1, "microbatches of a step")
    schedule.add_argument("--chunks", type=ranged(int, 1), help="stages of a rank, interleaved only (default 2)")
    schedule.number("--hidden", 0.0, 0, "share of a forward that overlap hides", high=1)
    schedule.number("--send", 0.0, 0.0, "what a transfer takes, of the forward of 1/PP of the model")
    picture = output(".png", ".svg", ".pdf")
    schedule.add_argument("--picture", type=picture, help="where to save the picture (default KIND-ppP-mM.png)")
    return whole


# %%
for mistake in (["trian"], ["generate", "runs/tiny", "--temperature", "-1"]):
    try:
        make_parser().parse_args(mistake)
    except UserError as error:
        print(error)


# %%
#| export
def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    try:
        known, rest = make_parser().parse_known_args(arguments)
        if "overrides" in known:
            known.overrides = parse_overrides(rest)
        elif rest:
            known.parser.error(f"{rest[0]}: unexpected")
        return known.command(known) or 0
    except UserError as error:
        print(f"pithtrain: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pithtrain: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        return 141
    except REFUSALS as error:
        print(f"pithtrain: {describe_refusal(error)}", file=sys.stderr)
        return 2


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
def run() -> NoReturn:
    """`main`, and the end of the process, in which another Ctrl-C changes nothing any more."""
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


# %%
#| export
if __name__ == "__main__" and globals().get("__spec__") is not None:
    run()
