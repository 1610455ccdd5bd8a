"""The static counters catch what they should, and not what looks like it."""

import json
from pathlib import Path

import pytest

import ate_bench
from ate_bench.duplicates import find_duplicates
from ate_bench.errors import Errors, count_errors
from ate_bench.indirection import find_indirection
from ate_bench.source import load_tokenizer, parse, read_sources
from ate_bench.static import static_cost, static_json, static_table
from ate_bench.trail import build_graph, find_trail, follow, read_questions
from pithtrain.config import UserError

PACKAGE = Path(ate_bench.__file__).parent
QUESTIONS = PACKAGE / "questions.toml"


def kinds(text: str) -> list[str]:
    return sorted(finding.kind for finding in find_indirection(parse(text)))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("registry", "@register('a')\ndef f(): pass"),
        ("registry", "@MODELS.register\nclass A: pass"),
        ("registry", "register_model('a', A)"),
        ("computed_name", "def f(x, n): return getattr(x, n)"),
        ("computed_name", "def f(x, n): setattr(x, 'a' + n, 1)"),
        ("computed_name", "def f(n): return globals()[n]"),
        ("computed_name", "def f(x, n): return x.__dict__[n]"),
        ("string_dispatch", "from a import b, c\nD = {'b': b, 'c': c}"),
        ("string_dispatch", "import a\ndef f(k): return {'b': a.b, 'c': lambda: 1}[k]()"),
        ("kwargs_forwarding", "def f(**options): return g(1, **options)"),
        ("kwargs_forwarding", "class A:\n    def __init__(self, **kw): super().__init__(**kw)"),
        ("kwargs_forwarding", "def f(**kw):\n    return lambda: g(**kw)"),
        ("dynamic_import", "import importlib\ndef f(n): return importlib.import_module(n)"),
        ("dynamic_import", "def f(n): return __import__(n)"),
        ("global_state", "X = 0\ndef f():\n    global X\n    X = 1"),
        ("global_state", "X: list = []\ndef f(a): X.append(a)"),
        ("global_state", "X = {}\ndef f(a): X[a] = 1"),
        ("global_state", "X = {}\ndef f(a):\n    del X[a]"),
        ("global_state", "X = {}\ndef f(a):\n    global X\n    X[a] = 1\n    X = dict(X)"),
        ("compiled", "from torch.utils import cpp_extension\next = cpp_extension.load('a', ['a.cpp'])"),
        ("compiled", "ctypes.CDLL('a.so')"),
    ],
)
def test_an_indirection_is_caught(kind: str, text: str):
    assert kinds(text) == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "class A:\n    def __init__(self): self.register_buffer('a', b)",  # a method of torch, inside a function
        "@property\ndef f(self): pass",
        "def f(x): return getattr(x, 'name', None)",
        "def f(): return globals()['a']",
        "D = {'a': 1, 'b': 2}",
        "from a import LIMIT, SIZE\nD = {'limit': LIMIT, 'size': SIZE}",  # constants
        "def a(): pass\nD = {'a': a}",  # one entry chooses nothing
        "def a(): pass\ndef b(): pass\nD = {'a': a(), 'b': b()}",  # results, not functions
        "def a(): pass\nD = {1: a, 2: a}",
        "def f(): return g(**{'a': 1})",
        "def f(config, **kw):\n    print(kw)\n    return g(**config)",
        "def f(**kw):\n    def h(a): return g(**a)\n    return h",
        "from importlib import resources\nimport os",
        "X = []\ndef f():\n    X = []\n    X.append(1)",  # its own
        "X = []\ndef f(X): X.append(1)",
        "X = {}\nX['a'] = 1",  # while the module is made
        "X = {}\ndef f(): return X['a']",
        "X = {}\ndef f(s): s.X.append(1)",
        "torch.load('a')",
        "if kind == 'a':\n    a()\nelif kind == 'b':\n    b()",
        "# getattr(x, n)",
        "def f(:",
    ],
)
def test_what_only_looks_like_one_is_not(text: str):
    assert kinds(text) == []


BODY = """
def {name}({a}, {b}):
    {c} = []
    for {d} in {a}:
        if {d}.size > {b} and not {d}.hidden:
            {c}.append({d}.size * {d}.count + {b})
        elif {d}.count == 0:
            raise ValueError("no count for " + {d}.label)
    return sorted({c}, key=lambda pair: -pair)[:{b}]
"""
ONE = BODY.format(name="one", a="items", b="limit", c="result", d="item")
TWO = BODY.format(name="two", a="rows", b="most", c="kept", d="row")


def test_a_copy_with_other_names_is_a_duplicate():
    found = find_duplicates([parse(ONE), parse(TWO, Path("two.py"))])
    assert found.share > 0.7
    assert [(a[0].name, b[0].name) for a, b in found.pairs] == [("example.py", "two.py")]
    assert find_duplicates([parse(ONE + TWO)]).share > 0.7


def test_names_that_play_other_parts_are_no_duplicate():
    mixed = BODY.format(name="two", a="rows", b="rows", c="kept", d="kept")
    assert find_duplicates([parse(ONE), parse(mixed)]).share == 0


@pytest.mark.parametrize(
    "text",
    [
        "X = [" + "1, 2, 3, " * 60 + "]\nY = [" + "4, 5, 6, " * 60 + "]\n",
        "\n".join(f"from a.b import c{i}, d{i}" for i in range(60)) * 2,
        '"""' + "word " * 300 + '"""\n' + '"""' + "word " * 300 + '"""\n',
        "# a remark\n" * 200,
    ],
)
def test_tables_imports_and_prose_are_no_duplicates(text: str):
    assert find_duplicates([parse(text), parse(text)]).share == 0


def test_errors_by_what_they_tell():
    def one(text: str) -> Errors:
        return count_errors([parse(text)])

    assert one("raise ValueError(f'{x} is bad')") == Errors(1, 0, 0, 0)
    assert one("raise ValueError('%s is bad' % x)") == Errors(1, 0, 0, 0)
    assert one("assert x, f'{x} is bad'") == Errors(1, 0, 0, 0)
    assert one("raise ValueError('bad')") == Errors(0, 1, 0, 0)
    assert one("raise NotImplementedError") == Errors(0, 0, 1, 0)
    assert one("raise ValueError('')") == Errors(0, 0, 1, 0)
    assert one("assert x > 1") == Errors(0, 0, 1, 0)
    assert one("try: f()\nexcept ValueError as e: raise") == Errors(0, 0, 0, 0)
    assert one("try: f()\nexcept ValueError: pass") == Errors(0, 0, 0, 0)
    assert one("try: f()\nexcept Exception: pass") == Errors(0, 0, 0, 1)
    assert one("try: f()\nexcept: x = None") == Errors(0, 0, 0, 1)
    assert one("try: f()\nexcept Exception as e: logger.warning('no')") == Errors(0, 0, 0, 0)
    assert one("try: f()\nexcept Exception as e: kept = e") == Errors(0, 0, 0, 0)


LIBRARY = {
    "lib/__init__.py": "from .core import Engine as Motor\n",
    "lib/base.py": "class Base:\n    def run(self): return self.work()\n    def work(self): return kernel()\n"
    "def kernel(): pass\n",
    "lib/core.py": "from . import base\nclass Engine(base.Base):\n    pass\nclass Other:\n    def start(self): pass\n",
    "lib/cli.py": "import lib\nTABLE = {'a': lib.Motor}\ndef main(): return TABLE['a']\n"
    "def search(value): value.start()\ndef test(x): return isinstance(x, lib.Motor)\ndef odd(): lib.Motor.walk()\n",
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def graph(tmp_path: Path):
    write(tmp_path, LIBRARY)
    return build_graph(read_sources(tmp_path / "lib"))


def test_a_trail_goes_through_values_aliases_and_bases(graph):
    trail = find_trail(graph, "lib.cli.main", "lib.base.kernel")
    assert trail.searches == 0
    assert trail.names[:4] == ["lib.cli.main", "lib.cli.TABLE", "lib.Motor", "lib.core.Engine"]
    assert [path.name for path in trail.files] == ["cli.py", "__init__.py", "core.py", "base.py"]


def test_a_method_of_a_value_is_a_search_and_a_type_test_no_way(graph):
    assert find_trail(graph, "lib.cli.search", "lib.core.Other.start").searches == 1
    assert not find_trail(graph, "lib.cli.test", "lib.core.Engine").found
    assert not find_trail(graph, "lib.base.kernel", "lib.cli.main").found


def test_a_member_is_found_in_a_base_or_not_at_all(graph):
    assert follow(graph, "lib.Motor.run")[-1] == "lib.base.Base.run"
    assert follow(graph, "lib.Motor.walk") == ["lib.Motor", "lib.core.Engine"]
    assert follow(graph, "torch.nn.Linear") == []
    with pytest.raises(UserError, match=r"lib\.cli\.mian: no such definition"):
        find_trail(graph, "lib.cli.mian", "lib.base.kernel")


def test_classes_that_name_each_other_do_not_hang():
    graph = build_graph([parse("class A(B): pass\nclass B(A): pass\ndef f(): A.x.y.z()\n")])
    assert not find_trail(graph, "example.f", "example.f").searches
    assert follow(graph, "example.A.x") == ["example.A"]


def test_sources_leave_tests_out_and_keep_what_cannot_be_parsed(tmp_path: Path):
    write(tmp_path, {"p/a.py": "x = 1", "p/tests/b.py": "y", "p/test_c.py": "z", "p/old.py": "print 1", "p/d.txt": ""})
    sources = read_sources(tmp_path / "p")
    assert [(source.module, source.tree is None) for source in sources] == [("p.a", False), ("p.old", True)]
    with pytest.raises(UserError, match="no Python files"):
        read_sources(tmp_path / "p" / "none")


def test_the_static_table(tmp_path: Path):
    write(tmp_path, LIBRARY | {"lib/fast.cu": "", "lib/broken.py": "def"})
    (tmp_path / "q.toml").write_text(
        '[[question]]\ntext = "Where?"\nlib = {entry = "lib.cli.main", target = "lib.base.kernel"}\n'
        '[[question]]\ntext = "No way?"\nlib = {entry = "lib.base.kernel", target = "lib.cli.main"}\n'
        '[[question]]\ntext = "Not asked"\nother = {entry = "a", target = "b"}\n'
    )
    cost = static_cost(tmp_path / "lib", tmp_path / "q.toml")
    assert (cost.files, cost.unparsed, cost.indirection["compiled"]) == (5, 1, 1)
    count = load_tokenizer()
    texts = [text for name, text in LIBRARY.items()]
    assert cost.ways[0].tokens == sum(count(text) for text in texts)
    table = static_table([cost])
    assert "| Where? | 4 files" in table and "| No way? | no trail |" in table and "Not asked" not in table
    assert json.loads(static_json([cost]))["frameworks"][0]["ways"][0]["files"] == 4
    assert cost.ways[0].trail[0].startswith("lib/cli.py:") and cost.ways[0].trail[-1].endswith(" lib.base.kernel")


def test_questions_that_are_wrong_say_so(tmp_path: Path):
    (tmp_path / "q.toml").write_text('[[question]]\ntext = "a"\nlib = {entry = "b"}\n')
    with pytest.raises(UserError, match=r"q\.toml: expected .*target"):
        read_questions(tmp_path / "q.toml", "lib")


def test_the_projects_questions_lead_somewhere():
    import pithtrain

    graph = build_graph(read_sources(Path(pithtrain.__file__).parent))
    questions = read_questions(QUESTIONS, "pithtrain")
    assert len(questions) >= 5
    for question in questions:
        assert find_trail(graph, question.entry, question.target).found, question.text
    experts = [question.target for question in questions if "expert" in question.text and "code" in question.text]
    assert len(experts) == 2 and all(target.startswith("pithtrain.kernels.") for target in experts)  # a GPU's way
    assert any(question.target.endswith(".attend") for question in questions)
