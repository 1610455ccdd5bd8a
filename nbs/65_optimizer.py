# %% [markdown]
# # Optimizer and learning rate
#
# > AdamW with weight decay on matrices only, and a warmup-stable-decay learning rate.

# %%
#| default_exp train.optimizer

# %%
#| export
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from pithtrain.config import OptimizerConfig
from pithtrain.kernels.adamw import triton_adamw
from pithtrain.kernels.lang import kernels_serve
from pithtrain.parallel.sharding import on_this_rank

# %% [markdown]
# ## AdamW
#
# Adam divides each gradient's running mean by the root of its running square; AdamW
# (arXiv 1711.05101) shrinks the weights *beside* that, by $\eta\lambda\theta$, where plain Adam with an
# $L_2$ penalty would shrink the most-used weights the least:
#
# $$m \leftarrow \beta_1 m + (1-\beta_1) g, \quad v \leftarrow \beta_2 v + (1-\beta_2) g^2, \quad
#   \theta \leftarrow (1 - \eta\lambda)\,\theta - \eta\, \frac{\hat m}{\sqrt{\hat v} + \epsilon}.$$
#
# Here $\eta$ is the learning rate, $\lambda$ the weight decay, and $\epsilon$ keeps the quotient finite. The averages
# start at zero, so at step $n$ they hold a share $1 - \beta^n$ of a full average; $\hat m = m / (1 - \beta_1^n)$ and
# $\hat v = v / (1 - \beta_2^n)$ make up for that.
#
# One step of it, written out, against torch's fused implementation:

# %%
torch.manual_seed(0)
theta, g = torch.randn(4), torch.randn(4)
eta, lam, beta1, beta2, eps = 0.1, 0.5, 0.9, 0.95, 1e-8
m, v = (1 - beta1) * g, (1 - beta2) * g**2
by_hand = (1 - eta * lam) * theta - eta * (m / (1 - beta1)) / ((v / (1 - beta2)).sqrt() + eps)

parameter = nn.Parameter(theta.clone())
parameter.grad = g
torch.optim.AdamW([parameter], lr=eta, betas=(beta1, beta2), eps=eps, weight_decay=lam, fused=True).step()
torch.testing.assert_close(parameter.data, by_hand)

# %% [markdown]
# On a GPU [our kernel](18_adamw_kernel.py) takes the step: where gradients are clipped, it moves 28 bytes a parameter
# and torch's moves 32. All else is torch's: its groups, its state, and its `grad_scale`, by which gradients are divided
# ([clipping](43_sharding.py)). Only the count of steps is on the host, where the kernel's launch needs it.


# %%
#| export
class KernelAdamW(torch.optim.AdamW):
    """torch's AdamW with steps by `triton_adamw`, one launch a parameter.

    Parameters are fp32; their `state` is there before the first step, its "step" on the CPU: see `make_optimizer`."""

    grad_scale: torch.Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        """One step on every parameter that has a gradient; the gradients stay as they are."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, (beta1, beta2) = self.state[p], group["betas"]
                state["step"] += 1
                weight, grad, mean, square = map(on_this_rank, (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
                triton_adamw(
                    weight, grad, mean, square, self.grad_scale, int(state["step"]),
                    rate=group["lr"], decay=group["weight_decay"], beta1=beta1, beta2=beta2, eps=group["eps"],
                )  # fmt: skip


# %%
from pithtrain.kernels.lang import runs_triton

if runs_triton(theta):
    parameter = nn.Parameter(theta.clone())
    parameter.grad = g
    optimizer = KernelAdamW([parameter], lr=eta, betas=(beta1, beta2), eps=eps, weight_decay=lam)
    optimizer.state[parameter] = {"step": torch.zeros(()), "exp_avg": 0 * theta, "exp_avg_sq": 0 * theta}
    optimizer.step()
    torch.testing.assert_close(parameter.data, by_hand)

# %% [markdown]
# Decay makes sense for matrices, whose size a following norm forgets anyway. A norm's scale that is
# decayed towards zero silences its layer, so vectors are left alone, a layer's stack of its experts' biases too.


# %%
#| export
def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over named fp32 parameters: weight decay on matrices, none on vectors.

    Experts, which are sharded over other ranks than the rest and stacked along their first axis, are groups of their
    own."""
    groups = []
    for experts in (False, True):
        alike = [p for name, p in parameters.items() if (".experts." in name) == experts]
        for matrices in (False, True):
            chosen = [p for p in alike if (p.dim() >= 2 + experts) == matrices]
            if chosen:
                groups.append({"params": chosen, "weight_decay": config.weight_decay if matrices else 0.0})
    by_kernel = all(map(kernels_serve, parameters.values()))
    kind = KernelAdamW if by_kernel else partial(torch.optim.AdamW, fused=True)
    optimizer = kind(groups, config.learning_rate, (config.beta1, config.beta2), config.eps)
    for p in parameters.values():  # now and not at the first step: if memory does not suffice, that shows at once
        zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device="cpu" if by_kernel else p.device), **zeros}
    return optimizer


# %%
from pithtrain.config import Qwen3MoeConfig
from pithtrain.models.build import build

optimizer = make_optimizer(dict(build(Qwen3MoeConfig()).named_parameters()), OptimizerConfig())
for group in optimizer.param_groups:
    print(f"weight decay {group['weight_decay']}: {sum(p.numel() for p in group['params']):,} parameters")

# %% [markdown]
# ## Warmup, stable, decay
#
# The rate climbs linearly while Adam's running averages fill, stays at its peak for most of the run, and
# falls linearly at the end (WSD: MiniCPM, arXiv 2404.06395). Where a cosine must know the last step from
# the first, this schedule only needs to know it when the decay begins.


# %%
#| export
def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of `step`, counted from 1 to `steps`. Source of the form: arXiv 2404.06395."""
    if step <= config.warmup:
        return config.learning_rate * step / config.warmup
    decay_steps = config.decay * steps
    left = 1.0 if decay_steps == 0 else min(1.0, (steps - step) / decay_steps)
    return config.learning_rate * (config.final + (1 - config.final) * left)


# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(6, 2.8))
for decay, final in ((0.4, 0.0), (0.2, 0.1)):
    config = OptimizerConfig(warmup=20, decay=decay, final=final)
    ax.plot([learning_rate(s, 200, config) for s in range(1, 201)], label=f"decay {decay:g}, final {final:g}")
ax.set(title="Warmup, stable, decay", xlabel="step", ylabel="learning rate")
ax.legend()
fig

# %% [markdown]
# Next: how a run survives being interrupted: [checkpoints](66_checkpoint.py).
