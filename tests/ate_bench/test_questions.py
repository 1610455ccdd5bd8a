"""Each question's programs pass a reference answer, and fail wrong ones for the right reason."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ate_bench.check import check_answer
from ate_bench.task import PACKAGE, Rule, load_task

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
QUESTIONS = sorted(path.parent.name for path in (PACKAGE / "tasks" / "qa").glob("*/rules.toml"))
FRAMEWORKS = ("pithtrain", "torchtitan", "megatron-core")


def definitions(text: str) -> Iterator[tuple[str, int]]:
    """Qualified names and lines of all definitions of a Python file."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named:
                yield prefix + child.name, child.lineno
            yield from inside(child, f"{prefix}{child.name}." if named else prefix)

    return inside(ast.parse(text), "")


def cite(match: re.Match) -> str:
    """`[[path name]]` as a citation of the line on which the definition begins today."""
    path, name = match[1].split()
    lines = dict(reversed(list(definitions((REPOSITORY / path).read_text()))))
    assert name in lines, f"{path} has no {name} any more; mend the answer, and the task's key"
    return f"`{path}:{lines[name]} {name}`"


def answer(question: str) -> str:
    """The reference answer for PithTrain."""
    return re.sub(r"\[\[(.+?)\]\]", cite, (HERE / "answers" / f"{question}.md").read_text())


def failures(question: str, text: str) -> dict[str, str]:
    """The rules that a program says the answer breaks, and why."""
    rules = [rule for rule in load_task(f"qa/{question}").rules if rule.kind != "judge"]
    verdicts = [check_answer(rule, "pithtrain", text, REPOSITORY) for rule in rules]
    return {verdict.rule: verdict.reason for verdict in verdicts if verdict.outcome == "FAIL"}


def rules(question: str, kind: str) -> list[Rule]:
    return [rule for rule in load_task(f"qa/{question}").rules if rule.kind == kind]


def test_there_are_twelve_questions_and_every_framework_is_asked():
    assert len(QUESTIONS) == 12
    for question in QUESTIONS:
        task = load_task(f"qa/{question}")
        assert task.read_only and {rule.kind for rule in task.rules} == {
            "stance",
            "states",
            "citations",
            "cites",
            "judge",
        }
        for rule in task.rules:
            if rule.kind in ("stance", "cites", "judge"):
                assert set(rule.per) == set(FRAMEWORKS), (question, rule.id)
        told = task.instruction("cpu")
        assert "`Verdict: absent`" in told and all(f"`{rule.label}: " in told for rule in rules(question, "states"))


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_reference_answer_passes(question: str):
    assert failures(question, answer(question)) == {}


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_that_says_absent_or_another_value_fails(question: str):
    text = answer(question)
    assert set(failures(question, text.replace("Verdict: present", "Verdict: absent"))) == {"stance"}
    for rule in rules(question, "states"):
        changed = re.sub(rf"^{rule.label}: .*$", f"{rule.label}: other", text, flags=re.MULTILINE)
        assert failures(question, changed)[rule.id].startswith(f"{rule.label}: other, expected")
        left_out = re.sub(rf"^{rule.label}: .*$", "", text, flags=re.MULTILINE)
        assert failures(question, left_out) == {rule.id: f"there is no line '{rule.label}: value'"}


@pytest.mark.parametrize(
    ("wanted", "said", "right"),
    [
        ("1.0|1", "1.0", True),
        ("1.0|1", "1", True),
        ("1.0|1", "0.1", False),
        ("1.0|1", "7.1", False),
        ("1.0|1", "1,000", False),
        ("1e-6", "1.0e-6", True),
        ("1e-6", "0.000001", True),
        ("1e-6", "5.1e-6", False),
        ("2|two", "0.2", False),
        ("2|two", "Two.", True),
        ("float32", "`torch.float32`", True),
        ("float32", "7.float32", False),
        ("yes", ".", False),
    ],
)
def test_a_number_is_right_by_its_value_and_a_name_by_its_last_part(wanted: str, said: str, right: bool):
    rule = Rule("limit", "states", label="Limit", per={"f": wanted})
    assert check_answer(rule, "f", f"Limit: {said}", REPOSITORY).outcome == ("PASS" if right else "FAIL")


def test_a_line_is_one_that_python_counts(tmp_path: Path):
    (tmp_path / "a.py").write_text('x = """\x0c\u2028\n"""\n\n\ndef found():\n    pass\n')
    rule = Rule("citations", "citations")
    assert check_answer(rule, "f", "`a.py:5 found`", tmp_path).outcome == "PASS"
    assert "a.py has 6 lines" in check_answer(rule, "f", "`a.py:7 found`", tmp_path).reason


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_that_cites_other_lines_or_not_enough_places_fails(question: str):
    text = answer(question)
    moved = re.sub(r":(\d+) ", lambda match: f":{int(match[1]) + 4000} ", text)
    found = failures(question, moved)
    assert set(found) == {"citations", "places"} and " lines" in found["citations"]
    first = re.search(r"`([\w/.]+\.py):(\d+) ([\w.]+)`", text)
    elsewhere = text.replace(first[0], f"`{first[1]}:1 {first[3]}`")
    assert f"{first[3]} is neither on line 1 nor around it" in failures(question, elsewhere)["citations"]
    for names in rules(question, "cites")[0].per["pithtrain"]:
        either = "|".join(rf"{re.escape(name)}(?:\.\w+)?" for name in names.split("|"))
        without = re.sub(rf"`[\w/.]+:\d+ (?:{either})`", "the code", text)
        assert failures(question, without)["places"] == f"no citation lies in {names}"


def sources() -> dict[str, Path]:
    """The frameworks' packages, unpacked in folders of ATE_FRAMEWORKS that bear their names; and this one."""
    folder = Path(os.environ.get("ATE_FRAMEWORKS", HERE / "none"))
    return {"pithtrain": REPOSITORY / "pithtrain"} | {name: folder / name for name in FRAMEWORKS[1:]}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_places_of_every_key_exist(framework: str):
    """For TorchTitan and Megatron-Core: `pip install --no-deps --target $ATE_FRAMEWORKS/NAME` what their files pin."""
    folder = sources()[framework]
    if not folder.is_dir():
        pytest.skip(f"{framework} is not in ATE_FRAMEWORKS")
    known = set()
    for path in folder.rglob("*.py"):
        known.update(f".{name}" for name, _ in definitions(path.read_text(encoding="utf-8", errors="replace")))
    for question in QUESTIONS:
        for names in rules(question, "cites")[0].per[framework]:
            for name in names.split("|"):
                assert any(at.endswith(f".{name}") for at in known), f"{question}: {framework} has no {name}"
