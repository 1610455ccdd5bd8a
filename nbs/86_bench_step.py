# %% [markdown]
# # Benchmark: a training step beside transformers
#
# > Tokens per second of our training step and of a plain loop over the transformers model, in one run.
#
# A speed means little alone: machines differ, and the same machine differs from hour to hour. So all
# contenders train in the same process, on the same batches, with AdamW and the same threads, and what
# is reported beside the speeds is their *ratio*.
#
# The peer is what one would write without PithTrain: the model of `transformers`, `cross_entropy`, `clip_grad_norm_`,
# fused AdamW. Of its implementations of experts two take part: `eager`, a loop over experts, and `grouped_mm`.

# %%
#| default_exp bench_step

# %%
#| export
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pithtrain.bench import cpu_name
from pithtrain.config import Config, DecoderConfig, MeshConfig, Qwen3MoeConfig
from pithtrain.models.build import build
from pithtrain.models.decoder import count_parameters
from pithtrain.parallel.mesh import Mesh, fit_axes
from pithtrain.published import table_from
from pithtrain.train.step import Learner, Microbatch
from pithtrain.train.trainer import choose_compute

# %% [markdown]
# ## The peer
#
# [What a published folder says of a model](79_published.py) is what transformers builds it from.


# %%
#| export
def transformers_twin(config: DecoderConfig, experts_implementation: str) -> nn.Module:
    """transformers' model of this config, on the default device and in the default dtype, with weights of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    table = table_from(config) | {"use_cache": False}
    attention = "eager" if config.family == "gpt-oss" else "sdpa"  # which has no sinks there
    kinds = {"attn_implementation": attention, "experts_implementation": experts_implementation}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**table), **kinds)


# %%
small = Qwen3MoeConfig(hidden=64, heads=4, head_dim=16, experts=8, expert_hidden=64, vocab_size=512, layers=2)
total, active = count_parameters(build(small), small.experts, small.top_k)
assert total == sum(p.numel() for p in transformers_twin(small, "eager").parameters())
print(f"{total:,} parameters in both, of which a token uses {active:,}")


# %% [markdown]
# ## The contenders
#
# Each is a function that takes a step on token ids. Ours keeps its weights in float32 and computes in what the config
# asks for; on a GPU that is bf16. There the peer has weights, gradients and AdamW's averages in bf16, as its users do:
# that moves fewer bytes than ours.

# %%
#| export
Step = Callable[[Tensor], float]
"""Token ids (B, S + 1) int64 to the loss, after one step on them."""


def our_step(config: Config) -> Step:
    """Our step, with the batch as one microbatch."""
    device, dtype = choose_compute(config.run)
    train = replace(config.train, micro_batch_size=config.train.batch_size)
    learner = Learner(replace(config, train=train), Mesh(fit_axes(MeshConfig(), 1), device=device), dtype)
    positions = torch.arange(train.sequence_length, device=device)

    def step(ids: Tensor) -> float:
        batch = Microbatch(ids[:, :-1], ids[:, 1:].contiguous(), positions)
        return learner.step([batch], config.optimizer.learning_rate).loss

    return step


def transformers_step(config: Config, experts_implementation: str) -> Step:
    """A plain loop's step over the transformers model."""
    device, dtype = choose_compute(config.run)
    with device:
        twin = transformers_twin(config.model, experts_implementation).to(dtype)
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        twin.parameters(), o.learning_rate, (o.beta1, o.beta2), o.eps, o.weight_decay, fused=True
    )

    def step(ids: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = twin(input_ids=ids[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), config.optimizer.clip)
        optimizer.step()
        return loss.item()

    return step


# %% [markdown]
# ## Where the time goes
#
# On a CPU by the operator that took it, on a GPU by the kernel: its name tells what it is for.


# %%
#| export
KINDS = {
    "attention": "flash fmha scaled_dot_product sdpa",
    "our experts' kernels": "up_kernel product_kernel activation_gradient weight_gradient "
    "combine_kernel dispatch_kernel",
    "matrix products": "aten::mm aten::addmm aten::bmm aten::_grouped_mm gemm nvjet cutlass xmma",
    "optimiser": "adam",
    "loss": "linearcrossentropy cross_entropy_kernel logsumexp log_softmax cunn_softmax nll_loss",
    "norms of features": "rmsnorm layer_norm gammabeta",
    "copies and casts": "copy memcpy",
}


def by_kind(spent: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each kind of work, from those of operators or kernels."""
    kinds = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for key, ms in spent.items():
        name = key.lower()
        kinds[next((k for k, words in KINDS.items() if any(w in name for w in words.split())), "everything else")] += ms
    return kinds


def step_profile(step: Step, ids: Tensor) -> dict[str, dict[str, float]]:
    """Milliseconds of one step's device time, by kind of work and for the longest operators or kernels."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says when it starts and ends otherwise
    cuda = ids.is_cuda
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorder:
        step(ids)
    spent = {
        e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3 for e in recorder.key_averages()
    }
    longest = sorted(spent, key=spent.__getitem__, reverse=True)[:25]
    return {"kinds": by_kind(spent), "longest": {key: spent[key] for key in longest}}


# %% [markdown]
# ## FLOPs
#
# Of a model, not of a machine: what a step must multiply, whatever is computed twice. Each parameter of a product takes
# part in one multiply-add of a token forward and two backward, 6 FLOPs; in each layer, causal attention over $S$
# positions adds $6 S$ for each feature of all heads (counted here for Qwen3-MoE alone, so that other models' figures
# are too low); the embedding is looked up and costs none. Divided by time and by what the device can do, this is the
# *model FLOPs utilisation* (Chowdhery and others, arXiv 2204.02311).


# %%
#| export
def flops_per_token(config: Config) -> float:
    """Model FLOPs of a training step for each token; attention's own products are counted for Qwen3-MoE alone."""
    c = config.model
    with torch.device("meta"):
        model = build(c)
    _, active = count_parameters(model, c.experts, c.top_k)
    looked_up = 0 if c.tie_embeddings else model.embedding.weight.numel()
    attended = c.layers * c.heads * c.head_dim if isinstance(c, Qwen3MoeConfig) else 0
    return 6 * (active - looked_up + attended * config.train.sequence_length)


# %%
config = Config(model=small)
print(f"{flops_per_token(config) / 1e6:.2f} MFLOP for each token, in sequences of {config.train.sequence_length}")

# %% [markdown]
# ## Taking turns
#
# On a CPU contenders take turns, so that all see the same disturbances. A GPU's memory often holds only one of
# them: they run one after the other.


# %%
#| export
def bench_step(config: Config, rounds: int) -> dict[str, Any]:
    """Times of one training step: ours, and that of transformers with two of its implementations of experts.

    Every contender takes `rounds` timed steps after two that warm up. The batch is one microbatch of random tokens.
    The result is ready for JSON."""
    device, dtype = choose_compute(config.run)
    cuda = device.type == "cuda"
    makers: dict[str, Callable[[], Step]] = {"pithtrain": lambda: our_step(config)}
    for peer in ("eager", "grouped_mm"):
        makers[f"transformers, {peer}"] = lambda peer=peer: transformers_step(config, peer)
    generator = torch.Generator().manual_seed(0)
    shape = (rounds + 2, config.train.batch_size, config.train.sequence_length + 1)
    batches = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    losses, profiles, peaks = {}, {}, {}
    together = [[name] for name in makers] if cuda else [list(makers)]  # a GPU holds one of them
    for names in together:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        steps = {name: makers[name]() for name in names}
        for ids in tqdm(batches, desc="steps", leave=False):
            for name, step in steps.items():
                start = time.perf_counter()
                loss = step(ids)  # a number: the device is done
                seconds[name].append(time.perf_counter() - start)
                losses.setdefault(name, loss)
        for name, step in steps.items():
            profiles[name] = step_profile(step, batches[0])
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        del steps, step
        gc.collect()
        torch.cuda.empty_cache()
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    tokens = config.train.batch_size * config.train.sequence_length
    fastest = min((name for name in medians if name != "pithtrain"), key=medians.__getitem__)
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "model": {"layers": config.model.layers, "hidden": config.model.hidden, "experts": config.model.experts},
        "sequence_length": config.train.sequence_length,
        "tokens_per_step": tokens,
        "rounds": rounds,
        "median_seconds": medians,
        "tokens_per_second": {name: tokens / value for name, value in medians.items()},
        "tflops": {name: tokens * flops_per_token(config) / value / 1e12 for name, value in medians.items()},
        "peak_gib": peaks,
        "first_loss": losses,
        "fastest_peer": fastest,
        "ratio": medians[fastest] / medians["pithtrain"],
        "profiles": profiles,
    }


# %%
#| export
def describe_bench_step(result: dict[str, Any]) -> str:
    """The result of `bench_step` as a table."""
    lines = [
        f"{result['device']}, {result['threads']} thread(s), {result['dtype']}, torch {result['torch']}, "
        f"transformers {result['transformers']}; medians of {result['rounds']} steps",
        ", ".join(f"{key} {size}" for key, size in result["model"].items())
        + f"; {result['tokens_per_step']} tokens a step in sequences of {result['sequence_length']}",
    ]
    for name, speed in result["tokens_per_second"].items():
        peak = result["peak_gib"][name]
        lines.append(
            f"{name:<28}{speed:>10,.0f} tokens/s{1e3 * result['median_seconds'][name]:>9,.1f} ms a step"
            f"{result['tflops'][name]:>9.3g} model TFLOP/s" + (f"{peak:>7.1f} GiB" if peak else "")
        )
    lines.append(f"pithtrain is {result['ratio']:.2f} times as fast as {result['fastest_peer']}")
    kinds = result["profiles"]["pithtrain"]["kinds"]
    shares = ", ".join(f"{kind} {100 * ms / sum(kinds.values()):.0f} %" for kind, ms in kinds.items() if ms)
    return "\n".join([*lines, f"where our step's time goes: {shares}"])


# %% [markdown]
# At a size that runs in seconds here (`pithtrain bench step configs/tiny.toml` measures the real one):

# %%
from pithtrain.config import BalanceConfig, RunConfig, TrainConfig

config = Config(
    run=RunConfig(device="cpu"),
    model=small,
    balance=BalanceConfig(global_batch=0.0),
    train=TrainConfig(batch_size=4, micro_batch_size=4, sequence_length=64),
)
result = bench_step(config, rounds=5)
print(describe_bench_step(result))
first = list(result["first_loss"].values())
assert max(first) - min(first) < 0.1  # untrained, all are equally wrong

# %%
import matplotlib.pyplot as plt

kinds = {kind: ms for kind, ms in result["profiles"]["pithtrain"]["kinds"].items() if ms}
fig, ax = plt.subplots(figsize=(6, 2.2))
ax.barh(list(kinds), list(kinds.values()))
ax.set(title="Where a training step's time goes", xlabel="milliseconds")
fig

# %% [markdown]
# At this size most of a step is the overhead of Python and of small operators, which "everything else" holds.
#
# ## On a GPU
#
# Four layers of [Qwen3-30B-A3B](https://arxiv.org/abs/2505.09388), on an H200; with float32 weights, gradients and
# averages they fit a GPU of 80 GB. To measure it anew: `pithtrain bench step configs/qwen3-30b-a3b.toml
# --model.layers 4 --train.batch_size 4 --train.micro_batch_size 4 --json FILE`.

# %%
import json
from pathlib import Path

import pithtrain
from pithtrain.config import load_config

file = Path(pithtrain.__file__).parent.parent / "docs" / "benchmarks" / "step-h200.json"
if file.exists():
    measured = json.loads(file.read_text())
    print(describe_bench_step(measured))
    peak = 989  # TFLOP/s of an H200's bf16 products (NVIDIA's data sheet)
    print(f"{measured['date']}; of {peak} TFLOP/s: {measured['tflops']['pithtrain'] / peak:.0%}")
    for kernel, ms in measured["profiles"]["pithtrain"]["longest"].items():
        print(f"{ms:9.1f} ms  {kernel[:100]}")

# %% [markdown]
# Attention is cuDNN's here: FlashAttention-4 was not installed. The longest kernel is the optimiser's. Such a model has
# far more parameters than any one token uses, and [AdamW](18_adamw_kernel.py) touches them all: it reads the weight,
# the gradient and two averages, and writes three of them back. The gradient's norm, which [clipping](43_sharding.py)
# asks for, reads it once more. What that is at an H200's 4.8 TB/s (NVIDIA's data sheet), beside what it took:

# %%
if file.exists():
    config = load_config(file.parents[2] / "configs" / "qwen3-30b-a3b.toml", [("model.layers", "4")]).model
    with torch.device("meta"):
        total, _ = count_parameters(build(config), config.experts, config.top_k)
    print(f"{total / 1e9:.2f} billion parameters")
    longest = measured["profiles"]["pithtrain"]["longest"]
    for what, word, size in (("AdamW", "adamw_kernel", 7 * 4), ("norm of the gradients", "LpNorm", 4)):
        ms = next(ms for kernel, ms in longest.items() if word in kernel)
        print(
            f"{what:22} {size * total / 1e9:5.1f} GB: {size * total / 4.8e9:4.1f} ms at full speed, {ms:4.1f} measured"
        )

# %% [markdown]
# AdamW runs at nearly nine tenths of the data sheet's speed; even at all of it, it would be an eighth of this step. Its
# share falls with more tokens in a step, and with ranks that share the weights. All kernels by kind:

# %%
if file.exists():
    kinds = measured["profiles"]["pithtrain"]["kinds"]
    for kind, ms in kinds.items():
        print(f"{kind:24}{ms:6.1f} ms, {ms / sum(kinds.values()):5.1%}")

# %% [markdown]
# Beside our experts' kernels, the other matrix products, attention and AdamW no kind takes a tenth of the step. The
# feature norms run as torch's kernels, forward and backward; kernels of our own would save less than the 4 % that they
# take, and were not written.
