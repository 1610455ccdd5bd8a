"""The checks of the feature tasks pass the reference solutions, and fail wrong ones for the right reason."""

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ate_bench.task import PACKAGE, load_task

sys.path.insert(0, str(Path(__file__).parent))
from scripted import solution

COMMON = PACKAGE / "tasks" / "common"
FEATURES = sorted(path.parent.name for path in (PACKAGE / "tasks" / "feature").glob("*/rules.toml"))


def checked(program: Path, *arguments: object, capsys, monkeypatch) -> tuple[str, int]:
    """The last line that a checker prints, and its exit code, run within this process."""
    monkeypatch.setattr(sys, "argv", [str(program), *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = 0
    try:
        runpy.run_path(str(program))
    except SystemExit as end:
        code = end.code
    finally:
        for name in ("ate_feature", "compare"):  # nobody else must meet these
            sys.modules.pop(name, None)
    return capsys.readouterr().out.strip().splitlines()[-1], code


def test_there_are_four_features_with_both_variants():
    assert len(FEATURES) == 4
    for name in FEATURES:
        task = load_task(f"feature/{name}")
        assert [rule.id for rule in task.rules] == ["equations", "training", "tests", "reuse"]
        assert task.rules[2].given_tests
        for test in task.rules[2].per["pithtrain"]:
            assert (PACKAGE.parent / test).exists()
        for variant, sign in (("cpu", "two minutes"), ("gpu", "bfloat16")):
            told = task.instruction(variant)
            assert "## The interface" in told and "`build_layer(" in told and sign in told


WRONG = [
    ("zero_experts", "if previous is not None:", "if False:", "logits is off by"),
    ("zero_experts", "(a[:, :1] * tokens + a", "(tokens + a", "output is off by"),
    ("zero_experts", "eta[: self.ffn] = 1.0", "pass", "balance loss is off by"),
    ("zero_experts", "chosen.mean(0) * probs.mean(0)", "chosen.mean(0) * probs.mean(0).detach()", "gradient of"),
    ("zero_experts", "class Matrix", "1 / 0\n\n\nclass Matrix", "ZeroDivisionError"),
    ("differential_attention", "first - strength * second", "first - second", "output is off by"),
    ("differential_attention", " * (1 - self.start)", "", "output is off by"),
    ("differential_attention", "(number - 1)", "number", "output is off by"),
    ("differential_attention", "k[:, half::2]", "k[:, :2]", "output is off by"),
    ("differential_attention", "- torch.exp(self.lambda_q2", "- 1 + 0 * (self.lambda_q2", "output is off by"),
    ("differential_attention", "RMSNorm(2 * head_dim, EPS)", "RMSNorm(1, EPS)", "parameters are"),
    ("block_attention", "attn_mask=self.seen(q, k)", "is_causal=True", "output is off by"),
    (
        "block_attention",
        "masked_fill(number == own[:, None], torch.inf)",
        "masked_fill(number < 0, 0)",
        "output is off by",
    ),
    ("block_attention", "min(self.top_blocks, blocks)", "min(self.top_blocks + 1, blocks)", "output is off by"),
    ("block_attention", "(positions <= positions[:, None])", "(positions >= 0)", "output is off by"),
    ("block_attention", "    @torch.no_grad()\n    def seen", "    def seen", "PASS"),  # a choice has no gradient
    ("dynamic_experts", "(1 + soft - soft.detach())", "soft", "output is off by"),
    ("dynamic_experts", "(1 + soft - soft.detach())", "(1 + 0 * soft)", "gradient of"),
    ("dynamic_experts", "if self.training:", "if True:", "in evaluation"),
    ("dynamic_experts", " - torch.eye(len(w))", "", "auxiliary loss is off by"),
    ("dynamic_experts", "self.used |= chosen.any(0)", "self.used |= True", "adapt returned"),
    ("dynamic_experts", "nn.functional.normalize(self.lost, dim=0)", "self.lost", "new gate vector is off by"),
    ("dynamic_experts", "old[kept]", "old[kept[::-1]]", "after adapt is off by"),
]


@pytest.mark.parametrize(("name", "before", "after", "reason"), [(name, "", "", "PASS") for name in FEATURES] + WRONG)
def test_the_equations_pass_the_reference_and_no_other(
    name: str, before: str, after: str, reason: str, tmp_path: Path, monkeypatch, capsys
):
    code = solution(name)
    assert before in code
    (tmp_path / "ate_feature.py").write_text(code.replace(before, after, 1) if before else code)
    checker = load_task(f"feature/{name}").folder / "equations.py"
    said, left = checked(checker, tmp_path, COMMON, capsys=capsys, monkeypatch=monkeypatch)
    right = reason == "PASS"
    assert said.startswith("PASS" if right else "FAIL ") and reason in said and left == (0 if right else 1), said


CHEATS = {
    "prints": "print('PASS 4 cases', flush=True)\nimport os\nos._exit(0)\n\n\n",
    "leaves": "raise SystemExit(0)\n\n\n",
    "writes": """
import os
for number in range(3, 64):
    try:
        os.write(number, b"PASS 4 cases")
    except OSError:
        pass
os._exit(0)


""",
}


@pytest.mark.parametrize(("cheat", "reason"), [("prints", "ended"), ("leaves", "SystemExit"), ("writes", "ended")])
def test_code_that_says_pass_and_ends_its_process_has_said_nothing(cheat: str, reason: str, tmp_path: Path):
    code = solution("zero_experts").replace("class Matrix", CHEATS[cheat] + "class Matrix", 1)
    (tmp_path / "ate_feature.py").write_text(code)
    checker = load_task("feature/zero_experts").folder / "equations.py"
    # In a process of its own: one of the cheats writes to every open file, pytest's own pipes among them.
    done = subprocess.run(
        [sys.executable, checker, tmp_path, COMMON], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    said = done.stdout.strip().splitlines()[-1]
    assert said.startswith("FAIL ") and reason in said and done.returncode == 1, done.stdout + done.stderr


RECORDED = """
import shutil, sys
for name in ("loss.jsonl", "train.log"):
    shutil.copy(f"{sys.path[0]}/{name}", sys.argv[1])
"""


def hand_in(folder: Path, losses: list[object], stamp: str = "2026-01-01 12:00:00") -> None:
    """A program that leaves a log of these losses."""
    (folder / "ate_feature.py").write_text(RECORDED)
    (folder / "loss.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
    (folder / "train.log").write_text(f"{stamp} start\nsteps\n{stamp} end\n")


FALLING = [5 - 0.05 * step for step in range(40)]


@pytest.mark.parametrize(
    ("losses", "stamp", "reason"),
    [
        (FALLING, "2026-01-01T12:00:00Z", "PASS the loss went from 4.900 to 3.150 in 40 steps"),
        (FALLING[::-1], "2026-01-01 12:00:00", "FAIL the loss went from"),
        (FALLING[:39], "2026-01-01 12:00:00", "FAIL 39 steps, expected 40"),
        ([*FALLING, float("nan")], "2026-01-01 12:00:00", "FAIL the loss is not finite"),
        (FALLING, "step", "FAIL the first and last line of train.log"),
        (["five"], "2026-01-01 12:00:00", "FAIL ValueError"),
    ],
)
def test_a_training_must_learn(losses, stamp: str, reason: str, tmp_path: Path, monkeypatch, capsys):
    hand_in(tmp_path, losses, stamp)
    said, _ = checked(COMMON / "training.py", tmp_path, tmp_path / "out", capsys=capsys, monkeypatch=monkeypatch)
    assert said.startswith(reason), said


def test_a_training_that_fails_says_why(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "ate_feature.py").write_text("raise ValueError('no such layer')")
    said, _ = checked(COMMON / "training.py", tmp_path, tmp_path / "out", capsys=capsys, monkeypatch=monkeypatch)
    assert said == "FAIL ate_feature.py left with 1: ValueError: no such layer"


@pytest.mark.parametrize("name", FEATURES)
def test_the_reference_solutions_learn(name: str, tmp_path: Path, monkeypatch, capsys):
    """Trained within this process, which has torch already; test_mini.py has one trained by the checker itself."""
    (tmp_path / "ate_feature.py").write_text(solution(name))
    (tmp_path / "README.md").write_text((PACKAGE.parent / "README.md").read_text())
    specification = importlib.util.spec_from_file_location("ate_feature", tmp_path / "ate_feature.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.train(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    if name == "dynamic_experts":
        assert len({tuple(row["experts"]) for row in rows}) > 1  # their number changed
    (tmp_path / "ate_feature.py").write_text(RECORDED)
    said, _ = checked(COMMON / "training.py", tmp_path, tmp_path / "out", capsys=capsys, monkeypatch=monkeypatch)
    assert said.startswith("PASS the loss went from"), said


def test_tests_that_passed_must_pass_still(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # sooner
    for text, reason in (
        ("assert True", "PASS 1 passed, 0 failed, 0 skipped"),
        ("assert False", "FAIL 0 passed, 1 failed"),
        ("__import__('pytest').skip()", "FAIL 0 passed, 0 failed, 1 skipped"),
        ("__import__('engine')", "FAIL pytest left with 0 before its end"),
    ):
        (tmp_path / "engine.py").write_text("import os\nprint('9 passed in 1s', flush=True)\nos._exit(0)\n")
        (tmp_path / "test_it.py").write_text(f"def test_it():\n    {text}\n")
        said, _ = checked(COMMON / "tests.py", tmp_path, "test_it.py", capsys=capsys, monkeypatch=monkeypatch)
        assert said.startswith(reason), said
