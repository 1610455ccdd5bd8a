# %% [markdown]
# # The router: which experts a token visits
#
# > Scores every expert for every token, keeps the best `top_k`, and gives each a weight.
#
# In a dense transformer every token passes through one MLP. In a Mixture-of-Experts there are many, the
# *experts*, and a token visits only a few: the model's capacity grows with the number of experts, its
# cost with `top_k`. What decides is one small matrix, the router.

# %%
#| default_exp layers.router

# %%
#| export
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %% [markdown]
# ## The maths
#
# For a token $x \in \mathbb{R}^H$ and $E$ experts with router rows $r_e \in \mathbb{R}^H$,
#
# $$p_e = \frac{\exp(r_e \cdot x)}{\sum_{j} \exp(r_j \cdot x)}, \qquad
#   S = \operatorname{top\text{-}k}_e(p_e + b_e), \qquad
#   w_e = \frac{p_e}{\sum_{j \in S} p_j} \quad (e \in S).$$
#
# $b_e$ is a bias that only takes part in the choice, never in the weight. It is zero unless it is used to
# keep experts equally busy ([next notebook](21_balance.py)). Dividing by the sum over $S$ is
# *renormalisation* (Qwen3-MoE does it; some families do not).
#
# The choice $S$ has no gradient. The router still learns, because the weights $w_e$ scale the experts'
# outputs: an expert that helps pulls its own probability up.
#
# The smallest true implementation handles one token:


# %%
def route_one(x, router, top_k):
    p = torch.softmax(router @ x, dim=0)
    chosen = sorted(range(len(p)), key=lambda e: -p[e])[:top_k]
    total = sum(p[e] for e in chosen)
    return chosen, [float(p[e] / total) for e in chosen]


torch.manual_seed(0)
router = torch.randn(8, 16) / 4
tokens = torch.randn(5, 16)
for token in tokens:
    chosen, weights = route_one(token, router, top_k=2)
    print(chosen, [f"{w:.2f}" for w in weights])

# %% [markdown]
# ## All tokens at once
#
# Scores, softmax and choice are float32 whatever the model computes in: two experts whose scores differ in
# the fourth digit would tie in bfloat16, and a tie broken differently on two machines is a different model.


# %%
#| export
class Routed(NamedTuple):
    """Where tokens go. T tokens, K = top_k, E experts."""

    weights: Tensor  #: (T, K) fp32, what each chosen expert's output is multiplied by
    expert_ids: Tensor  #: (T, K) int64, the chosen experts, best first
    probs: Tensor  #: (T, E) fp32, the router's probabilities, for balance losses


# %%
#| export
def route(tokens: Tensor, weight: Tensor, bias: Tensor, top_k: int, renormalise: bool) -> Routed:
    """Softmax routing of `tokens` (T, H) by `weight` (E, H) with a selection `bias` (E,) in fp32."""
    probs = torch.softmax(F.linear(tokens.float(), weight.float()), dim=-1)
    expert_ids = torch.topk(probs.detach() + bias, top_k, dim=-1).indices
    weights = probs.gather(1, expert_ids)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routed(weights, expert_ids, probs)


# %%
routed = route(tokens, router, torch.zeros(8), top_k=2, renormalise=True)
for i, token in enumerate(tokens):
    chosen, weights = route_one(token, router, top_k=2)
    assert routed.expert_ids[i].tolist() == chosen
    torch.testing.assert_close(routed.weights[i], torch.tensor(weights))

# %% [markdown]
# ## What the router sees
#
# Four hundred tokens in two dimensions, four experts, `top_k` of 1: the router's rows cut the plane into
# sectors. The colour of a point is its expert, the arrows are the rows of the router.

# %%
import matplotlib.pyplot as plt

torch.manual_seed(1)
plane, rows = torch.randn(400, 2), F.normalize(torch.randn(4, 2), dim=1)
sectors = route(plane, rows * 3, torch.zeros(4), top_k=1, renormalise=False)
fig, ax = plt.subplots(figsize=(5, 4.4))
shade = sectors.probs.max(dim=1).values
ax.scatter(*plane.T, c=[f"C{e}" for e in sectors.expert_ids[:, 0]], alpha=shade.tolist(), s=18)
for e, (x, y) in enumerate(rows):
    ax.annotate("", (2 * float(x), 2 * float(y)), (0, 0), arrowprops={"color": f"C{e}", "width": 2})
ax.set(title="A router of four experts divides the plane", xlabel="feature 0", ylabel="feature 1", aspect="equal")
fig

# %% [markdown]
# Points near a border are pale: the router is unsure there, and training moves the border through them.
#
# ## The layer
#
# The bias is a buffer, not a parameter: no gradient reaches it. It is saved with the model, because
# leaving it out would route a resumed run differently. ([One kernel](13_router_kernel.py) does all of `route`
# on a GPU.)


# %%
#| export
class Router(nn.Module):
    """Softmax router of `experts` experts over `hidden` features, choosing `top_k` for each token."""

    def __init__(self, hidden: int, experts: int, top_k: int, renormalise: bool):
        super().__init__()
        self.top_k, self.renormalise = top_k, renormalise
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))

    def forward(self, tokens: Tensor) -> Routed:
        """Route `tokens` (T, hidden)."""
        return route(tokens, self.weight, self.bias, self.top_k, self.renormalise)


# %% [markdown]
# The gradient arrives through the weights alone. How far does it reach? One token, two chosen experts:

# %%
layer = Router(16, 8, top_k=2, renormalise=True)
nn.init.normal_(layer.weight, std=0.25)
one = layer(tokens[:1])
one.weights[0, 0].backward()
print("chosen experts:", one.expert_ids[0].tolist())
print("gradient norm of each router row:", [f"{g:.3f}" for g in layer.weight.grad.norm(dim=1)])

# %% [markdown]
# The softmax couples every row to every other, but renormalising divides that coupling out: only the
# chosen rows move. An expert that no token chooses therefore stays unchosen, and a router needs help to
# keep its experts busy: [balance](21_balance.py).
