"""The config: every mistake gets one line that names the file or key, and a round trip loses nothing."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pithtrain.config import (
    Config,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    UserError,
    config_from_tables,
    describe_settings,
    differences,
    load_config,
    parse_override,
    to_toml,
)


def refusal(tmp_path: Path, text: str, overrides: list[tuple[str, str]] = ()) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(tmp_path) + "/", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nstep = 5", "run.toml: train.step: no such setting; did you mean 'steps'?"),
        ("[trian]\nsteps = 5", "run.toml: [trian]: no such section; did you mean 'train'?"),
        ("steps = 5", "run.toml: [steps]: no such section"),
        ("train = 5", "run.toml: train: expected a table of settings, got 5"),
        ('[train]\nsteps = "5"', "run.toml: train.steps: '5' is of type str, expected int"),
        ("[train]\nsteps = 5.0", "run.toml: train.steps: 5.0 is of type float, expected int"),
        ("[train]\nsteps = true", "run.toml: train.steps: True is of type bool, expected int"),
        (
            "[train]\nsteps = 9223372036854775808",
            "train.steps: 9223372036854775808 is out of range, expected below 2**63",
        ),
        (f"[optimizer]\nlearning_rate = 1{'0' * 400}", "learning_rate: inf is out of range, expected a finite number"),
        ('[run]\nname = "a\\u0000b"', "run.name: 'a\\x00b' is not UTF-8 text without zeros"),
        ("[run]\nthreads = 100000", "run.threads: 100000 is out of range, expected between 0 and 1024"),
        ("[train]\nsteps = 0", "run.toml: train.steps: 0 is out of range, expected at least 1"),
        ("[data]\nheld_out = 0.9", "data.held_out: 0.9 is out of range, expected between 0.001 and 0.5"),
        ("[optimizer]\nlearning_rate = nan", "optimizer.learning_rate: nan is out of range"),
        ("[optimizer]\nlearning_rate = inf", "optimizer.learning_rate: inf is out of range"),
        ("[model]\nnorm_eps = -1e-6", "model.norm_eps: -1e-06 is out of range"),
        ("[model]\nfamily = [1]", "run.toml: model.family: '[1]' is no family; known: qwen3-moe, deepseek"),
        ('[run]\ndevice = "gpu"', "run.device: 'gpu' is not one of 'auto', 'cpu', 'cuda'"),
        ("[model]\ntop_k = 17", "model.top_k: 17 is more than experts, 16"),
        ("[model]\nkv_heads = 3", "model.kv_heads: 3 does not divide heads, 8"),
        ("[model]\nhead_dim = 31", "model.head_dim: 31 is odd"),
        ("[train]\nmicro_batch_size = 3", "train.micro_batch_size: 3 does not divide train.batch_size, 16"),
        ("[optimizer]\nwarmup = 201", "optimizer.warmup: 201 steps are more than train.steps, 200"),
        ('[run]\nname = "a/b"', "run.name: 'a/b' is not a folder's name"),
        ('[run]\nname = ".."', "run.name: '..' is not a folder's name"),
        ("[train\nsteps = 5", "run.toml: not valid TOML"),
        ("[train]\nsteps = 1\nsteps = 2", "run.toml: not valid TOML"),
    ],
)
def test_each_mistake_is_one_line(tmp_path, text, expected):
    assert expected in refusal(tmp_path, text)


def test_missing_folder_and_binary_files(tmp_path):
    for path, expected in ((tmp_path / "none.toml", "no such config file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=expected):
            load_config(path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(tmp_path / "binary.toml")


def test_overrides_lie_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[train]\nsteps = 5\n[optimizer]\nwarmup = 1\n")
    config = load_config(path, [("train.steps", "7"), ("run.name", "wide"), ("model.renormalise", "false")])
    assert (config.train.steps, config.run.name, config.model.renormalise) == (7, "wide", False)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("steps", "5", "--steps: expected --SECTION.KEY VALUE"),
        ("train.stepz", "5", "--train.stepz: no such setting; did you mean 'steps'?"),
        ("trian.steps", "5", "--trian.steps: no such section; did you mean 'train'?"),
        ("train.steps", "-5", "--train.steps: -5 is out of range, expected at least 1"),
        ("model.family", "qwen", "--model.family: 'qwen' is no family"),
        ("model.top_k", "17", "--model.top_k: 17 is more than experts, 16"),
        ("model.experts", "1", "run.toml: model.top_k (its default): 2 is more than experts, 1"),
        ("optimizer.eps", "1e-9", "run.toml: train: expected a table of settings, got 5"),
    ],
)
def test_a_mistake_is_told_where_it_was_made(tmp_path, key, text, expected):
    file = "train = 5" if key == "optimizer.eps" else ""
    assert refusal(tmp_path, file, [(key, text)]).startswith(expected)


@pytest.mark.parametrize(
    ("text", "value"), [("5", 5), ("1e-3", 1e-3), ("true", True), ("wide", "wide"), ('"5"', "5"), ("a = b", "a = b")]
)
def test_override_text(text, value):
    assert parse_override(text) == value and type(parse_override(text)) is type(value)


names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="/"), min_size=1)


@given(
    name=names.filter(lambda n: n not in (".", "..")),
    steps=st.integers(20, 10**9),
    rate=st.floats(0, 1e30, allow_nan=False),
    clip=st.integers(0, 5),
)
def test_round_trip_through_toml(name, steps, rate, clip):
    config = Config(
        run=RunConfig(name=name),
        train=TrainConfig(steps=steps),
        optimizer=OptimizerConfig(learning_rate=rate, clip=float(clip)),
    )
    copy = config_from_tables(tomllib.loads(to_toml(config)), "copy")
    assert copy == config and differences(copy, config) == []


def test_differences_leave_free_settings_out():
    assert differences(Config(), Config(run=RunConfig(folder="elsewhere", threads=3))) == []
    changed = Config(run=RunConfig(seed=1), train=TrainConfig(steps=7))
    assert differences(changed, Config()) == ["run.seed: 1, not 0", "train.steps: 7, not 200"]


def test_help_names_every_setting():
    text = describe_settings()
    for section in dataclasses.fields(Config):
        for spec in dataclasses.fields(section.default_factory):
            assert f"--{section.name}.{spec.name} " in text
            assert spec.metadata["doc"] in text


def test_shipped_configs_load():
    paths = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
    assert paths
    for path in paths:
        load_config(path)
