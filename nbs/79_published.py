# %% [markdown]
# # How models are published
#
# > For each family, where its weights and settings stand in a published folder: data, and a view.
#
# A published model is a folder: weights in `safetensors` files, settings in `config.json`. Other tools read such
# folders, and the weights of the [families here](32_qwen3_moe.py) come in them. Names differ, and so does what
# is one tensor: PithTrain stacks the experts of a layer and keeps gate and up projection together; a published
# checkpoint may have three tensors for each expert.
#
# One observation makes all of this small. **Every published tensor is a view of one of ours**: a row range of
# an expert, or the stack with its axes in another order. A view can be read from and written to, so a single
# description serves both directions.

# %%
#| default_exp published

# %%
#| export
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from torch import Tensor

from pithtrain.config import (DecoderConfig, DeepseekConfig, GptOssConfig, Qwen3_5MoeConfig, Qwen3MoeConfig, UserError,
                              check_value)  # fmt: skip

# %% [markdown]
# ## Names
#
# A table gives, for each tensor of a layer, its published names. Two names: the published tensors are its
# halves, gate and up. `#`: one such tensor for each expert. No name: published models have nothing of the kind,
# so it must be zero.


# %%
#| export
TOP = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in
       {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}.items()}  # fmt: skip
SPLIT_EXPERTS = {
    "experts.gate_up": "mlp.experts.#.gate_proj.weight mlp.experts.#.up_proj.weight",
    "experts.down": "mlp.experts.#.down_proj.weight",
}


# %%
#| export
def attention_names(theirs: str, names: dict[str, str]) -> dict[str, str]:
    """Published names of the weights of an attention that is called `theirs`."""
    return {f"attention.{ours}.weight": f"{theirs}.{name}.weight" for ours, name in names.items()}


# %%
#| export
GROUPED_QUERY = {
    "attention_norm.weight": "input_layernorm.weight",
    "expert_norm.weight": "post_attention_layernorm.weight",
    **attention_names("self_attn", {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}),
}
QUERY_KEY_NORMS = attention_names("self_attn", {"query_norm": "q_norm", "key_norm": "k_norm"})

# %%
print(GROUPED_QUERY)


# %%
#| export
def qwen3_moe_names(config: Qwen3MoeConfig, layer: int) -> dict[str, str]:
    """Published names of a Qwen3-MoE layer's tensors."""
    return GROUPED_QUERY | QUERY_KEY_NORMS | SPLIT_EXPERTS | {"router.weight": "mlp.gate.weight", "router.bias": ""}


# %%
#| export
def deepseek_names(config: DeepseekConfig, layer: int) -> dict[str, str]:
    """Published names of a DeepSeek layer's tensors; V2 has no selection bias."""
    mlp = "mlp" if layer < config.dense_layers else "mlp.shared_experts"
    query = {"query_latent": "q_a_proj", "query_norm": "q_a_layernorm", "query": "q_b_proj"}
    latent = {"latent": "kv_a_proj_with_mqa", "latent_norm": "kv_a_layernorm", "expand": "kv_b_proj"}
    attention = {"output": "o_proj"} | latent | (query if config.query_rank else {"query": "q_proj"})
    return attention_names("self_attn", attention) | {
        "attention_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "mlp.gate_up.weight": f"{mlp}.gate_proj.weight {mlp}.up_proj.weight",
        "mlp.down.weight": f"{mlp}.down_proj.weight",
        "router.weight": "mlp.gate.weight",
        "router.bias": "mlp.gate.e_score_correction_bias" if config.scoring == "sigmoid" else "",
        **SPLIT_EXPERTS,
    }


# %%
#| export
def gpt_oss_names(config: GptOssConfig, layer: int) -> dict[str, str]:
    """Published names of a GPT-OSS layer's tensors, the experts' not packed."""
    biases = {
        ours.replace("weight", "bias"): theirs.replace("weight", "bias")
        for ours, theirs in GROUPED_QUERY.items()
        if "norm" not in ours
    }
    experts = {f"experts.{leaf}": f"mlp.experts.{leaf}_proj" for leaf in ("gate_up", "down")}
    experts |= {f"{ours}_bias": f"{theirs}_bias" for ours, theirs in experts.items()}
    router = {"router.weight": "mlp.router.weight", "router.score_bias": "mlp.router.bias", "router.bias": ""}
    return GROUPED_QUERY | biases | experts | router | {"attention.sinks": "self_attn.sinks"}


# %%
#| export
def qwen3_5_moe_names(config: Qwen3_5MoeConfig, layer: int) -> dict[str, str]:
    """Published names of a Qwen3.5-MoE layer's tensors; the experts are stacked."""
    shared = "mlp.shared_expert"
    names = GROUPED_QUERY | QUERY_KEY_NORMS
    if (layer + 1) % config.full_every:
        delta = {"qkv": "in_proj_qkv", "gate": "in_proj_z", "strength": "in_proj_b", "decay": "in_proj_a"}
        delta |= {"norm": "norm", "output": "out_proj"}
        names = names | attention_names("linear_attn", delta)
    return names | {
        "attention.convolution": "linear_attn.conv1d.weight",
        "attention.A_log": "linear_attn.A_log",
        "attention.dt_bias": "linear_attn.dt_bias",
        "router.weight": "mlp.gate.weight",
        "router.bias": "",
        "shared.gate_up.weight": f"{shared}.gate_proj.weight {shared}.up_proj.weight",
        "shared.down.weight": f"{shared}.down_proj.weight",
        "shared_gate.weight": "mlp.shared_expert_gate.weight",
        "experts.gate_up": "mlp.experts.gate_up_proj",
        "experts.down": "mlp.experts.down_proj",
    }


# %% [markdown]
# ## Settings
#
# Most settings only have another name. A function in each direction makes the rest, mostly positions. What a
# family takes for granted stands in `fixed`: a folder that says otherwise is another model, and is refused.

# %%
#| export
# fmt: off
SHARED_KEYS = {"vocab_size": "vocab_size", "layers": "num_hidden_layers", "hidden": "hidden_size",
               "heads": "num_attention_heads", "top_k": "num_experts_per_tok", "norm_eps": "rms_norm_eps"}
OPTIONAL_KEYS = {"tie_embeddings": "tie_word_embeddings", "init_std": "initializer_range"}
QWEN_KEYS = {"experts": "num_experts", "expert_hidden": "moe_intermediate_size"}
HEAD_KEYS = {"kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
DEEPSEEK_KEYS = {"experts": "n_routed_experts", "expert_hidden": "moe_intermediate_size",
                 "head_dim": "qk_nope_head_dim", "rope_dim": "qk_rope_head_dim", "value_dim": "v_head_dim",
                 "latent_rank": "kv_lora_rank", "dense_layers": "first_k_dense_replace",
                 "dense_hidden": "intermediate_size", "shared_experts": "n_shared_experts",
                 "routed_scale": "routed_scaling_factor"}
DELTA_KEYS = {"delta_key_heads": "linear_num_key_heads", "delta_value_heads": "linear_num_value_heads",
              "delta_key_dim": "linear_key_head_dim", "delta_value_dim": "linear_value_head_dim",
              "delta_taps": "linear_conv_kernel_dim", "shared_hidden": "shared_expert_intermediate_size"}
# fmt: on


# %%
#| export
def rope_settings(table: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    """The rotary settings of a config.json, old form or new, with `rope_type` and `rope_theta` in them."""
    rope = {"rope_type": "default", "rope_theta": table.get("rope_theta", 10_000.0)}
    given = table.get("rope_parameters") or table.get("rope_scaling") or {}
    rope |= {"rope_type" if key == "type" else key: value for key, value in given.items()}
    if rope["rope_type"] not in kinds:
        raise UserError(f"rope_type: {rope['rope_type']!r} is not known of this family, only {', '.join(kinds)}")
    return rope


# %%
#| export
def plain_positions(table: dict[str, Any]) -> dict[str, Any]:
    """Our settings of positions that are not stretched."""
    return {"rope_theta": rope_settings(table, ("default",))["rope_theta"]}


# %%
#| export
def plain_rope(config: DecoderConfig) -> dict[str, Any]:
    """The way back from `plain_positions`."""
    return {"rope_theta": config.rope_theta, "rope_scaling": None}


# %%
#| export
YARN = {
    "yarn_factor": "factor",
    "yarn_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


# %%
#| export
def yarn_positions(table: dict[str, Any]) -> dict[str, Any]:
    """Our settings of positions that YaRN may stretch."""
    rope = rope_settings(table, ("default", "yarn"))
    ours = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "yarn":
        if rope.get("attention_factor"):
            raise UserError("attention_factor: is set; here YaRN's own magnitude is used")
        ours |= {ours: rope[theirs] for ours, theirs in YARN.items() if theirs in rope}
    return ours


# %%
#| export
def yarn_rope(config: DeepseekConfig | GptOssConfig, **more: Any) -> dict[str, Any]:
    """The way back from `yarn_positions`, with the family's own settings."""
    if config.yarn_factor == 1:
        return plain_rope(config)
    yarn = {theirs: getattr(config, ours) for ours, theirs in YARN.items()}
    # Both spellings of the kind: readers of the old form know one of them, those of the new form the other.
    scaling = {"rope_type": "yarn", "type": "yarn", **yarn, **more}
    positions = round(config.yarn_factor * config.yarn_length)
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "max_position_embeddings": positions}


# %%
#| export
def deepseek_settings(table: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek's positions, groups and query rank."""
    ours, rope = yarn_positions(table), table.get("rope_parameters") or table.get("rope_scaling") or {}
    if "yarn_factor" in ours and (strength := rope.get("mscale_all_dim")):
        if not rope.get("mscale"):
            raise UserError("mscale: is not set but mscale_all_dim is; published models set both")
        ours |= {"yarn_mscale": float(rope["mscale"]), "yarn_mscale_all_dim": float(strength)}
    if table["model_type"] == "deepseek_v3" or table.get("topk_method", "greedy") != "greedy":
        ours |= {"groups": table.get("n_group") or 1, "top_groups": table.get("topk_group") or 1}
    return ours | {"query_rank": table.get("q_lora_rank") or 0}


# %%
#| export
def deepseek_table(config: DeepseekConfig) -> dict[str, Any]:
    """The way back from `deepseek_settings`. Raises UserError for what no published DeepSeek can say."""
    c, v3 = config, config.scoring == "sigmoid"
    if c.renormalise and not v3:
        raise UserError("model.renormalise: is on, and readers of DeepSeek-V2 do not renormalise")
    strengths = {"mscale": c.yarn_mscale, "mscale_all_dim": c.yarn_mscale_all_dim}
    if c.yarn_factor > 1 and (c.yarn_mscale != 1 if not c.yarn_mscale_all_dim else not c.yarn_mscale):
        raise UserError("model.yarn_mscale: readers of DeepSeek take 1 where yarn_mscale_all_dim is 0, and never 0")
    greedy = "group_limited_greedy" if c.groups > 1 else "greedy"
    return yarn_rope(c, **strengths) | {
        "topk_method": "noaux_tc" if v3 else greedy,
        "n_group": c.groups,
        "topk_group": c.top_groups,
        "q_lora_rank": c.query_rank or None,
        "num_key_value_heads": c.heads,
        "num_nextn_predict_layers": 0,
    }


# %%
#| export
def layer_types(layers: int, every: int, others: str) -> list[str]:
    """What each layer is, in the published words: of so many the last has full attention, and the others do not."""
    return [others if number % every else "full_attention" for number in range(1, layers + 1)]


# %%
#| export
def check_layer_types(table: dict[str, Any], expected: list[str]) -> None:
    """Refuse layers in another order than the family's."""
    if table.get("layer_types", expected) != expected:
        raise UserError("layer_types: are not in this family's order")


# %%
#| export
def gpt_oss_settings(table: dict[str, Any]) -> dict[str, Any]:
    """GPT-OSS's positions; its layers alternate."""
    check_layer_types(table, layer_types(table["num_hidden_layers"], 2, "sliding_attention"))
    if not (table.get("rope_parameters") or table.get("rope_scaling")):
        raise UserError("rope_scaling: is missing; published GPT-OSS models say which positions they have")
    ours = yarn_positions(table)
    if "yarn_factor" in ours and rope_settings(table, ("yarn",)).get("truncate", True):
        raise UserError("truncate: is on; GPT-OSS's YaRN does not stop at whole pairs")
    return ours


# %%
#| export
def gpt_oss_table(config: GptOssConfig) -> dict[str, Any]:
    """The way back from `gpt_oss_settings`."""
    rope = yarn_rope(config, truncate=False)
    rope["rope_scaling"] = rope["rope_scaling"] or {"rope_type": "default"}  # readers take YaRN where it is missing
    return rope | {"layer_types": layer_types(config.layers, 2, "sliding_attention")}


# %%
#| export
def qwen3_5_settings(table: dict[str, Any]) -> dict[str, Any]:
    """Qwen3.5's positions, of which some features alone are rotated, and its layers."""
    layers, kinds = table["num_hidden_layers"], table.get("layer_types")
    every = table.get("full_attention_interval", 4)
    if kinds:
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else layers + 1
    check_layer_types(table, layer_types(layers, every, "linear_attention"))
    rope = rope_settings(table, ("default",))
    share = rope.get("partial_rotary_factor", table.get("partial_rotary_factor", 0.25))
    return {"rope_theta": rope["rope_theta"], "rope_dim": round(share * table["head_dim"]), "full_every": every}


# %%
#| export
def qwen3_5_table(config: Qwen3_5MoeConfig) -> dict[str, Any]:
    """The way back from `qwen3_5_settings`."""
    share = config.rope_dim / config.head_dim
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": share}
    types = layer_types(config.layers, config.full_every, "linear_attention")
    return {"rope_parameters": rope, "layer_types": types}


# %% [markdown]
# ## The families


# %%
#| export
BESIDE = r"rotary_emb\.inv_freq$"


@dataclass(frozen=True)
class Published:
    """How one architecture is published."""

    config: type[DecoderConfig]
    model_type: str
    architecture: str
    keys: dict[str, str]  #: our setting -> its key in config.json
    fixed: dict[str, Any]  #: key -> the value it must have where it is given
    settings: Callable[[dict[str, Any]], dict[str, Any]]  #: config.json -> our settings that `keys` has not
    table: Callable[[Any], dict[str, Any]]  #: the way back
    names: Callable[[Any, int], dict[str, str]]  #: config and layer -> our tensors' published names
    ours: tuple[tuple[str, Any], ...] = ()  #: settings of ours that tell this architecture from its siblings
    beside: str = BESIDE  #: regular expression of tensors that are no part of the decoder


# %%
#| export
SILU = {"hidden_act": "silu", "attention_bias": False}
DEEPSEEK_FIXED = SILU | {"mlp_bias": False, "moe_layer_freq": 1, "rope_interleave": True}
# fmt: off
PUBLISHED = (
    Published(
        Qwen3MoeConfig, "qwen3_moe", "Qwen3MoeForCausalLM",
        SHARED_KEYS | HEAD_KEYS | QWEN_KEYS | {"renormalise": "norm_topk_prob"},
        SILU | {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False},
        plain_positions, plain_rope, qwen3_moe_names,
    ),
    Published(
        DeepseekConfig, "deepseek_v2", "DeepseekV2ForCausalLM", SHARED_KEYS | DEEPSEEK_KEYS,
        DEEPSEEK_FIXED | {"scoring_func": "softmax", "norm_topk_prob": False},
        deepseek_settings, deepseek_table, deepseek_names, (("scoring", "softmax"),),
    ),
    Published(
        DeepseekConfig, "deepseek_v3", "DeepseekV3ForCausalLM",
        SHARED_KEYS | DEEPSEEK_KEYS | {"renormalise": "norm_topk_prob"},
        DEEPSEEK_FIXED | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        deepseek_settings, deepseek_table, deepseek_names, (("scoring", "sigmoid"),),
    ),
    Published(
        GptOssConfig, "gpt_oss", "GptOssForCausalLM",
        SHARED_KEYS | HEAD_KEYS
        | {"experts": "num_local_experts", "expert_hidden": "intermediate_size", "window": "sliding_window"},
        {"hidden_act": "silu", "attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        gpt_oss_settings, gpt_oss_table, gpt_oss_names,
    ),
    Published(
        Qwen3_5MoeConfig, "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM",
        SHARED_KEYS | HEAD_KEYS | QWEN_KEYS | DELTA_KEYS, SILU | {"attn_output_gate": True},
        qwen3_5_settings, qwen3_5_table, qwen3_5_moe_names, (),
        rf"{BESIDE}|^mtp\.|^model\.visual\.",  # a second token's prediction, and images
    ),
)
# fmt: on


# %%
#| export
def published_of(config: DecoderConfig) -> Published:
    """How a model of this config is published."""
    return next(
        p for p in PUBLISHED if p.config is type(config) and all(getattr(config, k) == value for k, value in p.ours)
    )


# %%
#| export
def settings_from(table: dict[str, Any]) -> tuple[Published, dict[str, Any]]:
    """The architecture that a config.json describes, and its settings as our [model] table.

    Raises UserError that names every key which is missing or says what the family here cannot."""
    table = table | table.get("text_config", {})  # a model of several kinds: its text part, and what holds for all
    found = next((p for p in PUBLISHED if p.model_type == table.get("model_type")), None)
    if found is None:
        known = ", ".join(p.model_type for p in PUBLISHED)
        raise UserError(f"model_type: {table.get('model_type')!r} is not an architecture known here ({known})")
    if "num_local_experts" in table:  # newer spelling of the same
        table = {"num_experts": table["num_local_experts"], **table}
    problems = [f"{key}: is missing" for key in found.keys.values() if table.get(key) is None]
    problems += [
        f"{key}: {table[key]!r}, and only {value!r} is known here"
        for key, value in found.fixed.items()
        if table.get(key) not in (None, value)
    ]
    if problems:
        raise UserError("; ".join(problems))
    specs = {spec.name: spec for spec in fields(found.config)}
    given = found.keys | {ours: theirs for ours, theirs in OPTIONAL_KEYS.items() if theirs in table}
    settings = {"family": found.config.family, **dict(found.ours), "tie_embeddings": False}
    settings |= {ours: check_value(theirs, specs[ours], table[theirs]) for ours, theirs in given.items()}
    layers = range(settings["layers"], settings["layers"] + (table.get("num_nextn_predict_layers") or 0))
    beside = "|".join([found.beside, *(rf"^model\.layers\.{layer}\." for layer in layers)])  # predict further tokens
    return replace(found, beside=beside), settings | found.settings(table)


# %%
#| export
def table_from(config: DecoderConfig) -> dict[str, Any]:
    """What config.json says of this model. Raises UserError for what the architecture cannot say."""
    found = published_of(config)
    keys = {theirs: getattr(config, ours) for ours, theirs in (found.keys | OPTIONAL_KEYS).items()}
    named = {"architectures": [found.architecture], "model_type": found.model_type}
    return named | found.fixed | keys | found.table(config)


# %% [markdown]
# There and back, for every config that ships with PithTrain:

# %%
from pathlib import Path

import pithtrain
from pithtrain.config import config_from_tables, load_config

for path in sorted((Path(pithtrain.__file__).parent.parent / "configs").glob("*.toml")):
    model = load_config(path).model
    found, settings = settings_from(table_from(model))
    assert config_from_tables({"model": settings}, path.name).model == model, path
    print(f"{path.stem:20} is published as {found.architecture}")

# %% [markdown]
# ## Views
#
# GPT-OSS stores its experts transposed, and a gate's column beside its up's. Both are orders of axes, so these
# are views too; a last axis of gate and up counts as one in the published shape.


# %%
#| export
class View(NamedTuple):
    """A published tensor: its name, the elements of ours that it holds, and its shape."""

    name: str
    elements: Tensor
    shape: tuple[int, ...]


# %%
#| export
def views(config: DecoderConfig, name: str, tensor: Tensor, names: dict[str, str]) -> Iterator[View]:
    """The published tensors that our `tensor`, with the global name `name`, consists of.

    `names` changes the layer's published names, where a folder has them otherwise than the family."""
    if name in TOP:
        yield View(TOP[name], tensor, tuple(tensor.shape))
        return
    _, layer, leaf = name.split(".", 2)
    templates = (published_of(config).names(config, int(layer)) | names)[leaf].split()
    if isinstance(config, GptOssConfig) and leaf.startswith("experts.gate_up"):
        elements = tensor.unflatten(1, (2, -1)).transpose(1, -1)  # (E, [H,] D, 2)
        yield View(f"model.layers.{layer}.{templates[0]}", elements, (*elements.shape[:-2], tensor.shape[1]))
        return
    if isinstance(config, GptOssConfig) and leaf == "experts.down":
        tensor = tensor.mT
    by_expert = enumerate(tensor) if templates and "#" in templates[0] else [(0, tensor)]
    for expert, one in by_expert:
        for template, part in zip(templates, one.chunk(max(1, len(templates))), strict=False):
            place = f"model.layers.{layer}.{template.replace('#', str(expert))}"
            yield View(place, part, tuple(part.shape))


# %% [markdown]
# What two tensors of small models are when published:

# %%
import torch

small = Qwen3MoeConfig(experts=2, hidden=6, expert_hidden=4)
for view in views(small, "layers.0.experts.gate_up", torch.arange(2 * 8 * 6.0).view(2, 8, 6), {}):
    print(f"{view.name:52} {view.shape}  first elements {view.elements.flatten()[:3].tolist()}")
small = GptOssConfig(experts=2, hidden=8, expert_hidden=8)
(view,) = views(small, "layers.0.experts.gate_up", torch.arange(2 * 16 * 8.0).view(2, 16, 8), {})
print(f"{view.name:52} {view.shape}  first elements {view.elements.flatten()[:3].tolist()}")

# %% [markdown]
# ## How many tensors?
#
# The same models, counted as tensors. A checkpoint with a tensor for each expert has hundreds of times as many
# names as one that stacks them.

# %%
import matplotlib.pyplot as plt

from pithtrain.models.build import build

counts = {}
for name in ("deepseek-v2-lite", "deepseek-v3", "gpt-oss-20b", "qwen3.5-35b-a3b"):
    model = load_config(Path(pithtrain.__file__).parent.parent / "configs" / f"{name}.toml").model
    with torch.device("meta"):
        tensors = build(model).state_dict()
    counts[name] = (len(tensors), sum(1 for n, t in tensors.items() for _ in views(model, n, t, {})))
fig, ax = plt.subplots(figsize=(7, 2.6))
ax.barh([i + 0.2 for i in range(4)], [ours for ours, _ in counts.values()], 0.38, label="here")
ax.barh([i - 0.2 for i in range(4)], [theirs for _, theirs in counts.values()], 0.38, label="as published")
ax.set(title="Tensors of a checkpoint", xlabel="tensors", xscale="log", xlim=(100, 1e5))
ax.set_yticks(range(4), list(counts))
ax.legend(fontsize=8)
fig

# %% [markdown]
# Next: the folders themselves, [in and out](80_hub.py).
