# %% [markdown]
# # From a config to a model
#
# > The type of the model's config says which family it is; this is the one place that looks at it.

# %%
#| default_exp models.build

# %%
#| export
from pithtrain.config import DecoderConfig, DeepseekConfig, GptOssConfig, Qwen3_5MoeConfig, Qwen3MoeConfig
from pithtrain.models.decoder import Decoder
from pithtrain.models.deepseek import deepseek
from pithtrain.models.gpt_oss import gpt_oss
from pithtrain.models.qwen3_5_moe import qwen3_5_moe
from pithtrain.models.qwen3_moe import qwen3_moe
from pithtrain.models.stages import Place


# %%
#| export
def build(config: DecoderConfig, place: Place = Place()) -> Decoder:
    """The model that `config` describes, or the part of it that `place` asks for; weights not yet drawn."""
    match config:
        case Qwen3MoeConfig():
            return qwen3_moe(config, place)
        case DeepseekConfig():
            return deepseek(config, place)
        case GptOssConfig():
            return gpt_oss(config, place)
        case Qwen3_5MoeConfig():
            return qwen3_5_moe(config, place)
    raise TypeError(f"{type(config).__name__} is the config of no family")


# %%
import torch

with torch.device("meta"):  # shapes without memory
    model = build(Qwen3MoeConfig())
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, none of them in memory")

# %% [markdown]
# ## The published models
#
# On the meta device, where tensors have shapes and no memory, even the largest is made in a moment. So the two
# numbers that a Mixture-of-Experts is named by, all of its parameters and those that one token uses, can be counted.
# The counts are ours; beside them stands what the authors say.
#
# Authors count in two ways. A token uses one row of the embedding: some count all of that matrix as used, some none
# (the matrix of the output head is always counted, since every score needs all of it). And some round, others cut:
# Qwen3's 3.35 and DeepSeek-V2-Lite's 2.45 are published as 3.3 and 2.4. Qwen3.5's names count the vision encoder in
# front of the text model, 0.45 to 0.46 billion parameters, which is no part of the model here; it is added to the
# count, as `transformers` has it.

# %%
from pathlib import Path

import pithtrain
from pithtrain.config import load_config
from pithtrain.models.decoder import count_parameters

QWEN3, QWEN3_5 = "arXiv 2505.09388 and model cards", "the model's name"
SOURCES = {  # total, active, does active count the embedding?, source
    "qwen3-30b-a3b": ("30.5", "3.3", True, QWEN3),
    "qwen3-235b-a22b": ("235", "22", True, QWEN3),
    "deepseek-v2-lite": ("15.7", "2.4", False, "arXiv 2405.04434, appendix B"),
    "deepseek-v2": ("236", "21", False, "arXiv 2405.04434"),
    "deepseek-v3": ("671", "37", False, "arXiv 2412.19437"),
    "gpt-oss-20b": ("20.91", "3.61", False, "arXiv 2508.10925, table 1"),
    "gpt-oss-120b": ("116.83", "5.13", False, "arXiv 2508.10925, table 1"),
    "qwen3.5-35b-a3b": ("35", "3", True, QWEN3_5),
    "qwen3.5-122b-a10b": ("122", "10", True, QWEN3_5),
    "qwen3.5-397b-a17b": ("397", "17", True, QWEN3_5),
}
configs = Path(pithtrain.__file__).parent.parent / "configs"
assert SOURCES.keys() == {path.stem for path in configs.glob("*.toml")} - {"tiny"}


def vision_encoder(hidden):
    """Parameters of the vision encoder that stands in front of a Qwen3.5 model of this width."""
    from transformers import Qwen3_5MoeVisionConfig, Qwen3_5MoeVisionModel

    with torch.device("meta"):
        encoder = Qwen3_5MoeVisionModel(Qwen3_5MoeVisionConfig(out_hidden_size=hidden))
    return sum(p.numel() for p in encoder.parameters())


def says(count, published):
    """Whether `published`, in billions, is `count` rounded or cut to as many digits."""
    unit = 10 ** -len(published.partition(".")[2])
    return any(abs(way(count / 1e9 / unit) * unit - float(published)) < unit / 2 for way in (round, int))


counts = {}
print(f"{'billions of parameters':22}{'all':>9}{'active':>8}   {'published':16}source")
for name, (all_of_them, used, with_embedding, source) in SOURCES.items():
    shape = load_config(configs / f"{name}.toml").model
    with torch.device("meta"):
        whole = build(shape)
    total, active = count_parameters(whole, shape.experts, shape.top_k)
    active -= 0 if with_embedding else whole.embedding.weight.numel()
    total += vision_encoder(shape.hidden) if source == QWEN3_5 else 0
    counts[name] = (total / 1e9, active / 1e9)
    print(f"{name:22}{total / 1e9:9.2f}{active / 1e9:8.2f}   {f'{all_of_them}, {used}':16}{source}")
    assert says(total, all_of_them) and says(active, used), name

# %% [markdown]
# Drawn: to the right, how much a model can hold; upwards, how much a token costs. A line joins what would use the same
# share of itself: the smallest use more than a tenth, the largest one in twenty.

# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(7.5, 4))
for share in (0.02, 0.05, 0.1, 0.2):
    ax.plot([2 / share, 45 / share], [2, 45], color="0.85", lw=1, zorder=0)
    ax.text(50 / share, 50, f"{share:.0%}", color="0.5", fontsize=8, ha="center", va="center")
for colour, family in enumerate(("qwen3-", "deepseek", "gpt-oss", "qwen3.5")):
    ax.plot(*zip(*(counts[name] for name in counts if name.startswith(family)), strict=True), "o", color=f"C{colour}")
shifts = {"qwen3-30b-a3b": (0, -11), "qwen3.5-35b-a3b": (4, 3), "qwen3-235b-a22b": (-85, 4), "gpt-oss-20b": (-30, 6)}
for name, point in counts.items():
    ax.annotate(name, point, shifts.get(name, (6, -3)), textcoords="offset points", fontsize=8)
ax.set(title="Published models", xlabel="parameters, billions", ylabel="used by a token, billions")
ax.set(xscale="log", yscale="log", xlim=(9, 3500), ylim=(1.8, 62))
ax.set_xticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1,000"])
ax.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
ax.minorticks_off()
fig

# %% [markdown]
# Next: text for it to read: the [corpus](60_corpus.py).
