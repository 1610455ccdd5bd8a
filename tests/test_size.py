"""The package stays small: the promise is fewer than 8,000 exported lines."""

from pathlib import Path

from ate_bench.size import code_lines, measure


def test_the_package_keeps_its_promise():
    """Lines of code and docstrings: blank lines, comments and the exporter's marks are not what is read."""
    assert measure(Path(__file__).parent.parent / "pithtrain").code < 8000


def test_code_lines_on_edge_cases():
    assert code_lines("") == 0
    assert code_lines("# remark\n\n") == 0
    assert code_lines("x = (1,\n     2)\n") == 2
    assert code_lines('s = """a\n\n# b\n"""\n') == 4
