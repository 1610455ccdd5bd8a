"""Notebooks to modules and back: export, check, sync, notebooks.

The source of every exported module is a text notebook, `nbs/**/*.py` in jupytext's percent format.
nbdev turns it into a module; this script adds stable names for cells, a digest for each block (so that a
hand edit is seen before it is lost) and the way back. A block begins with its cell and digest:

    # %% route@1f0c93ab

The module's head names its notebook. There is no `__all__`: every import says what it wants.
"""

import argparse
import ast
import hashlib
import re
import tempfile
from collections import Counter
from pathlib import Path

MARKER = re.compile(r"^# %% ([\w-]+)@([0-9a-f]{8})$", re.M)
DIRECTIVES = re.compile(r"(?:#\|.*\n)+")
OTHER_EXPORT = re.compile(r"(?:\s*#.*\n)*\s*#\s*\|\s*export")


def notebook_paths(root: Path) -> list[Path]:
    return sorted((root / "nbs").rglob("*.py"))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def digest(code: str) -> str:
    return hashlib.sha256(code.strip("\n").encode()).hexdigest()[:8]


def read_notebook(path: Path) -> dict:
    """A notebook as a dict in which each exported cell has a stable id: the first name it defines."""
    import jupytext

    # With comment_magics, jupytext takes the comment "# copy the weights" for a shell command.
    notebook = jupytext.reads(read(path), {"extension": ".py", "format_name": "percent", "comment_magics": False})
    copies: Counter[str] = Counter()
    for index, cell in enumerate(notebook.cells):
        name = f"cell-{index}"
        if cell.cell_type == "code" and cell.source.startswith("#| export\n"):
            name = cell_name(cell.source, path)
        elif cell.cell_type == "code" and OTHER_EXPORT.match(cell.source):
            first = cell.source.strip().splitlines()[0]
            raise SystemExit(f"{path}: cell '{first}': make its first line '#| export', with code below it")
        copies[name] += 1
        cell["id"] = name if copies[name] == 1 else f"{name}-{copies[name]}"
    return notebook


def cell_name(source: str, path: Path) -> str:
    """The first function, class or variable that a cell defines; `imports` if it defines none."""
    for node in ast.parse(source, filename=f"{path} (a cell)").body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return node.name
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                return target.id
    return "imports"


def export_notebook(path: Path, root: Path, out: Path) -> Path | None:
    """Write the module of one notebook of `root` under `out`; return it relative to `out`."""
    from execnb.nbio import dict2nb
    from nbdev.export import ExportModuleProc
    from nbdev.maker import ModuleMaker
    from nbdev.process import NBProcessor

    notebook = read_notebook(path)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    if not any(source.startswith("#| export\n") for source in sources):
        return None
    names = [source.split()[2:] for source in sources if source.startswith("#| default_exp")]
    if len(names) != 1 or len(names[0]) != 1:
        raise SystemExit(f"{path.relative_to(root)}: has exported cells but not one '#| default_exp MODULE' cell")
    exporter = ExportModuleProc()
    NBProcessor(path, [exporter], nb=dict2nb(notebook), process=True)
    inside = path.relative_to(root)
    target = out / ("ate_bench" if "ate_bench" in inside.parts else "pithtrain")
    maker = ModuleMaker(target, exporter.default_exp, out / inside)
    maker.make(exporter.modules["#"], exporter.in_all["#"], lib_path=target)
    head, *pieces = re.split(rf"^{re.escape(maker.hdr)} #([\w-]+)$", read(maker.fname), flags=re.M)
    pieces = [f"# %% {name}@{digest(code)}{code}" for name, code in zip(pieces[::2], pieces[1::2], strict=True)]
    head = head.partition("# %% auto #0\n")[0]
    maker.fname.write_text("".join([head, *pieces]), encoding="utf-8", newline="\n")
    module = maker.fname.relative_to(out)
    for folder in list(module.parents)[:-1]:
        (out / folder / "__init__.py").touch()  # leaves an exported one as it is
    return module


def export_tree(root: Path, out: Path, paths: list[Path]) -> dict[Path, Path]:
    """Export `paths`; return the module of each notebook that has one, as {module: notebook}."""
    made: dict[Path, Path] = {}
    for path in paths:
        if module := export_notebook(path, root, out):
            if module in made:
                raise SystemExit(f"{module}: exported by {made[module].name} and by {path.name}; rename one")
            made[module] = path
    return made


def blocks(module: Path) -> dict[str, tuple[str, str]]:
    """The blocks of an exported module: cell id -> (digest at export, code now)."""
    if not module.exists():
        return {}
    pieces = MARKER.split(read(module))
    return {pieces[i]: (pieces[i + 1], pieces[i + 2].strip("\n")) for i in range(1, len(pieces), 3)}


def edited_by_hand(module: Path, fresh: Path) -> list[str]:
    """Cells of `module` whose code is neither what was exported nor what the notebook holds now."""
    old, now = blocks(module), blocks(fresh)
    hand = [name for name, (exported, code) in old.items() if digest(code) != exported]
    hand = [name for name in hand if name not in now or old[name][1] != now[name][1]]
    if old and [(name, old[name][0]) for name in old] == [(name, now[name][0]) for name in now]:
        # What stands between header and first block has no digest, but follows from the cells.
        heads = {MARKER.split(read(path))[0].partition("\n# AUTOGENERATED!")[2] for path in (module, fresh)}
        hand += ["the head"] if len(heads) > 1 else []
    return hand


def export(root: Path, paths: list[Path], force: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        made = export_tree(root, fresh, paths)
        for module in [] if force else made:
            if names := edited_by_hand(root / module, fresh / module):
                by_hand = f"{module}: edited by hand in {', '.join(names)}"
                raise SystemExit(f"{by_hand}; keep it with 'make sync' or lose it with 'make export FORCE=1'")
        for source in fresh.rglob("*.py"):
            target = root / source.relative_to(fresh)
            if not target.exists() or (read(source) != read(target) and source.relative_to(fresh) in made):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
                print(f"exported {target.relative_to(root)}")


def check(root: Path) -> None:
    """Exit with 1, naming each module that is not what its notebook exports."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        made = export_tree(root, fresh, notebook_paths(root))
        wanted = {path.relative_to(fresh) for path in fresh.rglob("*.py")}
        problems = []
        for module in sorted(wanted):
            if not (root / module).exists():
                problems.append(f"{module}: missing; run 'make export'")
            elif module in made and read(root / module) != read(fresh / module):
                names = ", ".join(edited_by_hand(root / module, fresh / module))
                advice = f"edited by hand in {names}; run 'make sync'" if names else "run 'make export'"
                problems.append(f"{module}: stale against {made[module].relative_to(root)}; {advice}")
        for path in sorted([*root.glob("pithtrain/**/*.py"), *root.glob("ate_bench/**/*.py")]):
            inside = path.relative_to(root)
            empty_init = inside in wanted and not read(path)
            if inside not in made and not empty_init and "tasks" not in inside.parts:
                problems.append(f"{inside}: no notebook exports it; delete it")
        if problems:
            raise SystemExit("\n".join(problems))
        print(f"{len(made)} modules match their notebooks")


def sync(root: Path) -> None:
    """Carry hand edits of exported modules back into their notebooks."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        made = export_tree(root, fresh, notebook_paths(root))
        texts, done = dict[Path, str](), list[str]()
        for module, path in made.items():
            before, now = blocks(root / module), blocks(fresh / module)
            for name in edited_by_hand(root / module, fresh / module):
                where, inside = f"{module}: block '{name}'", path.relative_to(root)
                if name not in now or name not in before:
                    raise SystemExit(f"{where} has no cell in {inside}; edit the notebook, then 'make export FORCE=1'")
                exported, code = before[name]
                if now[name][0] != exported:
                    raise SystemExit(f"{where} and its cell in {inside} were both edited; merge by hand")
                if not code or re.search(r"^# %%", code, re.M):
                    raise SystemExit(f"{where} is empty or holds a '# %%' line; change the cells of {inside} by hand")
                code = absolute_imports(code, module)
                texts[path] = with_cell(texts.get(path, read(path)), path, name, code)
                done.append(f"synced {where} into {inside}")
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8", newline="\r\n" if b"\r\n" in path.read_bytes() else "\n")
        print("\n".join(done) or "no module was edited by hand")
        export(root, list(texts), force=True)


def with_cell(text: str, path: Path, name: str, code: str) -> str:
    """`text` of the notebook at `path`, with `code` in its cell `name`; all else stays as it is."""
    cells = {cell["id"]: cell.source for cell in read_notebook(path).cells}
    twins = [other for other, source in cells.items() if source == cells[name]]
    places = list(re.finditer(rf"^# %%.*\n{re.escape(cells[name])}(?=\s*(?:^# %%|\Z))", text, re.M))
    if len(places) < len(twins):
        raise SystemExit(f"{path}: cell '{name}' cannot be found in the text; edit it there by hand")
    end = places[twins.index(name)].end()
    start = end - len(cells[name])
    return text[:start] + DIRECTIVES.match(cells[name])[0] + code + text[end:]


def absolute_imports(code: str, module: Path) -> str:
    """`code` of `module` with its relative imports spelt out, as the notebook needs them."""
    lines = code.split("\n")
    for node in ast.walk(ast.parse(code, filename=f"{module} (a block)")):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = ".".join([*module.parts[: len(module.parts) - node.level], *filter(None, [node.module])])
            line = node.lineno - 1
            lines[line] = re.sub(r"\bfrom \.+[\w.]*", f"from {package}", lines[line], count=1)
    return "\n".join(lines)


def write_ipynb(paths: list[Path]) -> None:
    """Write the .ipynb twin of each notebook beside it, without outputs."""
    import nbformat

    for path in paths:
        notebook = read_notebook(path)
        for cell in notebook.cells:
            if cell.cell_type == "code" and cell.source.endswith("\nfig"):
                cell.source += ";"  # Jupyter shows the figure anyway, and without this it would show it twice
        if "matplotlib" in read(path):  # Jupyter shows a figure made without pyplot only after this
            notebook.cells.insert(1, nbformat.v4.new_code_cell("%matplotlib inline", id="matplotlib"))
        notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        nbformat.write(notebook, path.with_suffix(".ipynb"), version=4)
    print(f"wrote {len(paths)} notebooks beside their sources in nbs/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["export", "check", "sync", "notebooks"])
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (export, notebooks); default: all")
    parser.add_argument("--force", action="store_true", help="export over hand edits of modules")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help="the repository")
    args = parser.parse_args()
    root = args.root.resolve()
    paths = [path.resolve() for path in args.paths] or notebook_paths(root)
    if unknown := [str(path) for path in paths if path not in notebook_paths(root)]:
        raise SystemExit(f"{', '.join(unknown)}: not in {root / 'nbs'}; name notebooks like nbs/20_router.py")
    try:
        match args.command:
            case "export":
                export(root, paths, args.force)
            case "check":
                check(root)
            case "sync":
                sync(root)
            case "notebooks":
                write_ipynb(paths)
    except SyntaxError as error:
        raise SystemExit(f"{error.filename}: {error.msg}: {(error.text or '').strip()}") from None


if __name__ == "__main__":
    main()
