# %% [markdown]
# # The corpus
#
# > Finds the text files to train on, and sets some of them aside, by name, to be measured on.

# %%
#| default_exp train.corpus

# %% [markdown]
# ## The idea
#
# A corpus here is a folder of text files. A **document** is one file. Two decisions matter more than they
# seem to:
#
# 1. **What is in.** With no folder given, the corpus is the source text of the Python standard library on
#    this very machine: some ten megabytes of careful code and English docstrings that everybody who can run
#    this has, with nothing to download. A folder of your own works the same way, with a glob pattern.
# 2. **What is held out.** A model is measured on text that it has never seen. The split is by whole file,
#    since two windows of one file share names and phrases, and it follows from the file's *name* alone.
#
# Let $h(d) \in [0, 1)$ be the first 8 bytes of the SHA-256 of the document's path below the corpus folder,
# read as a fraction. Then
#
# $$ d \text{ is held out} \iff h(d) < f $$
#
# for a held-out fraction $f$. No random state and no order of files is involved, so adding a file moves no
# other file, and raising $f$ only ever moves documents from training to held-out.

# %%
#| export
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pithtrain.config import UserError

# %% [markdown]
# ## Reading
#
# All reading goes through one function, so that a file one may not read is an error with a name.


# %%
#| export
def read_bytes(path: Path) -> bytes:
    """The bytes of a file; a file that cannot be read is a UserError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): make it readable or narrow data.pattern") from None


# %%
import tempfile

scratch = tempfile.TemporaryDirectory()
hello = Path(scratch.name) / "hello.txt"
hello.write_text("Hello, experts.\n")
print(read_bytes(hello))
try:
    read_bytes(Path(scratch.name) / "absent.txt")
except UserError as error:
    print(error)

# %% [markdown]
# ## A document
#
# A document keeps its place and fingerprint but not its text: a corpus may be larger than memory, and
# text is read when it is tokenised.


# %%
#| export
@dataclass(frozen=True)
class Document:
    """One text file: `name` is its path below the corpus folder with forward slashes; `size` is in bytes."""

    name: str
    path: Path
    size: int
    sha256: str

    def text(self) -> str:
        """The file's text. Raises UserError when the file has changed since the corpus was found."""
        data = read_bytes(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(f"{self.path}: changed while the corpus was being read: start again")
        return data.decode()


# %%
document = Document("hello.txt", hello, 16, hashlib.sha256(read_bytes(hello)).hexdigest())
print(document.text())

# %% [markdown]
# Not every file that matches a pattern is text. Bytes that are not UTF-8 are no text to us, and a file with
# a zero byte in it is a binary file that happens to decode.


# %%
#| export
def is_text(data: bytes) -> bool:
    """Whether the bytes are UTF-8 text: they decode, and hold no zero byte."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


# %%
print({sample: is_text(sample) for sample in (b"plain", "naïve ☃".encode(), b"caf\xe9", b"ELF\0\0")})

# %% [markdown]
# ## The split
#
# $h(d)$ places every name on the unit interval. Below $f$ it is held out.


# %%
#| export
def split_position(name: str) -> float:
    """Where a document's name falls on [0, 1): below the held-out fraction it is held out."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


# %%
for name in ("ast.py", "json/decoder.py", "asyncio/tasks.py"):
    print(f"{name:20s} {split_position(name):.4f}")

# %% [markdown]
# ## The standard library as a corpus
#
# Four things in that folder would make a worse corpus, and are left out:
#
# | left out | because |
# |---|---|
# | `site-packages`, `__pycache__` | not the standard library; not source |
# | `test`, `tests`, `idle_test` | more than half of all text, and missing from many Linux distributions |
# | `encodings`, `_sysconfigdata*` | generated: a hundred near-copies of one table on both sides of the split |
# | `pydoc_data` | one generated file of 0.7 MB, which would be most of whichever split it fell into |

# %%
#| export
STANDARD_LIBRARY_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


# %%
#| export
def in_standard_library_corpus(name: str) -> bool:
    """Whether a file of the standard library's folder belongs to the default corpus."""
    parts = name.split("/")
    return STANDARD_LIBRARY_WITHOUT.isdisjoint(parts[:-1]) and not parts[-1].startswith("_sysconfigdata")


# %%
for name in ("ast.py", "test/test_ast.py", "encodings/cp1250.py", "test.py"):
    print(f"{name:22s} {'in' if in_standard_library_corpus(name) else 'out'}")

# %% [markdown]
# ## Finding it all
#
# `find_corpus` reads every file once: to know whether it is text, and for the **fingerprint**, a hash over
# all names and contents that token shards carry, so that shards of yesterday's text are never taken for
# shards of today's.


# %%
#| export
@dataclass(frozen=True)
class Corpus:
    """Documents in both splits, sorted by name, and how many files were skipped as `empty` or `undecodable`."""

    description: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    fraction: float  #: of the files, asked to be held out
    empty: int
    undecodable: int
    fingerprint: str  #: SHA-256 over the names and contents of all documents


# %%
#| export
def find_corpus(folder: Path | str | None, pattern: str, held_out: float) -> Corpus:
    """The documents below `folder`, at any depth, that match the glob `pattern` ("*.txt", "docs/*.md").

    With no folder: the Python standard library's own source. Files and folders whose name starts with a dot,
    `__pycache__`, and folders of runs and of token shards are passed over. `held_out` is the fraction of files held
    out, between 0 and 1. Raises UserError for a folder that is missing, cannot be read, has no matching text, or
    leaves one of the splits empty."""
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "no such folder"
        raise UserError(f"{root}: {problem}: set data.corpus to a folder of text files")

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            cure = "make it readable or choose another corpus"
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}): {cure}")

    ours = set()  # folders of runs and of token shards: what pithtrain wrote is not read again
    passed = {"__pycache__", "lost+found"} | (set() if folder else STANDARD_LIBRARY_WITHOUT)
    for path, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in passed]
        if "tokenizer.json" in files and not {"config.toml", "manifest.json"}.isdisjoint(files):
            ours.add(Path(path))
            folders.clear()
    try:
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob(pattern) if path.is_file())
    except (ValueError, NotImplementedError, IndexError):
        raise UserError(f"data.pattern = {pattern!r}: not a relative glob: try '*.txt'") from None
    documents, empty, undecodable = [], 0, 0
    for name in names:
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
        if hidden or (not folder and not in_standard_library_corpus(name)):
            continue
        if ours and not ours.isdisjoint((root / name).parents):
            continue
        data = read_bytes(root / name)
        if not data:
            empty += 1
        elif not is_text(data):
            undecodable += 1
        else:
            documents.append(Document(name, root / name, len(data), hashlib.sha256(data).hexdigest()))
    if not documents:
        skipped = f" ({empty} empty and {undecodable} undecodable skipped)" if empty + undecodable else ""
        raise UserError(f"{root}: no text file matches {pattern!r}{skipped}: check data.corpus and data.pattern")
    train = tuple(d for d in documents if split_position(d.name) >= held_out)
    rest = tuple(d for d in documents if split_position(d.name) < held_out)
    if not train or not rest:
        split, cure = ("held-out", "raise it") if train else ("training", "lower it")
        problem = f"data.held_out = {held_out} of {len(documents)} documents leaves none for {split}"
        raise UserError(f"{root}: {problem}: {cure}, or give more, smaller files")
    listing = "".join(f"{d.sha256} {d.name}\n" for d in documents).encode("utf-8", "surrogateescape")
    fingerprint = hashlib.sha256(listing).hexdigest()
    name = root.resolve() if folder else f"the Python {platform.python_version()} standard library"
    return Corpus(f"{name} ({pattern})", train, rest, held_out, empty, undecodable, fingerprint)


# %%
import time

start = time.perf_counter()
corpus = find_corpus(None, "*.py", held_out=0.05)
print(f"{corpus.description}, found in {time.perf_counter() - start:.2f} s")
for split, documents in (("train", corpus.train), ("held out", corpus.held_out)):
    print(f"{split:10s} {len(documents):5d} documents {sum(d.size for d in documents) / 1e6:7.2f} MB")
print(f"skipped: {corpus.empty} empty, {corpus.undecodable} undecodable")

# %% [markdown]
# The picture shows the split at work. Each dot is a file of the standard library, at the place on the unit
# interval that the hash of its name gives it; the height is its size. Names spread evenly and sizes have no
# say, so the few dots left of the line are a fair sample of the library. Move the line to the right, and all
# files that were held out stay held out.

# %%
import matplotlib.pyplot as plt

fig, axis = plt.subplots(figsize=(8, 3.4))
for documents, colour, label in ((corpus.train, "C0", "train"), (corpus.held_out, "C3", "held out")):
    positions = [split_position(d.name) for d in documents]
    axis.scatter(positions, [d.size for d in documents], s=9, color=colour, label=f"{label} ({len(documents)})")
axis.axvline(0.05, color="black", linewidth=1)
axis.set(yscale="log", xlabel="h(name)", ylabel="bytes", title="The held-out split follows from the name alone")
axis.legend(loc="lower right")
fig.tight_layout()
fig
# %% [markdown]
# Stability is worth an assertion: add a file to a folder, and every other file stays where it was.

# %%
with tempfile.TemporaryDirectory() as folder:
    for number in range(40):
        (Path(folder) / f"{number}.txt").write_text(f"document {number}")
    before = find_corpus(Path(folder), "*.txt", held_out=0.2)
    (Path(folder) / "another.txt").write_text("one more")
    (Path(folder) / "empty.txt").write_text("")
    (Path(folder) / "latin-1.txt").write_bytes("café".encode("latin-1"))
    after = find_corpus(Path(folder), "*.txt", held_out=0.2)
    assert set(before.held_out) <= set(after.held_out) and set(before.train) <= set(after.train)
    assert (after.empty, after.undecodable) == (1, 1)
    assert before.fingerprint != after.fingerprint
    try:
        find_corpus(Path(folder), "*.md", held_out=0.2)
    except UserError as error:
        print(error)

# %% [markdown]
# ## A sample for the tokenizer
#
# A tokenizer's merges settle after some tens of megabytes. For a large corpus it is trained on a sample:
# documents in the order of their hash, until a number of bytes is reached. The standard library is
# smaller than the limit that `pithtrain.train.shards` gives, so there the sample is everything.


# %%
#| export
def sample(documents: Iterable[Document], limit: int) -> list[Document]:
    """Documents in the order of `split_position`, one at least, cut before they exceed `limit` bytes together."""
    chosen, total = [], 0
    for document in sorted(documents, key=lambda d: split_position(d.name)):
        total += document.size
        if chosen and total > limit:
            break
        chosen.append(document)
    return chosen


# %%
few = sample(corpus.train, limit=100_000)
print([d.name for d in few], sum(d.size for d in few))
scratch.cleanup()

# %% [markdown]
# ## Where to go next
#
# `61_tokenizer` learns a vocabulary from the training documents; `62_shards` writes them as token shards.
