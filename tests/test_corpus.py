"""The corpus: what is found, what is skipped, and a split that does not move."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pithtrain.config import UserError
from pithtrain.train.corpus import find_corpus, in_standard_library_corpus, is_text, sample, split_position


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def numbered(count: int) -> dict[str, bytes]:
    return {f"part-{number % 7}/{number}.txt": f"text {number}\n".encode() for number in range(count)}


def refused(folder, pattern="*.txt", held_out=0.2) -> str:
    with pytest.raises(UserError) as caught:
        find_corpus(folder, pattern, held_out)
    message = str(caught.value)
    assert "\n" not in message and (str(folder) in message or repr(pattern) in message)
    return message


def test_finds_every_file_once_in_one_split(tmp_path):
    corpus = find_corpus(write(tmp_path, numbered(60)), "*.txt", 0.2)
    names = [document.name for document in (*corpus.train, *corpus.held_out)]
    assert sorted(names) == sorted(numbered(60))
    assert list(corpus.train) == sorted(corpus.train, key=lambda d: d.name)
    for document in corpus.train:
        assert document.text().encode() == numbered(60)[document.name]
        assert document.size == len(numbered(60)[document.name])


def test_skips_what_is_no_text_and_counts_it(tmp_path):
    bad = {"a.txt": b"caf\xe9", "b.txt": b"\x7fELF\0\0", "c.txt": b"\xff\xfeh\0i\0", "d.txt": b""}
    corpus = find_corpus(write(tmp_path, numbered(60) | bad), "*.txt", 0.2)
    assert (corpus.undecodable, corpus.empty) == (3, 1)
    assert len(corpus.train) + len(corpus.held_out) == 60


def test_passes_over_hidden_folders_caches_and_other_suffixes(tmp_path):
    more = {".git/x.txt": b"x", "a/.b/x.txt": b"x", "__pycache__/x.txt": b"x", ".x.txt": b"x", "x.md": b"x"}
    corpus = find_corpus(write(tmp_path, numbered(60) | more), "*.txt", 0.2)
    assert len(corpus.train) + len(corpus.held_out) == 60 and corpus.empty + corpus.undecodable == 0


def test_a_pattern_can_name_a_folder(tmp_path):
    corpus = find_corpus(write(tmp_path, numbered(60)), "part-[0-4]/*.txt", 0.2)
    found = {document.name for document in (*corpus.train, *corpus.held_out)}
    assert found == {name for name in numbered(60) if name[5] in "01234"}


def test_missing_folder(tmp_path):
    assert "no such folder" in refused(tmp_path / "absent")


def test_a_file_for_a_folder(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    assert "is not a folder" in refused(tmp_path / "file.txt")


def test_empty_folder(tmp_path):
    assert "no text file matches '*.txt'" in refused(tmp_path)


def test_only_undecodable_files(tmp_path):
    write(tmp_path, {"a.txt": b"\xff", "b.txt": b""})
    assert "1 empty and 1 undecodable" in refused(tmp_path)


@pytest.mark.parametrize("pattern", ["/etc/*", "a**/b"])
def test_impossible_pattern(tmp_path, pattern):
    assert "not a relative glob" in refused(write(tmp_path, numbered(3)), pattern)


def test_empty_pattern_matches_nothing(tmp_path):
    refused(write(tmp_path, numbered(3)), "")


def test_a_split_without_documents(tmp_path):
    name = min(numbered(60), key=split_position)
    below, above = split_position(name) / 2, (split_position(name) + 1) / 2
    write(tmp_path, {name: b"the only one"})
    assert "none for held-out: raise it" in refused(tmp_path, held_out=below)
    assert "none for training: lower it" in refused(tmp_path, held_out=above)


def test_what_a_run_wrote_is_not_read_again(tmp_path):
    folder = write(tmp_path, numbered(60))
    (folder / "lost+found").mkdir()
    before = find_corpus(folder, "*.txt", 0.2)
    for place, beside in (("runs/demo", "config.toml"), ("data/a", "manifest.json")):
        (folder / place).mkdir(parents=True)
        for name in ("tokenizer.json", beside, "sample.txt"):
            (folder / place / name).write_text("def")
    assert find_corpus(folder, "*.txt", 0.2) == before


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path, numbered(60))
    monkeypatch.setattr(
        "os.walk", lambda root, onerror: [onerror(PermissionError(13, "Permission denied", f"{root}/sub"))]
    )
    assert "sub: cannot be read (Permission denied): make it readable" in refused(folder)


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path):
    corpus = find_corpus(write(tmp_path, numbered(60)), "*.txt", 0.2)
    corpus.train[0].path.write_text("another text")
    with pytest.raises(UserError, match=r"changed while.*"):
        corpus.train[0].text()
    corpus.train[0].path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        corpus.train[0].text()


def test_the_fingerprint_sees_names_contents_and_nothing_else(tmp_path_factory):
    def fingerprint(files):
        return find_corpus(write(tmp_path_factory.mktemp("corpus"), files), "*.txt", 0.2).fingerprint

    files = numbered(60)
    assert fingerprint(files) == fingerprint(dict(reversed(files.items())))
    assert fingerprint(files) != fingerprint(files | {"part-0/0.txt": b"text 1\n"})
    assert fingerprint(files) != fingerprint({("new.txt" if n == "part-0/0.txt" else n): d for n, d in files.items()})


def test_a_larger_fraction_keeps_what_was_held_out(tmp_path):
    write(tmp_path, numbered(60))
    splits = [set(find_corpus(tmp_path, "*.txt", fraction).held_out) for fraction in (0.1, 0.3, 0.6)]
    assert splits[0] < splits[1] < splits[2]


@given(
    st.sets(st.integers(0, 400), min_size=20, max_size=60),
    st.sets(st.integers(401, 800), max_size=20),
)
def test_added_files_move_no_other(tmp_path_factory, first, later):
    def files(numbers):
        return {f"{number}.txt": b"x" for number in numbers}

    folder = write(tmp_path_factory.mktemp("corpus"), files(first) | {"out.txt": b"x"})
    before = find_corpus(folder, "*.txt", 0.5)
    after = find_corpus(write(folder, files(later)), "*.txt", 0.5)
    assert set(before.train) <= set(after.train) and set(before.held_out) <= set(after.held_out)


def test_the_split_is_the_same_for_ever():
    """These numbers are SHA-256 of the names: a change would silently train on held-out text."""
    assert split_position("ast.py") == int(hashlib.sha256(b"ast.py").hexdigest()[:16], 16) / 2**64
    held_out = [f"{number}.txt" for number in range(40) if split_position(f"{number}.txt") < 0.1]
    assert held_out == ["1.txt", "18.txt", "20.txt", "27.txt", "39.txt"]


def test_the_split_takes_about_its_fraction():
    share = sum(split_position(f"package/module_{number}.py") < 0.05 for number in range(20_000)) / 20_000
    assert abs(share - 0.05) < 0.006  # four standard deviations


@given(st.binary(max_size=40))
def test_is_text_agrees_with_the_codec(data):
    try:
        decodes = "\0" not in data.decode("utf-8")
    except UnicodeDecodeError:
        decodes = False
    assert is_text(data) == decodes


@pytest.mark.parametrize("limit", [0, 1, 100, 10**9])
def test_the_sample_is_a_prefix_in_hash_order(tmp_path, limit):
    documents = find_corpus(write(tmp_path, numbered(60)), "*.txt", 0.2).train
    chosen = sample(reversed(documents), limit)
    assert chosen == sorted(documents, key=lambda d: split_position(d.name))[: len(chosen)]
    assert len(chosen) == 1 or sum(d.size for d in chosen) <= limit
    assert len(chosen) < len(documents) or limit == 10**9


def test_the_standard_library_is_a_corpus():
    corpus = find_corpus(None, "*.py", 0.05)
    names = {document.name for document in (*corpus.train, *corpus.held_out)}
    assert {"ast.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    for name in names:
        assert in_standard_library_corpus(name)
        assert not {"site-packages", "test", "encodings", "__pycache__"} & set(name.split("/")[:-1])
    assert sum(document.size for document in corpus.train) > 4_000_000
    largest = max(document.size for document in corpus.held_out)
    assert largest < sum(document.size for document in corpus.held_out) / 2
