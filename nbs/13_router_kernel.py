# %% [markdown]
# # The router in one pass
#
# > Logits, softmax or sigmoid, top-k, weights and load counts of a block of tokens without leaving the chip.
#
# What a router is for, [its layer](20_router.py) explains, which is worth reading first; and what balance losses are,
# [the notebook behind it](21_balance.py). The router's arithmetic is small: $T \times E \times H$ multiply-adds, 0.1 to
# 2 percent of what the experts do. What it costs is traffic and launches. In plain PyTorch a product, a softmax and a
# top-k write or read a table of $(T, E)$ logits or scores, and a gather, a sum, a division and a count over $(T, K)$
# follow, each of them a launch. Here a program holds the logits of 64 tokens (16 in fp32, or of more than 256 experts)
# for *all* experts in registers, and writes each result once:
#
# ```
# hidden (64, H) ─┐
#                 ├─ product in fp32 ─▶ scores (64, E) ─┬─▶ probs (T, E) fp32, for balance losses and backward
# router (E, H) ──┘        in registers                 ├─▶ K times: take the best, strike it out
#                                                       │        └─▶ expert_ids, weights (T, K)
#                                                       └─▶ load (E,): how many tokens chose each expert
# ```
#
# In bytes, for 16,384 tokens of Qwen3-30B-A3B ($H = 2048$, $E = 128$, $K = 8$) in bf16:

# %%
T, H, E, K = 16384, 2048, 128, 8
once = {"hidden, read": 2 * T * H, "probs, written": 4 * T * E, "ids and weights, written": (8 + 4) * T * K}
for name, size in once.items():
    print(f"{name:26} {size / 1e6:5.1f} MB")
print(f"together {sum(once.values()) / 4.8e6:.0f} microseconds at 4.8 TB/s, an H200's; every further pass over a table")
print(f"of fp32 scores would add {2 * 4 * T * E / 4.8e6:.1f} to read it and write another, and a launch")

# %%
#| default_exp kernels.router

# %%
#| export
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pithtrain.kernels.lang import INTERPRETED, PRODUCTS_OF, tl, triton, want, wanted

# %% [markdown]
# ## The maths
#
# For a token $x$ and router rows $r_e$, stacked in $R$ (`router_weight`), with *scores* $p = \mathrm{softmax}(Rx)$
# or $p = \sigma(Rx)$:
#
# $$S = \operatorname{top\text{-}k}_e(p_e + b_e), \qquad w_e = \lambda\, \frac{p_e}{\sum_{j \in S} p_j} \quad
#   \text{or} \quad w_e = \lambda\, p_e ,$$
#
# the first with `renormalise`, the second without. $b$ is a bias that steers the choice to keep experts equally busy
# (DeepSeek-V3, arXiv 2412.19437); it has no part in the weights and gets no gradient. $\lambda$, `scale`, is a constant
# of the model. Logits are summed and kept in fp32, whatever the inputs: experts that differ in the fourth digit must
# not tie.


# %%
#| export
class Routed(NamedTuple):
    """Where tokens go. T tokens, K = top_k, E experts."""

    weights: Tensor  #: (T, K) fp32, what each chosen expert's output is multiplied by
    expert_ids: Tensor  #: (T, K) int64, the chosen experts, best first
    probs: Tensor  #: (T, E) fp32, scores for balance losses; layers.router divides those of a sigmoid by their sum
    load: Tensor  #: (E,) integers, how many tokens chose each expert


# %%
def reference_route(hidden, router_weight, top_k, bias=None, renormalise=True, sigmoid=False, scale=1.0):
    """`triton_route` in plain PyTorch, in the dtype of what it is given."""
    logits = hidden @ router_weight.T
    probs = logits.sigmoid() if sigmoid else logits.softmax(-1)
    chosen = probs.detach() if bias is None else probs.detach() + bias
    expert_ids = chosen.topk(top_k).indices
    weights = probs.gather(1, expert_ids)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # a bias can choose scores that are all 0
    load = torch.bincount(expert_ids.flatten(), minlength=len(router_weight)).int()
    return Routed(weights * scale, expert_ids, probs, load)


# %%
torch.manual_seed(0)
hidden, router_weight = torch.randn(40, 16), torch.randn(6, 16) / 4
routed = reference_route(hidden, router_weight, top_k=2)
for t in range(3):
    weights = [round(w, 2) for w in routed.weights[t].tolist()]
    print(f"token {t}: experts {routed.expert_ids[t].tolist()} with weights {weights}")
print("load", routed.load.tolist())

# %% [markdown]
# ## Forward
#
# Experts are padded to a power of two with logits of minus infinity. Top-k is $K$ rounds of "take the largest,
# strike it out": for such a small $K$, with everything in registers, it needs no sort. Counts are added with integer
# atomics, whose order does not matter.


# %%
#| export
@triton.jit
def route_kernel(
    x_ptr, weight_ptr, bias_ptr, weights_ptr, id_ptr, prob_ptr, count_ptr, T, scale,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, KW: tl.constexpr,
    BIASED: tl.constexpr, RENORMALISE: tl.constexpr, SIGMOID: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Route BT tokens; WIDTH and KW are E and K rounded up to powers of two."""
    first = tl.program_id(0).to(tl.int64) * BT
    x_ptr += first * H
    prob_ptr += first * E
    weights_ptr += first * K
    id_ptr += first * K
    T -= first.to(tl.int32)
    t = tl.arange(0, BT)
    e = tl.arange(0, WIDTH)
    k = tl.arange(0, BK)
    x_ptr += t[:, None] * H + k[None, :]
    weight_ptr += e[None, :] * H + k[:, None]
    logits = tl.zeros([BT, WIDTH], tl.float32)
    for start in range(0, H, BK):
        x = tl.load(x_ptr + start, mask=(t[:, None] < T) & (k[None, :] + start < H), other=0.0)
        w = tl.load(weight_ptr + start, mask=(e[None, :] < E) & (k[:, None] + start < H), other=0.0)
        if x.dtype != w.dtype:
            x, w = x.to(tl.float32), w.to(tl.float32)
        logits = tl.dot(x, w, logits, input_precision="ieee")
    logits = tl.where(e[None, :] < E, logits, float("-inf"))
    if SIGMOID:
        probs = tl.sigmoid(logits)
    else:
        probs = tl.exp(logits - tl.max(logits, 1)[:, None])
        probs = probs / tl.sum(probs, 1)[:, None]
    tl.store(prob_ptr + t[:, None] * E + e[None, :], probs, mask=(t[:, None] < T) & (e[None, :] < E))
    left = probs
    if BIASED:  # a bias of minus infinity must not look like an expert that was struck out
        left += tl.load(bias_ptr + e, mask=e < E, other=0.0)[None, :]
        left = tl.where(left == float("-inf"), -1e38, left)
    left = tl.where(e[None, :] < E, left, float("-inf"))
    j = tl.arange(0, KW)
    ids = tl.zeros([BT, KW], tl.int32)
    weights = tl.zeros([BT, KW], tl.float32)
    for n in tl.static_range(K):
        best = tl.minimum(tl.argmax(left, 1), E - 1)  # NaN scores must not name an expert that is not there
        struck = e[None, :] == best[:, None]
        left = tl.where(struck, float("-inf"), left)
        ids = tl.where(j[None, :] == n, best[:, None], ids)
        weights = tl.where(j[None, :] == n, tl.sum(tl.where(struck, probs, 0.0), 1)[:, None], weights)
    taken = (left == float("-inf")) & (e[None, :] < E) & (t[:, None] < T)
    tl.atomic_add(count_ptr + e, tl.sum(taken.to(tl.int32), 0), mask=e < E, sem="relaxed")
    if RENORMALISE:
        weights = weights / (tl.sum(weights, 1)[:, None] + 1e-20)  # a bias can choose scores that are all 0
    at = t[:, None] * K + j[None, :]
    mask = (t[:, None] < T) & (j[None, :] < K)
    tl.store(weights_ptr + at, weights * scale, mask=mask)
    tl.store(id_ptr + at, ids.to(tl.int64), mask=mask)


# %% [markdown]
# ## Backward
#
# Given gradients $\bar w$ of the weights and, if a balance loss asks, $\bar p$ of the scores: for each $e \in S$, with
# $q_e = p_e / \sum_S p$,
#
# $$\bar p_e \mathrel{+}= \frac{\lambda}{\sum_S p}\Bigl(\bar w_e - \sum_{j \in S} \bar w_j q_j\Bigr)
#   \;\text{(renormalised)} \quad\text{or}\quad \bar p_e \mathrel{+}= \lambda\, \bar w_e;$$
#
# then, for the logits $\ell = Rx$ and all experts,
#
# $$\bar \ell = p \odot \bigl(\bar p - \langle p, \bar p\rangle\bigr) \;\text{(softmax)} \quad\text{or}\quad
#   \bar \ell = \bar p \odot p \odot (1 - p) \;\text{(sigmoid)},$$
#
# and two ordinary matrix products bring $\bar\ell$ to the tokens and to the router.


# %%
#| export
@triton.jit
def route_gradient_kernel(
    prob_ptr, id_ptr, d_weights_ptr, d_prob_ptr, d_logit_ptr, T, scale,
    E: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    DENSE: tl.constexpr, RENORMALISE: tl.constexpr, SIGMOID: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """d_logits (T, E) from the gradients of weights (T, K) and, if DENSE, of probs (T, E)."""
    first = tl.program_id(0).to(tl.int64) * BT
    prob_ptr += first * E
    d_logit_ptr += first * E
    id_ptr += first * K
    d_weights_ptr += first * K
    T -= first.to(tl.int32)
    t = tl.arange(0, BT)
    e = tl.arange(0, WIDTH)
    at = t[:, None] * E + e[None, :]
    mask = (t[:, None] < T) & (e[None, :] < E)
    probs = tl.load(prob_ptr + at, mask=mask, other=0.0)
    d_chosen = tl.zeros([BT, WIDTH], tl.float32)
    chosen = tl.zeros([BT, WIDTH], tl.float32)
    for n in tl.static_range(K):
        hit = e[None, :] == tl.load(id_ptr + t * K + n, mask=t < T, other=-1)[:, None]
        d_weight = tl.load(d_weights_ptr + t * K + n, mask=t < T, other=0.0) * scale
        d_chosen = tl.where(hit, d_weight[:, None], d_chosen)
        chosen = tl.where(hit, probs, chosen)
    if RENORMALISE:
        total = tl.sum(chosen, 1)[:, None] + 1e-20  # as in the forward pass
        mean = tl.sum(d_chosen * chosen, 1)[:, None] / total
        d_chosen = tl.where(chosen > 0.0, (d_chosen - mean) / total, 0.0)
    if DENSE:
        d_prob_ptr += first * E
        d_chosen += tl.load(d_prob_ptr + at, mask=mask, other=0.0)
    if SIGMOID:
        d_logits = d_chosen * probs * (1.0 - probs)
    else:
        d_logits = probs * (d_chosen - tl.sum(probs * d_chosen, 1)[:, None])
    tl.store(d_logit_ptr + at, d_logits.to(d_logit_ptr.dtype.element_ty), mask=mask)


# %% [markdown]
# One subtlety: an expert chosen with a score that underflowed to exactly zero gets no gradient through the
# renormalisation. That of its logit is zero anyway: both formulas multiply by $p$.


# %%
#| export
class Route(torch.autograd.Function):
    """`triton_route` with its gradients."""

    @staticmethod
    def forward(ctx, hidden, router_weight, top_k, bias, renormalise, sigmoid, scale):
        (T, H), E = hidden.shape, len(router_weight)
        width, small = max(16, triton.next_power_of_2(E)), INTERPRETED
        weights, probs = (hidden.new_empty(T, n, dtype=torch.float32) for n in (top_k, E))
        expert_ids = torch.empty(T, top_k, dtype=torch.int64, device=hidden.device)
        load = torch.zeros(E, dtype=torch.int32, device=hidden.device)
        exact = torch.float32 in (hidden.dtype, router_weight.dtype)
        rows = 16 if small or exact or width > 256 else 64
        inner = 16 if small or exact or width > 1024 else 32 if width > 512 else 64  # what shared memory holds
        route_kernel[(triton.cdiv(T, rows),)](
            hidden, router_weight, bias, weights, expert_ids, probs, load, T, scale,
            H, E, top_k, width, triton.next_power_of_2(top_k),
            bias is not None, renormalise, sigmoid, rows, inner, num_warps=4, num_stages=1 if width > 1024 else 3,
        )  # fmt: skip
        ctx.save_for_backward(hidden, router_weight, expert_ids, probs)
        ctx.mark_non_differentiable(expert_ids, load)
        ctx.set_materialize_grads(False)
        ctx.rule = (renormalise, sigmoid, scale)
        return weights, expert_ids, probs, load

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weights, _ids, d_probs, _load):
        hidden, router_weight, expert_ids, probs = ctx.saved_tensors
        renormalise, sigmoid, scale = ctx.rule
        (T, E), K = probs.shape, expert_ids.shape[1]
        d_weights = probs.new_zeros(T, K) if d_weights is None else d_weights.contiguous()
        dense = d_probs is not None
        dtype = torch.promote_types(hidden.dtype, router_weight.dtype)
        d_logits = torch.empty_like(probs, dtype=dtype)
        rows = 16
        route_gradient_kernel[(triton.cdiv(T, rows),)](
            probs, expert_ids, d_weights, d_probs.contiguous() if dense else None, d_logits, T, scale,
            E, K, max(16, triton.next_power_of_2(E)), dense, renormalise, sigmoid, rows, num_warps=4,
        )  # fmt: skip
        wants_hidden, wants_router, *_ = wanted(ctx)
        d_hidden = (d_logits @ router_weight.to(dtype)).to(hidden.dtype) if wants_hidden else None
        d_router = (d_logits.T @ hidden.to(dtype)).to(router_weight.dtype) if wants_router else None
        return d_hidden, d_router, None, None, None, None, None


# %%
#| export
def triton_route(
    hidden: Tensor, router_weight: Tensor, top_k: int, bias: Tensor | None = None,
    renormalise: bool = True, sigmoid: bool = False, scale: float = 1.0,
) -> Routed:  # fmt: skip
    """Route `hidden` (T, H) by `router_weight` (E, H), each in float32, bfloat16 or float16.

    Scores are the softmax over experts, or the sigmoid; `bias` (E,) float32 is added for the choice alone. The
    weights are the chosen scores, divided by their sum if `renormalise`, times `scale`. Differentiable once, in
    `hidden` and `router_weight`, through `weights` and `probs`. Raises TypeError or ValueError, one line, on bad
    arguments."""
    want("hidden", hidden, (None, None), PRODUCTS_OF)
    device = hidden.device
    want("router_weight", router_weight, (None, hidden.shape[1]), PRODUCTS_OF, device)
    E = len(router_weight)
    if bias is not None:
        want("bias", bias, (E,), (torch.float32,), device)
        bias = bias.contiguous()
    if E > 2048:
        raise ValueError(f"router_weight has {E} rows; this kernel takes at most 2048 experts")
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k is {top_k}; want 1 to {E}, the number of experts")
    return Routed(
        *Route.apply(hidden.contiguous(), router_weight.contiguous(), top_k, bias, renormalise, sigmoid, scale)
    )


# %% [markdown]
# The kernel against the reference in float64, outputs and gradients, in every combination of its options:


# %%
def worst_error(T, H, E, K, **options):
    torch.manual_seed(0)
    x, r = torch.randn(T, H, requires_grad=True), (torch.randn(E, H) / H**0.5).requires_grad_()
    x64, r64 = (t.detach().double().requires_grad_() for t in (x, r))
    ours, true = triton_route(x, r, K, **options), reference_route(x64, r64, K, **options)
    assert torch.equal(ours.expert_ids, true.expert_ids) and torch.equal(ours.load, true.load)
    dw, dp = torch.randn(T, K), torch.randn(T, E)
    ((ours.weights * dw).sum() + (ours.probs * dp).sum()).backward()
    ((true.weights * dw).sum() + (true.probs * dp).sum()).backward()
    pairs = [(ours.weights, true.weights), (ours.probs, true.probs), (x.grad, x64.grad), (r.grad, r64.grad)]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


if INTERPRETED:
    for renormalise in (True, False):
        for sigmoid in (True, False):
            for bias in (None, torch.randn(11)):
                error = worst_error(37, 40, 11, 3, renormalise=renormalise, sigmoid=sigmoid, bias=bias, scale=2.5)
                print(f"renormalise {renormalise!s:5}  sigmoid {sigmoid!s:5}  bias {bias is not None!s:5}  {error:.1e}")
                assert error < 1e-5

# %% [markdown]
# What the selection bias does: raise one expert's bias and watch tokens move to it.

# %%
import matplotlib.pyplot as plt

lifts = torch.linspace(0, 0.4, 21)
loads = torch.stack([reference_route(hidden, router_weight, 2, torch.eye(6)[0] * lift).load for lift in lifts])
fig, ax = plt.subplots(figsize=(6, 3))
ax.stackplot(lifts, loads.T, labels=[f"expert {e}" for e in range(6)], alpha=0.7)
ax.set(title="Load against the bias of expert 0", xlabel="bias of expert 0", ylabel="(token, expert) pairs")
ax.legend(ncol=3, fontsize=8)
fig

# %% [markdown]
# The weights of the tokens that it had before stay what they were:


# %%
def by_expert(lift: float) -> torch.Tensor:
    found = reference_route(hidden, router_weight, 2, torch.eye(6)[0] * lift)
    return torch.zeros(40, 6).scatter(1, found.expert_ids, found.weights)


before, after = by_expert(0.0), by_expert(0.4)
had = before[:, 0] > 0
assert torch.equal(before[had], after[had])
print(f"expert 0 has {int(had.sum())} tokens, then {int((after[:, 0] > 0).sum())}; all weights of the old ones stay")

# %% [markdown]
# Next: the other end of the model, [the loss](14_cross_entropy.py).
