"""Sphinx's settings. The pages are laid out by tools/docs.py, which `make docs` runs."""

import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from docs_api import full_names, modules  # noqa: E402

project, author, html_title = "PithTrain", "the PithTrain authors", "PithTrain"
copyright = "2026 onwards, the PithTrain authors"
extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.mathjax"]
mathjax_path = "mathjax/tex-chtml.js"  # of this site, as is everything: no page asks another for anything
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline", "attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tools/docs.py has run them, two at a time
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
nb_merge_streams, nb_render_markdown_format = True, "myst"
# A notebook may go from a title to its third level; a bare name in a signature may be one of two modules'.
suppress_warnings = ["myst.header", "ref.python"]
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_static_path, templates_path = [str(ROOT / "docs/_static")], [str(ROOT / "docs/_templates")]
html_favicon = str(ROOT / "docs/_static/icon.svg")
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_search_scorer = str(ROOT / "docs/search_scorer.js")
html_copy_source = html_show_sphinx = False
html_theme_options = {"navigation_with_keys": False, "top_of_page_buttons": []}
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .gp, .go"


def link_names(app, doctree):
    """What prose writes in backticks, and the reference knows, becomes a link to it."""
    names, own = full_names(ROOT), module_of(app.env.docname)
    for literal in list(doctree.findall(nodes.literal)):
        text = literal.astext().removesuffix("()")
        near = literal.parent
        while near is not None and not isinstance(
            near, nodes.reference | nodes.title | addnodes.desc_signature | addnodes.pending_xref
        ):
            near = near.parent
        full = names.get(f"{own}.{text}") or (names.get(text) if clear(literal.astext()) else None)
        if near is not None or full is None or full == own:
            continue
        link = addnodes.pending_xref(
            "", refdomain="py", reftype="obj", reftarget=full, refexplicit=True, refwarn=True, refdoc=app.env.docname
        )
        literal.replace_self(link)
        link += literal


def clear(text: str) -> bool:
    """Whether a name can only be the package's: `run` may be anything, `run()`, `RMSNorm` and `all_to_all` not."""
    return text.endswith("()") or "." in text or "_" in text or text != text.lower()


def module_of(docname: str) -> str:
    """The module whose names a page may use bare: of a notebook or a page of the reference."""
    if docname.startswith("api/"):
        return docname.removeprefix("api/")
    source = f"{docname}.py."
    for module, path in modules(ROOT).items():
        head = path.read_text(encoding="utf-8")[:600]
        if docname.startswith("nbs/") and source in head:
            return module
    return ""


def add_downloads(app, pagename, templatename, context, doctree):
    """Under each title: the page as a notebook, as Markdown, and its source."""
    if doctree is None or "body" not in context:
        return
    name = pagename.rpartition("/")[2]
    code = pagename.startswith("nbs/") or pagename.removeprefix("api/") in modules(ROOT)
    links = [(f"{name}.ipynb", "Notebook (.ipynb)", " download"), (f"{name}.md", "Markdown", "")]
    links.append((f"{name}.py", "Source (.py)", "") if code else (f"{name}.source.md", "Source (.md)", ""))
    row = "".join(f'<a href="{file}"{extra}>{label}</a>' for file, label, extra in links)
    head, close, rest = context["body"].partition("</h1>")
    context["body"] = f'{head}{close}<p class="page-links">{row}</p>{rest}' if close else context["body"]


def bring_mathjax(app, error):
    """Of MathJax, the one file that pages load, and its fonts."""
    package = Path(str(distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax")))
    there = Path(app.outdir) / "_static/mathjax"
    shutil.copytree(package / "output/chtml/fonts", there / "output/chtml/fonts", dirs_exist_ok=True)
    shutil.copy(package / "tex-chtml.js", there)


def setup(app):
    app.connect("doctree-read", link_names)
    app.connect("html-page-context", add_downloads)
    app.connect("build-finished", bring_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
