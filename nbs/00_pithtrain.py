# %% [markdown]
# # PithTrain
#
# > A compact training system for Mixture-of-Experts language models, written as literate notebooks.
#
# A Mixture-of-Experts (MoE) model replaces the MLP of each transformer layer by many, of which a token
# visits a few. That is how the largest language models are built today; and what it takes to train one
# well (routing, balance, kernels, parallelism, pipelining, checkpoints) is usually spread over a hundred
# thousand lines. PithTrain says all of it in a few notebooks that run as they stand. The package that
# trains is exported from them, line by line.

# %%
#| default_exp __init__

# %% [markdown]
# ## The idea in one cell
#
# Everything else in these notebooks makes this loop true at scale.

# %%
import torch

torch.manual_seed(0)
token = torch.randn(16)  # one token's vector
router = torch.randn(8, 16)  # a row for each of eight experts
experts = [torch.nn.Linear(16, 16) for _ in range(8)]

share = torch.softmax(router @ token, dim=0)
weights, chosen = share.topk(2)  # only two experts do any work
output = sum(w / weights.sum() * experts[e](token) for w, e in zip(weights, chosen.tolist(), strict=True))
print("experts", chosen.tolist(), "with weights", [round(float(w), 2) for w in weights / weights.sum()])

# %% [markdown]
# ## Reading order
#
# | notebooks | what they build |
# |---|---|
# | [01 config](01_config.py), [02 traceback](02_traceback.py) | a run as one value; from an error to its notebook |
# | 10 to 19 | Triton kernels, each beside its PyTorch reference: [sort](11_sort.py), [expert MLP](12_expert_mlp.py), [router](13_router_kernel.py), [cross-entropy](14_cross_entropy.py) |
# | [20 router](20_router.py), [21 balance](21_balance.py), [22 experts](22_experts.py) | the Mixture-of-Experts itself |
# | [23 linear](23_linear.py), [24 norm](24_norm.py), [25 rotary](25_rotary.py), [26 attention](26_attention.py), [27 loss](27_loss.py) | the rest of a layer, and what judges it |
# | [30 stages](30_stages.py), [31 Qwen3-MoE](31_qwen3_moe.py) | a layer in five stages, a model in one file |
# | 50 to 57 | pipeline [schedules](50_schedule.py) as data: generated, simulated, validated, [drawn](55_draw.py), [run](57_engine.py) |
# | [60 corpus](60_corpus.py), [61 tokenizer](61_tokenizer.py), [62 shards](62_shards.py), [63 batches](63_batches.py), [64 baselines](64_baselines.py) | text to tokens to batches, and what a model must beat |
# | [65 optimizer](65_optimizer.py), [66 checkpoint](66_checkpoint.py), [67 metrics](67_metrics.py), [68 figures](68_figures.py), [69 run](69_run.py), [70 generate](70_generate.py), [71 trainer](71_trainer.py) | training |
# | [85](85_bench.py), [86 benchmarks](86_bench_step.py), [90 command line](90_cli.py) | measuring, and using it |
#
# Start with the [router](20_router.py) if you came to learn, with the [command line](90_cli.py) if you
# came to train.
#
# ## The package's own module
#
# Importing `pithtrain` does two things: it names its version, and it makes uncaught errors
# [point to their notebook](02_traceback.py).

# %%
#| export
from pithtrain.traceback import name_notebooks_in_tracebacks

# %%
#| export
__version__ = "0.1.0"

name_notebooks_in_tracebacks()
