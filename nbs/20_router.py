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
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pithtrain.kernels.lang import kernels_serve
from pithtrain.kernels.router import Routed, triton_route

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
# ## Experts in groups
#
# When experts live on many machines, a token that visits eight of them may have to travel to eight. DeepSeek
# (V2, arXiv 2405.04434; V3, arXiv 2412.19437) bounds the travel: experts stand in groups, one group to a
# machine, and a token may only choose from its few best groups. How good a group is for a token is read off
# its best expert (V2) or its two best (V3).


# %%
#| export
def choose_in_groups(scores: Tensor, top_k: int, groups: int, top_groups: int, best: int) -> Tensor:
    """Ids (T, top_k), best first, of the highest `scores` (T, E) among the experts of the `top_groups` best groups.

    A group is a run of E / groups neighbouring experts, as good as the sum of its `best` highest scores."""
    grouped = scores.unflatten(1, (groups, -1))
    value = grouped.topk(min(best, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    closed = torch.ones_like(value, dtype=torch.bool).scatter(1, value.topk(top_groups).indices, False)
    return grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1).topk(top_k).indices


# %%
scores = torch.tensor([[0.9, 0.0, 0.6, 0.5, 0.1, 0.2]])  # three groups of two
for best in (1, 2):
    ids = choose_in_groups(scores, top_k=2, groups=3, top_groups=1, best=best)
    print(f"judged by the best {best}: experts {ids[0].tolist()}")

# %% [markdown]
# Judged by its single best expert the first group wins, though its second is useless; judged by two, the
# second group does.
#
# What a score is differs too. Where V2 takes the softmax, V3 takes a sigmoid: each expert is scored by
# itself, and none goes down because another goes up. With 256 experts, softmax scores would be small numbers
# of very different size, on which a selection bias of one step for all could not act evenly. $\lambda$ scales
# the weights, so that the experts' part of the layer is as large as the rest:
#
# $$p_e = \operatorname{softmax}_e(r \cdot x) \;\text{(V2)} \quad\text{or}\quad p_e = \sigma(r_e \cdot x) \;\text{(V3)},
#   \qquad w_e = \lambda\, p_e \;\;\text{or}\;\; \lambda\, \frac{p_e}{\sum_{j \in S} p_j}.$$
#
# ## All tokens at once
#
# Scores and choice are float32 whatever the model computes in: two experts whose scores differ in
# the fourth digit would tie in bfloat16, and a tie broken differently on two machines is a different model.
#
# A bias can choose experts whose probabilities have all underflowed to zero. Their sum plus 1e-20 as the divisor makes
# their weights zero then, where the bare sum would make them NaN. What comes out is [the kernel's](13_router_kernel.py)
# `Routed`: `weights` and `expert_ids` (T, K), and what a [balance loss](21_balance.py) asks for, `probs` (T, E) and
# each expert's `load` (E,).


# %%
#| export
def shares(scores: Tensor) -> Tensor:
    """`scores` divided by their sum over the last axis; of a sum of zero all shares are zero."""
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)  # lost in fp32's rounding of any sum above 1e-12


def expert_load(expert_ids: Tensor, experts: int) -> Tensor:
    """How often each of so many experts is named along the last axis, (..., experts) int64."""
    load = torch.zeros(*expert_ids.shape[:-1], experts, dtype=torch.long, device=expert_ids.device)
    return load.scatter_add_(-1, expert_ids, torch.ones_like(expert_ids))


# %%
#| export
def route(
    tokens: Tensor, weight: Tensor, bias: Tensor, top_k: int, renormalise: bool,
    sigmoid: bool = False, scale: float = 1.0, groups: int = 1, top_groups: int = 1,
) -> Routed:  # fmt: skip
    """Route `tokens` (T, H) by `weight` (E, H), in fp32; `bias` (E,) counts in the choice and `scale` in the weights.

    Experts are scored by the softmax and groups by their best, or with `sigmoid` (DeepSeek-V3, arXiv 2412.19437) by
    that and by their two best; those scores are divided by their sum to serve as `probs`. See `choose_in_groups`."""
    logits = F.linear(tokens.float(), weight.float())
    scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
    expert_ids = choose_in_groups(scores.detach() + bias, top_k, groups, top_groups, best=2 if sigmoid else 1)
    weights = scores.gather(1, expert_ids)
    weights = shares(weights) if renormalise else weights
    return Routed(
        weights * scale,
        expert_ids,
        shares(scores) if sigmoid else scores,
        expert_load(expert_ids.flatten(), len(weight)),
    )


# %%
routed = route(tokens, router, torch.zeros(8), top_k=2, renormalise=True)
for i, token in enumerate(tokens):
    chosen, weights = route_one(token, router, top_k=2)
    assert routed.expert_ids[i].tolist() == chosen
    torch.testing.assert_close(routed.weights[i], torch.tensor(weights))
print("load:", routed.load.tolist())

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
# leaving it out would route a resumed run differently. On a GPU, unless experts stand in groups or are more than 2,048,
# [one kernel](13_router_kernel.py) does all of `route`. It gets the weight rounded to the dtype of the tokens, as all
# other weights are, so that tensor cores multiply; a few tokens whose last two candidates are nearly tied choose
# differently for it. Sums, and everything after them, are float32 all the same.


# %%
#| export
class Router(nn.Module):
    """Router of `experts` experts over `hidden` features; the other settings are those of `route`."""

    def __init__(
        self, hidden: int, experts: int, top_k: int, renormalise: bool,
        sigmoid: bool = False, scale: float = 1.0, groups: int = 1, top_groups: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.top_k, self.renormalise, self.sigmoid, self.scale = top_k, renormalise, sigmoid, scale
        self.groups, self.top_groups = groups, top_groups
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))

    def forward(self, tokens: Tensor) -> Routed:
        """Route `tokens` (T, hidden)."""
        scoring = self.renormalise, self.sigmoid, self.scale
        if self.groups > 1 or len(self.weight) > 2048 or not kernels_serve(tokens):  # beyond, the kernel has no room
            return route(tokens, self.weight, self.bias, self.top_k, *scoring, self.groups, self.top_groups)
        found = triton_route(tokens, self.weight.to(tokens.dtype), self.top_k, self.bias, *scoring)
        return found._replace(probs=shares(found.probs)) if self.sigmoid else found


# %% [markdown]
# Without a balance loss the gradient arrives through the weights alone. How far does it reach? One token, two chosen
# experts:

# %%
layer = Router(16, 8, top_k=2, renormalise=True)
nn.init.normal_(layer.weight, std=0.25)
one = layer(tokens[:1])
one.weights[0, 0].backward()
print("chosen experts:", one.expert_ids[0].tolist())
print("gradient norm of each router row:", [f"{g:.3f}" for g in layer.weight.grad.norm(dim=1)])

# %% [markdown]
# The softmax couples every row to every other, but renormalising divides that coupling out: only the
# chosen rows move. An expert that no token chooses gets no gradient at all, and a router needs help to
# keep its experts busy: [balance](21_balance.py).
#
# ## What groups save
#
# 16 experts a group, 8 groups, 8 experts a token. Each bar counts tokens by the number
# of groups, and so of machines, that they visit. Free choice spreads a token over five or six, the bound keeps
# it within three.

# %%
torch.manual_seed(0)
many, weight = torch.randn(4000, 32), torch.randn(128, 32) / 6
fig, ax = plt.subplots(figsize=(6, 3))
for offset, top_groups in ((-0.2, 8), (0.2, 3)):
    router = Router(32, 128, top_k=8, renormalise=False, groups=8, top_groups=top_groups)
    router.weight.data.copy_(weight)
    machines = torch.zeros(4000, 8).scatter_(1, router(many).expert_ids // 16, 1).sum(dim=1).long()
    ax.bar(torch.arange(9) + offset, machines.bincount(minlength=9) / 4000, 0.4, label=f"best {top_groups} of 8 groups")
    print(f"best {top_groups} of 8 groups: {machines.float().mean():.2f} machines a token")
ax.set(title="Machines that a token travels to", xlabel="groups visited", ylabel="share of tokens")
ax.legend()
fig

# %% [markdown]
# Yours to do: [route a batch of tokens](exercises/20_router.py). Next: keeping experts busy: [balance](21_balance.py).
