"""Token shards: what is written is the text, whole or absent, and every damage has a name."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pithtrain.config import DataConfig, UserError
from pithtrain.train import shards as module
from pithtrain.train.corpus import find_corpus
from pithtrain.train.shards import Tokens, open_shards, prepare
from pithtrain.train.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer

VOCAB = 300


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        words = " ".join(f"value_{number * k % 97} ☃" for k in range(1 + number))
        (folder / f"{number}.txt").write_text(f"document {number}: {words}\n{END_OF_TEXT} is only text here\n")
    return folder


def make(folder: Path, corpus: Path, vocab_size: int = VOCAB, held_out: float = 0.2, pattern: str = "*.txt", **more):
    return prepare(DataConfig(str(corpus), pattern, str(folder), held_out), vocab_size, **more)


def refused(call, *arguments, **named) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts(shards, tokens: Tokens) -> list[str]:
    """The documents back from a row of tokens."""
    row = tokens.take(np.arange(len(tokens)))
    ends = np.flatnonzero(row == shards.tokenizer.token_to_id(END_OF_TEXT))
    assert ends[0] == 0 and ends[-1] == len(row) - 1
    return [shards.tokenizer.decode(row[a + 1 : b].tolist(), skip_special_tokens=False) for a, b in pairwise(ends)]


def test_the_text_comes_back_and_the_counts_are_true(tmp_path, corpus):
    shards = make(tmp_path / "data", corpus)
    found = find_corpus(corpus, "*.txt", 0.2)
    for split, tokens, documents in (
        (shards.manifest.train, shards.train, found.train),
        (shards.manifest.held_out, shards.held_out, found.held_out),
    ):
        assert texts(shards, tokens) == [document.text() for document in documents]
        assert split.documents == len(documents)
        assert split.bytes == sum(document.size for document in documents)
        assert split.tokens == len(tokens)
    assert shards.manifest.fingerprint == found.fingerprint


def test_many_shards_are_one_row(tmp_path, corpus, monkeypatch):
    one = make(tmp_path / "one", corpus)
    monkeypatch.setattr(module, "SHARD_TOKENS", 1000)
    many = make(tmp_path / "many", corpus)
    assert len(one.train.shards) == 1 and len(many.train.shards) > 3
    assert [len(shard) for shard in many.train.shards[:-1]] == [1000] * (len(many.train.shards) - 1)
    assert len(one.train) == len(many.train)
    everything = np.arange(len(one.train))
    assert (one.train.take(everything) == many.train.take(everything)).all()


def test_the_last_shard_may_be_exactly_full(tmp_path, corpus, monkeypatch):
    total = len(make(tmp_path / "one", corpus).train)
    monkeypatch.setattr(module, "SHARD_TOKENS", total)
    assert [len(shard) for shard in make(tmp_path / "full", corpus).train.shards] == [total]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_take_reads_any_positions(sizes, data):
    row = np.random.default_rng(sum(sizes)).integers(0, 9, sum(sizes)).astype(np.uint16)
    tokens = Tokens(np.split(row, np.cumsum(sizes)[:-1]))
    positions = np.array(data.draw(st.lists(st.integers(0, len(row) - 1), min_size=1, max_size=40)))
    taken = tokens.take(positions.reshape(1, -1))
    assert taken.dtype == np.int64 and taken.shape == (1, len(positions))
    assert (taken[0] == row[positions]).all()


def test_two_preparations_are_the_same_bytes(tmp_path, corpus):
    make(tmp_path / "a", corpus)
    make(tmp_path / "b", corpus)
    assert len(list((tmp_path / "a").iterdir())) == 4
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_large_vocabulary_takes_32_bits(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(module, "train_tokenizer", lambda texts, vocab_size: train_tokenizer(texts, VOCAB))
    small = make(tmp_path / "small", corpus, vocab_size=2**16)
    large = make(tmp_path / "large", corpus, vocab_size=2**16 + 1)
    assert small.train.shards[0].dtype == np.dtype("<u2") and large.train.shards[0].dtype == np.dtype("<u4")
    assert texts(small, small.train) == texts(large, large.train)


# What is there is used, and what is another's is refused


def test_what_is_prepared_is_used_again(tmp_path, corpus):
    make(tmp_path / "data", corpus)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    lines = []
    make(tmp_path / "data", corpus, report=lines.append)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    assert lines == []


def test_folders_on_the_way_are_made_and_an_empty_one_is_filled(tmp_path, corpus):
    make(tmp_path / "a" / "b" / "data", corpus)
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", corpus)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"vocab_size": 310}, "model.vocab_size 300, this run asks for 310"),
        ({"held_out": 0.3}, "data.held_out 0.2, this run asks for 0.3"),
        ({"pattern": "[1-5]*.txt"}, "this run asks for"),
    ],
)
def test_another_request_is_refused(tmp_path, corpus, changed, says):
    make(tmp_path / "data", corpus)
    message = refused(make, tmp_path / "data", corpus, **changed)
    assert str(tmp_path / "data") in message and says in message


def test_changed_text_is_refused(tmp_path, corpus):
    make(tmp_path / "data", corpus)
    (corpus / "7.txt").write_text("edited")
    assert "its text has changed" in refused(make, tmp_path / "data", corpus)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, corpus):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("precious")
    assert "exists and holds no token shards" in refused(make, tmp_path / "data", corpus)
    assert (tmp_path / "data" / "thesis.tex").read_text() == "precious"


def test_a_file_where_the_folder_should_be(tmp_path, corpus):
    (tmp_path / "data").write_text("precious")
    assert "exists and holds no token shards" in refused(make, tmp_path / "data", corpus)
    assert "cannot be made" in refused(make, tmp_path / "data" / "below", corpus)
    assert (tmp_path / "data").read_text() == "precious"


def test_a_bad_corpus_makes_no_folder(tmp_path):
    assert "no such folder" in refused(make, tmp_path / "data", tmp_path / "absent")
    (tmp_path / "none").mkdir()
    assert "no text file" in refused(make, tmp_path / "data", tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none"]


def test_a_vocabulary_the_text_cannot_fill_makes_no_folder(tmp_path, corpus):
    assert "only fills" in refused(make, tmp_path / "data", corpus, vocab_size=100_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


# Damage


def test_corrupted_shard(tmp_path, corpus):
    make(tmp_path / "data", corpus)
    path = tmp_path / "data" / "held_out-00000.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    message = refused(make, tmp_path / "data", corpus)
    assert str(path) in message and "damaged" in message


@pytest.mark.parametrize("change", [-1, -2, 2])
def test_truncated_or_grown_shard(tmp_path, corpus, change):
    make(tmp_path / "data", corpus)
    path = tmp_path / "data" / "train-00000.bin"
    size = path.stat().st_size
    path.write_bytes((path.read_bytes() + b"xx")[: size + change])
    message = refused(open_shards, tmp_path / "data")
    assert str(path) in message and f"{size + change} bytes, the manifest says {size}" in message


def test_missing_shard(tmp_path, corpus):
    make(tmp_path / "data", corpus)
    (tmp_path / "data" / "train-00000.bin").unlink()
    assert "train-00000.bin: shard is missing" in refused(open_shards, tmp_path / "data")


def test_another_tokenizer_in_the_folder(tmp_path, corpus):
    make(tmp_path / "data", corpus)
    save_tokenizer(train_tokenizer(["another text entirely"] * 9, 260), tmp_path / "data" / "tokenizer.json")
    message = refused(make, tmp_path / "data", corpus)
    assert str(tmp_path / "data" / "tokenizer.json") in message and "not the tokenizer that made" in message


def test_the_tokenizer_of_a_run_must_be_that_of_the_shards(tmp_path, corpus):
    make(tmp_path / "data", corpus)
    shutil.copy(tmp_path / "data" / "tokenizer.json", tmp_path / "run.json")
    open_shards(tmp_path / "data", tokenizer=tmp_path / "run.json")
    save_tokenizer(train_tokenizer(["another text entirely"] * 9, 260), tmp_path / "run.json")
    message = refused(open_shards, tmp_path / "data", tokenizer=tmp_path / "run.json")
    assert str(tmp_path / "run.json") in message and str(tmp_path / "data") in message


def test_missing_and_broken_tokenizer(tmp_path, corpus):
    make(tmp_path / "data", corpus)
    (tmp_path / "data" / "tokenizer.json").write_text("{")
    assert "not a readable tokenizer" in refused(open_shards, tmp_path / "data")
    (tmp_path / "data" / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file" in refused(open_shards, tmp_path / "data")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda fields: "not json",
        lambda fields: "[]",
        lambda fields: "{}",
        lambda fields: json.dumps({key: value for key, value in fields.items() if key != "dtype"}),
        lambda fields: json.dumps(fields | {"surprise": 1}),
        lambda fields: json.dumps(fields | {"train": 3}),
    ],
)
def test_broken_manifest(tmp_path, corpus, spoil):
    make(tmp_path / "data", corpus)
    path = tmp_path / "data" / "manifest.json"
    path.write_text(spoil(json.loads(path.read_text())))
    assert f"{path}: not a manifest of token shards" in refused(open_shards, tmp_path / "data")


def test_manifest_of_another_version(tmp_path, corpus):
    make(tmp_path / "data", corpus)
    path = tmp_path / "data" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    assert f"{path}: version 99" in refused(open_shards, tmp_path / "data")


def test_opening_a_folder_without_shards(tmp_path):
    assert "no token shards here" in refused(open_shards, tmp_path)


# Whole or absent


@pytest.mark.parametrize("file", ["tokenizer.json", "train-00000.bin", "held_out-00000.bin", "manifest.json"])
@pytest.mark.parametrize("number, says", [(errno.ENOSPC, "the disk is full"), (errno.EIO, os.strerror(errno.EIO))])
def test_a_write_that_fails_leaves_nothing(tmp_path, corpus, monkeypatch, file, number, says):
    true_open = Path.open

    def failing_open(self, mode="r", *arguments, **named):
        if self.name == file and "w" in mode:
            true_open(self, mode, *arguments, **named).close()
            raise OSError(number, os.strerror(number), str(self))
        return true_open(self, mode, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing_open)
        message = refused(make, tmp_path / "data", corpus)
    assert str(tmp_path / "data") in message and says in message
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    make(tmp_path / "data", corpus)


def test_a_failing_flush_leaves_nothing(tmp_path, corpus, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full" in refused(make, tmp_path / "data", corpus)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_an_interrupt_leaves_nothing(tmp_path, corpus, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "data", corpus)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_disk_that_is_really_full(tmp_path, corpus):
    """A file system of 64 KiB, in a mount namespace of its own where the machine lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=64k tmpfs {disk} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    program = (
        "import os, sys; from pithtrain.config import DataConfig, UserError\n"
        "from pithtrain.train.shards import prepare\n"
        "try:\n"
        f"    prepare(DataConfig({str(corpus)!r}, '*.txt', {str(disk / 'data')!r}, 0.2), 300)\n"
        "except UserError as error:\n"
        f"    print(error); print(os.listdir({str(disk)!r}))\n"
    )
    for number in range(60):
        path = corpus / f"{number}.txt"
        path.write_text(path.read_text() * 20)
    done = subprocess.run([*mount, sys.executable, "-c", program], capture_output=True, text=True, check=True)
    message, left = done.stdout.splitlines()
    assert "the disk is full" in message and left == "[]"


def test_a_kill_leaves_no_folder_and_the_next_attempt_succeeds(tmp_path, corpus):
    """Killed while writing: the hidden folder may stay, the real one is absent, and then all is well."""
    program = (
        "import os, signal; from pithtrain.config import DataConfig; from pithtrain.train import shards\n"
        "write = shards._write_shard\n"
        "def killed(path, ids):\n"
        "    write(path, ids)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards._write_shard = killed\n"
        f"shards.prepare(DataConfig({str(corpus)!r}, '*.txt', {str(tmp_path / 'data')!r}, 0.2), 300)\n"
    )
    done = subprocess.run([sys.executable, "-c", program])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "data").exists() and (tmp_path / ".data.partial" / "train-00000.bin").exists()
    make(tmp_path / "data", corpus)
    assert not (tmp_path / ".data.partial").exists()


def _prepare_and_count(folder, corpus, start, results):
    lines = []
    start.wait()
    shards = make(folder, corpus, report=lines.append)
    results.put((len(lines), len(shards.train)))


def test_processes_that_start_together_prepare_once(tmp_path, corpus):
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    processes = [
        context.Process(target=_prepare_and_count, args=(tmp_path / "data", corpus, start, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    time.sleep(0.5)
    start.set()
    reports = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(lines for lines, _ in reports) == [0, 0, 2]
    assert len({tokens for _, tokens in reports}) == 1
