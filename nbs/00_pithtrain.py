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
# - **Start**: a run as one value, [config](01_config.py); from an error to its notebook,
#   [traceback](02_traceback.py).
# - **Kernels** in Triton, each beside its PyTorch reference: [Triton here](10_triton.py), [sort](11_sort.py),
#   [expert MLP](12_expert_mlp.py), [router](13_router_kernel.py), [cross-entropy](14_cross_entropy.py),
#   [pieces of attention](15_attention_pieces.py), [dispatch](16_dispatch_kernel.py),
#   [rotation](17_rotary_kernel.py), [AdamW](18_adamw_kernel.py).
# - **Layers**: the Mixture-of-Experts itself, [router](20_router.py), [balance](21_balance.py) and
#   [experts](22_experts.py); and the rest of a layer, [linear](23_linear.py), [norm](24_norm.py),
#   [MLP](23a_mlp.py), [rotary](25_rotary.py), [attention](26_attention.py), [loss](27_loss.py); and what some
#   families have of their own: [clamped experts](22a_clamped_experts.py),
#   [latent attention](28_latent_attention.py), the [delta rule](29_delta_rule.py).
# - **Models**: a layer in [five stages](30_stages.py), the [decoder](31_decoder.py) around such layers, and the
#   families, [Qwen3-MoE](32_qwen3_moe.py), [DeepSeek](33_deepseek.py), [GPT-OSS](34_gpt_oss.py) and
#   [Qwen3.5-MoE](35_qwen3_5_moe.py), one file each; [from a config to a model](36_build.py).
# - **Parallel**: the [mesh](40_mesh.py), [expert](41_expert_parallel.py) and
#   [context](42_ring_attention.py) parallelism, [sharding](43_sharding.py), how ranks are
#   [launched](44_launch.py) and [end together](45_watch.py).
# - **Pipeline**: [schedules](50_schedule.py) as data, [generated](51_generate.py), [simulated](52_simulate.py),
#   [lowered](53_lower.py), [validated](54_validate.py), [drawn](55_draw.py), [described](56_describe.py),
#   [cut in pieces](56a_pieces.py), [run](57_engine.py), [overlapped](57a_overlap.py) and [fitted](58_fit.py) to what
#   was measured.
# - **Text**: [corpus](60_corpus.py), [tokenizer](61_tokenizer.py), [shards](62_shards.py),
#   [batches](63_batches.py), and the [baselines](64_baselines.py) a model must beat.
# - **Training**: [optimizer](65_optimizer.py), [checkpoint](66_checkpoint.py), [metrics](67_metrics.py),
#   [figures](68_figures.py), [run](69_run.py), [generate](70_generate.py), the [step](71_step.py) and the
#   [trainer](72_trainer.py).
# - **Tools**: [published models](79_published.py), [in and out](80_hub.py); benchmarks of a
#   [block](85_bench.py) and of a [step](86_bench_step.py); many ranks [verified](87_verify.py) against one, one
#   rank [rehearsed](88_rehearse.py) without the others; the [command line](90_cli.py).
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
