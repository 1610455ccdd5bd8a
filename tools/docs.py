"""The documentation site: run the notebooks, lay the pages out for Sphinx, build, and write the twins.

Pages are the text notebooks `nbs/**/*.py` and the Markdown files of `docs/`. A Markdown file whose front matter
names a kernel is a notebook too (MyST-NB's `{code-cell}`). All of them are run by two processes; jupyter-cache keeps
what they showed until their code, or a module they import, changes. The reference is written from docstrings.

What Sphinx reads is laid out in `docs/_build/source`; the site is `docs/_build/html`. Beside `PAGE.html` lie
`PAGE.ipynb` with its outputs, `PAGE.md` for agents, and the source of a notebook, `PAGE.py`.
"""

import argparse
import base64
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import nbformat
from docs_api import definitions, modules, write_reference
from literate import absolute_imports, notebook_paths, read, read_notebook

ROOT = Path(__file__).resolve().parent.parent
SOURCE, HTML = ROOT / "docs/_build/source", ROOT / "docs/_build/html"
CACHE = ROOT / "docs/.jupyter_cache"
COMMANDS_SEE = ("pithtrain", "ate_bench", "README.md", "AGENTS.md")
SECONDS = 300  # that one cell may take
WORDS_A_MINUTE, LINES_A_MINUTE = 180, 20

# Runs before a page's own cells, and is not shown.
SETUP = "import runpy; runpy.run_path('tools/docs_figures.py')['register'](get_ipython())"


def page_paths(only: list[str]) -> dict[str, Path]:
    """Every page's source, by the name Sphinx knows it under. With `only`, just notebooks whose name holds one."""
    pages = {str(path.relative_to(ROOT).with_suffix("")): path for path in notebook_paths(ROOT)}
    pages = {name: path for name, path in pages.items() if not only or any(part in name for part in only)}
    for path in sorted((ROOT / "docs").rglob("*.md")):
        if "_build" not in path.parts:
            pages[str(path.relative_to(ROOT / "docs").with_suffix(""))] = path
    return pages


def runs(path: Path) -> bool:
    """Whether a page has code that runs."""
    return path.suffix == ".py" or re.match(r"---\n(?:.*\n)*?kernelspec:", read(path)) is not None


def read_page(path: Path) -> nbformat.NotebookNode:
    """A page as a notebook, as its author wrote it."""
    if path.suffix == ".py":
        notebook = read_notebook(path)
    else:
        import jupytext

        notebook = jupytext.reads(read(path), "md:myst" if runs(path) else "md")
        for index, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{index}"
    return nbformat.from_dict(notebook)


# What a page depends on ------------------------------------------------------------------------------------------

IMPORT = re.compile(r"(?:from|import) ((?:pithtrain|ate_bench)[\w.]*)(?: import ([\w, ]+))?")


def dependencies(text: str, known: dict[str, Path]) -> set[Path]:
    """The modules that code in `text` imports, and those that they import, and so on."""
    found, todo = set[Path](), [text]
    while todo:
        for name, members in IMPORT.findall(todo.pop()):
            names = [name, *(f"{name}.{member.strip()}" for member in members.split(","))]
            for path in {known[name] for name in names if name in known} - found:
                found.add(path)
                todo.append(spelt_out(path))
    return found


@cache
def spelt_out(path: Path) -> str:
    """A module with its relative imports spelt out."""
    return absolute_imports(read(path), path.relative_to(ROOT))


def digest_of(path: Path, known: dict[str, Path]) -> str:
    """Changes when anything does that may change what a page shows."""
    text = read(path)
    if "%%bash" in text or "ate_bench" in path.parts or "tools/" in text:  # commands are run, or trees are measured
        used = set(known.values())
    else:
        used = dependencies(text, known)
    used |= set((ROOT / "docs/benchmarks").glob("*")) if "benchmarks" in text else set()
    used |= set((ROOT / "configs").glob("*.toml")) if "configs" in text else set()
    used |= {ROOT / "constraints.txt", ROOT / "tools/docs_figures.py"}
    content = "".join(f"{file.relative_to(ROOT)}\n{read(file)}" for file in sorted(used))
    return hashlib.sha256(content.encode()).hexdigest()


# Running -------------------------------------------------------------------------------------------------------


def to_run(page: Path, known: dict[str, Path]) -> nbformat.NotebookNode:
    """A page as it is run and kept: the cache compares code cells and `kernelspec`, so the digest stands there."""
    notebook = read_page(page)
    # Every page needs its figures described; the import of matplotlib is spared to those that have none.
    setup = SETUP if "matplotlib" in read(page) or "fig" in read(page) else "pass"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(setup, id="setup"))
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict({"kernelspec": {**spec, "inputs": digest_of(page, known)}})
    return notebook


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(page: Path, notebook: nbformat.NotebookNode) -> tuple[nbformat.NotebookNode, float, str]:
    """Run `notebook` in a folder of its own; return it with outputs, the CPU's seconds, and its error if it failed."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    before, error = cpu_of_children(), ""
    with tempfile.TemporaryDirectory() as folder:
        looked_at = ("configs", "docs", "nbs", "tools") + (COMMANDS_SEE if page.suffix == ".md" else ())
        for name in looked_at:  # a checkout to read; what is written stays in the folder
            (Path(folder) / name).symlink_to(ROOT / name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        environment["MPLBACKEND"] = "Agg"
        for last in (False, True):
            client = NotebookClient(
                notebook, timeout=SECONDS, startup_timeout=SECONDS, extra_arguments=["--log-level=ERROR"],
                resources={"metadata": {"path": folder}},
            )  # fmt: skip
            try:
                client.execute(env=environment)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
                error = re.sub(r"\x1b\[[\d;]*m", "", str(failure))
            except RuntimeError:  # the kernel did not start: another that starts may have taken its port
                if last:
                    raise
                continue
            break
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran: would make each build differ from the last
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = output.text.replace(folder, "~/pithtrain").replace(str(ROOT), "~/pithtrain")
    return notebook, cpu_of_children() - before, error


def run_stale(pages: dict[str, Path], workers: int) -> dict[str, nbformat.NotebookNode]:
    """Every page that runs, with outputs: kept ones, or new ones. Exits with 1 if one fails, naming it."""
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn

    cache, known, ready, waiting = get_cache(CACHE), modules(ROOT), {}, {}
    cache.change_cache_limit(500)
    with ProcessPoolExecutor(workers) as pool:
        for name, page in pages.items():
            if not runs(page):
                continue
            notebook = to_run(page, known)
            try:
                ready[name] = cache.merge_match_into_notebook(notebook)[1]
            except KeyError:
                waiting[name] = pool.submit(run, page, notebook)
        failures = []
        for count, (name, future) in enumerate(waiting.items(), 1):
            ready[name], seconds, error = future.result()
            done = "FAILED" if error else "ran"
            print(f"[{count}/{len(waiting)}] {done} {name}, {seconds:.1f} s of CPU", flush=True)
            if error:
                failures.append(f"{pages[name].relative_to(ROOT)}:\n{error}")
            else:
                bundle = CacheBundleIn(ready[name], name, data={"execution_seconds": seconds})
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    if failures:
        raise SystemExit("\n\n".join(failures))
    return ready


# Laying out ----------------------------------------------------------------------------------------------------


def with_links(text: str, page: Path) -> str:
    """Links to sources become links to pages: `nbs/20_router.py` and `docs/guide/train.md` are found wherever."""

    def target(match: re.Match) -> str:
        path = (page.parent / match[1]).resolve()
        if not path.exists() or not path.is_relative_to(ROOT) or path.suffix not in (".py", ".md", ".ipynb"):
            return match[0]
        inside = path.relative_to(ROOT)
        there = inside.relative_to("docs") if inside.parts[0] == "docs" else inside
        here = page.relative_to(ROOT / "docs" if page.is_relative_to(ROOT / "docs") else ROOT).parent
        suffix = ".ipynb" if runs(path) else ".md"
        return f"]({os.path.relpath(SOURCE / there.with_suffix(suffix), SOURCE / here)}{match[2] or ''})"

    return re.sub(r"\]\(([\w./-]+\.(?:py|md))(#[\w-]+)?\)", target, text)


def title_of(notebook: nbformat.NotebookNode) -> str:
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (match := re.search(r"^# (.+)$", cell.source, re.M)):
            return match[1].strip()
    raise SystemExit("a page has no title")


def sentence_of(notebook: nbformat.NotebookNode) -> str:
    """The notebook in one sentence: the quotation under its title."""
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    match = re.search(r"^> (.+(?:\n> .+)*)", first, re.M)
    return re.sub(r"\n> ", " ", match[1]) if match else ""


def minutes_of(notebook: nbformat.NotebookNode) -> int:
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    lines = sum(cell.source.count("\n") + 1 for cell in notebook.cells if cell.cell_type == "code")
    return max(1, round(words / WORDS_A_MINUTE + lines / LINES_A_MINUTE))


def module_of(notebook: nbformat.NotebookNode, path: Path) -> str:
    """The module that a notebook exports to, or nothing."""
    package = "ate_bench" if "ate_bench" in path.parts else "pithtrain"
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith("#| default_exp"):
            return f"{package}.{cell.source.split()[2]}".removesuffix(".__init__")
    return ""


def pictures(cell: nbformat.NotebookNode) -> list:
    """The outputs of a cell that are figures."""
    return [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]


def described(notebook: nbformat.NotebookNode, page: Path) -> None:
    """Give each cell that shows a figure the alternative text and the width that Sphinx and agents will find there."""
    for cell in notebook.cells:
        for output in pictures(cell):
            found = output.metadata.get("image/png", {})
            written = re.search(r"^#\| alt: (.+)$", cell.source, re.M)
            alt = written[1] if written else found.get("alt", "")
            if not alt:
                where = f"{page.relative_to(ROOT)}: the cell that begins '{cell.source.splitlines()[0]}'"
                raise SystemExit(f"{where} shows a figure without a title: give it one, or a line '#| alt: ...'")
            image = {"alt": alt} | ({"width": f"{round(found['inches'] * 96)}px"} if "inches" in found else {})
            cell.metadata["mystnb"] = {"image": image}


def as_page(notebook: nbformat.NotebookNode, page: Path) -> nbformat.NotebookNode:
    """What Sphinx is given: links to pages, no directives, exported cells marked as such."""
    notebook = nbformat.from_dict(notebook)
    cells = []
    for cell in notebook.cells:
        if cell.get("id") == "setup" or cell.source.startswith("#| default_exp"):
            continue
        if cell.cell_type == "markdown":
            cell.source = with_links(cell.source, page)
        elif cell.source.startswith("#| export\n"):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "export"]
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n", "", cell.source, flags=re.M)
        cells.append(commands(cell) if cell.source.startswith("%%bash\n") else cell)
    notebook.cells = cells
    notebook.metadata["kernelspec"].pop("inputs", None)
    return notebook


def commands(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A cell of shell commands as prose: what was typed, and what was printed."""
    parts = [fenced(cell.source.removeprefix("%%bash\n"), "bash")]
    said = "".join(output.get("text", "") for output in cell.outputs)
    said = re.sub(r"[^\n]*\r(?=[^\n])", "", said)  # of a line written over and over, as progress is, the last state
    if said := re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", said):
        parts.append(fenced(said, "text"))
    return nbformat.v4.new_markdown_cell("\n\n".join(parts), id=cell.id)


def as_download(notebook: nbformat.NotebookNode, page: Path) -> nbformat.NotebookNode:
    """What a person opens in Jupyter: every cell as it stands in the source, with outputs."""
    notebook = nbformat.from_dict(notebook)
    notebook.cells = [cell for cell in notebook.cells if cell.get("id") != "setup"]
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.endswith("\nfig"):
            cell.source += ";"
    if page.suffix == ".py" and "matplotlib" in read(page):
        notebook.cells.insert(1, nbformat.v4.new_code_cell("%matplotlib inline", id="matplotlib"))
    notebook.metadata.setdefault("kernelspec", {"display_name": "Python 3", "language": "python", "name": "python3"})
    notebook.metadata["kernelspec"].pop("inputs", None)
    return notebook


def fenced(text: str, language: str) -> str:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def as_markdown(notebook: nbformat.NotebookNode, name: str) -> str:
    """A page for agents: prose, code and what the code printed; figures as links with their alternative text."""
    up, parts = "../" * name.count("/"), []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            parts.append(plain_markdown(cell.source))
            continue
        parts.append(fenced(cell.source, "python"))
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                file = hashlib.sha256(base64.b64decode(data["image/png"])).hexdigest()
                parts.append(f"![{cell.metadata.mystnb.image.alt}]({up}_images/{file}.png)")
            elif text := output.get("text") or data.get("text/markdown") or data.get("text/plain"):
                parts.append(fenced(text, "text"))
    return "\n\n".join(parts) + "\n"


def plain_markdown(text: str) -> str:
    """Without what only Sphinx understands."""
    text = re.sub(r"^```\{toctree\}\n(?:.*\n)*?```(?:\n|$)", "", text, flags=re.M)
    text = re.sub(r"\{py:obj\}`(\w+) <[\w.]+>`", r"`\1`", text)
    text = re.sub(r"^\[(.*)\]\{\.facts\}$", r"\1", text, flags=re.M)
    return re.sub(r"\]\(([\w./-]+)\.ipynb(#[\w-]+)?\)", r"](\1.md\2)", text)


def write(path: Path, text: str) -> None:
    """Leaves a file alone that already says this, so that Sphinx does not read it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or read(path) != text:
        path.write_text(text, encoding="utf-8", newline="\n")


class Layout:
    """All pages, laid out: `SOURCE` for Sphinx, and `twins` for what will lie beside each page of the site."""

    def __init__(self, pages: dict[str, Path], ready: dict[str, nbformat.NotebookNode]):
        self.pages, self.twins, self.titles = pages, dict[str, str](), dict[str, str]()
        self.written = set[Path]()
        before = {path for path in SOURCE.rglob("*") if path.suffix in (".md", ".ipynb")}
        self.notebooks = {name: ready[name] for name, path in pages.items() if path.suffix == ".py"}
        self.module = {name: module_of(notebook, pages[name]) for name, notebook in self.notebooks.items()}
        self.home = {module: name for name, module in self.module.items() if module}
        for name, path in pages.items():
            self.lay_out(name, path, ready.get(name))
        for name, text in write_reference(ROOT, self.home).items():
            self.put(f"{name}.md", text)
            page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="cell-0")])
            self.twins[f"{name}.md"], self.twins[f"{name}.ipynb"] = text, nbformat.writes(page)
            module = modules(ROOT).get(name.removeprefix("api/"))
            self.twins[f"{name}.py" if module else f"{name}.source.md"] = read(module) if module else text
            self.titles[name] = title_of(page)
        for old in before - self.written:
            old.unlink()
        if before != self.written:  # Sphinx would keep what links to pages that came or went
            shutil.rmtree(ROOT / "docs/_build/doctrees", ignore_errors=True)

    def put(self, name: str, text: str) -> None:
        write(SOURCE / name, text)
        self.written.add(SOURCE / name)

    def lay_out(self, name: str, path: Path, ready: nbformat.NotebookNode | None) -> None:
        if ready is None:
            text = with_links(self.filled(read(path), name), path)
            self.put(f"{name}.md", text)
            self.twins[f"{name}.md"] = plain_markdown(text)
            plain = read_page(path)
            self.titles[name] = title_of(plain)
            self.twins[f"{name}.ipynb"] = nbformat.writes(as_download(plain, path))
            self.twins[f"{name}.source.md"] = read(path)
            return
        described(ready, path)
        shown = as_page(ready, path)
        for cell in shown.cells:
            if cell.cell_type == "markdown":
                cell.source = self.filled(cell.source, name)
        self.titles[name] = title_of(shown)
        self.put(f"{name}.ipynb", nbformat.writes(shown) + "\n")
        self.twins[f"{name}.md"] = as_markdown(shown, name)
        self.twins[f"{name}.ipynb"] = nbformat.writes(as_download(ready, path))
        self.twins[f"{name}.py" if path.suffix == ".py" else f"{name}.source.md"] = read(path)

    def filled(self, text: str, name: str) -> str:
        """`<!-- notebooks nbs/1 -->` in a page becomes what the path says of the notebooks so named."""
        text = re.sub(r"<!-- notebooks (.+?) -->", lambda match: self.listing(match[1].split(), name), text)
        return re.sub(r"<!-- minutes (.+?) -->", lambda match: self.summed(match[1].split()), text)

    def chosen(self, prefixes: list[str]) -> list[str]:
        return [name for name in sorted(self.notebooks) if name.startswith(tuple(prefixes))]

    def summed(self, prefixes: list[str]) -> str:
        names = self.chosen(prefixes)
        return f"{len(names)} notebooks, {sum(minutes_of(self.notebooks[name]) for name in names)} min"

    def listing(self, prefixes: list[str], page: str) -> str:
        """For each notebook: its sentence, minutes, the notebooks it needs and the names it gives; and a toctree."""
        up, lines = "../" * page.count("/"), []
        names = self.chosen(prefixes)
        for name in names:
            notebook = self.notebooks[name]
            lines += [f"### [{title_of(notebook)}]({up}{name}.ipynb)", "", sentence_of(notebook), ""]
            facts = [f"{minutes_of(notebook)} minutes"]
            if needs := self.needs(name):
                links = (f"[{title_of(self.notebooks[other]).split(':')[0]}]({up}{other}.ipynb)" for other in needs)
                facts.append(f"needs {', '.join(links)}")
            if gives := self.gives(name):
                facts.append("gives " + ", ".join(f"{{py:obj}}`{given} <{full}>`" for given, full in gives.items()))
            lines += [f"[{' · '.join(facts)}]{{.facts}}", ""]
        entries = "\n".join(f"/{name}" for name in names)
        return "\n".join([*lines, "```{toctree}", ":hidden:", "", entries, "```"])

    def needs(self, name: str) -> list[str]:
        """The notebooks whose modules this one imports by itself."""
        code = "\n".join(cell.source for cell in self.notebooks[name].cells if cell.cell_type == "code")
        wanted = set()
        for module, members in IMPORT.findall(code):
            for full in (module, *(f"{module}.{member.strip()}" for member in members.split(","))):
                wanted |= {self.home[full]} if full in self.home else set()
        return sorted(wanted - {name, "nbs/00_pithtrain"})

    def gives(self, notebook: str) -> dict[str, str]:
        """The functions and classes that a notebook exports, with their full names."""
        module = self.module[notebook]
        found = definitions(modules(ROOT)[module]) if module in modules(ROOT) else ()
        return {name: f"{module}.{name}" for name in found if not name.isupper()}


# Building ------------------------------------------------------------------------------------------------------


def sphinx(workers: int, strict: bool) -> None:
    command = [sys.executable, "-m", "sphinx", "--keep-going", "-q", "-b", "html", "-j", str(workers)]
    command += ["-W"] if strict else []
    command += ["-c", ROOT / "docs", "-d", ROOT / "docs/_build/doctrees", SOURCE, HTML]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(
            "the site was not built: mend the warnings above (docs/_build/source/X is made of docs/X or nbs/X)"
        )


def llms_text(layout: Layout, project: dict) -> str:
    """The list of pages that agents look for (llmstxt.org): each with its Markdown twin."""
    lines = [f"# {project['name']}", "", f"> {project['description']}.", ""]
    lines += [
        "Every page of this site has a Markdown twin: replace `.html` by `.md`. Notebooks also have their source,"
    ]
    lines += ["`.py`, and `.ipynb` with outputs.", ""]
    groups = (("Guide", ""), ("Learning path", "learn/"), ("Notebooks", "nbs/"), ("Reference", "api/"))
    for group, prefix in groups:
        lines += [f"## {group}", ""]
        others = tuple(p for _, p in groups if p)
        for name, title in layout.titles.items():
            if name.startswith(prefix) if prefix else not name.startswith(others):
                said = f": {sentence_of(layout.notebooks[name])}" if name in layout.notebooks else ""
                lines.append(f"- [{title}]({name}.md){said}")
        lines.append("")
    return "\n".join(lines)


def build(only: list[str], workers: int) -> None:
    begin = time.perf_counter()
    pages = page_paths(only)
    layout = Layout(pages, run_stale(pages, workers))
    shutil.copytree(ROOT / "docs/figures", SOURCE / "figures", dirs_exist_ok=True)
    sphinx(workers, strict=not only)
    for name, text in layout.twins.items():
        write(HTML / name, text)
    write(HTML / "llms.txt", llms_text(layout, tomllib.loads(read(ROOT / "pyproject.toml"))["project"]))
    print(f"built {len(layout.titles)} pages in {time.perf_counter() - begin:.0f} s: docs/_build/html/index.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help="notebooks to build, by parts of names")
    parser.add_argument("--workers", type=int, default=2, help="processes that run notebooks, and Sphinx's")
    args = parser.parse_args()
    build(args.only, args.workers)


if __name__ == "__main__":
    main()
