"""The way from notebooks to modules and back, on a small tree of its own and on the real one."""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LITERATE = REPOSITORY / "tools" / "literate.py"

spec = importlib.util.spec_from_file_location("literate", LITERATE)
literate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(literate)

BASE = '''\
# %% [markdown]
# # Base
#
# > What the others import.

# %%
#| default_exp base

# %%
#| export
import math

# %% [markdown]
# Area of a circle.

# %%
def area(radius):
    return 3 * radius**2


# %%
#| export
def area(radius):
    """π r²."""
    # copy the radius twice: more than one use
    return math.pi * radius**2


# %%
assert area(0) == 0
'''

RING = """\
# %% [markdown]
# # Ring
#
# > Imports across packages.

# %%
#| default_exp shapes.ring

# %%
#| export
from functools import lru_cache

from pithtrain.base import area

# %%
#| export
@lru_cache
def ring(outer, inner):
    return area(outer) - area(inner)

# %%
#| export
class Ring:
    def __init__(self, outer, inner):
        self.area = ring(outer, inner)
"""

TASK = """\
# %% [markdown]
# # Task
#
# > A measured task.

# %%
#| default_exp task

# %%
#| export
from pithtrain.shapes.ring import ring

# %%
#| export
def task():
    return ring(2, 1)"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository of three notebooks, exported. The last one ends without a newline."""
    (tmp_path / "settings.ini").write_bytes((REPOSITORY / "settings.ini").read_bytes())
    (tmp_path / "nbs" / "ate_bench").mkdir(parents=True)
    for name, text in {"01_base.py": BASE, "02_ring.py": RING, "ate_bench/01_task.py": TASK}.items():
        (tmp_path / "nbs" / name).write_text(text, encoding="utf-8")
    succeed(tmp_path, "export")
    return tmp_path


def call(root: Path, *words: str) -> tuple[str, str]:
    """What a command prints, and the message it fails with; in this process, where nbdev is imported once."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(root)
        patch.setattr(sys, "argv", ["literate.py", *words, "--root", str(root)])
        try:
            literate.main()
        except SystemExit as stop:
            assert isinstance(stop.code, str) and stop.code
            return printed.getvalue(), stop.code
    return printed.getvalue(), ""


def succeed(root: Path, *words: str) -> str:
    printed, message = call(root, *words)
    assert message == ""
    return printed


def fail(root: Path, *words: str) -> str:
    """The message of a command that must fail and change nothing."""
    before = contents(root)
    printed, message = call(root, *words)
    assert message and not printed
    assert contents(root) == before
    return message


def contents(root: Path) -> dict[str, bytes]:
    files = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def change(path: Path, old: str, new: str) -> None:
    text = path.read_bytes().decode()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path}"
    path.write_bytes(text.replace(old, new).encode())


def run(root: Path, program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Export


def test_the_modules_work_and_lead_home(tree: Path):
    assert run(tree, "from ate_bench.task import task; print(round(task(), 4))") == "9.4248"
    ring = (tree / "pithtrain" / "shapes" / "ring.py").read_text()
    assert "\nfrom ..base import area\n" in ring
    assert "File to edit: ../../nbs/02_ring.py.\n" in ring
    assert re.findall(r"^# %% (\w+)@[0-9a-f]{8}$", ring, re.M) == ["imports", "ring", "Ring"]
    assert "from pithtrain.shapes.ring import ring" in (tree / "ate_bench" / "task.py").read_text()


def test_a_comment_stays_a_comment(tree: Path):
    change(tree / "nbs" / "01_base.py", "import math\n", "import math\n# copy the weights\n# !ls\n# %time\n")
    succeed(tree, "export")
    assert "import math\n# copy the weights\n# !ls\n# %time\n" in (tree / "pithtrain" / "base.py").read_text()


def test_exporting_twice_changes_no_byte(tree: Path):
    before = contents(tree)
    stamps = {path: path.stat().st_mtime_ns for path in tree.rglob("*.py")}
    assert succeed(tree, "export") == ""
    assert contents(tree) == before
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*.py")} == stamps
    assert succeed(tree, "check") == "3 modules match their notebooks\n"


def test_one_notebook_can_be_exported_alone(tree: Path):
    for name in ("01_base", "02_ring"):
        (tree / f"nbs/{name}.py").open("a").write("\n# %%\n#| export\nlast = 1\n")
    assert succeed(tree, "export", "nbs/02_ring.py") == "exported pithtrain/shapes/ring.py\n"
    assert "pithtrain/base.py: stale" in fail(tree, "check")
    assert "nbs/03_no.py" in fail(tree, "export", "nbs/03_no.py")


def test_a_cell_inserted_above_changes_no_other_line(tree: Path):
    module = tree / "pithtrain" / "shapes" / "ring.py"
    before = module.read_text().splitlines()
    new = "# %%\n#| export\ndef disc(radius):\n    return ring(radius, 0)\n\n\n# %%\n1 + 1\n\n# %%\n"
    change(tree / "nbs" / "02_ring.py", "# %%\n#| export\n@lru_cache", f"{new}#| export\n@lru_cache")
    succeed(tree, "export")
    after = module.read_text().splitlines()
    assert not [line for line in before if line not in after]
    added = [line for line in after if line not in before]
    assert [re.sub("@.*", "", line) for line in added] == [
        "# %% disc",
        "def disc(radius):",
        "    return ring(radius, 0)",
    ]


def test_prose_and_unexported_cells_do_not_reach_the_module(tree: Path):
    before = contents(tree)
    change(tree / "nbs" / "01_base.py", "# Area of a circle.", "# The area of a circle, and π.")
    change(tree / "nbs" / "01_base.py", "    return 3 * radius**2", "    return 3.1 * radius**2")
    assert succeed(tree, "export") == ""
    assert contents(tree)["pithtrain/base.py"] == before["pithtrain/base.py"]


# Check


def test_a_stale_module_fails_check(tree: Path):
    change(tree / "nbs" / "02_ring.py", "area(outer) - area(inner)", "area(outer) + area(inner)")
    message = "pithtrain/shapes/ring.py: stale against nbs/02_ring.py; run 'make export'"
    assert fail(tree, "check") == message
    done = subprocess.run([sys.executable, LITERATE, "check", "--root", tree], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{message}\n")
    succeed(tree, "export")
    succeed(tree, "check")


def test_check_names_every_problem(tree: Path):
    (tree / "pithtrain" / "orphan.py").write_text("")
    (tree / "pithtrain" / "shapes" / "__init__.py").write_text("by_hand = 1\n")
    (tree / "ate_bench" / "task.py").unlink()
    assert fail(tree, "check").splitlines() == [
        "ate_bench/task.py: missing; run 'make export'",
        "pithtrain/orphan.py: no notebook exports it; delete it",
        "pithtrain/shapes/__init__.py: no notebook exports it; delete it",
    ]


# Sync


@pytest.fixture
def edited(tree: Path) -> Path:
    change(tree / "pithtrain" / "base.py", "return math.pi * radius**2", "return math.pi * radius * radius  # ½τr²")
    return tree


def test_a_hand_edit_fails_check_and_is_not_overwritten(edited: Path):
    message = fail(edited, "check")
    assert message.startswith("pithtrain/base.py: ") and "edited by hand in area; run 'make sync'" in message
    message = fail(edited, "export")
    assert message.startswith("pithtrain/base.py: edited by hand in area; ") and "make sync" in message
    assert succeed(edited, "export", "--force") == "exported pithtrain/base.py\n"
    assert "½" not in (edited / "pithtrain" / "base.py").read_text()


def test_sync_carries_a_hand_edit_home(edited: Path):
    assert "synced pithtrain/base.py: block 'area' into nbs/01_base.py" in succeed(edited, "sync")
    new = BASE.replace("return math.pi * radius**2", "return math.pi * radius * radius  # ½τr²")
    assert (edited / "nbs" / "01_base.py").read_text(encoding="utf-8") == new
    succeed(edited, "check")
    assert succeed(edited, "export") == ""
    assert "# ½τr²" in (edited / "pithtrain" / "base.py").read_text(encoding="utf-8")
    assert succeed(edited, "sync") == "no module was edited by hand\n"


def test_sync_makes_relative_imports_absolute(tree: Path):
    module = tree / "pithtrain" / "shapes" / "ring.py"
    change(module, "from ..base import area\n", "from ..base import area, math\nfrom .. import base\n")
    change(
        module,
        "        self.area",
        "        from . import ring as here\n\n        self.module = here\n        self.area",
    )
    succeed(tree, "sync")
    notebook = (tree / "nbs" / "02_ring.py").read_text()
    assert "\nfrom pithtrain.base import area, math\nfrom pithtrain import base\n" in notebook
    assert "\n        from pithtrain.shapes import ring as here\n" in notebook
    assert "\nfrom ..base import area, math\nfrom .. import base\n" in module.read_text()
    succeed(tree, "check")
    program = "from pithtrain.shapes.ring import Ring; print(Ring(1, 0).module.__name__)"
    assert run(tree, program) == "pithtrain.shapes.ring"


def test_sync_into_a_cell_without_a_last_newline(tree: Path):
    change(tree / "ate_bench" / "task.py", "ring(2, 1)", "ring(3, 1)")
    succeed(tree, "sync")
    assert (tree / "nbs/ate_bench/01_task.py").read_text() == TASK.replace("ring(2, 1)", "ring(3, 1)")
    succeed(tree, "check")


def test_a_cell_whose_text_begins_another_is_not_mistaken(tree: Path):
    notebook = tree / "nbs" / "01_base.py"
    twin = "# %%\n#| export\nimport math\nimport cmath\n\n# %%\n#| export\nimport math\n"
    notebook.write_text(BASE.replace("# %%\n#| export\nimport math\n", twin), encoding="utf-8")
    succeed(tree, "export")
    module = tree / "pithtrain" / "base.py"
    head, marker, tail = module.read_text(encoding="utf-8").partition("# %% imports-2@")
    module.write_text(head + marker + tail.replace("import math", "import math, os", 1), encoding="utf-8")
    succeed(tree, "sync")
    text = notebook.read_text(encoding="utf-8")
    assert twin.removesuffix("import math\n") + "import math, os\n" in text
    succeed(tree, "check")


def test_the_second_of_two_equal_cells_can_be_edited(tree: Path):
    notebook, module = tree / "nbs" / "03_twins.py", tree / "pithtrain" / "twins.py"
    cell = "# %%\n#| export\ncount = 1\n"
    notebook.write_text(f"# %%\n#| default_exp twins\n\n{cell}\n{cell}")
    succeed(tree, "export")
    head, marker, tail = module.read_text().partition("# %% count-2@")
    module.write_text(head + marker + tail.replace("count = 1", "count = 2"))
    succeed(tree, "sync")
    assert notebook.read_text() == f"# %%\n#| default_exp twins\n\n{cell}\n{cell.replace('1', '2')}"
    succeed(tree, "check")


def test_sync_leaves_edits_of_the_notebook_alone(edited: Path):
    change(edited / "nbs" / "02_ring.py", "area(outer) - area(inner)", "area(outer) + area(inner)")
    ring = (edited / "nbs" / "02_ring.py").read_bytes()
    succeed(edited, "sync")
    assert (edited / "nbs" / "02_ring.py").read_bytes() == ring
    assert "pithtrain/shapes/ring.py: stale" in fail(edited, "check")


def test_two_edits_of_one_block_are_refused(edited: Path):
    change(edited / "pithtrain" / "shapes" / "ring.py", "area(outer) - ", "area(outer) + ")
    change(edited / "nbs" / "01_base.py", "math.pi * radius**2", "math.tau / 2 * radius**2")
    assert "block 'area' and its cell in nbs/01_base.py were both edited" in fail(edited, "sync")
    assert "edited by hand in area" in fail(edited, "export")
    assert "edited by hand in area" in fail(edited, "check")


def test_the_same_edit_on_both_sides_is_no_conflict(edited: Path):
    change(edited / "nbs" / "01_base.py", "math.pi * radius**2", "math.pi * radius * radius  # ½τr²")
    assert succeed(edited, "export") == "exported pithtrain/base.py\n"


def test_edits_of_two_blocks_meet(tree: Path):
    change(tree / "pithtrain" / "shapes" / "ring.py", "area(outer) - ", "area(outer) + ")
    change(tree / "nbs" / "02_ring.py", "def __init__(self, outer, inner)", "def __init__(self, outer, inner=0)")
    succeed(tree, "sync")
    new = RING.replace("area(outer) - ", "area(outer) + ").replace(
        "outer, inner):\n        s", "outer, inner=0):\n        s"
    )
    assert (tree / "nbs" / "02_ring.py").read_text() == new
    succeed(tree, "check")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\n# %% imports@", "\nimport os\n# %% imports@", "block 'the head' has no cell in nbs/01_base.py"),
        ("# %% area@", "# %% other@", "block 'other' has no cell in nbs/01_base.py"),
        ("import math\n", "import math\n\n# %%\nimport os\n", "block 'imports' is empty or holds a '# %%' line"),
        ("import math\n", "", "block 'imports' is empty"),
        ("import math\n", "import math as\n", "pithtrain/base.py (a block): invalid syntax: import math as"),
    ],
)
def test_what_has_no_place_in_the_notebook_is_refused(edited: Path, old: str, new: str, message: str):
    change(edited / "pithtrain" / "base.py", old, new)
    change(edited / "pithtrain" / "shapes" / "ring.py", "area(outer) - ", "area(outer) + ")
    assert message in fail(edited, "sync")
    assert "edited by hand" in fail(edited, "export")


def test_windows_line_ends_stay(tree: Path):
    for path in (tree / "nbs" / "01_base.py", tree / "pithtrain" / "base.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    succeed(tree, "check")
    assert succeed(tree, "export") == ""
    change(tree / "pithtrain" / "base.py", "math.pi * radius**2", "math.tau / 2 * radius**2")
    succeed(tree, "sync")
    new = BASE.replace("math.pi * radius**2", "math.tau / 2 * radius**2").replace("\n", "\r\n").encode()
    assert (tree / "nbs" / "01_base.py").read_bytes() == new
    succeed(tree, "check")


# What a notebook must not be


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "#| default_exp shapes.ring",
            "#| default_exp base",
            "pithtrain/base.py: exported by 01_base.py and by 02_ring.py",
        ),
        ("#| default_exp shapes.ring", "1", "nbs/02_ring.py: has exported cells but not one '#| default_exp"),
        ("#| default_exp shapes.ring", "#| default_exp", "nbs/02_ring.py: has exported cells but not one"),
        ("#| export\nclass", "#|export\nclass", "nbs/02_ring.py: cell '#|export': make its first line '#| export'"),
        ("#| export\nclass", "#| hide\n#| export\nclass", "cell '#| hide': make its first line '#| export'"),
        ("#| export\nclass", "#| export other\nclass", "cell '#| export other': make its first line"),
        ("class Ring:", "class Ring", "nbs/02_ring.py (a cell): expected ':': class Ring"),
    ],
)
@pytest.mark.parametrize("command", ["export", "check", "sync"])
def test_a_bad_notebook_is_refused(tree: Path, old: str, new: str, message: str, command: str):
    change(tree / "nbs" / "02_ring.py", old, new)
    assert message in fail(tree, command)


# The .ipynb twins


def test_twins_are_valid_and_stable(tree: Path):
    import nbformat

    succeed(tree, "notebooks")
    twin = tree / "nbs" / "ate_bench" / "01_task.ipynb"
    before = twin.read_bytes()
    nbformat.validate(nbformat.reads(before.decode(), as_version=4))
    succeed(tree, "notebooks")
    assert twin.read_bytes() == before


# The real repository


def test_the_repository_is_exported_and_quick_about_it(capsys: pytest.CaptureFixture):
    succeed(REPOSITORY, "check")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, LITERATE, "export"], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with capsys.disabled():
        print(f"[export of the whole: {seconds:.1f} s]", end=" ")
    assert seconds < 15  # 5 s on an idle machine


IMPORT_ALL = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("nbdev", "fastcore", "execnb", "jupytext"):
            raise ModuleNotFoundError(f"{name} must not be needed at run time", name=name)

sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name)
"""


def test_modules_import_without_the_literate_tools():
    paths = sorted([*REPOSITORY.glob("pithtrain/**/*.py"), *REPOSITORY.glob("ate_bench/*.py")])
    names = [".".join(p.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for p in paths]
    assert "pithtrain.layers.router" in names
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == names
    blocked = subprocess.run([sys.executable, "-c", IMPORT_ALL, "nbdev"], capture_output=True, text=True)
    assert "nbdev must not be needed" in blocked.stderr
