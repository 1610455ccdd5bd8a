# %% [markdown]
# # Balance: keeping every expert busy
#
# > Losses, and a loss-free bias, that keep a router from sending every token to the same few experts.
#
# A router left alone collapses: the expert that is chosen more learns more, becomes better, and is chosen
# more still. Experts that are never chosen are wasted memory; on several GPUs, the rank that holds the
# favourite makes all others wait. Two remedies are in use, and both are here.

# %%
#| default_exp layers.balance

# %%
#| export
import torch
from torch import Tensor

from pithtrain.config import BalanceConfig
from pithtrain.layers.router import Routed

# %% [markdown]
# ## Load
#
# The *load* of an expert is the number of (token, expert) pairs that it gets. The router counts it over all the tokens
# that it sees; where each sequence is to be balanced, it is counted for each of them apart:

# %%
from pithtrain.layers.router import expert_load

torch.manual_seed(0)
probs = torch.softmax(torch.randn(64, 8) + torch.linspace(0, 2, 8), dim=1)
ids = probs.topk(2).indices
load = expert_load(ids.reshape(4, -1), 8)
for sequence, row in enumerate(load):
    print(f"sequence {sequence}:", row.tolist())
print("together:  ", load.sum(dim=0).tolist(), "of", ids.numel(), "pairs")

# %% [markdown]
# ## The Switch loss
#
# With $f_e$ the fraction of pairs that expert $e$ gets and $P_e$ the mean probability the router gives it,
#
# $$\mathcal{L} = E \sum_{e=1}^{E} f_e P_e$$
#
# (Switch Transformer, arXiv 2101.03961, eq. 4, with $f$ over pairs so that it holds for any `top_k`). At
# perfect balance $f_e = P_e = 1/E$ and $\mathcal{L} = 1$; when all tokens go to the same $K$ experts and the
# router gives no other any probability, $\mathcal{L} = E / K$.
# $f$ is a count and has no gradient; the gradient flows through $P$ and pushes down the probability of the
# experts with the most load. One function serves every form of the loss, because the forms differ only in
# *which tokens $f$ is counted over*.


# %%
#| export
def switch_loss(probs: Tensor, load: Tensor) -> Tensor:
    """E * sum_e f_e P_e: P is the mean of `probs` (..., T, E) over T, f is `load` (..., E) over its sum.

    A scalar, the mean over leading axes; 1.0 when balanced, E / top_k when all tokens take the same experts.
    Source: Switch Transformer, arXiv 2101.03961."""
    fraction = load.to(probs.dtype) / load.sum(dim=-1, keepdim=True)
    return probs.shape[-1] * (fraction * probs.mean(dim=-2)).sum(dim=-1).mean()


# %%
even = torch.full((64, 8), 1 / 8)
one_takes_all = torch.eye(8)[torch.zeros(64, dtype=torch.long)]
two_take_all = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]).expand(64, 8)
print("balanced:               ", switch_loss(even, torch.full((8,), 16)).item())
print("collapsed, top_k of 1:  ", switch_loss(one_takes_all, torch.tensor([64, 0, 0, 0, 0, 0, 0, 0])).item())
print("collapsed, top_k of 2:  ", switch_loss(two_take_all, torch.tensor([64, 64, 0, 0, 0, 0, 0, 0])).item())
print("the skewed router above:", round(switch_loss(probs, load.sum(dim=0)).item(), 3))

# %% [markdown]
# ## Three scopes
#
# - **micro-batch**: $f$ over the tokens of one forward pass. Easy, but a small microbatch of, say, all
#   Python code is pushed to use every expert equally, which works against specialisation.
# - **sequence**: $f$ and $P$ over each sequence apart, then the mean (DeepSeek-V3, arXiv 2412.19437,
#   eq. 17, there with a tiny coefficient): the strictest.
# - **global batch**: $f$ over all microbatches of an optimiser step, on all ranks (arXiv 2501.11873): the
#   loosest. Experts may specialise by domain as long as the batch as a whole is balanced. While a step
#   accumulates, $f$ is counted over the microbatches so far.
#
# Four sequences, each of which uses two experts of its own, evenly: each is unbalanced, the batch as a
# whole is perfectly balanced. The three scopes tell them apart.

# %%
own = torch.arange(4).repeat_interleave(16)
ids = torch.stack([2 * own, 2 * own + 1], dim=1)
probs, load = torch.zeros(64, 8).scatter_(1, ids, 0.5), expert_load(ids.reshape(4, -1), 8)
print("one microbatch of all four:  ", switch_loss(probs, load.sum(dim=0)).item())
print("a microbatch of one sequence:", switch_loss(probs[:16], load[0]).item())
print("sequence:                    ", switch_loss(probs.view(4, 16, 8), load).item())
print("global over four microbatches:", switch_loss(probs[:16], load.sum(dim=0)).item())

# %% [markdown]
# ## All of them, as the trainer wants it
#
# A run gives each scope a coefficient (mostly zero). The losses of all layers are added, as
# Switch does, so that each layer's router feels its own in full whatever the depth.


# %%
#| export
def balance_loss(
    routing: list[Routed], load: Tensor | None, load_so_far: Tensor, coefficients: BalanceConfig
) -> Tensor:
    """The weighted sum of the three forms for one microbatch, a scalar: the sum over layers.

    `routing` has an entry a layer; `load` (layers, sequences, E) is that of each sequence of the microbatch, None where
    the coefficients of the first two forms are 0; `load_so_far` (layers, E) is that of the whole step up to and with
    this microbatch. A rank that holds only part of the tokens gives the loads of all of them, and gets its part of the
    loss. Sources: arXiv 2101.03961, 2412.19437 (over sequences), 2501.11873 (over the global batch)."""
    total = torch.zeros((), device=load_so_far.device)
    for layer, (routed, step_load) in enumerate(zip(routing, load_so_far, strict=True)):
        if coefficients.micro_batch:
            total = total + coefficients.micro_batch * switch_loss(routed.probs, load[layer].sum(dim=0))
        if coefficients.sequence:
            by_sequence = routed.probs.unflatten(0, (len(load[layer]), -1))
            total = total + coefficients.sequence * switch_loss(by_sequence, load[layer])
        if coefficients.global_batch:
            total = total + coefficients.global_batch * switch_loss(routed.probs, step_load)
    return total


# %%
routed, together = Routed(probs, ids, probs, load.sum(dim=0)), load.sum(dim=0, keepdim=True)
for coefficients in (BalanceConfig(sequence=0.01, global_batch=0.0), BalanceConfig(global_batch=0.01)):
    print(coefficients, round(balance_loss([routed], load[None], together, coefficients).item(), 4))

# %% [markdown]
# ## Without a loss
#
# A balance loss pulls the router's weights away from what the language-modelling loss wants. DeepSeek-V3
# (and arXiv 2408.15664) balances without any gradient: the selection bias $b_e$ of the
# [router](20_router.py) rises by a fixed step $\gamma$ when expert $e$ had less than the mean load in the
# last step, and falls when it had more. The weights $w_e$ do not see it.
#
# $$b_e \leftarrow b_e + \gamma \operatorname{sign}(\bar{c} - c_e),$$
#
# with $c_e$ the load of expert $e$, $\bar c$ the mean load, and $\gamma$ the argument `rate`.


# %%
#| export
@torch.no_grad()
def update_bias(bias: Tensor, load: Tensor, rate: float) -> None:
    """Move the selection `bias` (E,), in place, by `rate` towards experts with less than the mean `load`.

    Source: auxiliary-loss-free balancing, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437."""
    bias += rate * torch.sign(load.float().mean() - load.float())


# %% [markdown]
# A router that strongly prefers some experts, and 150 steps of the bias alone. The load of the favourite
# falls to its share and the starved expert's rises to it; the model's weights never changed.

# %%
import matplotlib.pyplot as plt

from pithtrain.layers.router import route

torch.manual_seed(0)
experts, weight, bias = 8, torch.randn(8, 16) / 6, torch.zeros(8)
weight[:, 0] += torch.linspace(-0.6, 0.6, 8)
history = []
for _ in range(150):
    tokens = torch.randn(1024, 16)
    tokens[:, 0] = 1.0
    load = route(tokens, weight, bias, 2, True).load
    history.append(load / load.sum() * experts)
    update_bias(bias, load, rate=0.003)
fig, ax = plt.subplots(figsize=(6.5, 3.5))
ax.plot(torch.stack(history))
ax.axhline(1, color="black", lw=0.8, ls="--")
ax.set(title="Loss-free balancing", xlabel="step", ylabel="load / balanced load", ylim=(0, None))
fig
# %%
assert history[0].max() > 1.8 and history[-1].max() < 1.3

# %% [markdown]
# ## What to log
#
# Two numbers tell whether a router is healthy. The *load imbalance* is the busiest expert's load over the mean: with
# one expert a rank it is how much longer the slowest rank works, with several a bound on that. The *entropy* of the
# router's probabilities, in nats, says how decided the router is: $\log E$ when it knows nothing, 0 when it always
# knows.


# %%
#| export
@torch.no_grad()
def routing_entropy(probs: Tensor) -> Tensor:
    """Mean entropy of the router's `probs` (T, E), in nats: between 0 and log E."""
    return torch.special.entr(probs).sum(dim=-1).mean()


# %%
import math

print(f"undecided: {routing_entropy(even):.3f} nats, log 8 is {math.log(8):.3f}")
print(f"decided:   {routing_entropy(one_takes_all):.3f} nats")

# %% [markdown]
# Next: what the experts do with the tokens they are sent: [experts](22_experts.py).
