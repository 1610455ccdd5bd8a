# %% [markdown]
# # Experts: many small MLPs, each on its own tokens
#
# > The expert MLPs of a layer, applied to the tokens that the router sent to each.
#
# An expert is the MLP of a dense transformer, only narrower: a SwiGLU with three matrices. A layer holds
# $E$ of them in two stacked tensors, and each (token, expert) pair that the [router](20_router.py) chose
# is one row of work.

# %%
#| default_exp layers.experts

# %%
#| export
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pithtrain.kernels.expert_mlp import triton_expert_mlp
from pithtrain.kernels.lang import kernels_serve, wanted

# %% [markdown]
# ## The maths
#
# For the token $x$ with chosen experts $S$ and weights $w_e$,
#
# $$y = \sum_{e \in S} w_e\, D_e \left( \operatorname{silu}(G_e x) \odot U_e x \right),$$
#
# with the gate $G_e$ and the up projection $U_e$, both $I \times H$, and the down projection $D_e$,
# $H \times I$ (SwiGLU: arXiv 2002.05202). $G_e$ and $U_e$ are stored as one tensor `gate_up` of shape
# $(E, 2I, H)$, gate rows first: one matrix product computes both.
#
# The smallest true implementation is a loop over experts:


# %%
def expert_mlp_reference(tokens: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """For each token the weighted sum of its experts' outputs: (T, H).

    `tokens` (T, H), `expert_ids` (T, K) with -1 for a pair that is not computed here, `weights` (T, K),
    `gate_up` (E, 2I, H) with the gate rows first, `down` (E, H, I).
    """
    output = torch.zeros_like(tokens)
    for expert, (own_gate_up, own_down) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        rows, slots = torch.where(expert_ids == expert)
        gate, up = F.linear(tokens[rows], own_gate_up).chunk(2, dim=-1)
        expert_output = F.linear(F.silu(gate) * up, own_down)
        output = output.index_add(0, rows, weights[rows, slots, None].to(tokens.dtype) * expert_output)
    return output


# %%
torch.manual_seed(0)
# ruff: noqa: E741  (I is the expert hidden size, as in the maths)
T, H, E, K, I = 12, 16, 4, 2, 24  # tokens, hidden, experts, top_k, expert hidden
tokens = torch.randn(T, H)
gate_up, down = torch.randn(E, 2 * I, H) / H**0.5, torch.randn(E, H, I) / I**0.5
weights, expert_ids = torch.softmax(torch.randn(T, E), dim=1).topk(K)
expert_mlp_reference(tokens, expert_ids, weights, gate_up, down).shape

# %% [markdown]
# ## All pairs of an expert side by side
#
# The loop compares all pairs once for each expert, calls small operations by the hundred, and autograd keeps five
# intermediates for each expert. (`unbind` matters: behind `gate_up[expert]`, the backward would write a gradient of
# *all* experts for each of them, zero but for one.) A training step needs none of that: sort the pairs by expert once,
# and each expert's pairs are a contiguous run.

# %%
import matplotlib.pyplot as plt

order = torch.argsort(expert_ids.flatten(), stable=True)
fig, axes = plt.subplots(2, 1, figsize=(7, 2.2), sharex=True)
for ax, ids, title in (
    (axes[0], expert_ids.flatten(), "pairs as routed: token after token"),
    (axes[1], expert_ids.flatten()[order], "pairs sorted: expert after expert"),
):
    ax.imshow(ids[None], aspect="auto", cmap="tab10", vmin=0, vmax=9)
    for i, pair in enumerate(range(T * K) if ax is axes[0] else order.tolist()):
        ax.text(i, 0, pair // K, ha="center", va="center", color="white", fontsize=8)
    ax.set(title=title, yticks=[], xticks=[])
fig.suptitle("Numbers are tokens, colours are experts", fontsize=9, y=0.02)
fig.tight_layout()
fig

# %% [markdown]
# ## As many experts at a time as the cache holds
#
# On a CPU a run should go through the *whole* MLP while its rows are in the cache. Expert after expert does that, but
# fine-grained experts have runs of a few dozen rows, and then the calls take longer than the arithmetic. So
# neighbouring experts are taken together, in portions. Their products stay one for each expert; everything between
# the products is one call for the whole portion.


# %%
#| export
def portions(counts: list[int], most: int) -> Iterator[tuple[slice, slice]]:
    """(experts, pairs) of each portion: neighbours with at most `most` pairs together, or one expert with more."""
    first = start = stop = 0
    for expert, count in enumerate(counts):
        if start < stop and stop + count > start + most:
            yield slice(first, expert), slice(start, stop)
            first, start = expert, stop
        stop += count
    yield slice(first, len(counts)), slice(start, stop)


# %%
for experts, pairs in portions([3, 2, 9, 0, 4, 1], most=6):
    print(f"experts {experts.start} to {experts.stop - 1}: pairs {pairs.start} to {pairs.stop - 1}")


# %%
#| export
def multiply(left: Iterable[Tensor], right: Iterable[Tensor], out: Iterable[Tensor]) -> None:
    """For each expert `out` = `left` @ `right`; a run of no pairs leaves zeros in its weights' gradient."""
    for a, b, product in zip(left, right, out, strict=True):
        torch.mm(a, b, out=product)


# %%
counts, found = [3, 0, 2], torch.empty(3, 4, 6).fill_(torch.nan)
grads, inputs = torch.randn(5, 4), torch.randn(5, 6)
multiply(grads.t().split(counts, 1), inputs.split(counts), found)  # as the gradient of three experts' weights
print("norms of the experts' gradients:", [round(norm, 2) for norm in found.flatten(1).norm(dim=1).tolist()])

# %% [markdown]
# ## Forward and backward by hand
#
# Of the intermediates only the input of the activation, $h = [g, u] = [G x, U x]$ (`pre`), is kept for the backward;
# the rest is cheap to compute again. The code weighs $a$ rather than $D a$: the same, and $a$ is in the cache. With $a
# = \operatorname{silu}(g) \odot u$ (`activated`), $\bar y$ the gradient of a token's output and $z = D^\top \bar y$
# (`grad_activated`, before it is weighted), the gradients are, for each pair,
#
# $$\bar w = \langle z, a \rangle, \qquad
#   \bar h = [\,w\,z \odot u \odot \operatorname{silu}'(g),\; w\,z \odot \operatorname{silu}(g)\,], \qquad
#   \bar D \mathrel{+}= \bar y\,(w a)^\top, \qquad
#   \begin{bmatrix} \bar G \\ \bar U \end{bmatrix} \mathrel{+}= \bar h\, x^\top, \qquad
#   \bar x \mathrel{+}= \begin{bmatrix} G \\ U \end{bmatrix}^\top \bar h.$$
#
# $\bar w$, the gradient of the router's weight, is $\langle z, a\rangle$ and not $\langle \bar y, D a \rangle$, its
# equal, because that would need the expert's output ([more](12_expert_mlp.py)).


# %%
#| export
class ExpertMLP(torch.autograd.Function):
    """The expert MLP with each expert's rows contiguous and its backward written out; shapes as in `Experts`."""

    @staticmethod
    def forward(ctx, tokens: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        experts, width = gate_up.shape[:2]
        flat = expert_ids.flatten()
        absent, *counts = torch.bincount(flat + 1, minlength=experts + 1).tolist()
        order = torch.argsort(flat, stable=True)[absent:]  # pairs of id -1 come first
        rows = order // expert_ids.shape[1]
        pair_weights = weights.flatten()[order, None].to(tokens.dtype)
        pre = tokens.new_empty(len(order), width)
        output = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        parts = list(portions(counts, 2**18 // width))  # 1 MiB of h in fp32
        for some, run in parts:
            x = tokens.index_select(0, rows[run])
            multiply(x.split(counts[some]), gate_up[some].mT, pre[run].split(counts[some]))
            gate, up = pre[run].chunk(2, dim=-1)
            activated = F.silu(gate).mul_(up).mul_(pair_weights[run])
            y = x  # x is not needed any more, and its memory is in the cache
            multiply(activated.split(counts[some]), down[some].mT, y.split(counts[some]))
            output.index_add_(0, rows[run], y.float())
        ctx.save_for_backward(tokens, order, rows, pair_weights, pre, gate_up, down)
        ctx.counts, ctx.parts, ctx.weights_shape, ctx.weights_dtype = counts, parts, weights.shape, weights.dtype
        return output.to(tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, order, rows, pair_weights, pre, gate_up, down = ctx.saved_tensors
        wants_tokens, _, wants_weights, wants_gate_up, wants_down = wanted(ctx)
        grad_tokens = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        grad_weights = torch.zeros(ctx.weights_shape, dtype=torch.float32, device=tokens.device)
        grad_gate_up = torch.empty_like(gate_up) if wants_gate_up else None
        grad_down = torch.empty_like(down) if wants_down else None
        for some, run in ctx.parts:
            counts = ctx.counts[some]
            grad_y = grad.index_select(0, rows[run])
            gate, up = pre[run].chunk(2, dim=-1)
            w, silu = pair_weights[run], F.silu(gate)
            activated = silu * up
            grad_activated = torch.empty_like(activated)
            multiply(grad_y.split(counts), down[some], grad_activated.split(counts))
            if wants_weights:
                grad_weights.view(-1)[order[run]] = torch.linalg.vecdot(grad_activated.float(), activated.float())
            if wants_down:
                multiply(grad_y.t().split(counts, 1), activated.mul_(w).split(counts), grad_down[some])
            grad_activated.mul_(w)
            grad_pre = torch.empty_like(pre[run])
            grad_gate, grad_up = grad_pre.chunk(2, dim=-1)
            torch.mul(grad_activated, silu, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad_activated.mul_(up), gate, grad_input=grad_gate)
            if wants_gate_up:
                x = tokens.index_select(0, rows[run])
                multiply(grad_pre.t().split(counts, 1), x.split(counts), grad_gate_up[some])
            if wants_tokens:
                grad_x = grad_y  # in its memory, as above
                multiply(grad_pre.split(counts), gate_up[some], grad_x.split(counts))
                grad_tokens.index_add_(0, rows[run], grad_x.float())
        grad_weights = grad_weights.to(ctx.weights_dtype)
        return grad_tokens.to(tokens.dtype), None, grad_weights, grad_gate_up, grad_down


# %%
def gradients(function, *inputs):
    """Output of `function` and its gradients, for a fixed random gradient of the output."""
    tokens, ids, weights, *matrices = inputs
    leaves = [t.clone().requires_grad_() for t in (tokens, weights, *matrices)]
    output = function(leaves[0], ids, leaves[1], *leaves[2:])
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    return output, *torch.autograd.grad(output, leaves, seed)


some_absent = expert_ids.clone()
some_absent[::3, 0] = -1
for ids in (expert_ids, some_absent, torch.zeros_like(expert_ids[:, :1])):
    inputs = (tokens, ids, weights[:, : ids.shape[1]], gate_up, down)
    for name, a, b in zip(
        ("output", "tokens", "weights", "gate_up", "down"),
        gradients(ExpertMLP.apply, *inputs),
        gradients(expert_mlp_reference, *inputs),
        strict=True,
    ):
        assert (a - b).norm() <= 1e-5 * b.norm(), name

# %% [markdown]
# On this machine, forward and backward, the best of five: a layer of the tiny model, and one of fine-grained experts
# whose runs have 32 pairs. A dense product is the ceiling.

# %%
import time
from functools import partial


def best_of_five(run) -> float:
    """Seconds that `run` takes."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


torch.manual_seed(0)
a = torch.randn(1024, 1024)
print(f"one dense product: {2 * 1024**3 / best_of_five(lambda: a @ a) / 1e9:.0f} GFLOP/s")
for T, H, E, K, I in ((2048, 256, 16, 2, 256), (512, 256, 128, 8, 96)):
    tokens = torch.randn(T, H)
    gate_up, down = torch.randn(E, 2 * I, H) / H**0.5, torch.randn(E, H, I) / I**0.5
    weights, expert_ids = torch.softmax(torch.randn(T, E), dim=1).topk(K)
    print(f"\n{T} tokens, {E} experts of {I}, top_k {K}")
    flops = 18 * T * K * H * I  # three products of 2HI each, thrice: forward, input and weight gradients
    for name, function in (("reference loop", expert_mlp_reference), ("sorted, by hand", ExpertMLP.apply)):
        seconds = best_of_five(partial(gradients, function, tokens, expert_ids, weights, gate_up, down))
        print(f"{name:16} {1e3 * seconds:6.1f} ms, {flops / seconds / 1e9:5.0f} GFLOP/s")

# %% [markdown]
# ## The layer
#
# The same plan, with all experts at once, is what the [Triton kernels](12_expert_mlp.py) carry out on a GPU. They
# fetch weights in pieces of 16 bytes, so rows must be a multiple of that: 8 features in bf16. What they cannot take,
# odd widths and float64, takes the path above on a GPU too; that is right, slow, and makes the host wait.


# %%
#| export
def kernels_take(tokens: Tensor, expert_hidden: int) -> bool:
    """Whether the kernels compute experts of this width for `tokens` (T, H)."""
    aligned = all(width * tokens.element_size() % 16 == 0 for width in (tokens.shape[1], expert_hidden))
    return aligned and kernels_serve(tokens)


# %%
print("the kernels take these tokens, which are on the CPU:", kernels_take(tokens, I))


# %%
#| export
class Experts(nn.Module):
    """`experts` SwiGLU MLPs of width `expert_hidden` over `hidden` features, in two stacked parameters."""

    def __init__(self, hidden: int, experts: int, expert_hidden: int):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * expert_hidden, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, expert_hidden))

    def forward(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """For each token the weighted sum of its experts' outputs: (T, H) in the dtype of `tokens` (T, H).

        `expert_ids` (T, K), -1 for a pair that is not computed here; `weights` (T, K), fp32."""
        if kernels_take(tokens, self.down.shape[2]):
            return triton_expert_mlp(tokens, expert_ids, weights, self.gate_up, self.down)
        gate_up, down = self.gate_up.to(tokens.dtype), self.down.to(tokens.dtype)
        return ExpertMLP.apply(tokens, expert_ids, weights, gate_up, down)


# %%
layer = Experts(16, 4, 24)
for parameter in layer.parameters():
    nn.init.normal_(parameter, std=0.2)
print(", ".join(f"{name} {tuple(p.shape)}" for name, p in layer.named_parameters()))
tokens = torch.randn(12, 16)
weights, expert_ids = torch.softmax(torch.randn(12, 4), dim=1).topk(2)
expected = expert_mlp_reference(tokens, expert_ids, weights, *layer.parameters())
torch.testing.assert_close(layer(tokens, expert_ids, weights), expected)

# %% [markdown]
# Yours to do: [experts without wasted work](exercises/22_experts.py).
#
# Next: the experts of GPT-OSS, [clamped and with biases](22a_clamped_experts.py), then the parts of the layer that are
# not an MLP: [linear](23_linear.py), [norm](24_norm.py), [positions](25_rotary.py) and [attention](26_attention.py).
