"""The package stays small: the promise is fewer than 8,000 exported lines of code."""

from pathlib import Path

from ate_bench.size import code_lines, measure


def test_the_package_keeps_its_promise():
    """Lines of code: blank lines, comments and docstrings are not counted."""
    size = measure(Path(__file__).parent.parent / "pithtrain")
    print(size)  # seen with pytest -rP
    assert size.code < 8000


def test_code_lines_on_edge_cases():
    assert code_lines("") == 0
    assert code_lines("# remark\n\n") == 0
    assert code_lines("x = (1,\n     2)\n") == 2
    assert code_lines('s = """a\n\n# b\n"""\n') == 4
    assert code_lines('def f():\n    """Doc\n\n    more."""\n    return 1\n') == 2
    assert code_lines('class A:\n    x: int\n    """What x is."""\n') == 2
