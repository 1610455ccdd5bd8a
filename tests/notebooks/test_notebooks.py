"""Every notebook runs as a script, says nothing alarming, writes nothing here, and shows its figures.

`make test-notebooks` runs this and then the .ipynb twins under nbdev's runner.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted((REPOSITORY / "nbs").rglob("*.py"))
SECONDS = 180


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def tail(text: str | bytes | None) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    return "\n".join(text.splitlines()[-25:])


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_a_notebook_runs_as_a_script(notebook: Path, tmp_path: Path):
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    before = files_of(REPOSITORY / "nbs")
    command = [sys.executable, str(notebook)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=SECONDS)
    except subprocess.TimeoutExpired as late:
        pytest.fail(
            f"{name_of(notebook)} ran over {SECONDS} s\n{tail(late.stdout)}\n{tail(late.stderr)}", pytrace=False
        )
    said = f"{tail(done.stdout)}\n{tail(done.stderr)}"
    if done.returncode != 0:
        pytest.fail(f"{name_of(notebook)} left with {done.returncode}\n{said}", pytrace=False)
    if "Warning" in done.stderr:
        pytest.fail(f"{name_of(notebook)} warns\n{said}", pytrace=False)
    assert not list(tmp_path.iterdir()), "it wrote into the folder it was run from"
    assert files_of(REPOSITORY / "nbs") <= before, "it wrote beside the notebooks"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_a_cell_that_makes_a_figure_ends_with_it(notebook: Path):
    """Then Jupyter shows it once; `plt.show()` would warn in a script, and a chosen backend would hide it."""
    for cell in notebook.read_text(encoding="utf-8").split("\n# %%"):
        code = cell.partition("\n")[2]
        if cell.startswith(" [markdown]") or "plt." not in code:
            continue
        for wrong in ("plt.show(", "plt.close(", "plt.switch_backend(", "matplotlib.use("):
            assert wrong not in code, f"{wrong}) in {name_of(notebook)}"
        body = ast.parse(code).body
        shown = [ast.unparse(node) for node in body if isinstance(node, ast.Assign)]
        if any(line.startswith("fig") and "= plt.subplots(" in line for line in shown):
            assert ast.unparse(body[-1]) == "fig", f"end this cell of {name_of(notebook)} with `fig`:\n{code}"


DRAWING = """\
# %% [markdown]
# # Drawing
#
# > Two figures.

# %%
from matplotlib.figure import Figure

figure = Figure()
figure.subplots().plot([1, 2])
figure

# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots()
ax.plot([1, 2])
fig
"""


def test_figures_appear_once_in_jupyter(tmp_path: Path):
    from jupyter_client.manager import start_new_kernel

    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "drawing.py").write_text(DRAWING)
    literate = REPOSITORY / "tools" / "literate.py"
    subprocess.run([sys.executable, literate, "notebooks", "--root", tmp_path], check=True, capture_output=True)
    cells = json.loads((tmp_path / "nbs" / "drawing.ipynb").read_text())["cells"]
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    manager, client = start_new_kernel(kernel_name="python3", env=environment)
    counts: list[int] = []
    try:
        for cell in cells:
            if cell["cell_type"] == "code":
                shown: list[dict] = []
                hook = shown.append
                reply = client.execute_interactive("".join(cell["source"]), output_hook=hook, timeout=60)
                assert reply["content"]["status"] == "ok", reply["content"]
                counts.append(sum("image/png" in message["content"].get("data", {}) for message in shown))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert counts == [0, 1, 1]
