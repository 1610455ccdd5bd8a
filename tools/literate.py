"""Notebooks to modules and back: export, check, sync, notebooks.

The source of every exported module is a text notebook, `nbs/**/*.py` in jupytext's percent format.
nbdev turns it into a module; this script adds what nbdev leaves to Jupyter: stable names for cells, a
digest for each block (so that a hand edit is seen before it is lost), and the way back from a module.

A block of a module starts with a marker that names its notebook, its cell and the digest of its code:

    # %% ../../nbs/20_router.py #route@1f0c93ab
"""

import argparse
import ast
import hashlib
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"^# %% (\S+) #([\w-]+)@([0-9a-f]{8})$", re.M)
DIRECTIVES = re.compile(r"(?:#\|.*\n)+")
RELATIVE = re.compile(r"^(\s*from )(\.+)([\w.]*)( import )", re.M)


def notebook_paths(root: Path) -> list[Path]:
    return sorted((root / "nbs").rglob("*.py"))


def digest(code: str) -> str:
    return hashlib.sha256(code.strip("\n").encode()).hexdigest()[:8]


def read_notebook(path: Path) -> dict:
    """A notebook as a dict in which each exported cell has a stable id: the first name it defines."""
    import jupytext

    notebook = jupytext.reads(path.read_text(), fmt="py:percent")
    taken: set[str] = set()
    for index, cell in enumerate(notebook.cells):
        exported = cell.cell_type == "code" and cell.source.startswith("#| export")
        base = cell_name(cell.source) if exported else f"cell-{index}"
        name, copies = base, 1
        while name in taken:
            copies += 1
            name = f"{base}-{copies}"
        taken.add(name)
        cell["id"] = name
    return notebook


def cell_name(source: str) -> str:
    """The first function, class or variable that a cell defines; `imports` if it defines none."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return node.name
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                return target.id
    return "imports"


def export_notebook(path: Path, root: Path, out: Path) -> list[Path]:
    """Write the modules of one notebook of `root` under `out`; return them relative to `out`."""
    from execnb.nbio import dict2nb
    from nbdev.export import ExportModuleProc
    from nbdev.maker import ModuleMaker
    from nbdev.process import NBProcessor

    library = "ate_bench" if path.parent.name == "ate_bench" else "pithtrain"
    exporter = ExportModuleProc()
    NBProcessor(path, [exporter], nb=dict2nb(read_notebook(path)), process=True)
    if not any(cell.cell_type == "code" for cell in exporter.modules["#"]):
        return []
    if not hasattr(exporter, "default_exp"):
        raise SystemExit(f"{path.relative_to(root)}: has exported cells but no '#| default_exp MODULE' cell")
    target = out / library
    maker = ModuleMaker(target, exporter.default_exp, out / path.relative_to(root))
    maker.make(exporter.modules["#"], exporter.in_all["#"], lib_path=target)
    code = re.sub(r"^(# %% \S+ #[\w-]+)$", r"\1@", maker.fname.read_text(), flags=re.M)
    code = code.replace("# %% auto #0@", "# %% auto")
    maker.fname.write_text(with_digests(code))
    for folder in [maker.fname.parent, *maker.fname.parent.relative_to(out).parents]:
        if folder not in (Path(), Path(".")) and not (out / folder / "__init__.py").exists():
            (out / folder / "__init__.py").touch()
    return [maker.fname.relative_to(out)]


def with_digests(code: str) -> str:
    pieces = re.split(r"^(# %% \S+ #[\w-]+@)$", code, flags=re.M)
    for i in range(1, len(pieces), 2):
        pieces[i] += digest(pieces[i + 1])
    return "".join(pieces)


def export_tree(root: Path, out: Path, paths: list[Path]) -> dict[Path, Path]:
    """Export `paths`; return the module of each notebook that has one, as {module: notebook}."""
    made: dict[Path, Path] = {}
    for path in paths:
        for module in export_notebook(path, root, out):
            if module in made:
                raise SystemExit(f"{module}: exported by {made[module].name} and by {path.name}; rename one")
            made[module] = path
    return made


def blocks(module: Path) -> dict[str, tuple[str, str, str]]:
    """The blocks of an exported module: cell id -> (notebook, digest at export, code now)."""
    if not module.exists():
        return {}
    pieces = MARKER.split(module.read_text())
    return {
        pieces[i + 1]: (pieces[i], pieces[i + 2], pieces[i + 3].strip("\n"))
        for i in range(1, len(pieces), 4)
    }


def edited_by_hand(module: Path, fresh: Path) -> list[str]:
    """Cells of `module` whose code is neither what was exported nor what the notebook holds now."""
    now = blocks(fresh)
    return [
        name
        for name, (_, exported, code) in blocks(module).items()
        if digest(code) != exported and code != now.get(name, ("", "", None))[2]
    ]


def export(root: Path, paths: list[Path], force: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        made = export_tree(root, fresh, paths)
        for module in [] if force else made:
            if names := edited_by_hand(root / module, fresh / module):
                raise SystemExit(
                    f"{module}: edited by hand in {', '.join(names)}; 'make sync' carries the edit into its "
                    "notebook, 'make export FORCE=1' throws it away"
                )
        for source in fresh.rglob("*.py"):
            target = root / source.relative_to(fresh)
            if not target.exists() or (
                source.read_bytes() != target.read_bytes() and source.relative_to(fresh) in made
            ):
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
            elif (root / module).read_bytes() != (fresh / module).read_bytes():
                by_hand = edited_by_hand(root / module, fresh / module)
                advice = f"edited by hand in {', '.join(by_hand)}; run 'make sync'" if by_hand else "run 'make export'"
                source = made[module].relative_to(root) if module in made else "the notebooks"
                problems.append(f"{module}: stale against {source}; {advice}")
        for library in ("pithtrain", "ate_bench"):
            for path in sorted((root / library).rglob("*.py")):
                if path.relative_to(root) not in wanted and "tasks" not in path.relative_to(root).parts:
                    problems.append(f"{path.relative_to(root)}: no notebook exports it; delete it")
        if problems:
            raise SystemExit("\n".join(problems))
        print(f"{len(made)} modules match their notebooks")


def sync(root: Path) -> None:
    """Carry hand edits of exported modules back into their notebooks."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        made = export_tree(root, fresh, notebook_paths(root))
        texts: dict[Path, str] = {}
        for module, path in made.items():
            now, cells = blocks(fresh / module), {c["id"]: c.source for c in read_notebook(path).cells}
            for name in edited_by_hand(root / module, fresh / module):
                _, exported, code = blocks(root / module)[name]
                where = f"{module}: block '{name}'"
                if name not in now:
                    raise SystemExit(f"{where} has no cell in {path.relative_to(root)}; add it there by hand")
                if now[name][1] != exported:
                    raise SystemExit(f"{where} and its cell in {path.relative_to(root)} were both edited; merge by hand")
                old = cells[name]
                new = DIRECTIVES.match(old)[0] + absolute_imports(code, module)
                text = texts.get(path, path.read_text())
                if text.count(f"\n{old}\n") != 1:
                    raise SystemExit(f"{where}: its cell stands twice in {path.relative_to(root)}; edit it there")
                texts[path] = text.replace(f"\n{old}\n", f"\n{new}\n")
                print(f"synced {where} into {path.relative_to(root)}")
        for path, text in texts.items():
            path.write_text(text)
        if texts:
            export(root, list(texts), force=True)
        else:
            print("no module was edited by hand")


def absolute_imports(code: str, module: Path) -> str:
    def absolute(match: re.Match) -> str:
        package = module.parts[: len(module.parts) - len(match[2])]
        return match[1] + ".".join([*package, *filter(None, [match[3]])]) + match[4]

    return RELATIVE.sub(absolute, code)


def write_ipynb(root: Path, paths: list[Path]) -> None:
    """Write the .ipynb twin of each notebook beside it, without outputs."""
    import nbformat

    for path in paths:
        notebook = read_notebook(path)
        notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        nbformat.write(notebook, path.with_suffix(".ipynb"), version=4)
    print(f"wrote {len(paths)} notebooks beside their sources in {(root / 'nbs').relative_to(root)}/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["export", "check", "sync", "notebooks"])
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (export, notebooks); default: all")
    parser.add_argument("--force", action="store_true", help="export over hand edits of modules")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository to work on")
    args = parser.parse_args()
    root = args.root.resolve()
    paths = [path.resolve() for path in args.paths] or notebook_paths(root)
    match args.command:
        case "export":
            export(root, paths, args.force)
        case "check":
            check(root)
        case "sync":
            sync(root)
        case "notebooks":
            write_ipynb(root, paths)


if __name__ == "__main__":
    sys.exit(main())
