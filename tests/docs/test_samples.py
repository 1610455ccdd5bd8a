"""Code that pages show and the build does not run, since it is no cell: run here, as written, in a checkout of its own.

A fence without a language, or of `text`, is a drawing or what a program printed, and holds no commands. In the checkout
`configs/tiny.toml` takes two steps on a few files. `make test` is what CI runs itself, so it is not run again.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pithtrain.cli import make_parser
from pithtrain.config import describe_settings

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY / "tools"))

docs = pytest.importorskip("docs")

FENCE = re.compile(r"^(`{3,})(.*)\n((?:.*\n)*?)\1(?:\n|$)", re.M)
COMMAND = re.compile(r"^\s*(?:make|pip|pithtrain|ate-bench|python|torchrun|srun|\.venv/\S+|\$\w+|import|from) ?", re.M)
PAGES = {**docs.page_paths([]), "README": REPOSITORY / "README.md", "AGENTS": REPOSITORY / "AGENTS.md"}


def prose(page: Path) -> str:
    return "\n\n".join(cell.source for cell in docs.read_page(page).cells if cell.cell_type == "markdown")


def samples(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fence in a page's prose; the two files at the root show nothing but commands."""
    for _, language, text in FENCE.findall(prose(page)):
        if not language.startswith("{"):
            yield ("bash" if page.parent == REPOSITORY else language), text


SAMPLES = {name: list(samples(page)) for name, page in PAGES.items()}
RUN = [name for name, found in SAMPLES.items() if any(language not in ("", "text") for language, _ in found)]

# In place of what needs a cluster, a download or gigabytes.
SHORTER = {
    "--gib 0.5 1 2 4": "--gib 0.02",
    "train CONFIG": "train configs/tiny.toml",
    "/tmp/ate/torchtitan/torchtitan /tmp/ate/megatron-core/megatron": "ate_bench",
}
SRUN = """\
export SLURM_JOB_ID=1 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NODELIST=localhost
export SLURM_PROCID=0 SLURM_LOCALID=0
shift; exec "$@"
"""
PIP = """\
case $1 in
download) ;;
install) exec python -m pip "$@" --dry-run --quiet --no-deps;;
*) exit 1;;
esac
"""
LM_EVAL = """\
from types import SimpleNamespace

def simple_evaluate(model, tasks):
    [(log, greedy)] = model.loglikelihood([SimpleNamespace(args=("a", "b"))])
    assert log < 0, (log, tasks)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that git knows, the environment that runs this, and stand-ins under `bin`."""
    here = tmp_path / "pithtrain"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).exists():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, here / name, follow_symlinks=False)
    tiny = here / "configs/tiny.toml"
    short = re.sub(r"steps = \d+", "steps = 2", tiny.read_text())
    short = short.replace("[optimizer]\n", "[optimizer]\nwarmup = 0\n")
    tiny.write_text(short.replace("[data]\n", '[data]\ncorpus = "nbs"\npattern = "[2-4]*.py"\n'))
    (here / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if not path.name.startswith(".ready"):
            (here / ".venv" / path.name).symlink_to(path)
    (here / ".venv/.ready").touch()
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("pip", PIP)):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin/lm_eval.py").write_text(LM_EVAL)
    return here


def bash(text: str, here: Path) -> None:
    """Run commands; those of `.ci/run` are left to it."""
    mine = re.findall(r"^ *(make \S+)$", (REPOSITORY / ".ci/run").read_text(), re.M)
    lines = [line for line in text.splitlines() if line.partition("#")[0].strip() not in mine]
    said = "\n".join(lines)
    for long, short in SHORTER.items():
        said = said.replace(long, short)
    path = os.pathsep.join([str(here.parent / "bin"), str(here / ".venv/bin"), os.environ["PATH"]])
    modules = os.pathsep.join([str(here), str(here.parent / "bin")])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": modules, "EDITOR": "true", "OMP_NUM_THREADS": "1"}
    environment.pop("MAKEFLAGS", None)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", said], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{said}\n\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", RUN)
def test_the_samples_of_a_page_run(page: str, checkout: Path):
    for language, text in SAMPLES[page]:
        match language:
            case "bash":
                bash(text, checkout)
            case "python":
                bash(".venv/bin/pithtrain train configs/tiny.toml --run.name mine", checkout)
                (checkout / "sample.py").write_text(text)
                bash(".venv/bin/python sample.py", checkout)
            case "json":
                json.loads(text)
            case "toml":
                tomllib.loads(text)
            case _:
                assert language in ("", "text"), f"a sample of {language}, which nothing runs"


@pytest.mark.parametrize("page", PAGES)
def test_what_looks_like_code_is_a_sample_or_a_cell(page: str):
    for language, text in SAMPLES[page]:
        found = COMMAND.search(text)
        assert language not in ("", "text") or found is None, f"mark the fence of {found[0]!r} as bash or python"
    for cell in docs.read_page(PAGES[page]).cells:
        assert "skip-execution" not in cell.metadata.get("tags", [])


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_settings_that_prose_names_exist(page: str):
    text = prose(PAGES[page])
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    commands = next(action.choices for action in make_parser()._actions if action.choices)
    assert set(re.findall(r"`(?:\.venv/bin/)?pithtrain ([a-z]+)", text)) <= set(commands)
    settings = set(re.findall(r"^  --(\w+\.\w+)", describe_settings(), re.M))
    tables = "|".join({setting.partition(".")[0] for setting in settings})
    assert set(re.findall(rf"`(?:--)?((?:{tables})\.(?!py\b)\w+)", text)) <= settings
