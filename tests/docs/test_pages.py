"""What tools/docs.py makes of a page, without building the site."""

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY / "tools"))

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
docs = pytest.importorskip("docs")
docs_api = pytest.importorskip("docs_api")

ROUTER = REPOSITORY / "nbs/20_router.py"


def page(*cells: str):
    code = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate([docs.SETUP, *cells])]
    return nbformat.v4.new_notebook(cells=code, metadata={"kernelspec": {"name": "python3", "display_name": "Python"}})


def figure(title: str) -> str:
    drawn = "from matplotlib.figure import Figure\nfig = Figure()\nax = fig.subplots()\n"
    return (
        f"{drawn}ax.plot([1, 2], label='ours')\nax.legend()\nax.set(title={title!r}, xlabel='step', ylabel='loss')\nfig"
    )


def test_a_failing_cell_is_an_error():
    _, _, error = docs.run(ROUTER, page("print('before')", "1 / 0"))
    assert "ZeroDivisionError" in error
    assert "1 / 0" in error


def test_a_kernel_that_does_not_start_is_started_again(monkeypatch):
    starts, execute = [], nbclient.NotebookClient.execute

    def first_dies(client, **options):
        starts.append(client)
        if len(starts) == 1:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return execute(client, **options)

    monkeypatch.setattr(nbclient.NotebookClient, "execute", first_dies)
    notebook, _, error = docs.run(ROUTER, page("print('ran')"))
    assert not error
    assert notebook.cells[1].outputs[0].text == "ran\n"
    assert len(starts) == 2


def test_a_figure_is_told_by_its_title_axes_and_legend():
    notebook, _, error = docs.run(ROUTER, page(figure("Loss")))
    assert not error
    docs.described(notebook, ROUTER)
    image = notebook.cells[1].metadata["mystnb"]["image"]
    assert image["alt"] == "Loss. across: step. up: loss. legend: ours"
    assert image["width"].endswith("px")


def test_a_figure_is_told_by_what_its_author_wrote():
    notebook, _, _ = docs.run(ROUTER, page("#| alt: A line that falls.\n" + figure("")))
    docs.described(notebook, ROUTER)
    assert notebook.cells[1].metadata["mystnb"]["image"]["alt"] == "A line that falls."


def test_a_figure_that_nobody_describes_stops_the_build():
    notebook, _, _ = docs.run(ROUTER, page(figure("")))
    with pytest.raises(SystemExit, match="without a title"):
        docs.described(notebook, ROUTER)


def test_a_page_depends_on_what_it_imports_and_on_what_that_imports():
    known = docs_api.modules(REPOSITORY)
    found = docs.dependencies("from pithtrain.layers.experts import Experts", known)
    assert {known["pithtrain.layers.experts"], known["pithtrain.kernels.lang"]} <= found
    assert known["pithtrain.train.trainer"] not in found
    assert known["pithtrain.parallel.ring"] in docs.dependencies("from pithtrain.parallel import ring", known)


def test_links_to_sources_lead_to_pages():
    text = "[a](21_balance.py) [b](../docs/learn/exercises.md) [c](none.py) [d](https://site/x.py)"
    linked = docs.with_links(text, ROUTER)
    assert linked == "[a](21_balance.ipynb) [b](../learn/exercises.md) [c](none.py) [d](https://site/x.py)"
    assert docs.with_links("[a](../../nbs/20_router.py)", REPOSITORY / "docs/guide/data.md") == (
        "[a](../nbs/20_router.ipynb)"
    )


def test_the_reference_has_signatures_fields_and_methods():
    notebooks = {"pithtrain.layers.router": "nbs/20_router", "pithtrain.kernels.router": "nbs/13_router_kernel"}
    pages = docs_api.write_reference(REPOSITORY, notebooks)
    assert "{py:attribute} Routed.weights" in pages["api/pithtrain.kernels.router"]
    text = pages["api/pithtrain.layers.router"]
    for part in (
        "{py:function} route(tokens: Tensor, weight: Tensor, bias: Tensor, top_k: int",
        "{py:class} Router(hidden: int, experts: int, top_k: int",
        "{py:method} Router.forward(tokens: Tensor) -> Routed",
    ):
        assert part in text


def test_progress_leaves_its_last_state():
    cell = nbformat.v4.new_code_cell("%%bash\ntrain", id="a")
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text=text) for text in ("\r 0%", "\r 50%", "\r100%\n", "done\n")
    ]
    assert docs.commands(cell).source == "```bash\ntrain\n```\n\n```text\n100%\ndone\n```"
