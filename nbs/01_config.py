# %% [markdown]
# # Config: a run as one value
#
# > Typed dataclasses that hold everything a run depends on; TOML in, one-line errors out.
#
# A training run is a function of its config and of the text it reads. So the config is a *value*: frozen
# dataclasses, filled from a TOML file, checked completely before anything is created, and written back
# beside the results. Nothing in PithTrain reads a setting from anywhere else.
#
# What a field means, its unit and its allowed range stand in one place: the field's own definition. The
# `--help` of the command line, the checks and the documentation all read it from there.

# %%
#| default_exp config

# %%
#| export
import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

# %% [markdown]
# ## Errors a user can act on
#
# A mistake in what the user gave is a `UserError`. Its text is one line: what is wrong, where, and what
# would be right. The command line prints that line and exits with code 2; a library caller catches it.


# %%
#| export
class UserError(Exception):
    """A mistake in a user's input: one line that says what is wrong, where, and what would be right."""


# What the system says of files that a user can mend. That a file of ours is missing is not one of them.
REFUSALS = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


def describe_refusal(error: OSError) -> str:
    """One line about a file that the system refuses, one of `REFUSALS`."""
    return f"{error.filename2 or error.filename}: {error.strerror}; mend that and run the same command"


# %% [markdown]
# ## Fields
#
# `knob` is `dataclasses.field` with a sentence of documentation and a range. `free=True` marks a field
# that does not change the trained weights by more than rounding (how often to save, on how many ranks to
# run): a resumed run may change it.


# %%
#| export
def knob(default: Any, doc: str, *, low: float | None = None, high: float | None = None, free: bool = False) -> Any:
    """A dataclass field with its documentation, its allowed range (inclusive) and whether a resume may change it."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "free": free})


# %% [markdown]
# ## The sections
#
# One dataclass for each table of the TOML file. The defaults are the tiny run that `make train` does.


# %%
#| export
@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it runs on."""

    name: str = knob("tiny", "name of the run; its folder is FOLDER/NAME")
    folder: str = knob("runs", "folder that holds all runs", free=True)
    seed: int = knob(0, "seed of the weights and of the order of the data", low=0)
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "auto takes CUDA where there is a GPU", free=True)
    precision: Literal["auto", "float32", "bfloat16"] = knob("auto", "dtype of the compute; auto: bfloat16 on CUDA")
    threads: int = knob(0, "CPU threads; 0 leaves the choice to torch", low=0, high=1024, free=True)


@dataclass(frozen=True)
class DataConfig:
    """The text and its token shards."""

    corpus: str = knob("", "folder of text files; empty means the Python standard library's own source")
    pattern: str = knob("*.py", "glob that a file's name must match to be read")
    folder: str = knob("data/tiny", "folder of the tokenizer and the token shards, made when absent", free=True)
    held_out: float = knob(0.05, "fraction of files held out for validation", low=0.001, high=0.5)


@dataclass(frozen=True)
class BalanceConfig:
    """How experts are kept equally busy. Each coefficient multiplies a loss that is 1.0 at balance."""

    micro_batch: float = knob(0.0, "coefficient of the loss over each microbatch (Switch)", low=0.0)
    sequence: float = knob(0.0, "coefficient of the loss over each sequence", low=0.0)
    global_batch: float = knob(0.01, "coefficient of the loss over the whole batch of a step", low=0.0)
    bias_rate: float = knob(0.0, "step of the selection bias, loss-free balancing; 0 turns it off", low=0.0)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a warmup-stable-decay learning rate."""

    learning_rate: float = knob(2e-3, "peak learning rate", low=0.0)
    warmup: int = knob(20, "steps of linear warmup from 0", low=0)
    decay: float = knob(0.4, "last fraction of the steps, over which the rate falls to final", low=0.0, high=1.0)
    final: float = knob(0.0, "learning rate at the end, as a fraction of the peak", low=0.0, high=1.0)
    beta1: float = knob(0.9, "decay of the gradient's running mean", low=0.0, high=0.9999)
    beta2: float = knob(0.95, "decay of the squared gradient's running mean", low=0.0, high=0.99999)
    eps: float = knob(1e-8, "added to the denominator of the update", low=0.0)
    weight_decay: float = knob(0.1, "decoupled weight decay, on matrices only", low=0.0)
    clip: float = knob(1.0, "largest global gradient norm; 0 leaves gradients alone", low=0.0)


@dataclass(frozen=True)
class TrainConfig:
    """How much is trained on, in what pieces."""

    steps: int = knob(200, "optimiser steps; may change until the learning rate falls", low=1)
    sequence_length: int = knob(256, "tokens of a sequence", low=1)
    batch_size: int = knob(16, "sequences of an optimiser step", low=1)
    micro_batch_size: int = knob(
        16, "sequences of one pass of a rank, over which balance losses are counted", low=1, free=True
    )
    recompute: Literal["none", "attention", "experts", "layer"] = knob("none", "made again in the backward", free=True)
    checkpoint_every: int = knob(100, "steps between checkpoints; 0 saves only at the end", low=0, free=True)
    keep: int = knob(2, "checkpoints kept, the newest", low=1, free=True)
    evaluate_every: int = knob(0, "steps between validations; 0 validates only at the end", low=0, free=True)


@dataclass(frozen=True)
class MeshConfig:
    """How the ranks of a run share the work; a checkpoint of one mesh loads into any other."""

    pp: int = knob(1, "pipeline ranks, which share the layers", low=1, free=True)
    dp: int = knob(0, "data-parallel ranks, which share the batch; 0: as many as the others leave", low=0, free=True)
    cp: int = knob(1, "context-parallel ranks, which share each sequence", low=1, free=True)
    ep: int = knob(1, "expert-parallel ranks, which share each layer's experts and also the batch", low=1, free=True)
    copies: int = knob(1, "hybrid sharding: copies of the sharded weights; divides dp", low=1, free=True)
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zbv", "dualpipev"] = knob(
        "dualpipev", "pipeline schedule, where pp is more than 1", free=True
    )


@dataclass(frozen=True)
class LogConfig:
    """Loggers beside metrics.jsonl; both are extras."""

    tensorboard: bool = knob(False, "write TensorBoard events (extra: tensorboard)", free=True)
    wandb: bool = knob(False, "log to Weights & Biases (extra: wandb)", free=True)


# %% [markdown]
# ## The model families
#
# Every family is a decoder with experts, so they share `DecoderConfig`; what only one family has stands in
# its own dataclass. `family` in the TOML file says which one the table `[model]` is.


# %%
#| export
@dataclass(frozen=True)
class DecoderConfig:
    """What every model family has."""

    vocab_size: int = knob(4096, "tokens in the vocabulary, which the tokenizer is trained to", low=257)
    layers: int = knob(4, "decoder layers", low=1)
    hidden: int = knob(256, "width of the residual stream, in features", low=1)
    heads: int = knob(8, "query heads", low=1)
    experts: int = knob(16, "experts of a layer", low=1)
    top_k: int = knob(2, "experts that a token visits", low=1)
    expert_hidden: int = knob(256, "width of an expert's inner layer, in features", low=1)
    rope_theta: float = knob(10_000.0, "base of the rotary wavelengths", low=1.0)
    norm_eps: float = knob(1e-6, "added to the mean square in RMSNorm", low=0.0)
    tie_embeddings: bool = knob(True, "use the embedding matrix as the output head")
    init_std: float = knob(0.02, "standard deviation of the initial weights", low=0.0)

    def problems(self) -> list[str]:
        """What contradicts itself, each as "key: what is wrong"."""
        return [f"top_k: {self.top_k} is more than experts, {self.experts}"] if self.top_k > self.experts else []


@dataclass(frozen=True)
class GroupedQueryConfig(DecoderConfig):
    """What the families have in which groups of query heads share a key and value head."""

    kv_heads: int = knob(2, "key and value heads; divides heads", low=1)
    head_dim: int = knob(32, "features of a head; even", low=2)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.heads % self.kv_heads:
            found += [f"kv_heads: {self.kv_heads} does not divide heads, {self.heads}"]
        if self.head_dim % 2:
            found += [f"head_dim: {self.head_dim} is odd; rotary positions pair features"]
        return found


@dataclass(frozen=True)
class Qwen3MoeConfig(GroupedQueryConfig):
    """A Qwen3-MoE decoder."""

    family: Literal["qwen3-moe"] = knob("qwen3-moe", "architecture of the model")
    renormalise: bool = knob(True, "rescale the weights of a token's top_k experts to sum to 1")


# %%
#| export
@dataclass(frozen=True)
class DeepseekConfig(DecoderConfig):
    """A DeepSeek decoder: V2 where scoring is "softmax", V3 where it is "sigmoid"."""

    family: Literal["deepseek"] = knob("deepseek", "architecture of the model")
    scoring: Literal["softmax", "sigmoid"] = knob("softmax", "scores of the experts; groups by their 1 or 2 best")
    head_dim: int = knob(32, "features of a head's query and key that are not rotated", low=1)
    rope_dim: int = knob(16, "features of a head's query and key that are rotated; even", low=2)
    value_dim: int = knob(32, "features of a head's value", low=1)
    latent_rank: int = knob(64, "features of the latent that keys and values are made from", low=1)
    query_rank: int = knob(0, "features that queries are made from; 0: from the hidden state itself", low=0)
    dense_layers: int = knob(1, "first layers, which have one MLP and no experts", low=0)
    dense_hidden: int = knob(1024, "width of that MLP's inner layer, in features", low=1)
    shared_experts: int = knob(1, "experts that every token visits", low=0)
    groups: int = knob(1, "groups that the experts stand in; divides experts", low=1)
    top_groups: int = knob(1, "groups that a token may choose its experts from", low=1)
    renormalise: bool = knob(False, "rescale the weights of a token's top_k experts to sum to 1, before routed_scale")
    routed_scale: float = knob(1.0, "factor on the weights of a token's experts", low=0.0)
    yarn_factor: float = knob(1.0, "context length over that of training, by YaRN; 1: plain positions", low=1.0)
    yarn_length: int = knob(4096, "positions of training that YaRN starts from", low=1)
    yarn_beta_fast: float = knob(32.0, "turns in yarn_length from which a pair keeps its frequency", low=0.01)
    yarn_beta_slow: float = knob(1.0, "turns in yarn_length up to which a pair is slowed by yarn_factor", low=0.01)
    yarn_mscale: float = knob(1.0, "strength of YaRN's magnitude on the rotated features", low=0.0)
    yarn_mscale_all_dim: float = knob(0.0, "strength of YaRN's magnitude on all features", low=0.0)

    def problems(self) -> list[str]:
        found, size = super().problems(), self.experts // self.groups
        if self.rope_dim % 2:
            found += [f"rope_dim: {self.rope_dim} is odd; rotary positions pair features"]
        if self.experts % self.groups:
            found += [f"groups: {self.groups} does not divide experts, {self.experts}"]
        if self.top_groups > self.groups:
            found += [f"top_groups: {self.top_groups} is more than groups, {self.groups}"]
        if self.top_k > self.top_groups * size:
            found += [f"top_k: {self.top_k} is more than the {self.top_groups * size} experts of top_groups groups"]
        if self.dense_layers >= self.layers:
            found += [f"dense_layers: {self.dense_layers} of {self.layers} layers leaves none with experts"]
        if self.scoring == "sigmoid" and size < 2:
            found += [f"groups: {self.groups} leaves groups of {size}; sigmoid scoring judges them by two experts"]
        return found


# %%
#| export
@dataclass(frozen=True)
class GptOssConfig(GroupedQueryConfig):
    """A GPT-OSS decoder."""

    family: Literal["gpt-oss"] = knob("gpt-oss", "architecture of the model")
    window: int = knob(128, "keys that a query sees, its own included, in the first layer and every other one", low=1)
    yarn_factor: float = knob(1.0, "context length over that of training, by YaRN; 1: plain positions", low=1.0)
    yarn_length: int = knob(4096, "positions of training that YaRN starts from", low=1)
    yarn_beta_fast: float = knob(32.0, "turns in yarn_length from which a pair keeps its frequency", low=0.01)
    yarn_beta_slow: float = knob(1.0, "turns in yarn_length up to which a pair is slowed by yarn_factor", low=0.01)


# %%
#| export
@dataclass(frozen=True)
class Qwen3_5MoeConfig(GroupedQueryConfig):
    """A Qwen3.5-MoE decoder; layers without softmax attention have the gated delta rule."""

    family: Literal["qwen3.5-moe"] = knob("qwen3.5-moe", "architecture of the model")
    rope_dim: int = knob(8, "features of a head that are rotated, the first ones; even, at most head_dim", low=2)
    full_every: int = knob(4, "of so many layers the last has softmax attention, the others the delta rule", low=1)
    delta_key_heads: int = knob(2, "query and key heads of the delta rule", low=1)
    delta_value_heads: int = knob(4, "value heads of the delta rule; a multiple of delta_key_heads", low=1)
    delta_key_dim: int = knob(32, "features of a query and key of the delta rule", low=1)
    delta_value_dim: int = knob(32, "features of a value of the delta rule", low=1)
    delta_taps: int = knob(4, "tokens that the short convolution ahead of the delta rule spans", low=1)
    shared_hidden: int = knob(256, "width of the inner layer of the expert that every token visits", low=1)

    def problems(self) -> list[str]:
        found, keys, values = super().problems(), self.delta_key_heads, self.delta_value_heads
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            found += [f"rope_dim: {self.rope_dim} is odd or more than head_dim, {self.head_dim}"]
        if values % keys:
            found += [f"delta_value_heads: {values} is no multiple of delta_key_heads, {keys}"]
        return found


# %%
#| export
FAMILIES = (Qwen3MoeConfig, DeepseekConfig, GptOssConfig, Qwen3_5MoeConfig)  # the first is the default


# %% [markdown]
# All tables together. Some rules bind several fields; they are checked when the whole config is known.


# %%
#| export
@dataclass(frozen=True)
class Config:
    """Everything a run depends on, one field for each table of its TOML file."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: DecoderConfig = field(default_factory=FAMILIES[0])
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.run.folder) / self.run.name

    def problems(self) -> list[str]:
        """What contradicts itself, each as "section.key: what is wrong"."""
        train, warmup = self.train, self.optimizer.warmup
        found = [f"model.{problem}" for problem in self.model.problems()]
        if train.batch_size % (size := train.micro_batch_size):
            found += [f"train.micro_batch_size: {size} does not divide train.batch_size, {train.batch_size}"]
        if warmup > train.steps:
            found += [f"optimizer.warmup: {warmup} steps are more than train.steps, {train.steps}"]
        if self.run.name in ("", ".", "..") or "/" in self.run.name:
            found += [f"run.name: {self.run.name!r} is not a folder's name"]
        return found


# %%
config = Config()
print(Config(optimizer=OptimizerConfig(warmup=300)).problems())
config.model

# %% [markdown]
# ## From TOML
#
# `check_value` compares one value with its field, `section_from_table` one table with its dataclass. A
# message starts with the key as the user wrote it; a misspelt key is answered with the nearest real one.


# %%
#| export
def check_value(where: str, spec: dataclasses.Field, value: Any) -> Any:
    """`value` as the field `spec` wants it (an int is taken where a float belongs), or a UserError."""
    if get_origin(spec.type) is Literal:
        if value not in get_args(spec.type):
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, get_args(spec.type)))}")
        return value
    if spec.type is float and type(value) is int:
        value = float(value) if value.bit_length() < 1024 else math.inf
    if type(value) is not spec.type:
        raise UserError(f"{where}: {value!r} is of type {type(value).__name__}, expected {spec.type.__name__}")
    if spec.type is str and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise UserError(f"{where}: {value!r} is not UTF-8 text without zeros")
    low, high = spec.metadata["low"], spec.metadata["high"]
    beyond = (spec.type is float and not math.isfinite(value)) or (spec.type is int and value >= 2**63)
    if beyond or (low is not None and value < low) or (high is not None and value > high):
        span = f"between {low} and {high}" if high is not None else f"at least {low}"
        if beyond and high is None:
            span = "below 2**63" if spec.type is int else "a finite number"
        raise UserError(f"{where}: {value} is out of range, expected {span}")
    return value


# %%
#| export
def nearest(name: str, names: list[str]) -> str:
    """A hint for a misspelt name: the closest of `names`, or all of them."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


# %%
#| export
def section_from_table(section: type, where: str, table: Any) -> Any:
    """One section's dataclass from its TOML table; `where` prefixes the key in messages."""
    if not isinstance(table, dict):
        raise UserError(f"{where}: expected a table of settings, got {table!r}")
    specs = {spec.name: spec for spec in dataclasses.fields(section)}
    for key in table:
        if key not in specs:
            raise UserError(f"{where}.{key}: no such setting; {nearest(key, list(specs))}")
    return section(**{key: check_value(f"{where}.{key}", specs[key], value) for key, value in table.items()})


# %%
try:
    section_from_table(Qwen3MoeConfig, "tiny.toml: model", {"expert": 8})
except UserError as error:
    print(error)
try:
    section_from_table(Qwen3MoeConfig, "tiny.toml: model", {"top_k": 0})
except UserError as error:
    print(error)

# %% [markdown]
# A setting on the command line overrides the file's: `--train.steps 500`. Its text is read as a TOML
# value where it is one and as a plain string otherwise, so `--run.name wide` needs no inner quotes.


# %%
#| export
def parse_override(text: str) -> Any:
    """The value of a command-line override: TOML where it parses, a string otherwise."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# %% [markdown]
# A mistake begins with its key. Where that came from is added in one place: the file, or the command line.


# %%
#| export
def config_from_tables(tables: dict[str, Any], where: str, options: dict[str, str] | None = None) -> Config:
    """A checked Config from parsed TOML tables out of the file `where`; `options` names the keys that are not its."""
    sections = {spec.name: spec.default_factory for spec in dataclasses.fields(Config)}
    families = {family.family: family for family in FAMILIES}
    try:
        for name in tables:
            if name not in sections:
                raise UserError(f"[{name}]: no such section; {nearest(name, list(sections))}")
        model = tables.get("model")
        family = str(model.get("family", FAMILIES[0].family)) if isinstance(model, dict) else FAMILIES[0].family
        if family not in families:
            raise UserError(f"model.family: {family!r} is no family; known: {', '.join(families)}")
        sections["model"] = families[family]
        config = Config(**{name: section_from_table(sections[name], name, table) for name, table in tables.items()})
        if problems := config.problems():
            key, problem = problems[0].split(": ", 1)
            section, name = key.split(".")
            default = "" if name in tables.get(section, {}) else " (its default)"
            raise UserError(f"{key}{default}: {problem}")
        return config
    except UserError as error:
        key, _, problem = str(error).partition(": ")
        raise UserError(f"{(options or {}).get(key, f'{where}: {key}')}: {problem}") from None


# %%
#| export
def load_config(path: Path, overrides: list[tuple[str, str]] = ()) -> Config:
    """Read a TOML file, lay `overrides` (pairs of "section.key" and text) over it, check everything.

    Raises UserError, naming the file or the option, for a missing or malformed file, an unknown key, a wrong
    type, a value out of range, or fields that contradict each other."""
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; configs/tiny.toml is one to start from") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    options, sections = {}, {section.name: section.default_factory for section in dataclasses.fields(Config)}
    kinds = {f"{name}.{spec.name}": spec.type for name, kind in sections.items() for spec in dataclasses.fields(kind)}
    for key, text in overrides:
        section, dot, name = key.partition(".")
        if not dot:
            raise UserError(f"--{key}: expected --SECTION.KEY VALUE, as in --train.steps 500")
        options |= {key: f"--{key}", f"[{section}]": f"--{key}"}
        table = tables.setdefault(section, {})
        if isinstance(table, dict):
            value = parse_override(text)
            table[name] = value if kinds.get(key) is not str or isinstance(value, str) else text
    return config_from_tables(tables, str(path), options)


# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "run.toml"
    path.write_text('[run]\nname = "wide"\n[model]\nexperts = 32\n')
    wide = load_config(path, [("train.steps", "500"), ("optimizer.learning_rate", "1e-3")])
    print(wide.run.name, wide.model.experts, wide.train.steps, wide.optimizer.learning_rate)
    for overrides in ([("train.step", "5")], [("train.micro_batch_size", "5")], [("run.seed", "yes")]):
        try:
            load_config(path, overrides)
        except UserError as error:
            print(str(error).replace(folder + "/", ""))

# %% [markdown]
# A run keeps the config it ran with in its folder; whoever opens a run begins there.


# %%
#| export
def load_run_config(folder: Path) -> Config:
    """The config of the run in `folder`. Raises UserError where the folder is not a run."""
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder}: not a run (no config.toml there); a run's folder is runs/NAME")
    return load_config(folder / "config.toml")


# %%
try:
    load_run_config(Path("runs/none"))
except UserError as error:
    print(error)

# %% [markdown]
# ## Back to TOML, and what every key means
#
# A run keeps the config it ran with, complete. A later start of the same run is compared with it field by
# field: what is not `free` must be equal, or the run folder belongs to a different config.


# %%
#| export
def to_toml(config: Config) -> str:
    """The complete config as TOML text; `load_config` reads it back to an equal value."""
    import tomli_w

    return tomli_w.dumps(dataclasses.asdict(config))


# %%
#| export
def differences(config: Config, other: Config) -> list[str]:
    """The settings, free ones left out, in which two configs differ, as "section.key: a, not b" lines."""
    found = []
    for section in dataclasses.fields(Config):
        mine, theirs = getattr(config, section.name), getattr(other, section.name)
        for spec in dataclasses.fields(mine):
            if spec.metadata["free"] or (type(mine) is not type(theirs) and spec.name != "family"):
                continue  # another family says it all
            if (a := getattr(mine, spec.name)) != (b := getattr(theirs, spec.name)):
                found.append(f"{section.name}.{spec.name}: {a!r}, not {b!r}")
    return found


# %%
assert config_from_tables(tomllib.loads(to_toml(wide)), "copy") == wide
differences(wide, config)

# %% [markdown]
# And the reference, from the same definitions; `pithtrain train --help` prints it.


# %%
#| export
def describe_settings() -> str:
    """Every setting with its type, default, range and meaning, one line each, by section."""
    lines, shared = [], {spec.name for spec in dataclasses.fields(DecoderConfig)}
    sections = [(spec.name, spec.default_factory, ()) for spec in dataclasses.fields(Config) if spec.name != "model"]
    sections += [("model", DecoderConfig, ())] + [("model", family, shared) for family in FAMILIES]
    for name, section, told in sections:
        lines += ["", f"[{name}] {section.__doc__}"]
        for spec in (spec for spec in dataclasses.fields(section) if spec.name not in told):
            kind = "|".join(get_args(spec.type)) if get_origin(spec.type) is Literal else spec.type.__name__
            low, high = spec.metadata["low"], spec.metadata["high"]
            span = "" if low is None else f", >= {low:g}" if high is None else f", {low:g} to {high:g}"
            default = f"default {spec.default!r}".lower() if spec.type is bool else f"default {spec.default!r}"
            lines.append(f"  {f'--{name}.{spec.name}':<26} {spec.metadata['doc']} ({kind}{span}; {default})")
    return "\n".join(lines[1:])


# %%
print(describe_settings())

# %% [markdown]
# Next: [what a traceback out of this package tells you](02_traceback.py), and then the model, from its
# [router](20_router.py) up.
