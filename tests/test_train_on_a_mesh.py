"""Whole runs of several processes, through `pithtrain launch`: equal to one process, stopped, moved, killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOML = """
[run]
name = "demo"
device = "cpu"
[model]
vocab_size = 300
layers = 4
hidden = 32
heads = 4
kv_heads = 2
head_dim = 8
experts = 4
top_k = 2
expert_hidden = 16
tie_embeddings = false
[balance]
sequence = 0.01
global_batch = 0.0
bias_rate = 0.001
[optimizer]
warmup = 2
[train]
steps = 24
sequence_length = 16
batch_size = 8
micro_batch_size = 1
checkpoint_every = 0
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a run of the same small config and data in a process of its own; more settings may follow."""
    folder = tmp_path_factory.mktemp("mesh")
    (folder / "corpus").mkdir()
    for i in range(40):
        text = "".join(f"def function_{i}_{j}(x):\n    return x + {j}\n" for j in range(30))
        (folder / f"corpus/file{i}.py").write_text(text)
    (folder / "demo.toml").write_text(TOML)
    places = ["--run.folder", f"{folder}/runs", "--data.folder", f"{folder}/data", "--data.corpus", f"{folder}/corpus"]

    def process(name: str, how: list[str], *more: str) -> tuple[subprocess.Popen, Path]:
        arguments = [*how, str(folder / "demo.toml"), *places, "--run.name", name, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = subprocess.Popen(
            [sys.executable, "-m", "pithtrain.cli", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        return started, folder / "runs" / name

    return process


def finish(process, timeout=120):
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for_steps(folder, steps, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(records(folder)) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError(f"{steps} steps were not reached: {finish(process)}")


def test_stopped_on_four_ranks_and_finished_on_others(start):
    """ep 2 x pp 2, then cp 2, then one process: one run, with the numbers of a run of one process throughout."""
    whole, expected = start("whole", ["train"])
    code, _, errors = finish(whole)
    assert code == 0, errors

    first, folder = start("moved", ["launch", "--nproc", "4"], "--mesh.ep", "2", "--mesh.pp", "2")
    wait_for_steps(folder, 3, first)
    first.send_signal(signal.SIGINT)
    code, output, errors = finish(first)
    assert code == 130 and "the same command goes on from there" in output, errors
    stopped = records(folder)[-1]["step"]
    assert 3 <= stopped < 24
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{stopped:08d}"]

    second, _ = start("moved", ["launch", "--nproc", "2"], "--mesh.cp", "2")
    wait_for_steps(folder, stopped + 2, second)
    second.send_signal(signal.SIGTERM)
    code, output, errors = finish(second)
    assert code in (0, 130) and f"going on from step {stopped}" in output, errors

    third, _ = start("moved", ["train"])
    code, _, errors = finish(third)
    assert code == 0, errors
    for a, b in zip(records(folder), records(expected), strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    last, wanted = records(folder)[-1], records(expected)[-1]
    assert last["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=1e-4)


def test_validation_on_a_mesh_is_that_of_one_process(start):
    settings = ("--train.steps", "2", "--train.evaluate_every", "1")
    one, expected = start("one", ["train"], *settings)
    code, _, errors = finish(one)
    assert code == 0, errors
    for axis in ("pp", "dp"):
        two, folder = start(axis, ["launch", "--nproc", "2"], *settings, f"--mesh.{axis}", "2")
        code, _, errors = finish(two)
        assert code == 0, errors
        for a, b in zip(records(folder), records(expected), strict=True):
            assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=1e-5)
            assert a["load"] == b["load"] and a["entropy"] == pytest.approx(b["entropy"], rel=1e-5)


def children(pid: int) -> dict[int, int]:
    """Process of each rank below `pid`."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((v for v in variables if v.startswith(b"RANK=")), None)
        if rank:
            found[int(rank.partition(b"=")[2])] = int(child)
    return found


def test_a_rank_killed_in_the_middle_of_a_step_ends_the_job(start):
    job, folder = start("killed", ["launch", "--nproc", "2"], "--mesh.ep", "2", "--train.steps", "100000")
    wait_for_steps(folder, 2, job)
    os.kill(children(job.pid)[1], signal.SIGKILL)
    killed = time.monotonic()
    code, _, errors = finish(job, timeout=60)
    seconds = time.monotonic() - killed
    print(f"ended {seconds:.2f} s after the kill; {errors.splitlines()[-1]}")  # seen with pytest -rP
    assert code != 0 and seconds < 15
    assert "rank 1" in errors and "killed" in errors and "Traceback" not in errors


def test_mistakes_are_answered_once_and_early(start):
    for settings, said in (
        (("--mesh.ep", "3"), "mesh.ep: 3 does not divide 2"),
        (("--train.micro_batch_size", "8"), "train.micro_batch_size: 8 sequences on each of 2 ranks"),
        (("--train.step", "8"), "did you mean 'steps'?"),
        (("--mesh.pp", "2", "--train.micro_batch_size", "4"), "mesh.pp: dualpipev on 2 ranks needs"),
        (("--data.corpus", "/no/such/folder"), "/no/such/folder: no such folder"),  # found while the others wait
        (("--model.experts", "100000000"), "and this device has"),
    ):
        job, folder = start("refused", ["launch", "--nproc", "2"], *settings)
        code, _, errors = finish(job)
        assert code == 2 and errors.count(said) == 1 and len(errors.splitlines()) == 1, errors
        assert not folder.exists()
