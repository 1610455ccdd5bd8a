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
print(model)

# %% [markdown]
# Next: text for it to read: the [corpus](60_corpus.py).
