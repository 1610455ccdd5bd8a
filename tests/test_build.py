"""The published configs: every parameter that transformers counts, and the published totals and active parts."""

from pathlib import Path

import pytest
import torch

from pithtrain.config import DecoderConfig, load_config
from pithtrain.models.build import build
from pithtrain.models.decoder import count_parameters
from pithtrain.published import table_from

CONFIGS = Path(__file__).parent.parent / "configs"
# Billions in all and used by a token, and the places that are published. The active part leaves the embedding out
# where the authors do. What the authors cut, not rounded, is here one digit longer: 3.35 is published as 3.3, 2.45 as
# 2.4. Qwen3.5: the text model alone; the names count a vision encoder of 0.45 and round (35, 397) or cut (122, 3).
PUBLISHED = {
    "qwen3-30b-a3b": (30.5, 1, 3.35, 2, True),
    "qwen3-235b-a22b": (235, 0, 22, 0, True),
    "deepseek-v2-lite": (15.7, 1, 2.45, 2, False),
    "deepseek-v2": (236, 0, 21, 0, False),
    "deepseek-v3": (671, 0, 37, 0, False),
    "gpt-oss-20b": (20.91, 2, 3.61, 2, False),
    "gpt-oss-120b": (116.83, 2, 5.13, 2, False),
    "qwen3.5-35b-a3b": (34.7, 1, 3, 0, True),
    "qwen3.5-122b-a10b": (122, 0, 10, 0, True),
    "qwen3.5-397b-a17b": (396.3, 1, 17, 0, True),
}


def test_every_published_config_is_here():
    assert PUBLISHED.keys() == {path.stem for path in CONFIGS.glob("*.toml")} - {"tiny"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_and_active_parts_are_the_published_ones(name):
    total, places, active, active_places, with_embedding = PUBLISHED[name]
    config = load_config(CONFIGS / f"{name}.toml").model
    with torch.device("meta"):
        model = build(config)
    ours, used = count_parameters(model, config.experts, config.top_k)
    used -= 0 if with_embedding else model.embedding.weight.numel()
    assert round(ours / 1e9, places) == total
    assert round(used / 1e9, active_places) == active


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_those_of_transformers(name):
    """To the last one, with the config.json that an export would write."""
    hf = pytest.importorskip("transformers")
    config = load_config(CONFIGS / f"{name}.toml").model
    table = table_from(config)
    with torch.device("meta"):
        theirs = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(table.pop("model_type"), **table))
        ours = build(config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_config_of_no_family_is_refused():
    with pytest.raises(TypeError, match="DecoderConfig is the config of no family"):
        build(DecoderConfig())
