# %% [markdown]
# # Clamped experts with biases
#
# > The expert MLPs of GPT-OSS: a SwiGLU whose inputs are clamped, and a bias on every product.
#
# [Experts](22_experts.py) multiply two projections of a token with each other, so a single large feature can
# grow as the square. GPT-OSS (arXiv 2508.10925) holds both factors within a limit.

# %%
#| default_exp layers.clamped_experts

# %%
#| export
import torch
from torch import Tensor, nn

from pithtrain.kernels.expert_mlp import reference_expert_mlp, triton_expert_mlp
from pithtrain.layers.experts import kernels_take

# %% [markdown]
# ## The maths
#
# With gate $g = G_e x + c_e$ and up projection $u = U_e x + d_e$ of expert $e$, both clamped at 7 (the gate from above
# alone, since its negative side is flat),
#
# $$y = \sum_{e \in S} w_e \left( D_e\, \big( g\, \sigma(1.702\, g) \odot (u + 1) \big) + f_e \right).$$
#
# In the code $c_e$ on top of $d_e$ is `gate_up_bias[e]`, and $f_e$ is `down_bias[e]`. $g\,\sigma(1.702\,g)$ is close
# to GELU, and the 1 lets the gate pass where $u$ is zero. The bias $f_e$ is inside the bracket: the routing weight
# scales it too.


# %%
def clamped_swiglu(projected):
    """(..., 2I), gates first, to (..., I)."""
    gate, up = projected.chunk(2, dim=-1)
    gate, up = gate.clamp(max=7), up.clamp(min=-7, max=7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


# %% [markdown]
# Beside the usual SwiGLU, over the gate, with the up projection held at some values. Solid lines stop growing
# at 7; the clamped form passes something where $u = 0$ and nothing at $u = -1$.

# %%
import matplotlib.pyplot as plt
import torch.nn.functional as F

gate = torch.linspace(-6, 12, 200)
fig, ax = plt.subplots(figsize=(6.5, 3.2))
for colour, up in (("C0", -1.0), ("C1", 0.0), ("C2", 1.0), ("C3", 12.0)):
    ax.plot(gate, clamped_swiglu(torch.stack([gate, torch.full_like(gate, up)], dim=1)), colour, label=f"u = {up:g}")
    ax.plot(gate, F.silu(gate) * up, colour, ls=":")
ax.set(title="Clamped SwiGLU (solid) and SwiGLU (dotted)", xlabel="gate g", ylabel="output", ylim=(-12, 80))
ax.legend()
fig

# %% [markdown]
# The smallest true implementation:


# %%
def clamped_experts_reference(tokens, expert_ids, weights, gate_up, gate_up_bias, down, down_bias):
    """Shapes as in `ClampedExperts`."""
    output = torch.zeros_like(tokens)
    for expert in range(len(gate_up)):
        rows, slots = torch.where(expert_ids == expert)
        activated = clamped_swiglu(F.linear(tokens[rows], gate_up[expert], gate_up_bias[expert]))
        expert_output = F.linear(activated, down[expert], down_bias[expert])
        output = output.index_add(0, rows, weights[rows, slots, None].to(tokens.dtype) * expert_output)
    return output


# %% [markdown]
# ## The layer
#
# On a GPU the [kernels of the plain experts](12_expert_mlp.py) run it, clamps and the first biases included; elsewhere
# the loop that they are checked against, which is the one above but for the last bias. What is left,
# $\sum_e w_e f_e$, needs no pairs of a token and an expert at all. It is the tokens' weights, laid out over all
# experts, times $f$.


# %%
#| export
class ClampedExperts(nn.Module):
    """`experts` clamped SwiGLU MLPs with biases, of width `expert_hidden`, stacked. Source: arXiv 2508.10925."""

    def __init__(self, hidden: int, experts: int, expert_hidden: int):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * expert_hidden, hidden))
        self.gate_up_bias = nn.Parameter(torch.zeros(experts, 2 * expert_hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, expert_hidden))
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden))

    def forward(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """For each token the weighted sum of its experts' outputs: (T, H) in the dtype of `tokens` (T, H).

        `expert_ids` (T, K), -1 for a pair that is not computed here; `weights` (T, K), fp32."""
        run = triton_expert_mlp if kernels_take(tokens, self.down.shape[2]) else reference_expert_mlp
        output = run(tokens, expert_ids, weights, self.gate_up, self.down, self.gate_up_bias.to(tokens.dtype))
        ids = expert_ids.where(expert_ids >= 0, len(self.down))
        shares = weights.new_zeros(len(tokens), len(self.down) + 1).scatter_add(1, ids, weights)[:, :-1]
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return torch.addmm(output.to(wide), shares.to(wide), self.down_bias.to(wide)).to(tokens.dtype)


# %% [markdown]
# On a CPU both are loops: what is compared is the last bias. `tests/test_clamped_experts.py` compares the kernels.

# %%
torch.manual_seed(0)
T, H, E, K, I = 12, 16, 4, 2, 24  # noqa: E741 (tokens, hidden, experts, top_k, expert hidden)
tokens = (4 * torch.randn(T, H)).requires_grad_()  # large enough to be clamped
weights, expert_ids = torch.softmax(torch.randn(T, E), dim=1).topk(K)
expert_ids[::3, 0] = -1
layer = ClampedExperts(H, E, I)
for parameter in layer.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
leaves = [tokens, weights.requires_grad_(), *layer.parameters()]
parts = (layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias)
ours, true = layer(tokens, expert_ids, weights), clamped_experts_reference(tokens, expert_ids, weights, *parts)
upstream = torch.randn(T, H)
our_grads, true_grads = (torch.autograd.grad(y, leaves, upstream) for y in (ours, true))
names = ("output", "tokens", "weights", *(name for name, _ in layer.named_parameters()))
for name, a, b in zip(names, (ours, *our_grads), (true, *true_grads), strict=True):
    assert (a - b).norm() <= 1e-5 * b.norm()
    print(f"{name:14} relative difference {((a - b).norm() / b.norm()).item():.1e}")

# %% [markdown]
# What the kernels save on a GPU, for one layer of GPT-OSS-20B's widths, forward and backward, beside the same sum by
# PyTorch's grouped product over sorted pairs, `grouped_mm` (`tools/clamped_experts.py`; when this was measured, that
# also looked out for pairs of id -1):

# %%
import json
from pathlib import Path

import pithtrain

file = Path(pithtrain.__file__).parent.parent / "docs" / "benchmarks" / "clamped-h200.json"
if file.exists():
    measured = json.loads(file.read_text())
    print(f"{measured['measured']}, {measured['date']}, {measured['shape']['tokens']} tokens")
    for row in measured["rows"]:
        print(f"{row['name']:12} {row['ms']:6.1f} ms {row['peak_gib']:5.2f} GiB beyond inputs and weights")

# %% [markdown]
# Next: the parts of a layer that are not experts: [linear](23_linear.py). The family that these experts
# belong to is [GPT-OSS](34_gpt_oss.py).
