"""The tokenizer: any text comes back, training is deterministic, and a bad file is one line."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pithtrain.config import UserError
from pithtrain.train.tokenizer import END_OF_TEXT, load_tokenizer, save_tokenizer, tokenizer_hash, train_tokenizer

TEXTS = [f"def name_{number}(value):\n    return value + {number} * value  # naïve ☃\n" for number in range(200)]
TOKENIZER = train_tokenizer(TEXTS, vocab_size=320)


@given(st.text() | st.lists(st.sampled_from([END_OF_TEXT, "def ", "\n", "☃", "<|", "\r\n", " "])).map("".join))
def test_any_text_comes_back(text):
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert TOKENIZER.token_to_id(END_OF_TEXT) not in ids
    assert len(ids) <= len(text.encode())


def test_the_vocabulary_has_the_size_asked_for():
    for size in (257, 258, 300):
        tokenizer = train_tokenizer(TEXTS, size)
        assert tokenizer.get_vocab_size() == size
        assert tokenizer.token_to_id(END_OF_TEXT) == 0


def test_with_no_merges_a_token_is_a_byte():
    text = "naïve ☃ text"
    assert len(train_tokenizer(TEXTS, 257).encode(text).ids) == len(text.encode())


def test_merges_shorten_text():
    text = TEXTS[7]
    assert len(TOKENIZER.encode(text).ids) < len(text.encode()) / 2


def test_training_is_the_same_in_other_processes_with_other_threads(tmp_path):
    program = (
        "import sys; from pathlib import Path; import pithtrain.train.tokenizer as t\n"
        "from pithtrain.train.corpus import find_corpus\n"
        "texts = [d.text() for d in find_corpus(None, 'asyncio/*.py', 0.1).train]\n"
        "t.save_tokenizer(t.train_tokenizer(texts, 1000), Path(sys.argv[1]))\n"
    )
    hashes = set()
    for threads, seed in (("1", "1"), ("4", "2"), ("4", "3")):
        path = tmp_path / f"{threads}-{seed}.json"
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", program, str(path)], check=True, env=environment)
        hashes.add(tokenizer_hash(path))
    assert len(hashes) == 1


def test_saved_and_loaded_it_is_the_same(tmp_path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(TOKENIZER, path)
    loaded = load_tokenizer(path)
    text = TEXTS[3] + END_OF_TEXT
    assert loaded.encode(text).ids == TOKENIZER.encode(text).ids
    assert loaded.decode(loaded.encode(text).ids, skip_special_tokens=False) == text


def test_the_hash_is_of_the_vocabulary(tmp_path):
    for name, size in (("a", 300), ("b", 300), ("c", 301)):
        save_tokenizer(train_tokenizer(TEXTS, size), tmp_path / name)
    assert tokenizer_hash(tmp_path / "a") == tokenizer_hash(tmp_path / "b") != tokenizer_hash(tmp_path / "c")


def test_vocabulary_too_small_for_bytes():
    with pytest.raises(UserError, match=r"model.vocab_size = 256: too small.*257"):
        train_tokenizer(TEXTS, 256)


def test_vocabulary_larger_than_the_text_can_fill():
    with pytest.raises(UserError, match=r"model.vocab_size = 5000: the text only fills \d+: lower it"):
        train_tokenizer(["abc abc abd"], 5000)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.json: no such file"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"not json", b"{}", b"[1, 2]", b"\xff\xfe", b'{"version": "1.0"}'])
def test_broken_file(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer.json: not a readable tokenizer") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_end_of_text(tmp_path):
    path = tmp_path / "tokenizer.json"
    fields = json.loads(TOKENIZER.to_str())
    fields["added_tokens"] = []
    fields["model"]["vocab"] = {token: i for token, i in fields["model"]["vocab"].items() if token != END_OF_TEXT}
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"has no <\|endoftext\|> token"):
        load_tokenizer(path)
