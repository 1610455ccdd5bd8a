# %% [markdown]
# # Token shards
#
# > Writes documents as memory-mapped files of token numbers, once, and never half.

# %%
#| default_exp train.shards

# %% [markdown]
# ## The idea
#
# Tokenising takes seconds for a small corpus and hours for a large one, so it is done once and kept. What is
# kept is as plain as can be: all documents of a split in one row, end-of-text (written `|` here) between them,
#
# $$ |\; d_1 \;|\; d_2 \;|\; \cdots \;|\; d_n \;| $$
#
# as 16-bit integers (32-bit where the vocabulary exceeds 65,536), cut into files of at most 33M tokens. The
# row *starts* with end-of-text too: so the first token of each document is predicted from an end-of-text,
# and a row of $N$ tokens has exactly $N - 1$ predictions, one for each token of each document and one for
# each document's end.
#
# A file of numbers explains nothing, so a `manifest.json` lies beside it: what corpus it came from, which
# tokenizer, how many documents, tokens and **bytes of text** (bits per byte needs them), and the SHA-256 of
# every shard. Three promises follow:
#
# 1. **Whole or absent.** Everything is written to a hidden folder next to the final one, flushed to disk, and
#    renamed in one step. A full disk or a kill at any moment leaves no folder that looks finished.
# 2. **Verified.** Opening checks every size and hash, so a damaged shard is an error with a name and not a
#    strange loss curve.
# 3. **Never mistaken.** A folder made from another text or with another vocabulary is refused.

# %% [markdown]
# ## The smallest true implementation

# %%
import tempfile
from pathlib import Path

import numpy as np

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "train-00000.bin"
    documents = [[5, 6, 7], [8, 9]]
    row = [0]
    for document in documents:
        row += [*document, 0]
    np.array(row, dtype="<u2").tofile(path)
    tokens = np.memmap(path, dtype="<u2", mode="r")  # nothing is read until it is touched
    print(tokens, tokens[4:7], path.stat().st_size, "bytes")

# %%
#| export
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pithtrain.config import DataConfig, UserError
from pithtrain.train.corpus import Corpus, Document, find_corpus, sample
from pithtrain.train.tokenizer import end_of_text, load_tokenizer, save_tokenizer, tokenizer_hash, train_tokenizer

# %% [markdown]
# ## The manifest

# %%
#| export
VERSION = 1
SHARD_TOKENS = 2**25  # most tokens in one file: 64 MiB of 16-bit numbers
TOKENIZER_BYTES = 64 * 2**20  # the tokenizer is trained on at most this much of the training text


# %%
#| export
@dataclass(frozen=True)
class Shard:
    """One file of token numbers: its name, how many, and the SHA-256 of its bytes."""

    file: str
    tokens: int
    sha256: str


# %%
#| export
@dataclass(frozen=True)
class Split:
    """A split's counts: `tokens` has all end-of-texts in it, `bytes` is the size of the text itself."""

    documents: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]


# %% [markdown]
# The bytes are those of the text, so that losses of models with different vocabularies compare: a mean loss
# of $\ell$ nats over the $N - 1$ predicted tokens of a text of $B$ bytes is
#
# $$ \text{bits per byte} = \frac{\ell \, (N - 1)}{B \ln 2} $$


# %%
#| export
@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. `dtype` is numpy's name; `tokenizer` is the hash of tokenizer.json."""

    version: int
    dtype: str
    vocab_size: int
    tokenizer: str
    corpus: str
    fingerprint: str
    held_out_fraction: float
    empty: int
    undecodable: int
    train: Split
    held_out: Split


# %%
#| export
def read_manifest(path: Path) -> Manifest:
    """Read manifest.json. Raises UserError when it is broken or of another version."""
    try:
        fields = json.loads(path.read_bytes())
        if fields["version"] != VERSION:
            raise UserError(f"{path}: version {fields['version']}, this code reads {VERSION}: prepare it again")
        for name in ("train", "held_out"):
            shards = tuple(Shard(**shard) for shard in fields[name].pop("shards"))
            fields[name] = Split(**fields[name], shards=shards)
        return Manifest(**fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: not a manifest of token shards: delete its folder to prepare again") from None


# %%
manifest = Manifest(
    VERSION, "<u2", 512, "0" * 64, "an example", "0" * 64, 0.1, 0, 0, Split(1, 3, 7, ()), Split(1, 2, 5, ())
)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "manifest.json"
    path.write_text(json.dumps(asdict(manifest)))
    assert read_manifest(path) == manifest
    path.write_text(path.read_text()[:100])
    try:
        read_manifest(path)
    except UserError as error:
        print(error)

# %% [markdown]
# ## One long row of tokens
#
# A split may lie in many files, and a reader should not care. `Tokens.take` gathers any positions, in any
# shape, from whichever files hold them.


# %%
#| export
class Tokens:
    """The tokens of one split as one long row over its shards."""

    def __init__(self, shards: list[np.ndarray]):
        self.shards = shards
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Tokens at `positions` (any shape, 0 <= position < len(self)) as int64 of the same shape."""
        if len(self.shards) == 1:
            return self.shards[0][positions].astype(np.int64)
        owner = np.searchsorted(self.starts, positions, side="right") - 1
        out = np.empty(positions.shape, dtype=np.int64)
        for number in np.unique(owner):
            mine = owner == number
            out[mine] = self.shards[number][positions[mine] - self.starts[number]]
        return out


# %%
tokens = Tokens([np.arange(0, 5, dtype=np.uint16), np.arange(5, 9, dtype=np.uint16)])
print(len(tokens), tokens.take(np.array([[3, 4, 5], [8, 0, 1]])).tolist())
assert (tokens.take(np.arange(9)) == np.arange(9)).all()

# %% [markdown]
# ## Writing
#
# Documents stream through the tokenizer some at a time, so memory holds one shard at most and never the
# whole corpus. Each is closed by end-of-text. A split is cut into shards wherever one is full: mid-document if need
# be, since `Tokens` reads across.


# %%
#| export
def write_split(
    folder: Path, name: str, documents: Sequence[Document], tokenizer: Tokenizer, dtype: str, shard_tokens: int
) -> Split:
    """Write the documents as `folder/<name>-00000.bin` and so on, `shard_tokens` tokens each but the last."""
    end = end_of_text(tokenizer)
    shards, size, waiting, pending = [], 0, 1, [np.array([end], dtype=dtype)]
    for first in range(0, len(documents), 64):
        texts = [document.text() for document in documents[first : first + 64]]
        size += sum(len(text.encode()) for text in texts)
        for encoding in tokenizer.encode_batch_fast(texts):
            pending.append(np.array([*encoding.ids, end], dtype=dtype))
            waiting += len(pending[-1])
            while waiting >= shard_tokens:
                row = np.concatenate(pending)
                shards.append(_write_shard(folder / f"{name}-{len(shards):05d}.bin", row[:shard_tokens]))
                pending, waiting = [row[shard_tokens:]], waiting - shard_tokens
    if waiting:
        shards.append(_write_shard(folder / f"{name}-{len(shards):05d}.bin", np.concatenate(pending)))
    return Split(len(documents), sum(shard.tokens for shard in shards), size, tuple(shards))


# %%
#| export
def _write_shard(path: Path, ids: np.ndarray) -> Shard:
    """Write token numbers as they lie in memory."""
    data = ids.tobytes()
    path.write_bytes(data)
    return Shard(path.name, len(ids), hashlib.sha256(data).hexdigest())


# %%
from pithtrain.train.corpus import find_corpus

corpus = find_corpus(None, "json/*.py", held_out=0.2)
tokenizer = train_tokenizer([document.text() for document in corpus.train], vocab_size=512)
with tempfile.TemporaryDirectory() as folder:
    split = write_split(Path(folder), "train", corpus.train, tokenizer, "<u2", shard_tokens=3000)
    print(f"{split.documents} documents, {split.bytes} bytes, {split.tokens} tokens")
    for shard in split.shards:
        print(shard.file, shard.tokens, shard.sha256[:12], (Path(folder) / shard.file).stat().st_size, "bytes")

# %% [markdown]
# ## Whole or absent
#
# `write_shards` puts everything under a hidden name, and renames. If anything goes wrong the hidden folder is
# removed; if the process is killed outright it stays, and the next attempt clears it. Whatever prevents the
# writing, a full disk above all, becomes one line.


# %%
#| export
def write_shards(
    folder: Path, corpus: Corpus, vocab_size: int, given: Path | None, report: Callable[[str], None]
) -> None:
    """Train a tokenizer on the corpus, tokenise both splits, and make `folder`, absent or empty, in one step.

    `given` is the tokenizer.json to take in place of a new one. Raises UserError when the disk is full, the folder
    cannot be written, or the given tokenizer has more than `vocab_size` tokens."""
    partial, dtype = folder.with_name(f".{folder.name}.partial"), "<u2" if vocab_size <= 2**16 else "<u4"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if given:
            shutil.copyfile(given, partial / "tokenizer.json")
            tokenizer = load_tokenizer(given)
            if tokenizer.get_vocab_size() > vocab_size:
                raise UserError(f"{given}: has more tokens than model.vocab_size, {vocab_size}: give the model's own")
        else:
            report(f"training a tokenizer of {vocab_size} tokens")
            texts = (document.text() for document in sample(corpus.train, TOKENIZER_BYTES))
            tokenizer = train_tokenizer(texts, vocab_size)
            save_tokenizer(tokenizer, partial / "tokenizer.json")
        report(f"tokenising {len(corpus.train) + len(corpus.held_out)} documents")
        manifest = Manifest(
            version=VERSION, dtype=dtype, vocab_size=vocab_size, tokenizer=tokenizer_hash(partial / "tokenizer.json"),
            corpus=corpus.description, fingerprint=corpus.fingerprint, held_out_fraction=corpus.fraction,
            empty=corpus.empty, undecodable=corpus.undecodable,
            train=write_split(partial, "train", corpus.train, tokenizer, dtype, SHARD_TOKENS),
            held_out=write_split(partial, "held_out", corpus.held_out, tokenizer, dtype, SHARD_TOKENS),
        )  # fmt: skip
        (partial / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        os.rename(partial, folder)
        _flush(folder.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why, cure = ("the disk is full", "free some space or ") if full else (error.strerror, "")
        raise UserError(f"{folder}: cannot write the token shards: {why}: {cure}choose another data.folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# %%
#| export
def _flush(path: Path) -> None:
    """Push a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# %%
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name) / "json"
write_shards(folder, corpus, vocab_size=512, given=None, report=print)
print((folder / "manifest.json").read_text())

# %% [markdown]
# ## Opening


# %%
#| export
@dataclass(frozen=True)
class Shards:
    """An opened folder of token shards: both splits, the tokenizer, and the manifest."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens


# %%
#| export
def open_shards(folder: Path, tokenizer: Path | None = None) -> Shards:
    """Open what `prepare` wrote, checking sizes, hashes and the tokenizer.

    `tokenizer` is the tokenizer.json of, say, a run that is to go on with this data; its hash must be that of
    the shards. Raises UserError naming the file that is missing, cut short, damaged, or of another tokenizer."""
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder}: no token shards here (no manifest): pithtrain train makes them, or set data.folder")
    manifest, path = read_manifest(folder / "manifest.json"), tokenizer or folder / "tokenizer.json"
    loaded = load_tokenizer(path)
    if tokenizer_hash(path) != manifest.tokenizer:
        raise UserError(f"{path}: not the tokenizer that made the shards in {folder}: choose another data.folder")
    splits = (manifest.train, manifest.held_out)
    opened = (Tokens([_open_shard(folder / s.file, s, manifest.dtype) for s in split.shards]) for split in splits)
    return Shards(folder, manifest, loaded, *opened)


# %%
#| export
def _open_shard(path: Path, shard: Shard, dtype: str) -> np.ndarray:
    """Memory-map one shard after checking it."""
    cure, expected = "delete the folder to prepare it again", shard.tokens * np.dtype(dtype).itemsize
    if not path.is_file():
        raise UserError(f"{path}: shard is missing: {cure}")
    if path.stat().st_size != expected:
        raise UserError(f"{path}: shard has {path.stat().st_size} bytes, the manifest says {expected}: {cure}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise UserError(f"{path}: shard is damaged (its SHA-256 is not the manifest's): {cure}")
    return np.memmap(path, dtype=dtype, mode="r")


# %%
shards = open_shards(folder)
print(repr(shards.tokenizer.decode(shards.train.take(np.arange(1, 40)))))

data = bytearray((folder / "train-00000.bin").read_bytes())
data[1000] ^= 1  # one flipped bit
(folder / "train-00000.bin").write_bytes(data)
try:
    open_shards(folder)
except UserError as error:
    print(error)

# %% [markdown]
# ## Prepare: make it, or find it made
#
# `prepare` is what a training run calls. A folder lock on the parent makes processes that start together wait
# for the first, and then find its work done.


# %%
#| export
def prepare(
    config: DataConfig, vocab_size: int, tokenizer: Path | None = None, report: Callable[[str], None] = lambda _: None
) -> Shards:
    """Open the token shards in `config.folder`, writing them first when they are not there.

    `report` is given a line about each slow step. `tokenizer` is that of a model to go on with; by default one is
    trained. Raises UserError for a corpus without text, a folder with other contents, a full disk, damaged shards,
    and shards of another corpus, vocabulary or tokenizer."""
    if (folder := Path(config.folder)).name in ("", ".."):
        raise UserError(f"data.folder: {config.folder!r} is no folder of its own: name one, for example data/mine")
    found = find_corpus(config.corpus, config.pattern, config.held_out)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.parent, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}): choose another data.folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "manifest.json").is_file():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"{folder}: exists and holds no token shards: choose another data.folder")
            write_shards(folder, found, vocab_size, tokenizer, report)
    finally:
        os.close(lock)
    manifest = read_manifest(folder / "manifest.json")
    changed = " (its text has changed)" if manifest.corpus == found.description else ""
    for what, same, has, wants in (
        ("corpus", manifest.fingerprint == found.fingerprint, manifest.corpus, found.description + changed),
        ("model.vocab_size", manifest.vocab_size == vocab_size, manifest.vocab_size, vocab_size),
        ("data.held_out", manifest.held_out_fraction == found.fraction, manifest.held_out_fraction, found.fraction),
    ):
        if not same:
            problem = f"holds shards of {what} {has}, this run asks for {wants}"
            raise UserError(f"{folder}: {problem}: choose another data.folder or delete it")
    return open_shards(folder, tokenizer)


# %%
import time

config = DataConfig(folder=scratch.name + "/standard-library", pattern="asyncio/*.py", held_out=0.1)
for _ in range(2):
    start = time.perf_counter()
    shards = prepare(config, vocab_size=2048, report=print)
    print(f"{time.perf_counter() - start:.2f} s")
try:
    prepare(config, vocab_size=4096)
except UserError as error:
    print(error)

# %% [markdown]
# ## A look at the data
#
# Each vertical bar below is one end-of-text, so the gaps are documents; the colour of the strip is how
# predictable the text is by frequency alone (the mean of $-\ln p$ of its tokens under unigram counts, in
# nats): light stretches are made of common tokens, dark ones of rare.

# %%
import matplotlib.pyplot as plt

row = shards.train.take(np.arange(len(shards.train)))
surprise = -np.log(np.bincount(row, minlength=2048)[row] / len(row))
block = 200
strip = surprise[: len(row) // block * block].reshape(-1, block).mean(axis=1)
fig, axis = plt.subplots(figsize=(9, 2.2))
image = axis.imshow(strip[None], aspect="auto", cmap="Blues", extent=(0, len(row), 0, 1))
axis.vlines(np.flatnonzero(row == 0), 0, 1, color="C3", linewidth=0.7)
axis.set(xlabel="position in the training row (tokens)", yticks=[], title="Documents, and how rare their tokens are")
fig.colorbar(image, label="nats per token")
fig.tight_layout()
fig
# %%
scratch.cleanup()

# %% [markdown]
# ## Where to go next
#
# `63_batches` reads windows of these rows in a shuffled order that any step can be resumed from.
