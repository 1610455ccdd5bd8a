# %% [markdown]
# # Benchmark: a training step beside transformers
#
# > Tokens per second of our training step and of a plain loop over the transformers model, in one run.
#
# A speed means little alone: machines differ, and the same machine differs from hour to hour. So both
# models train in the same process, on the same batches, from the same weights, with the same optimiser
# and the same threads, taking turns step by step, and what is reported is the *ratio* of the medians.
#
# The peer is what one would write without PithTrain: `Qwen3MoeForCausalLM` of `transformers`, its loss,
# `clip_grad_norm_`, fused AdamW. It has several implementations of its experts; each takes part.

# %%
#| default_exp bench_step

# %%
#| export
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from pithtrain.config import Config, MeshConfig
from pithtrain.models.decoder import Decoder
from pithtrain.parallel.mesh import Mesh, fit_axes
from pithtrain.train.optimizer import make_optimizer
from pithtrain.train.step import Learner, Microbatch

# %% [markdown]
# ## The same weights
#
# Only then are the two doing the same work: routing depends on the weights, and so do the sizes of the
# experts' products.


# %%
#| export
def transformers_twin(model: Decoder, experts_implementation: str) -> nn.Module:
    """transformers' Qwen3-MoE with the config and the weights of `model`, in fp32."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    c = model.config
    twin_config = Qwen3MoeConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        num_experts=c.experts,
        num_experts_per_tok=c.top_k,
        moe_intermediate_size=c.expert_hidden,
        norm_topk_prob=c.renormalise,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation=experts_implementation,
    )
    twin = Qwen3MoeForCausalLM(twin_config)
    renamed = (
        ("embedding.", "model.embed_tokens."),
        ("head.", "lm_head."),
        ("attention_norm.", "input_layernorm."),
        ("expert_norm.", "post_attention_layernorm."),
        ("attention.query_norm.", "self_attn.q_norm."),
        ("attention.key_norm.", "self_attn.k_norm."),
        ("attention.query.", "self_attn.q_proj."),
        ("attention.key.", "self_attn.k_proj."),
        ("attention.value.", "self_attn.v_proj."),
        ("attention.output.", "self_attn.o_proj."),
        ("router.", "mlp.gate."),
        ("experts.gate_up", "mlp.experts.gate_up_proj"),
        ("experts.down", "mlp.experts.down_proj"),
    )
    weights = {}
    for name, parameter in model.named_parameters():
        for ours, theirs in renamed:
            if ours in name:
                name = name.replace(ours, theirs, 1)
                break
        weights[name if name.startswith(("model.", "lm_head.")) else f"model.{name}"] = parameter.detach()
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights do not match transformers' names: missing {missing}, unexpected {unexpected}")
    return twin


# %%
from pithtrain.config import Qwen3MoeConfig
from pithtrain.models.build import build
from pithtrain.models.decoder import initialise

small = Qwen3MoeConfig(hidden=64, heads=4, head_dim=16, experts=8, expert_hidden=64, vocab_size=512, layers=2)
model = build(small)
initialise(model, seed=0)
ids = torch.randint(512, (2, 32))
twin = transformers_twin(model, "eager")
with torch.no_grad():
    print(
        "largest difference of logits:",
        (twin(ids).logits - model.logits(model(ids, torch.arange(ids.shape[1]))[0])).abs().max().item(),
    )

# %% [markdown]
# ## Where the time goes


# %%
#| export
def one_microbatch(config: Config) -> Learner:
    """A learner, alone in fp32, that takes the batch of a step as one microbatch."""
    train = replace(config.train, micro_batch_size=config.train.batch_size)
    return Learner(replace(config, train=train), Mesh(fit_axes(MeshConfig(), 1)))


# %%
#| export
def whole_batch(ids: Tensor) -> Microbatch:
    """All sequences of a step, (B, S + 1) token ids, as one microbatch."""
    return Microbatch(ids[:, :-1], ids[:, 1:].contiguous(), torch.arange(ids.shape[1] - 1))


# %%
#| export
def step_profile(config: Config) -> dict[str, float]:
    """Shares of one training step's CPU time, by kind of work."""
    from torch.profiler import ProfilerActivity, profile

    learner = one_microbatch(config)
    shape = (config.train.batch_size, config.train.sequence_length + 1)
    ids = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        recorder = profile(activities=[ProfilerActivity.CPU])
        with recorder:
            learner.step([whole_batch(ids)], 1e-3)
    kinds = {
        "aten::mm": "matrix products",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
        "aten::_fused_adamw_": "optimiser",
        "aten::exp": "softmax of the loss",
        "aten::exp_": "softmax of the loss",
        "aten::logsumexp": "softmax of the loss",
    }
    shares = dict.fromkeys([*kinds.values(), "everything else"], 0.0)
    events = recorder.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    for event in events:
        shares[kinds.get(event.key, "everything else")] += event.self_cpu_time_total / total
    return shares


# %% [markdown]
# ## Taking turns


# %%
#| export
def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, config: Config) -> float:
    """The step of a plain training loop over a transformers model; the loss."""
    optimizer.zero_grad(set_to_none=True)
    logits = model(input_ids=ids[:, :-1]).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
    optimizer.step()
    return loss.item()


# %%
#| export
def bench_step(config: Config, rounds: int, peers: tuple[str, ...] = ("eager", "grouped_mm")) -> dict[str, Any]:
    """Times of one fp32 CPU training step: ours, and transformers' with each experts implementation of `peers`.

    Every contender takes `rounds` timed steps, in turns, after two that warm up. The batch is one microbatch
    of random tokens, without balance losses. The result is ready for JSON.
    """
    learner = one_microbatch(config)
    model = learner.parts[0]
    twins = {f"transformers, {name}": transformers_twin(model, name) for name in peers}
    rate = config.optimizer.learning_rate
    steppers: dict[str, Callable[[Tensor], float]] = {}
    steppers["pithtrain"] = lambda ids: learner.step([whole_batch(ids)], rate).loss
    for name, twin in twins.items():
        twin_optimizer = make_optimizer(dict(twin.named_parameters()), config.optimizer)
        steppers[name] = lambda ids, t=twin, o=twin_optimizer: plain_step(t, o, ids, config)
    shape = (config.train.batch_size, config.train.sequence_length + 1)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    losses: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(rounds + 2):
        ids = torch.randint(config.model.vocab_size, shape, generator=generator)
        for name, step in steppers.items():
            start = time.perf_counter()
            losses[name].append(step(ids))
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = config.train.batch_size * config.train.sequence_length
    fastest = min(twins, key=medians.__getitem__)
    return {
        "date": date.today().isoformat(),
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "tokens_per_step": tokens,
        "rounds": rounds,
        "median_seconds": medians,
        "tokens_per_second": {name: tokens / value for name, value in medians.items()},
        "first_loss": {name: values[0] for name, values in losses.items()},
        "fastest_peer": fastest,
        "ratio": medians[fastest] / medians["pithtrain"],
        "profile": step_profile(config),
    }


# %%
#| export
def cpu_name() -> str:
    """The processor's name, where the system tells."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# %%
#| export
def describe_bench_step(result: dict[str, Any]) -> str:
    """The result of `bench_step` as a table."""
    lines = [f"{result['device']}, {result['threads']} threads, torch {result['torch']}, fp32"]
    for name, speed in result["tokens_per_second"].items():
        lines.append(f"{name:<28}{speed:>10,.0f} tokens/s{1e3 * result['median_seconds'][name]:>10,.0f} ms a step")
    lines.append(f"pithtrain is {result['ratio']:.2f} times as fast as {result['fastest_peer']}")
    shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in result["profile"].items())
    return "\n".join([*lines, f"where our step's time goes: {shares}"])


# %% [markdown]
# At a size that runs in seconds here (`pithtrain bench step configs/tiny.toml` measures the real one):

# %%
from pithtrain.config import BalanceConfig, TrainConfig

config = Config(
    model=small,
    balance=BalanceConfig(global_batch=0.0),
    train=TrainConfig(batch_size=4, micro_batch_size=4, sequence_length=64),
)
result = bench_step(config, rounds=5)
print(describe_bench_step(result))
first = list(result["first_loss"].values())
assert max(first) - min(first) < 1e-4  # all did the same work

# %%
import matplotlib.pyplot as plt

shares = result["profile"]
fig, ax = plt.subplots(figsize=(6, 2.2))
ax.barh(list(shares), [100 * share for share in shares.values()])
ax.set(title="Where a training step's time goes", xlabel="percent")
fig
