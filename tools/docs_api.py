"""The reference, written from signatures and docstrings, and where each name of it is found.

Docstrings are Markdown, as the notebooks' prose is, so pages are Markdown with Sphinx's Python directives. Nothing is
imported: what a module holds is read from its text.
"""

import ast
import inspect
import re
from collections import Counter
from functools import cache
from pathlib import Path


@cache
def modules(root: Path) -> dict[str, Path]:
    """The package's modules by dotted name."""
    files = [*sorted(root.glob("pithtrain/**/*.py")), *sorted(root.glob("ate_bench/*.py"))]
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def definitions(path: Path) -> dict[str, ast.AST]:
    """The nodes that define the public names of a module, in the order of the text."""
    found = {}
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                found[target.id] = node
    return {name: node for name, node in found.items() if not name.startswith("_")}


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Methods worth a line: public ones that say what they do."""
    functions = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    return [item for item in functions if not item.name.startswith("_") and ast.get_docstring(item)]


@cache
def full_names(root: Path) -> dict[str, str]:
    """What prose may call a thing -> its full name: each full name, and a bare one that only one module has."""
    bare, names = Counter[str](), dict[str, str]()
    for module, path in modules(root).items():
        if definitions(path):
            names[module] = module
        for name, node in definitions(path).items():
            bare[name] += 1
            names[f"{module}.{name}"] = f"{module}.{name}"
            if isinstance(node, ast.ClassDef):
                for method in methods(node):
                    names[f"{module}.{name}.{method.name}"] = names[f"{name}.{method.name}"] = (
                        f"{module}.{name}.{method.name}"
                    )
    for full in list(names.values()):
        name = full.rpartition(".")[2]
        if bare[name] == 1 and full in names and full.count(".") and full not in modules(root):
            names.setdefault(name, full)
    return names


def signature(node: ast.FunctionDef, method: bool) -> str:
    arguments = ast.parse(ast.unparse(node)).body[0].args  # a copy, since it loses `self`
    decorators = {ast.unparse(item) for item in node.decorator_list}
    if method and "staticmethod" not in decorators:
        (arguments.posonlyargs or arguments.args).pop(0)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(arguments)}){returns}"


def comments(path: Path, node: ast.ClassDef) -> dict[str, str]:
    """What stands after `#:` beside the fields of a class."""
    lines = path.read_text(encoding="utf-8").splitlines()[node.lineno - 1 : node.end_lineno]
    found = (re.match(r"\s+(\w+): .*?#: (.+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def field_doc(value: ast.AST | None) -> str:
    """The sentence that a config's field carries: `knob(default, "sentence")`."""
    match value:
        case ast.Call(func=ast.Name(id="knob"), args=[_, ast.Constant(value=sentence), *_]):
            return str(sentence)
    return ""


def directive(kind: str, head: str, module: str, body: str, depth: int = 0) -> str:
    fence = "`" * (8 - 2 * depth)
    return f"{fence}{{py:{kind}}} {head}\n:module: {module}\n\n{body}\n{fence}"


def documented(node: ast.AST, name: str, module: str, path: Path) -> str:
    """The directive of one public name."""
    if isinstance(node, ast.FunctionDef):
        return directive("function", signature(node, method=False), module, docstring(node))
    if not isinstance(node, ast.ClassDef):
        value = ast.unparse(node.value) if node.value is not None else ""
        body = f"`{value}`" if value and len(value) < 100 and "\n" not in value and "`" not in value else ""
        return directive("data", name, module, body)
    said, parts = comments(path, node), [docstring(node)]
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id[0] != "_":
            field = item.target.id
            about = f":type: {ast.unparse(item.annotation)}"
            text = said.get(field, "") or field_doc(item.value)
            parts.append(directive("attribute", f"{name}.{field}", f"{module}\n{about}", text, depth=1))
    for item in methods(node):
        kinds = {ast.unparse(decorator) for decorator in item.decorator_list}
        property_ = bool(kinds & {"property", "cached_property", "functools.cached_property"})
        head = f"{name}.{item.name}" if property_ else f"{name}.{signature(item, method=True)}"
        parts.append(directive("property" if property_ else "method", head, module, docstring(item), depth=1))
    begin = next((i for i in node.body if isinstance(i, ast.FunctionDef) and i.name == "__init__"), None)
    head = name + (signature(begin, method=True).removeprefix("__init__").split(" -> ")[0] if begin else "")
    return directive("class", head, module, "\n\n".join(part for part in parts if part))


def docstring(node: ast.AST) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")


def write_reference(root: Path, home: dict[str, str]) -> dict[str, str]:
    """The pages of the reference, by name; `home` says which notebook holds a module."""
    pages, packages = dict[str, str](), dict[str, list[str]]()
    for module, path in modules(root).items():
        found = definitions(path)
        if not found:
            continue
        said = (ast.get_docstring(parsed(path)) or "").splitlines()
        lines = [f"# {module}", "", *said[:1], ""]
        if module in home:
            lines += [f"Explained in the notebook [{home[module]}.py](../{home[module]}.ipynb), which exports it.", ""]
        lines += [f"```{{py:module}} {module}\n```", ""]
        for name, node in found.items():
            lines += [documented(node, name, module, path), ""]
        pages[f"api/{module}"] = "\n".join(lines)
        parts = module.split(".")
        group = ".".join(parts[:2]) if (root / Path(*parts[:2])).is_dir() else parts[0]
        packages.setdefault(group, []).append(module)
    lines = [
        "# Reference",
        "",
        "Each module with its public names, from signatures and docstrings. A module's page links",
    ]
    lines += ["to the notebook that explains it; prose everywhere links here.", ""]
    for group, members in packages.items():
        lines += [f"## {group}", ""]
        for module in members:
            said = (ast.get_docstring(parsed(modules(root)[module])) or "").splitlines()
            lines.append(f"- [{module}]({module}.md): {said[0] if said else ''}")
        lines += ["", "```{toctree}", ":hidden:", "", *members, "```", ""]
    pages["api/index"] = "\n".join(lines)
    return pages
