# %% [markdown]
# # Models in and out
#
# > `pithtrain import` makes a run of a published folder, `pithtrain export` a published folder of a run.
#
# People train published architectures, and expect published tools to read the result. A folder that
# `transformers` reads becomes a [run](69_run.py) here, and back. [The notebook before](79_published.py) says which
# tensor is where; this one moves them, under three rules:
#
# - **Streamed.** A model may be far larger than the machine's memory. Tensors pass through one at a time: ours, which
#   stack the experts of a layer, in fp32.
# - **Exact.** Weights are held in fp32, and bf16 -> fp32 -> bf16 changes no bit. The run remembers what each
#   tensor was.
# - **All or nothing.** A folder that does not fit is refused with everything that is wrong in it, and nothing is
#   written.

# %%
#| default_exp hub

# %%
#| export
import json
import math
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pithtrain.config import Config, UserError, config_from_tables, load_run_config, to_toml
from pithtrain.models.build import build
from pithtrain.published import SPLIT_EXPERTS, Published, View, published_of, settings_from, table_from, views
from pithtrain.train.checkpoint import checkpoint_path, checkpoint_steps, disk_full, read_checkpoint
from pithtrain.train.run import published_settings
from pithtrain.train.tokenizer import END_OF_TEXT

# %% [markdown]
# ## Weights of four bits, and of eight
#
# GPT-OSS packs its experts as MXFP4: two values of four bits in a byte, 32 of them under one power of two. DeepSeek-V3
# is published in FP8, values of eight bits (a sign, four bits of exponent, three of fraction) under a scale in fp32 for
# each block of 128 rows and 128 columns; blocks at the edge are smaller.


# %%
#| export
def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks (..., G, 16) and scales (..., G), both uint8, to values (..., 32 G), fp32; exact in bf16 too."""
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = torch.tensor(positive + [-value for value in positive])
    pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1)
    return torch.ldexp(pairs.flatten(-2), scales.unsqueeze(-1).int() - 127).flatten(-2)


# %%
#| export
def unpack_fp8(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Values (R, C) of type float8_e4m3fn under a scale for each `block` of rows and columns, to fp32."""
    for axis, side in enumerate(block):
        scales = scales.float().repeat_interleave(side, axis).narrow(axis, 0, values.shape[axis])
    return values.float() * scales


# %%
blocks = torch.randint(256, (2, 1, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
unpacked = unpack_mxfp4(blocks, torch.tensor([[127], [130]], dtype=torch.uint8))
print(unpacked[:, :8].tolist())
assert torch.equal(unpacked.bfloat16().float(), unpacked)
print(unpack_fp8(torch.tensor([[1.0, 1.0, 1.1]]).to(torch.float8_e4m3fn), torch.tensor([[0.5, 3.0]]), (2, 2)))

# %% [markdown]
# ## What a folder holds
#
# Only headers are read: where each tensor is, its type and shape. Packed tensors are listed as what they unpack to.
# Whether a tensor is packed, its own type says: `config.json` may still tell of what has long been unpacked.


# %%
#| export
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Stored(NamedTuple):
    """A tensor of a published folder: its file, its name there, type and shape; where it is packed, what unpacks it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    scales: Path | None = None  #: the file of its scales
    block: tuple[int, int] = (0, 0)  #: rows and columns under one scale of FP8


# %%
#| export
def stored_tensors(folder: Path, block: tuple[int, int] = (128, 128)) -> dict[str, Stored]:
    """What the safetensors files of `folder` hold, by the text model's names; FP8 has a scale for each `block`.

    Raises UserError for broken files."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    try:
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: not an index of safetensors files; fetch it again") from None
    stored = {}
    for path in (folder / file for file in files):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    part = file.get_slice(name)
                    ours = re.sub(r"^model\.language_model\.", "model.", name)
                    stored[ours] = Stored(path, name, part.get_dtype(), tuple(part.get_shape()))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; a published model has its weights in safetensors files") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); fetch it again") from None
    for name in [name for name in stored if name.endswith("_proj_blocks")]:
        blocks, scales = stored[name], stored.get(name.replace("_blocks", "_scales"))
        packed = scales and (blocks.dtype, scales.dtype) == ("U8", "U8")
        if packed and blocks.shape[-1] == 16 and scales.shape == blocks.shape[:-1] and len(scales.shape) == 3:
            experts, rows, groups = scales.shape
            whole = Stored(blocks.path, blocks.name, "MXFP4", (experts, 32 * groups, rows), scales.path)
            stored[name.removesuffix("_blocks")] = whole
            del stored[name], stored[name.replace("_blocks", "_scales")]
    for name in [name.removesuffix("_scale_inv") for name in stored if name.endswith("_scale_inv")]:
        values, scales = stored.get(name), stored[f"{name}_scale_inv"]
        if not values or (values.dtype, scales.dtype, len(values.shape)) != ("F8_E4M3", "F32", 2):
            continue
        if scales.shape == tuple(-(-size // side) for size, side in zip(values.shape, block, strict=True)):
            stored[name] = values._replace(dtype="FP8", scales=scales.path, block=block)
            del stored[f"{name}_scale_inv"]
    return stored


# %%
#| export
def fill(parts: list[View], stored: dict[str, Stored]) -> None:
    """Copy published tensors into the views of ours that they are."""
    with ExitStack() as stack:  # files are mapped into memory: none stays open longer than for one tensor of ours
        paths = {path for part in parts for path in (stored[part.name].path, stored[part.name].scales) if path}
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in paths}
        for part in parts:
            found = stored[part.name]
            file, scales = files[found.path], files.get(found.scales)
            if found.dtype == "MXFP4":
                blocks = file.get_slice(found.name)
                scales = scales.get_slice(found.name.replace("_blocks", "_scales"))
                for expert, elements in enumerate(part.elements):
                    elements.copy_(unpack_mxfp4(blocks[expert], scales[expert]).T.reshape(elements.shape))
                continue
            values = file.get_tensor(found.name)
            if scales:
                values = unpack_fp8(values, scales.get_tensor(f"{found.name}_scale_inv"), found.block)
            part.elements.copy_(values.view(part.elements.shape))


# %% [markdown]
# ## In
#
# The model that the folder's settings describe is made on the meta device: its tensors have shapes and no memory.
# What should be in the folder then follows, and is compared with what is there.


# %%
#| export
def read_config(folder: Path, run: Path) -> tuple[Published, Config, dict[str, Any]]:
    """The run's config that a published folder's settings make, and how its weights were quantised, where they were.

    Raises UserError for what is not known here."""
    path = folder / "config.json"
    try:
        table = json.loads(path.read_text())
        quantised = {**(table.get("quantization_config") or {})}
        rows, columns = quantised.get("weight_block_size") or (128, 128)
        found, settings = settings_from(table)
        positions = (table | table.get("text_config", {})).get("max_position_embeddings", 4096)
        tables = {"run": {"name": run.name, "folder": str(run.parent)}, "data": {"folder": f"data/{run.name}"},
                  "model": settings, "train": {"sequence_length": min(4096, positions)}}  # fmt: skip
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the folder of a published model") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not the settings of a model ({type(error).__name__}: {error})") from None
    return found, config_from_tables(tables, str(path)), quantised | {"weight_block_size": (rows, columns)}


# %%
#| export
def misfits(expected: list[View], stored: dict[str, Stored], beside: str) -> list[str]:
    """Everything in which the tensors of a folder are not those expected, a line for each name."""
    lines = []
    for part in expected:
        found = stored.get(part.name)
        if found is None:
            lines.append(f"{part.name}: is missing")
        elif found.dtype not in DTYPES and found.scales is None:
            lines.append(f"{part.name}: is of type {found.dtype}, expected {', '.join(DTYPES)}")
        elif found.shape != part.shape:
            lines.append(f"{part.name}: has shape {found.shape}, expected {part.shape}")
    known = {part.name for part in expected}
    extra = [name for name in sorted(stored) if name not in known and not re.search(beside, name)]
    return lines + [f"{name}: is not part of this model" for name in extra]


# %% [markdown]
# torch's checkpoint writer takes a dictionary of tensors. `OneByOne` gives it shapes, and each tensor when its turn
# comes. The writer holds on to the tensor before, which is on the disk by then; so its memory is taken back.


# %%
#| export
class OneByOne(dcp.DefaultSavePlanner):
    """Saves a dictionary of meta tensors; `read(key)` makes each of them when it is to be written."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__(flatten_state_dict=False)
        self.read, self.last = read, torch.empty(0)

    def lookup_object(self, index: Any) -> Tensor:
        self.last.untyped_storage().resize_(0)
        self.last = self.read(index.fqn)
        return self.last


# %%
#| export
def refuse_taken(folder: Path) -> None:
    """Raise UserError if `folder` is there already."""
    if folder.exists():
        raise UserError(f"{folder}: exists; choose another name, or delete it")


# %%
#| export
@contextmanager
def whole_or_not(folder: Path) -> Iterator[Path]:
    """A folder to write to, which gets the name `folder` at the end, or goes. UserError where that is taken."""
    refuse_taken(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, folder)
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
        if disk_full(error):
            raise UserError(f"{folder}: the disk is full; free some space and run the same command again") from None
        if isinstance(error, OSError) and error.filename:
            raise UserError(f"{error.filename}: {error.strerror}; mend that and run the same command") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# %%
#| export
BESIDE_WEIGHTS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                  "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip


# %%
#| export
def copy_files(source: Path, target: Path, *names: str) -> None:
    """Copy those files of `names` that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


# %%
#| export
def tied_copy(stored: dict[str, Stored]) -> bool:
    """Whether a folder stores its output head and its embedding, and they are the same."""
    tensors = []
    for found in (stored[name] for name in ("lm_head.weight", "model.embed_tokens.weight") if name in stored):
        with safe_open(found.path, "pt") as file:
            tensors.append(file.get_tensor(found.name))
    return len(tensors) == 2 and tensors[0].dtype == tensors[1].dtype and torch.equal(*tensors)


# %%
#| export
def import_model(source: Path, run: Path, report: Callable[[str], None] = print) -> None:
    """Make the run folder `run`, with its step 0, of the published model in `source`.

    Raises UserError, before anything is written, for a folder that is not exactly the model it says it is."""
    refuse_taken(run)  # at once, and not when all is read
    found, config, quantised = read_config(source, run)
    stored = stored_tensors(source, quantised["weight_block_size"])
    with torch.device("meta"):
        shapes = build(config.model).state_dict()
    apart = "model.layers.0.mlp.experts.0.down_proj.weight" in stored  # of a family that mostly stacks them
    names = SPLIT_EXPERTS if apart else {}
    expected = [part for name, tensor in shapes.items() for part in views(config.model, name, tensor, names)]
    if config.model.tie_embeddings and tied_copy(stored):
        del stored["lm_head.weight"]
    if lines := misfits(expected, stored, found.beside):
        if (method := quantised.get("quant_method", "fp8")) not in ("fp8", "mxfp4"):
            lines.insert(0, f"quantization_config: {method!r} weights are not read, only 'fp8' and 'mxfp4'")
        more = [f"and {len(lines) - 20} more"] * (len(lines) > 20)
        title = f"{source}: its tensors are not those of this {found.architecture}:"
        raise UserError("\n".join([title, *lines[:20], *more]))

    def read(key: str) -> Tensor:
        name = key.removeprefix("model.")
        tensor = torch.zeros(shapes[name].shape)
        fill(list(views(config.model, name, tensor, names)), stored)
        return tensor

    types = {part.name: stored[part.name].dtype if not stored[part.name].scales else "BF16" for part in expected}
    common = Counter(types.values()).most_common(1)[0][0]
    others = {name: dtype for name, dtype in types.items() if dtype != common}
    with whole_or_not(run) as partial:
        (partial / "published").mkdir()
        copy_files(source, partial / "published", "config.json", *BESIDE_WEIGHTS)
        written = {"dtype": common, "others": others, "experts_apart": apart}
        (partial / "published" / "dtypes.json").write_text(json.dumps(written, indent=1))
        copy_files(source, partial, "tokenizer.json")
        (partial / "config.toml").write_text(to_toml(config))
        # A file for each tensor: within one, the writer would keep all of them in memory.
        path = checkpoint_path(partial / "checkpoints", 0)
        writer = dcp.FileSystemWriter(path, single_file_per_rank=False, sync_files=True)
        state = {f"model.{name}": tensor for name, tensor in shapes.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            dcp.save(state, storage_writer=writer, planner=OneByOne(read), no_dist=True)
    report(f"{run}: {len(expected):,} tensors of {found.architecture}, mostly {common}")
    for form, count in Counter(stored[part.name].dtype for part in expected if stored[part.name].scales).items():
        report(f"{count} tensors were packed as {form}; they are unpacked here, and export writes them as BF16")
    if aside := len(stored) - len(expected):
        report(f"{aside} tensors that are no part of the text decoder were left out")
    if not (run / "tokenizer.json").is_file():
        report(f"{source}: has no tokenizer.json; put the model's into {run} before you train it or let it write")


# %% [markdown]
# ## Out
#
# A safetensors file is a header in JSON (its length comes first, in eight bytes) and the bytes of all tensors. As
# shapes and types are known before, the header is written first and the tensors follow one by one.


# %%
#| export
class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


# %%
#| export
def cut_shards(entries: list[Entry], limit: int) -> dict[str, list[Entry]]:
    """Entries in order, by the file that each goes to; a file has at most `limit` bytes, or one tensor."""
    shards, size = [[]], 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, start=1)}


# %%
#| export
def to_bytes(entry: Entry, tensor: Tensor) -> memoryview:
    """What a file holds of a tensor. Raises UserError for values that the type cannot hold."""
    tensor = tensor.to(DTYPES[entry.dtype]).contiguous()
    if entry.dtype == "F16" and not tensor.isfinite().all():
        raise UserError(f"{entry.name}: has values that float16 cannot hold; export as bfloat16 or float32")
    return memoryview(tensor.flatten().view(torch.uint8).numpy())


# %%
#| export
def write_shard(path: Path, entries: list[Entry], tensors: Iterator[Tensor]) -> None:
    """Write a safetensors file of `entries`, taking as many of `tensors`."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        start, end = end, end + entry.bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            file.write(to_bytes(entry, next(tensors)))


# %%
import tempfile

scratch = tempfile.TemporaryDirectory()
entries = [Entry("a", "F32", (2, 3)), Entry("b", "BF16", (4,)), Entry("c", "F32", ())]
tensors = [torch.arange(6.0).view(2, 3), torch.ones(4), torch.tensor(7.0)]
write_shard(Path(scratch.name) / "x.safetensors", entries, iter(tensors))
with safe_open(Path(scratch.name) / "x.safetensors", "pt") as file:
    print({entry.name: file.get_tensor(entry.name) for entry in entries})
    assert all(torch.equal(file.get_tensor(e.name).float(), t) for e, t in zip(entries, tensors, strict=True))
print({name: [entry.name for entry in shard] for name, shard in cut_shards(entries, 32).items()})

# %% [markdown]
# Settings that PithTrain does not have (the tokens that begin and end a text, say) are those of the folder that the
# run was imported from.


# %%
#| export
def write_json(path: Path, table: dict[str, Any]) -> None:
    """Write settings."""
    path.write_text(json.dumps(table, indent=2) + "\n")


# %%
#| export
OLD_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "quantization_config", "dtype",
            "auto_map", "num_local_experts", "full_attention_interval", "transformers_version")  # fmt: skip


# %%
#| export
def write_settings(run: Path, folder: Path, config: Config, dtype: str) -> None:
    """Everything of an exported folder but the weights."""
    table, length = {"max_position_embeddings": config.train.sequence_length}, config.train.sequence_length
    if (run / "published" / "config.json").exists():
        imported = json.loads((run / "published" / "config.json").read_text())
        imported = imported.get("text_config", imported)
        table |= {key: value for key, value in imported.items() if key not in OLD_KEYS}
    else:  # a tokenizer that is made here begins with end-of-text, which stands before and behind every text
        table |= {"bos_token_id": 0, "eos_token_id": 0}
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, "add_bos_token": True}
        write_json(folder / "tokenizer_config.json", tokenizer | dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT))
    ends = {key: table[key] for key in ("bos_token_id", "eos_token_id") if table.get(key) is not None}
    write_json(folder / "generation_config.json", ends)
    table |= table_from(config.model) | {"torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    write_json(folder / "config.json", table)
    copy_files(run, folder, "tokenizer.json")
    copy_files(run / "published", folder, *BESIDE_WEIGHTS)


# %%
#| export
def export_model(
    run: Path, folder: Path, dtype: str = "", shard_bytes: int = 5 * 10**9, report: Callable[[str], None] = print
) -> None:
    """Write the newest checkpoint of `run` as a published model to `folder`, which must not exist.

    dtype: F32, BF16 or F16; by default each tensor's of the import, and F32 for a run that was trained here.
    Raises UserError, with every name, where the model has something that the published form cannot say."""
    config = load_run_config(run)
    steps = checkpoint_steps(run / "checkpoints")
    if not steps:
        raise UserError(f"{run}: has no checkpoint yet; train it first")
    published_settings(run)  # refuses damaged ones
    checkpoint, recorded = checkpoint_path(run / "checkpoints", steps[-1]), run / "published" / "dtypes.json"
    types = json.loads(recorded.read_text()) if recorded.exists() else {"dtype": "F32", "others": {}}
    common, others = dtype or types["dtype"], {} if dtype else types["others"]
    names = SPLIT_EXPERTS if types.get("experts_apart") else {}
    try:
        table_from(config.model)
    except UserError as error:
        raise UserError(f"{run}: {error}; it has no published form") from None
    with torch.device("meta"):
        shapes = build(config.model).state_dict()
    whole = {name: list(views(config.model, name, tensor, names)) for name, tensor in shapes.items()}

    def read(name: str) -> Tensor:
        tensor = torch.empty(shapes[name].shape)
        read_checkpoint(checkpoint, {f"model.{name}": tensor})
        return tensor

    if homeless := [name for name, parts in whole.items() if not parts and read(name).any()]:
        lines = [f"{name}: is not zero, and the published form has no such tensor" for name in homeless]
        raise UserError("\n".join([f"{run}: cannot be exported:", *lines]))
    parts = [part for parts in whole.values() for part in parts]
    entries = [Entry(part.name, others.get(part.name, common), part.shape) for part in parts]
    shards = cut_shards(entries, shard_bytes)

    def elements() -> Iterator[Tensor]:
        for name in (name for name, parts in whole.items() if parts):
            tensor = read(name)
            yield from (part.elements for part in views(config.model, name, tensor, names))
            del tensor  # before the next is read

    tensors = elements()
    with whole_or_not(folder) as partial:
        for file, shard in shards.items():
            write_shard(partial / file, shard, tensors)
        if len(shards) > 1:
            where = {entry.name: file for file, shard in shards.items() for entry in shard}
            index = {"metadata": {"total_size": sum(entry.bytes for entry in entries)}, "weight_map": where}
            write_json(partial / "model.safetensors.index.json", index)
        write_settings(run, partial, config, common)
    architecture = published_of(config.model).architecture
    report(f"{folder}: {architecture} of step {steps[-1]}, {len(entries):,} tensors in {len(shards)} files, {common}")


# %% [markdown]
# ## Out and in again
#
# A small DeepSeek, untrained, goes out in bf16 and comes in as another run; that one goes out again. The two
# published folders hold the same bytes.

# %%
from pithtrain.config import DeepseekConfig, RunConfig
from pithtrain.models.decoder import initialise
from pithtrain.train.checkpoint import save_checkpoint

here = Path(scratch.name)
model_config = DeepseekConfig(layers=2, hidden=64, experts=8, scoring="sigmoid", renormalise=True, expert_hidden=32)
model = build(model_config)
initialise(model, seed=0)
(here / "first").mkdir()
(here / "first" / "config.toml").write_text(to_toml(Config(run=RunConfig(name="first"), model=model_config)))
state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
save_checkpoint(here / "first" / "checkpoints", 7, state, keep=1)


def say(line):
    print(line.replace(scratch.name, "runs"))


export_model(here / "first", here / "out", dtype="BF16", shard_bytes=10**6, report=say)
import_model(here / "out", here / "second", report=say)
export_model(here / "second", here / "again", shard_bytes=10**6, report=say)
for path in sorted((here / "again").iterdir()):
    same = path.read_bytes() == (here / "out" / path.name).read_bytes()
    print(f"{path.name:34} {path.stat().st_size:>9,} bytes, {'the same' if same else 'another'}")
    assert same or path.suffix == ".json"

# %% [markdown]
# A folder that does not fit is refused, and all of it is told at once:

# %%
from safetensors.torch import load_file, save_file

file = here / "again" / "model-00001-of-00002.safetensors"
tensors = load_file(file)
tensors.pop("model.layers.0.mlp.up_proj.weight")
tensors["model.embed_tokens.weight"] = torch.zeros(3, 3)
tensors["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"].to(torch.int8)
tensors["model.layers.0.surprise"] = torch.zeros(1)
save_file(tensors, file)
try:
    import_model(here / "again", here / "third")
except UserError as error:
    print(str(error).replace(scratch.name, "runs"))
assert not (here / "third").exists()

# %% [markdown]
# ## Memory
#
# How much memory a transfer needs, against the size of the model: the peak of a process's resident memory, mapped files
# included, above what it had before. Models of random weights, with a published tensor for each expert (Qwen3-MoE), or
# with experts stacked and in another order (GPT-OSS). Measured by
#
# ```bash
# .venv/bin/python tools/hub_memory.py --gib 0.5 1 2 4 --json docs/benchmarks/hub-memory.json
# ```

# %%
import matplotlib.pyplot as plt

import pithtrain

root = Path(pithtrain.__file__).parent.parent
measured = json.loads((root / "docs" / "benchmarks" / "hub-memory.json").read_text())
print(f"{measured['device']}, {measured['cores']} cores, torch {measured['torch']}, {measured['date']}")
fig, ax = plt.subplots(figsize=(7, 3.2))
for colour, family in enumerate(("qwen3-moe", "gpt-oss")):
    models = [model for model in measured["models"] if model["family"] == family]
    sizes = [model["checkpoint_bytes"] / 2**30 for model in models]
    for way, style in (("import", "o-"), ("export", "s--")):
        peaks = [model[f"{way}_peak_bytes"] / 2**30 for model in models]
        ax.plot(sizes, peaks, style, color=f"C{colour}", label=f"{way}, {family}")
        print(f"{family:10}{way:7}{sizes[-1]:5.1f} GiB of bf16: peak {peaks[-1]:.2f} GiB")
ax.plot([0, sizes[-1]], [0, sizes[-1]], color="0.7", label="the whole checkpoint")
two = 2 * models[-1]["largest_tensor_bytes"] / 2**30
ax.axhline(two, color="0.4", ls=":", label="two of the largest tensors in fp32")
ax.set(title="Memory that a transfer needs", xlabel="checkpoint in bf16, GiB", ylabel="peak, GiB", ylim=(0, 4 * two))
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
fig

# %% [markdown]
# The peak does not grow with the model: what is held is the tensor that is read and its copy in the form that is
# written. tests/test_hub.py asks the same of a small model. But mind what a tensor is: here, the experts of a layer,
# stacked and in fp32. For the largest models that is much more than any tensor of the published folder:

# %%
from pithtrain.config import load_config

for name in ("gpt-oss-20b", "qwen3-30b-a3b", "deepseek-v3"):
    config = load_config(root / "configs" / f"{name}.toml").model
    with torch.device("meta"):
        tensors = build(config).state_dict()
    name_of, largest = max(tensors.items(), key=lambda item: item[1].numel())
    published = max(math.prod(view.shape) for n, t in tensors.items() for view in views(config, n, t, {}))
    print(f"{name:14} {name_of:27} {4 * largest.numel() / 1e9:5.1f} GB, twice that at the peak; "
          f"largest published, in bf16: {2 * published / 1e9:.1f} GB")  # fmt: skip

# %% [markdown]
# Next: what an imported or trained model is worth: [evaluation](81_evaluate.py).
