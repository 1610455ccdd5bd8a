"""Training: determinism, resume to the bit, and every refusal, through the command line in-process."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pithtrain import cli
from pithtrain.config import UserError
from pithtrain.train import trainer
from pithtrain.train.run import hold_run_folder

TINY = """
[run]
name = "demo"
device = "cpu"
[model]
vocab_size = 300
layers = 2
hidden = 32
heads = 4
kv_heads = 2
head_dim = 8
experts = 4
top_k = 2
expert_hidden = 16
[balance]
sequence = 0.01
micro_batch = 0.01
bias_rate = 0.001
[optimizer]
warmup = 2
[train]
steps = 8
sequence_length = 16
batch_size = 4
micro_batch_size = 2
checkpoint_every = 3
"""
TIMES = ("seconds", "tokens_per_second", "time")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"file{i}.py").write_text(
            "".join(f"def function_{i}_{j}(x):\n    return x + {j}\n" for j in range(30))
        )
    return folder


@pytest.fixture
def command(tmp_path, corpus):
    """Arguments of `pithtrain train` for a run in tmp_path; the data folder is the test's own."""
    (tmp_path / "demo.toml").write_text(TINY)

    def arguments(*more: str) -> list[str]:
        places = ("--run.folder", f"{tmp_path}/runs", "--data.folder", f"{tmp_path}/data", "--data.corpus", str(corpus))
        return ["train", str(tmp_path / "demo.toml"), *places, *more]

    return arguments


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_every_row_says_when_its_step_ended(command, tmp_path):
    start = time.time()
    assert cli.main(command("--train.steps", "3")) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines()]
    stamps = [row["time"] for row in rows]
    assert start + rows[0]["seconds"] <= stamps[0] + 0.01 and stamps[2] <= time.time()
    assert stamps[1] - stamps[0] >= rows[1]["seconds"] - 0.01 and stamps[2] - stamps[1] >= rows[2]["seconds"] - 0.01


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from pithtrain.train.run import open_run

    return open_run(folder).model.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_it_promises_and_repeats_exactly(command, tmp_path, capsys):
    assert cli.main(command()) == 0
    output = capsys.readouterr().out
    assert "nats per token" in output and "unigram" in output and "bigram" in output
    folder = tmp_path / "runs/demo"
    expected = {"config.toml", "tokenizer.json", "metrics.jsonl", "results.json", "sample.txt", "checkpoints"}
    expected |= {"corpus.sha256"}
    pictures = {"loss.png", "learning_rate.png", "expert_load.png", "entropy.png"}
    assert {path.name for path in folder.iterdir()} == expected | pictures
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000006", "step-00000008"]
    results = json.loads((folder / "results.json").read_text())
    assert results["step"] == 8 and set(results["nats_per_token"]) == {"this model", "bigram", "unigram"}

    assert cli.main(command("--run.name", "again")) == 0
    assert records(folder) == records(tmp_path / "runs/again")
    assert same(weights(folder), weights(tmp_path / "runs/again"))

    assert cli.main(command("--run.name", "other", "--run.seed", "1")) == 0
    assert records(folder)[0]["loss"] != records(tmp_path / "runs/other")[0]["loss"]


def test_interrupted_and_resumed_ends_with_the_same_bits(command, tmp_path, monkeypatch, capsys):
    assert cli.main(command("--run.name", "whole")) == 0
    step = trainer.Learner.step
    calls = 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(trainer.Learner, "step", interrupted)
    assert cli.main(command()) == 130
    assert "step 5 of 8; the same command goes on" in capsys.readouterr().out
    assert cli.main(command()) == 0
    assert calls == 8
    assert records(tmp_path / "runs/demo") == records(tmp_path / "runs/whole")
    assert same(weights(tmp_path / "runs/demo"), weights(tmp_path / "runs/whole"))


def test_killed_between_checkpoints_repeats_the_lost_steps(command, tmp_path, monkeypatch):
    assert cli.main(command("--run.name", "whole")) == 0
    step = trainer.Learner.step
    calls = 0

    def killed(*arguments):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt  # stands for a kill: nothing is saved
        return step(*arguments)

    monkeypatch.setattr(trainer.Learner, "step", killed)
    assert cli.main(command()) == 130
    assert [r["step"] for r in records(tmp_path / "runs/demo")] == [1, 2, 3, 4, 5]
    monkeypatch.setattr(trainer.Learner, "step", step)
    assert cli.main(command()) == 0
    assert records(tmp_path / "runs/demo") == records(tmp_path / "runs/whole")
    assert same(weights(tmp_path / "runs/demo"), weights(tmp_path / "runs/whole"))


def running(command, metrics):
    """A real process that trains, some steps on."""
    arguments = [sys.executable, "-m", "pithtrain.cli", *command("--train.steps", "100000")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_a_second_ctrl_c_ends_at_once_without_a_traceback(command, tmp_path, pause):
    process = running(command, tmp_path / "runs/demo/metrics.jsonl")
    process.send_signal(signal.SIGINT)
    time.sleep(pause)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (130, -signal.SIGINT)  # the latter where all was done before the second
    assert "Traceback" not in errors


def test_ctrl_c_in_a_real_process_saves_and_says_how_to_go_on(command, tmp_path):
    process = running(command, tmp_path / "runs/demo/metrics.jsonl")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopping and saving after this step; once more ends without saving" in errors
    assert "the same command goes on from there" in output and "Traceback" not in errors
    saved = [path.name for path in (tmp_path / "runs/demo/checkpoints").iterdir()]
    last = records(tmp_path / "runs/demo")[-1]["step"]
    assert f"step-{last:08d}" in saved


def test_a_sequence_shorter_than_the_prompt_ends_without_a_sample(command, tmp_path, capsys):
    assert cli.main(command("--train.sequence_length", "1")) == 0
    assert "no sample: the prompt: has" in capsys.readouterr().out
    assert not (tmp_path / "runs/demo/sample.txt").exists()


def refused(capsys, arguments: list[str]) -> str:
    """The one line that `arguments` are refused with."""
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("pithtrain: ")
    return message


def test_a_run_folder_of_another_config_is_left_alone(command, tmp_path, capsys):
    assert cli.main(command()) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    message = refused(capsys, command("--train.steps", "9"))
    assert "belongs to a run with another config (train.steps: 9, not 8)" in message
    (tmp_path / "runs/notes").mkdir()
    (tmp_path / "runs/notes/letter.txt").write_text("mine")
    assert "is not a run" in refused(capsys, command("--run.name", "notes"))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    # A setting that does not change the weights may change.
    assert cli.main(command("--train.keep", "1")) == 0


def test_a_run_gets_longer_from_before_its_learning_rate_fell(command, tmp_path, capsys):
    """It is then, to the bit, the run that was long from the start."""
    assert cli.main(command("--train.keep", "3")) == 0
    assert "delete its checkpoints after step 3, to go on" in refused(capsys, command("--train.steps", "12"))
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"runs/demo/checkpoints/step-{step:08d}")
    few = refused(capsys, command("--train.steps", "3"))  # nothing would be left to do
    assert "train.steps: 3, not 8" in few and "none of its checkpoints belongs to a run of 3 steps" in few
    assert "optimizer.decay" in refused(capsys, command("--train.steps", "12", "--optimizer.decay", "0.1"))
    assert cli.main(command("--train.steps", "12")) == 0
    assert "going on from step 3" in capsys.readouterr().out
    assert cli.main(command("--train.steps", "12", "--run.name", "straight")) == 0
    assert records(tmp_path / "runs/demo") == records(tmp_path / "runs/straight")
    assert same(weights(tmp_path / "runs/demo"), weights(tmp_path / "runs/straight"))


def test_too_little_memory_is_said_in_one_line(command, tmp_path, capsys, monkeypatch):
    assert "this device has" in refused(capsys, command("--model.experts", "100000000"))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()
    many = refused(capsys, ["bench", "step", *command("--model.experts", "100000000")[1:]])
    assert "gradients and averages take" in many

    wide = ("--train.batch_size", "1000000000000", "--train.micro_batch_size", "1000000000000")
    said = refused(capsys, command(*wide))
    assert "can't allocate memory: you tried to allocate" in said and "lower train.micro_batch_size" in said
    assert not (tmp_path / "runs").exists()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")

    monkeypatch.setattr(trainer.Learner, "step", full)
    message = refused(capsys, command())
    assert "CUDA out of memory. Tried to allocate 2.00 GiB; lower train.micro_batch_size" in message
    assert message == refused(capsys, ["rehearse", *command()[1:], "--ranks", "1"])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--data.corpus", "/no/such/folder"], "/no/such/folder"),
        (["--data.pattern", "*.none"], "*.none"),
        (["--train.sequence_length", "1000000"], "sequence_length"),
        (["--train.micro_batch_size", "3"], "train.micro_batch_size: 3 does not divide"),
        (["--model.vocab_size", "100000"], "vocab_size"),
        (["--data.folder", "."], "data.folder: '.' is no folder of its own"),
        (["--train.stepz", "3"], "did you mean 'steps'"),
        (["--train.steps"], "has no value"),
        (["steps"], "unexpected"),
    ],
)
def test_refusals_leave_no_run_behind(command, tmp_path, capsys, more, expected):
    assert expected in refused(capsys, command(*more))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused_before_any_work(command, tmp_path, capsys):
    assert "torch sees no CUDA GPU" in refused(capsys, command("--run.device", "cuda"))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_shards_are_refused(command, tmp_path, capsys, damage):
    assert cli.main(command()) == 0
    shard = tmp_path / "data/train-00000.bin"
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[:-2] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    assert "train-00000.bin" in refused(capsys, command("--run.name", "second"))
    assert not (tmp_path / "runs/second").exists()


def test_another_tokenizer_is_refused(command, tmp_path, capsys):
    assert cli.main(command("--run.name", "a", "--model.vocab_size", "290", "--data.folder", f"{tmp_path}/b")) == 0
    assert cli.main(command()) == 0
    shutil.copy(tmp_path / "b/tokenizer.json", tmp_path / "data/tokenizer.json")
    assert "not the tokenizer" in refused(capsys, command("--run.name", "second"))


def test_a_damaged_checkpoint_is_named(command, tmp_path, capsys):
    assert cli.main(command()) == 0
    newest = tmp_path / "runs/demo/checkpoints/step-00000008"
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    assert "step-00000008: cannot be read" in refused(capsys, command())
    (newest / ".metadata").unlink()
    assert cli.main(command()) == 2
    said = capsys.readouterr().err
    assert "step-00000008: cannot be read (its .metadata is missing); delete this folder" in said
    assert "Traceback" not in said and said.count("\n") == 1
    shutil.rmtree(newest)
    assert cli.main(command()) == 0  # from step 6


def test_a_full_disk_while_saving_keeps_the_older_checkpoint(command, tmp_path, capsys, monkeypatch):
    original = os.fsync
    saves = 0

    def full(descriptor):
        nonlocal saves
        if "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
            saves += 1
            if saves > 2:  # a checkpoint is two files, each flushed
                raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = refused(capsys, command())
    assert "the disk is full" in message
    folder = tmp_path / "runs/demo/checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    assert cli.main(command()) == 0


def test_a_full_disk_when_the_run_begins_leaves_nothing(command, tmp_path, capsys, monkeypatch):
    write = Path.write_text

    def full(path, text, *more, **named):
        if path.name == "config.toml":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, *more, **named)

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device" in refused(capsys, command())
    assert list((tmp_path / "runs").iterdir()) == []
    monkeypatch.undo()
    assert cli.main(command()) == 0


def test_undecodable_files_are_skipped_with_a_count(command, tmp_path, corpus, capsys):
    mixed = shutil.copytree(corpus, tmp_path / "mixed")
    for name in ("one.py", "two.py"):
        (mixed / name).write_bytes(b"x = '\xff\xfe'\n")
    assert cli.main(command("--data.corpus", str(mixed))) == 0
    output = capsys.readouterr().out
    assert any("2" in line and "skipped" in line for line in output.splitlines()), output


def test_a_loss_that_is_not_finite_stops_the_run(command, tmp_path, capsys):
    message = refused(
        capsys, command("--optimizer.learning_rate", "1e20", "--optimizer.clip", "0", "--train.steps", "30")
    )
    assert "lower optimizer.learning_rate" in message


def test_weights_that_are_no_numbers_replace_no_checkpoint(command, tmp_path, capsys, monkeypatch):
    """The loss and the norm of a step are those of the weights before it."""
    step = trainer.Learner.step

    def breaks(learner, batches, rate):
        result = step(learner, batches, rate)
        _, weight = next(learner.named_parameters())
        if learner.optimizer.state[weight]["step"] == 6:
            weight.data[0] = torch.nan
        return result

    monkeypatch.setattr(trainer.Learner, "step", breaks)
    said = refused(capsys, command("--train.keep", "1"))
    assert "runs/demo: a weight behind step 6 is nan; lower optimizer.learning_rate" in said
    assert [path.name for path in (tmp_path / "runs/demo/checkpoints").iterdir()] == ["step-00000003"]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "runs/demo").values())


def test_one_process_at_a_time_trains_a_run(command, tmp_path, capsys):
    assert cli.main(command()) == 0
    before = (tmp_path / "runs/demo/config.toml").read_text()
    with hold_run_folder(tmp_path / "runs/demo"):
        said = refused(capsys, command("--train.keep", "1"))
    assert "runs/demo: another process is training this run; wait" in said
    assert (tmp_path / "runs/demo/config.toml").read_text() == before
    assert cli.main(command()) == 0


def test_a_run_goes_on_with_its_own_text(command, tmp_path, corpus, capsys):
    other = shutil.copytree(corpus, tmp_path / "other")
    assert cli.main(command("--data.corpus", str(other), "--train.keep", "3")) == 0
    next(other.glob("*.py")).write_text("changed = 1\n")
    shutil.rmtree(tmp_path / "runs/demo/checkpoints/step-00000008")
    assert "(its text has changed)" in refused(capsys, command("--data.corpus", str(other)))
    shutil.rmtree(tmp_path / "data")
    said = refused(capsys, command("--data.corpus", str(other)))
    assert "runs/demo: was trained on other text than" in said and "restore that" in said


def test_files_that_the_system_refuses_are_one_line(command, tmp_path, capsys):
    assert cli.main(command("--train.steps", "2")) == 0
    checkpoints = tmp_path / "runs/demo/checkpoints"
    shutil.rmtree(checkpoints)
    checkpoints.write_text("")
    assert "checkpoints: is no folder that can be written" in refused(capsys, command("--train.steps", "2"))
    assert "demo.toml/x: Not a directory" in refused(capsys, ["train", str(tmp_path / "demo.toml/x")])
    (tmp_path / "runs/empty").mkdir()
    assert cli.main(command("--train.steps", "2", "--run.name", "empty")) == 0


def test_a_finished_run_without_its_last_metrics_says_so(command, tmp_path, capsys):
    assert cli.main(command("--train.steps", "3")) == 0
    (tmp_path / "runs/demo/metrics.jsonl").unlink()
    assert "metrics.jsonl: lacks the last step; pithtrain evaluate" in refused(capsys, command("--train.steps", "3"))


def test_a_run_that_was_never_saved_may_get_another_length(command, tmp_path, capsys):
    assert cli.main(command("--train.steps", "3")) == 0
    shutil.rmtree(tmp_path / "runs/demo/checkpoints")
    assert cli.main(command("--train.steps", "4")) == 0


def test_a_checkpoint_of_another_model_is_not_to_be_deleted(command, tmp_path, capsys):
    assert cli.main(command("--train.steps", "2")) == 0
    file = tmp_path / "runs/demo/config.toml"
    file.write_text(file.read_text().replace("hidden = 32", "hidden = 64"))
    said = refused(capsys, ["generate", str(tmp_path / "runs/demo")])
    assert "it is of another model than config.toml describes; restore that file" in said and "delete" not in said


@pytest.mark.parametrize("name", ["2024-05-01", "7", "true"])
def test_a_name_that_looks_like_something_else_is_a_name(command, tmp_path, name):
    assert cli.main(command("--train.steps", "2", "--run.name", name)) == 0
    assert (tmp_path / "runs" / name / "results.json").is_file()


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_refused(command, tmp_path, capsys, monkeypatch, package):
    from pithtrain.train import metrics

    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert f"the package {package} is not installed" in refused(capsys, command(f"--log.{package}", "true"))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()


def test_what_the_first_step_is_made_of_is_refused_without_a_run_left_behind(command, tmp_path, capsys, monkeypatch):
    def refuse(*given):
        raise UserError("no such thing")

    for name in ("process_group", "make_mesh", "Learner", "HeldOutBatches"):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, name, refuse)
            assert "no such thing" in refused(capsys, command())
        assert not (tmp_path / "runs").exists()


def test_tensorboard_gets_the_numbers(command, tmp_path):
    pytest.importorskip("tensorboard")
    assert cli.main(command("--log.tensorboard", "true")) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs/demo/tensorboard")).Reload()
    losses = [round(event.value, 4) for event in events.Scalars("loss")]
    assert losses == [round(r["loss"], 4) for r in records(tmp_path / "runs/demo")]


def test_bfloat16_trains_with_fp32_weights(command, tmp_path):
    assert cli.main(command("--run.precision", "bfloat16", "--run.name", "half")) == 0
    assert cli.main(command()) == 0
    a, b = records(tmp_path / "runs/half"), records(tmp_path / "runs/demo")
    assert all(abs(x["loss"] / y["loss"] - 1) < 0.01 for x, y in zip(a, b, strict=True))
    assert {w.dtype for name, w in weights(tmp_path / "runs/half").items()} == {torch.float32}


def test_accumulation_does_not_change_the_loss(command, tmp_path):
    for size in ("1", "4"):
        more = ("--balance.micro_batch", "0", "--balance.global_batch", "0", "--run.precision", "float32")
        assert cli.main(command("--run.name", f"m{size}", "--train.micro_batch_size", size, *more)) == 0
    a, b = records(tmp_path / "runs/m1"), records(tmp_path / "runs/m4")
    assert all(abs(x["loss"] / y["loss"] - 1) < 1e-4 for x, y in zip(a, b, strict=True))


def test_generate(command, tmp_path, capsys):
    assert cli.main(command()) == 0
    capsys.readouterr()
    run = str(tmp_path / "runs/demo")
    outputs = []
    for seed in ("0", "0", "1"):
        assert cli.main(["generate", run, "--prompt", "def f", "--tokens", "20", "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2] and outputs[0].startswith("def f")
    assert "not a run" in refused(capsys, ["generate", str(tmp_path)])
    assert "unexpected" in refused(capsys, ["generate", run, "--train.steps", "3"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian", "configs/tiny.toml"], "COMMAND: invalid choice: 'trian'"),
        (["train"], "the following arguments are required: config; pithtrain train --help"),
        (["generate", "run", "--temperature", "-1"], "--temperature: -1 is out of range, expected at least 0"),
        (
            ["generate", "run", "--temperature", "inf"],
            "--temperature: inf is out of range, expected a finite number",
        ),
        (["generate", "run", "--seed", "9" * 20], f"--seed: {'9' * 20} is out of range, expected at most {2**63 - 1}"),
        (
            ["export", "run", "to", "--shard-gb", "inf"],
            "--shard-gb: inf is out of range, expected a finite number",
        ),
        (["generate", "run", "--tokens", "x"], "--tokens: invalid int value: 'x'; pithtrain generate --help"),
        (["schedule", "--hidden", "2"], "--hidden: 2 is out of range, expected at most 1; pithtrain schedule --help"),
        (["bench", "moe", "extra"], "extra: unexpected; pithtrain bench moe --help"),
    ],
)
def test_what_argparse_refuses_is_one_line_that_names_the_option(capsys, arguments, expected):
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"pithtrain: {expected}") and message.count("\n") == 1


def test_a_picture_that_the_system_refuses_is_one_line(capsys, tmp_path, monkeypatch):
    def full(*_, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    path = tmp_path / "x.png"
    said = refused(capsys, ["schedule", "--picture", str(path)])
    assert f"{path}: cannot be written (No space left on device)" in said


@pytest.mark.parametrize("arguments", [["schedule", "--picture"], ["bench", "moe", "--json"]])
def test_output_that_could_not_be_written_is_refused_before_the_work(capsys, tmp_path, monkeypatch, arguments):
    assert "there is no folder" in refused(capsys, [*arguments, str(tmp_path / "none/x.png")])
    assert "expected a name that ends in" in refused(capsys, [*arguments, str(tmp_path / "x.foo")])
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    assert "x.png: cannot be written" in refused(capsys, ["schedule", "--picture", str(tmp_path / "x.png")])


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"], ["train", "none.toml"]])
def test_answers_come_before_torch_is_imported(arguments):
    code = f"import sys; sys.argv = ['pithtrain', *{arguments!r}]\nfrom pithtrain.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass\nassert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
