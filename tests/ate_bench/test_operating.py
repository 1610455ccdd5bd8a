"""The checks of the operate tasks pass what reference solutions hand in, and fail wrong ones for the right reason."""

import gzip
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ate_bench.task import PACKAGE, load_task

HERE = Path(__file__).parent
COMMON = PACKAGE / "tasks" / "common"
OPERATE = PACKAGE / "tasks" / "operate"

pytestmark = pytest.mark.timeout(180)


def run(program: Path, *arguments: object, monkeypatch) -> None:
    """Run a Python program within this process, in the repository's folder."""
    monkeypatch.setattr(sys, "argv", [str(program), *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(PACKAGE.parent)
    runpy.run_path(str(program), run_name="__main__")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What is handed in for first_training, checked once: its folder, with the run below check/runs/tiny."""
    out = tmp_path_factory.mktemp("out")
    shutil.copy(HERE / "solutions" / "first_training.sh", out / "run.sh")
    command = [sys.executable, str(COMMON / "training.py"), str(PACKAGE.parent), str(out), "bash", str(out / "run.sh")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.stdout.startswith("PASS the loss went from"), done.stdout + done.stderr
    for name in ("loss.jsonl", "train.log"):
        shutil.copy(out / "check" / name, out)
    return out


@pytest.fixture
def solve(trained: Path, tmp_path: Path, monkeypatch, capsys) -> Callable[[str], Path]:
    """Runs a reference solution on the trained run; what it hands in is in the folder that comes back."""

    def solved(task: str) -> Path:
        run(HERE / "solutions" / f"{task}.py", trained / "check/runs/tiny", tmp_path, monkeypatch=monkeypatch)
        capsys.readouterr()
        return tmp_path

    return solved


@pytest.fixture
def said(monkeypatch, capsys) -> Callable[..., str]:
    """What a checker says last."""

    def last(program: str, *arguments: object) -> str:
        run(OPERATE / program, *arguments, monkeypatch=monkeypatch)
        return capsys.readouterr().out.strip().splitlines()[-1]

    return last


def test_there_are_four_with_both_variants():
    names = sorted(path.parent.name for path in OPERATE.glob("*/rules.toml"))
    assert names == ["export_and_evaluate", "first_training", "heaviest_kernels", "routing_trace"]
    for name in names:
        task = load_task(f"operate/{name}")
        for rule in task.rules:
            for part in rule.command[1:2]:
                assert Path(part.replace("{task}", str(task.folder)).replace("{common}", str(COMMON))).exists(), part
        assert "two cores" in task.instruction("cpu") and "bfloat16" in task.instruction("gpu")
        assert "`{out}/train.log`" in task.instruction("cpu")


def losses(path: Path, values: list[float]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"loss": value}) + "\n" for value in values))


def test_a_first_training(trained: Path, tmp_path: Path, said):
    assert said("first_training/record.py", trained).startswith("PASS the loss goes to")
    falling = [5 - 0.04 * step for step in range(60)]
    losses(tmp_path / "check" / "loss.jsonl", falling)
    for own, reason in (
        (falling, "PASS"),
        (falling[:50], "FAIL 50 steps were handed in, run.sh makes 60"),
        ([5 - 0.06 * step for step in range(60)], "FAIL handed in is a loss from 4.880 to 1.580, run.sh makes one"),
    ):
        losses(tmp_path / "loss.jsonl", own)
        assert said("first_training/record.py", tmp_path).startswith(reason)
    (tmp_path / "loss.jsonl").unlink()
    assert said("first_training/record.py", tmp_path).startswith("FAIL loss.jsonl: FileNotFoundError")


def test_a_script_that_does_not_train(tmp_path: Path, monkeypatch, capsys):
    for script, reason in (
        ("exit 4", "FAIL run.sh left with 4: no error"),
        ("touch $1/train.log", "FAIL FileNotFoundError"),
        (
            "yes '2026-01-01 00:00:00' | head -9 > $1/train.log; yes '{\"loss\": 5}' | head -50 > $1/loss.jsonl",
            "FAIL the loss went from 5.000 to 5.000",
        ),
    ):
        (tmp_path / "run.sh").write_text(script)
        run(COMMON / "training.py", tmp_path, tmp_path, "bash", tmp_path / "run.sh", monkeypatch=monkeypatch)
        assert capsys.readouterr().out.startswith(reason)


def test_an_exported_model_has_the_loss_that_was_measured(solve, said):
    out, checker = solve("export_and_evaluate"), "export_and_evaluate/same_loss.py"
    rows = json.loads((out / "held_out.json").read_text())[:40]  # fewer, sooner
    (out / "held_out.json").write_text(json.dumps(rows))
    tokens = sum(len(row) - 1 for row in rows)

    def reported(loss: float, count: int = tokens) -> str:
        (out / "evaluation.json").write_text(json.dumps({"nats_per_token": loss, "tokens": count}))
        return said(checker, out)

    measured = float(reported(1.0).split("measures ")[1].split()[0])  # FAIL transformers measures ...
    assert reported(measured).startswith(f"PASS {measured:.5f} nats a token in transformers")
    assert reported(1.01 * measured).startswith("FAIL transformers measures")
    assert (
        reported(measured, tokens + 1)
        == f"FAIL {tokens + 1} tokens are reported, held_out.json has {tokens}, 1,000 are needed"
    )

    import torch
    from safetensors.torch import load_file, save_file

    (weights,) = (out / "model").glob("*.safetensors")
    right = load_file(weights)
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    swapped = {re.sub("gate_proj|up_proj", lambda found: other[found[0]], name): right[name] for name in right}
    save_file(swapped, weights, {"format": "pt"})  # exported in a wrong order
    assert reported(measured).startswith("FAIL transformers measures")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in right.items()}
    save_file(zeros, weights, {"format": "pt"})  # never trained
    assert reported(float(np.log(300))).startswith("FAIL 5.704 nats a token; a uniform guess has 5.704")
    weights.unlink()
    assert reported(measured) == "FAIL model: no safetensors file or no tokenizer.json"


def test_a_routing_trace(solve, said):
    out, trace, load = solve("routing_trace"), "routing_trace/trace.py", "routing_trace/load.py"
    assert said(trace, out).startswith("PASS 20 x 2 x 1024 x 2 pairs") and said(load, out).startswith("PASS")
    with np.load(out / "trace.npz") as arrays:
        ids, weights = arrays["expert_ids"], arrays["weights"]

    def handed_in(ids: np.ndarray, weights: np.ndarray, checker: str = trace) -> str:
        np.savez(out / "trace.npz", expert_ids=ids, weights=weights)
        return said(checker, out)

    for wrong_ids, wrong_weights, reason in (
        (ids[:, :, :, 0], weights[:, :, :, 0], "FAIL shapes are (20, 2, 1024)"),
        (ids, weights[:, :, ::2], "FAIL shapes are (20, 2, 1024, 2) and (20, 2, 512, 2)"),
        (ids[:10], weights[:10], "FAIL 10 steps"),
        (ids.astype(float), weights, "FAIL types are float64 and float32"),
        (ids + 1, weights, "FAIL ids go from 1 to 4, there are 4 experts"),
        (ids * 0, weights, "FAIL a token has the same expert twice"),
        (ids, weights * 0.5, "FAIL the weights of a token sum to 1 within 0.5"),
        (ids, -weights, "FAIL a weight is negative"),
        (ids, np.full_like(weights, 0.5), "FAIL all weights are the same"),
        (ids, np.repeat(weights[:1], 20, axis=0), "FAIL a layer's weights are the same in two steps"),
    ):
        assert handed_in(wrong_ids, wrong_weights).startswith(reason)
    assert handed_in((ids + 1) % 4, weights, load).startswith("FAIL step")  # other experts than were trained
    assert handed_in(ids[::-1], weights, load).startswith("FAIL step")
    assert handed_in(ids[:15], weights[:15], load) == "FAIL load.jsonl has 20 steps, the trace 15"


def test_the_heaviest_kernels(solve, said):
    out, checker = solve("heaviest_kernels"), "heaviest_kernels/kernels.py"
    right = json.loads((out / "kernels.json").read_text())
    trace = json.loads((out / "profile.json").read_text())
    assert said(checker, out) == f"PASS {', '.join(entry['name'] for entry in right)}"
    (out / "profile.json").unlink()
    assert said(checker, out) == "FAIL there is no profile.json or profile.json.gz"

    def handed_in(report: list[dict], **changes: object) -> str:
        (out / "profile.json.gz").write_bytes(gzip.compress(json.dumps({**trace, **changes}).encode()))
        (out / "kernels.json").write_text(json.dumps(report))
        return said(checker, out)

    assert handed_in(right).startswith("PASS")
    assert handed_in(right[1::-1] + right[2:]).startswith("FAIL reported are")
    assert handed_in(right[:2]).startswith("FAIL reported are")
    wrong = [{**right[0], "share": 2 * right[0]["share"]}, *right[1:]]
    assert handed_in(wrong).startswith(f"FAIL {right[0]['name']}: share is reported as")
    wrong = [{**right[0], "calls": right[0]["calls"] + 1}, *right[1:]]
    assert handed_in(wrong).startswith(f"FAIL {right[0]['name']}: calls is reported as")
    events = trace["traceEvents"]
    forward = [event for event in events if not str(event.get("name")).startswith("autograd::engine")]
    assert handed_in(right, traceEvents=forward).startswith("FAIL the trace has no backward")
    length = max(event["ts"] + event.get("dur", 0) for event in events if "ts" in event)
    twice = events + [{**event, "ts": event["ts"] + length} for event in events if event.get("ph") == "X"]
    assert handed_in(right, traceEvents=twice).startswith("FAIL the trace has 2 steps of an optimiser")


def test_kernels_of_a_gpu_are_its_own_events(tmp_path: Path, said):
    def event(category: str, name: str, start: float, duration: float) -> dict:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "pid": 0, "tid": 7}

    events = [event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 0, 900)]
    events += [event("user_annotation", "Optimizer.step#AdamW.step", 900, 50)]
    events += [
        event("kernel", name, start, 10.0 * (4 - number)) for number, name in enumerate("abcd") for start in (0, 50)
    ]
    (tmp_path / "profile.json").write_text(json.dumps({"traceEvents": events}))
    times = {"a": 80, "b": 60, "c": 40}
    report = [{"name": name, "microseconds": t, "calls": 2, "share": t / 200} for name, t in times.items()]
    (tmp_path / "kernels.json").write_text(json.dumps(report))
    assert said("heaviest_kernels/kernels.py", tmp_path) == "PASS a, b, c"
