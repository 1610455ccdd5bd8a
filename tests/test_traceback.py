"""An error out of an exported module names the notebook line to edit."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pithtrain.traceback import notebook_line, notebook_of

REPOSITORY = Path(__file__).resolve().parent.parent

NOTEBOOK = """\
# %% [markdown]
# # Scale
#
# > A thing that fails.

# %%
#| default_exp scale

# %% [markdown]
# The small version begins as the exported one does, and is not what is meant.

# %%
def scale(x, by):
    half = by / 2
    return x / by / half


# %%
#| export
from pithtrain.config import UserError

# %%
#| export
def scale(x, by):
    half = by / 2
    if half > 1:
        raise UserError("too much")
    return x / by / half
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with one notebook, of ate_bench, exported. (A second pithtrain would hide the real one.)"""
    root = tmp_path_factory.mktemp("tree")
    (root / "nbs" / "ate_bench").mkdir(parents=True)
    (root / "nbs" / "ate_bench" / "01_scale.py").write_text(NOTEBOOK)
    command = [sys.executable, REPOSITORY / "tools" / "literate.py", "export", "--root", root]
    subprocess.run(command, check=True, capture_output=True)
    return root


def exported_line(source: str) -> int:
    """The line of NOTEBOOK that holds `source` in its last, exported cell."""
    lines = NOTEBOOK.splitlines()
    return len(lines) - lines[::-1].index(source)


def last_words(program: str, *path: Path) -> list[str]:
    """What a process that must die prints to standard error, by lines."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY.anchor)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr.splitlines()


def named_line(root: Path, words: str) -> str:
    """The source line that `notebook: nbs/...:LINE` points at."""
    name, line = re.fullmatch(r"notebook: (nbs/\S+):(\d+)", words).groups()
    return (root / name).read_text().splitlines()[int(line) - 1]


def test_an_error_of_the_package_ends_with_its_notebook_line():
    program = 'from pithtrain.config import config_from_tables as c; c({"model": {"top_k": 32}}, "a.toml")'
    lines = last_words(program)
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2].startswith("pithtrain.config.UserError: a.toml: model.top_k")
    frames = [i for i, line in enumerate(lines) if re.search(r"/pithtrain/\w+\.py.* line \d+", line)]
    failing = lines[frames[-1] + 1].strip()
    assert failing and named_line(REPOSITORY, lines[-1]).strip() == failing


def test_an_error_below_the_package_names_the_line_of_ours_that_led_there():
    lines = last_words(
        "import torch, pithtrain.layers.router as r; t = torch.ones; r.route(t(1, 2), t(2, 3), t(2), 1, True)"
    )
    assert lines[-2].startswith("RuntimeError")
    assert "F.linear(tokens.float(), weight.float())" in named_line(REPOSITORY, lines[-1])


def test_ate_bench_is_led_home_too(tree: Path):
    lines = last_words("import pithtrain; from ate_bench.scale import scale; scale(1, 0)", tree)
    assert lines[-2].startswith("ZeroDivisionError")
    assert lines[-1] == f"notebook: nbs/ate_bench/01_scale.py:{exported_line('    return x / by / half')}"


def test_the_innermost_exported_frame_is_named(tree: Path):
    scale = {"__name__": "scale"}
    module = tree / "ate_bench" / "scale.py"
    exec(compile(module.read_text(), str(module), "exec"), scale)
    with pytest.raises(scale["UserError"]) as caught:
        scale["scale"](1, 4)
    line = exported_line('        raise UserError("too much")')
    assert notebook_of(caught.tb) == f"nbs/ate_bench/01_scale.py:{line}"


def test_every_line_of_every_module_is_found():
    """Each line of code of each block, in all modules, leads to the same line of its notebook."""
    for module in [*REPOSITORY.glob("pithtrain/**/*.py"), *REPOSITORY.glob("ate_bench/*.py")]:
        lines = module.read_text().splitlines()
        starts = [i for i, line in enumerate(lines, start=1) if re.search(r"^# %% \S+@[0-9a-f]{8}$", line)]
        for start, end in zip(starts, [*starts[1:], len(lines) + 1], strict=False):
            for line in {start + 1, (start + end) // 2, end - 1}:
                if line > start and lines[line - 1].strip():
                    found = named_line(REPOSITORY, f"notebook: {notebook_line(str(module), line)}")
                    # An import is relative in the module: compare what is imported, and from where at last.
                    same = re.sub(r"from \.*(\S*) import", r"\1 import", lines[line - 1])
                    assert found.endswith(same.strip()), f"{module}:{line} is {lines[line - 1]!r}, not {found!r}"


def test_a_relative_import_that_fails_is_found():
    module = REPOSITORY / "pithtrain" / "layers" / "balance.py"
    line = module.read_text().splitlines().index("from .router import Routed") + 1
    found = named_line(REPOSITORY, f"notebook: {notebook_line(str(module), line)}")
    assert found == "from pithtrain.layers.router import Routed"


def test_without_the_notebook_its_name_is_given(tree: Path, tmp_path: Path):
    shutil.copytree(tree / "ate_bench", tmp_path / "ate_bench")
    lines = last_words("import pithtrain; from ate_bench.scale import scale; scale(1, 0)", tmp_path)
    assert lines[-1] == "notebook: nbs/ate_bench/01_scale.py"


def test_a_module_that_its_notebook_no_longer_exports_gets_the_name_alone(tree: Path, tmp_path: Path):
    shutil.copytree(tree, tmp_path / "tree")
    module = tmp_path / "tree" / "ate_bench" / "scale.py"
    text = module.read_text().replace("half = by / 2", "half = by / 2.0")
    module.write_text(text)
    line = text.splitlines().index("    return x / by / half") + 1
    assert notebook_line(str(module), line) == "nbs/ate_bench/01_scale.py"


def test_other_files_have_no_notebook(tmp_path: Path):
    other = tmp_path / "pithtrain_like.py"
    other.write_bytes(b"# %% auto\nx = '\xff'\n")
    assert notebook_line(str(other), 2) is None
    assert notebook_line(str(tmp_path / "missing.py"), 1) is None
    assert notebook_line("<string>", 1) is None
    assert notebook_of(None) is None
    assert last_words("import pithtrain; 1 / 0")[-1] == "ZeroDivisionError: division by zero"


def test_the_hook_calls_the_one_before():
    program = "import sys; sys.excepthook = lambda kind, *_: print('first', kind.__name__, file=sys.stderr)\n"
    lines = last_words(program + "from pithtrain.config import config_from_tables; config_from_tables(3, 'a.toml')")
    assert lines[0].startswith("first ")
    assert lines[1].startswith("notebook: nbs/01_config.py:")
    assert len(lines) == 2


def test_a_failure_report_names_the_notebook(tmp_path: Path):
    shutil.copy(REPOSITORY / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\nfrom pithtrain.config import config_from_tables\n\n\n"
        "def test_ours():\n    config_from_tables({'model': {'top_k': 32}}, 'a.toml')\n\n\n"
        "def test_own():\n    assert 1 == 2\n\n\n"
        "@pytest.mark.gpu\ndef test_gpu():\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "2 failed, 1 skipped" in done.stdout, done.stdout
    assert len(re.findall(r"^-+ notebook: nbs/01_config\.py:\d+ -+$", done.stdout, re.M)) == 1
    assert done.stdout.count("notebook:") == 1
    assert "needs a CUDA device" in done.stdout
