"""A real agent loop: mini-swe-agent, with a scripted model, solves two tasks from end to end, and fails at them."""

import json
import os
import re
import shutil
import statistics
import sys
from pathlib import Path

import pytest

from ate_bench.cli import main
from ate_bench.source import read_sources
from ate_bench.task import load_task

sys.path.insert(0, str(Path(__file__).parent))
from scripted import SUBMIT, Reply, ScriptedModel, solution

REPOSITORY = Path(__file__).resolve().parent.parent.parent
MINI = shutil.which("mini") or shutil.which("mini", path=str(REPOSITORY / ".venv" / "mini" / "bin"))
KEY = "sk-scripted-0123456789"

pytestmark = [
    pytest.mark.skipif(MINI is None, reason="mini-swe-agent is not installed; run make agent"),
    pytest.mark.timeout(400),
]


def play(model: ScriptedModel, task: str, results: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict:
    """Run one attempt of `task` through the command line; return its record."""
    with model:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        monkeypatch.setenv("PATH", f"{Path(MINI).parent}:{os.environ['PATH']}")
        where = ["--framework", "pithtrain", "--task", task, "--results", str(results)]
        code = main(["run", *where, "--agent", "mini", "--model", "scripted", *options])
    (path,) = results.rglob("attempt.json")
    facts = json.loads(path.read_text())
    assert facts["status"] == "finished", facts
    assert code == (0 if facts["verdict"] == "PASS" else 1)
    assert model.keys == {f"Bearer {KEY}"}  # it was handed on ...
    for record in results.rglob("*"):  # ... and kept nowhere
        assert not record.is_file() or KEY.encode() not in record.read_bytes(), record
    return facts


def check_metrics(facts: dict, script: list[Reply], gpu: float) -> None:
    """The five metrics are what the script implies."""
    metrics = facts["metrics"]
    assert metrics["turns"] == len(script)
    assert metrics["context_tokens"] == statistics.median(reply.read for reply in script)
    assert metrics["output_tokens"] == sum(reply.wrote for reply in script)
    assert metrics["gpu_s"] == gpu
    # No pause of the script is long enough to be cut, so the session lasts from start to end.
    assert metrics["duration_s"] == pytest.approx(facts["ended"] - facts["started"], abs=0.01)
    assert metrics["duration_s"] >= sum(reply.delay for reply in script)


def outcomes(facts: dict) -> dict[str, str]:
    return {rule["rule"]: rule["outcome"] for rule in facts["rules"]}


def cite(definition: str, name: str, shift: int = 0) -> str:
    """A citation of the line on which `definition` begins in PithTrain, or of one near it."""
    for source in read_sources(REPOSITORY / "pithtrain"):
        for number, line in enumerate(source.text.splitlines(), 1):
            if line.startswith(definition):
                return f"`{source.path.relative_to(REPOSITORY)}:{number + shift} {name}`"
    raise AssertionError(f"{definition}: not in PithTrain; the task's key must be mended as well")


def rotary_script(shift: int) -> list[Reply]:
    table, turn = cite("def rotary_table(", "rotary_table", shift), cite("def rotate(", "rotate", shift)
    answer = (
        f"Verdict: present\nPairs: halves\nAngles in float32 from rope_theta: {table}. Halves: {turn}. "
        f"Called on queries and keys: {cite('class Attention(', 'Attention')}.\n"
    )
    return [
        Reply("grep -rn 'def rotary_table' pithtrain", read=1200, wrote=31, delay=0.3),
        Reply("sed -n 1,80p pithtrain/layers/rotary.py", read=2500, wrote=45),
        Reply("grep -n rotate pithtrain/layers/attention.py", read=4100, wrote=52),
        Reply(f"cat > $ATE_OUT/answer.md <<'END'\n{answer}END", read=5300, wrote=260, delay=0.2),
        Reply(SUBMIT, read=5600, wrote=12),
    ]


def test_a_question_is_answered(tmp_path, monkeypatch):
    script = rotary_script(shift=0)
    model = ScriptedModel(script)
    facts = play(model, "qa/rotary_positions", tmp_path, monkeypatch, "--judge", "mini", "--judge-model", "scripted")
    assert facts["verdict"] == "PASS", facts["rules"]
    assert set(outcomes(facts)) == {"read-only", "stance", "citations", "pairs", "places", "precision"}
    assert model.judged == 1
    check_metrics(facts, script, gpu=0)


def test_a_question_is_answered_with_citations_that_do_not_hold(tmp_path, monkeypatch):
    model = ScriptedModel(rotary_script(shift=-8))
    facts = play(model, "qa/rotary_positions", tmp_path, monkeypatch, "--judge", "mini", "--judge-model", "scripted")
    assert facts["verdict"] == "FAIL"
    found = outcomes(facts)
    assert found["stance"] == found["pairs"] == "PASS"
    assert found["citations"] == found["places"] == "FAIL"
    assert found["precision"] == "UNJUDGED" and model.judged == 0  # no judge is paid where a program said no
    reasons = {rule["rule"]: rule["reason"] for rule in facts["rules"]}
    assert "neither on line" in reasons["citations"]


def feature_script(code: str) -> list[Reply]:
    log = "2026-01-01 12:00:00 start\\n2026-01-01 12:00:42 end\\n"
    return [
        Reply("cat pithtrain/layers/experts.py", read=1500, wrote=20),
        Reply(f"cat > ate_feature.py <<'END'\n{code}\nEND", read=4000, wrote=2400),
        Reply(f"printf '{log}' > $ATE_OUT/train.log && python -c 'import ate_feature'", read=6600, wrote=70, delay=0.2),
        Reply(SUBMIT, read=6900, wrote=9),
    ]


def test_a_feature_is_added(tmp_path, monkeypatch):
    script = feature_script(solution("zero_experts"))
    said = json.dumps({"type": "result", "result": "PASS: it uses Experts and Decoder"})
    judge = tmp_path / "judge.toml"
    judge.write_text(f"name = 'judge'\ncommand = ['echo', '{said}']\nformat = 'claude'\n")
    model = ScriptedModel(script)
    task = tmp_path / "tasks" / "feature" / "zero_experts"  # with one file of tests in place of four
    shutil.copytree(load_task("feature/zero_experts").folder, task)
    rules, kept = (task / "rules.toml").read_text(), 'per = { pithtrain = ["tests/test_router.py"] }'
    (task / "rules.toml").write_text(re.sub("per = {.*}", kept, rules))
    facts = play(model, str(task), tmp_path / "results", monkeypatch, "--judge", str(judge))
    assert facts["verdict"] == "PASS", facts["rules"]
    assert set(outcomes(facts)) == {"equations", "training", "tests", "reuse"}
    check_metrics(facts, script, gpu=42)
    (patch,) = tmp_path.rglob("changes.patch")
    assert "+++ b/ate_feature.py" in patch.read_text()


def test_a_feature_is_added_wrongly(tmp_path, monkeypatch):
    code = solution("zero_experts").replace("probs.topk(self.top_k)", "probs.topk(self.top_k, sorted=True)")
    code = code.replace(
        "eta = torch.full", "weights = weights / weights.sum(-1, keepdim=True)\n        eta = torch.full"
    )
    # The task without its slow checks, which such a solution passes.
    task = tmp_path / "tasks" / "feature" / "zero_experts"
    shutil.copytree(load_task("feature/zero_experts").folder, task)
    rules = (task / "rules.toml").read_text().split("[[rule]]")
    kept = [rule for rule in rules if 'id = "training"' not in rule and 'id = "tests"' not in rule]
    (task / "rules.toml").write_text("[[rule]]".join(kept))
    facts = play(ScriptedModel(feature_script(code)), str(task), tmp_path / "results", monkeypatch)
    assert facts["verdict"] == "FAIL"
    reasons = {rule["rule"]: rule["reason"] for rule in facts["rules"]}
    assert reasons["equations"].startswith("FAIL output is off by")
    assert outcomes(facts) == {"equations": "FAIL", "reuse": "UNJUDGED"}
