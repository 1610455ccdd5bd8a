# %% [markdown]
# # Expert parallelism
#
# > Tokens travel to the ranks that hold their experts, once a rank, and their outputs travel home as one row.
#
# With `n` ranks each holds E / n of a layer's E experts. A token that its router sends to K experts has to
# be where those experts are. The plain way sends a copy of the token for each of its K experts. But several
# of a token's experts often live on one rank, and the token need travel there only once: *deduplicated*
# dispatch. Which of the arrived token's experts are meant travels along as a list of numbers, a few bytes
# beside a token's thousands. On the way back the rank adds up its experts' weighted outputs, so one row
# returns, whatever the number of experts.
#
# ## How much that saves
#
# If the K experts are drawn at random without repetition, a token misses one given rank with probability
# $\binom{E - E/n}{K} / \binom{E}{K}$. So it visits on average
#
# $$ v = n \left(1 - \binom{E - E/n}{K} \Big/ \binom{E}{K}\right) $$
#
# ranks, against $K$ copies sent without deduplication. Of either, a share of $1/n$ stays at home.

# %%
#| default_exp parallel.expert

# %%
#| export
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pithtrain.config import UserError
from pithtrain.layers.router import Routed
from pithtrain.models.stages import Arrived

# %% [markdown]
# ## Which row goes where
#
# Rows are sent in the order of their destination, and of the token within it. `slots[t, r]` is the row in
# which token t goes to rank r, or -1 where it does not go. With a table of visits, that is a running count.


# %%
#| export
def plan_rows(expert_ids: Tensor, experts_per_rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Row of each visit, (T, ranks) int64 with -1 for none, and rows for each rank, (ranks,) int64."""
    visits = torch.zeros(len(expert_ids), ranks, dtype=torch.bool, device=expert_ids.device)
    visits.scatter_(1, expert_ids // experts_per_rank, True)
    by_rank = visits.t().flatten()
    slots = (by_rank.cumsum(0) - 1).masked_fill(~by_rank, -1)
    return slots.view(ranks, -1).t(), visits.sum(dim=0)


# %%
expert_ids = torch.tensor([[0, 1, 7], [4, 5, 6], [2, 3, 4]])  # three tokens, three experts each
slots, counts = plan_rows(expert_ids, experts_per_rank=4, ranks=2)
print("row of each token's visit to rank 0 and rank 1:", slots.tolist(), "rows for each rank:", counts.tolist())

# %% [markdown]
# ## Measured against the closed form
#
# Random routing of 4,096 tokens to 128 experts, counted by `plan_rows` itself: what leaves the rank, in
# bytes of bf16 tokens of width 2,048, with and without deduplication.

# %%
from math import comb

import matplotlib.pyplot as plt


def sent_bytes(top_k, ranks, experts=128, tokens=4096, width=2048):
    choice = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).topk(top_k).indices
    away = plan_rows(choice, experts // ranks, ranks)[1][1:].sum().item()  # rank 0 is home
    copies = (choice >= experts // ranks).sum().item()
    visits = (ranks - 1) * (1 - comb(experts - experts // ranks, top_k) / comb(experts, top_k))
    return away * width * 2, copies * width * 2, visits * tokens * width * 2


fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for ax, values, sweep in (
    (axes[0], [1, 2, 4, 6, 8, 12, 16], lambda value: sent_bytes(value, 8)),
    (axes[1], [2, 4, 8, 16, 32, 64], lambda value: sent_bytes(8, value)),
):
    once, plain, formula = zip(*map(sweep, values), strict=True)
    ax.plot(values, [b / 1e6 for b in plain], "o-", label="a copy for each expert")
    ax.plot(values, [b / 1e6 for b in once], "o", label="once for each rank")
    ax.plot(values, [b / 1e6 for b in formula], "k:", label="closed form")
    assert all(abs(a / b - 1) < 0.02 for a, b in zip(once, formula, strict=True))
axes[0].set(xlabel="top_k (8 ranks)", ylabel="MB sent by a rank, one way", title="More experts a token")
axes[1].set(xlabel="ranks (top_k 8)", title="More ranks", xscale="log")
axes[0].legend()
fig

# %% [markdown]
# Eight experts on eight ranks: deduplication saves a third of the bytes. The larger K is beside n, the more.
#
# ## The journey
#
# What both directions need is kept in a `Journey`. The numbers of rows must be known on the host, because
# the transfers are given their sizes there: one copy of 2n numbers, the only wait of the host in a layer.


# %%
#| export
class Journey(NamedTuple):
    """How T tokens went out in P rows, Q of them arriving here from all ranks."""

    rows: Tensor  #: (P,) int64, the token of each row sent
    sent: list[int]  #: rows to each rank
    received: list[int]  #: rows from each rank
    tokens: int  #: T


# %%
#| export
def travel(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Start sending the rows of `x`, `sent[r]` of them to rank r; the rows that will have arrived, and the work."""
    arriving = x.new_empty(sum(received), *x.shape[1:])
    return arriving, dist.all_to_all_single(arriving, x, received, sent, group=group, async_op=True)


# %% [markdown]
# The two directions are each other's backward: the gradient of what was gathered and sent is received and
# added up, and the other way round.


# %%
#| export
def add_rows(rows: Tensor, journey: Journey) -> Tensor:
    """The sum over a token's rows (P, ...), for each token: (T, ...); added in fp32."""
    total = torch.zeros(journey.tokens, *rows.shape[1:], dtype=torch.float32, device=rows.device)
    return total.index_add_(0, journey.rows, rows.float()).to(rows.dtype)


# %%
#| export
class Dispatch(torch.autograd.Function):
    """Tokens (T, H) and weights (T, K) as rows at their experts' ranks: (Q, H), (Q, K)."""

    @staticmethod
    def forward(ctx, tokens: Tensor, weights: Tensor, journey: Journey, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        ctx.journey, ctx.group = journey, group
        there = (journey.received, journey.sent, group)
        out, work = travel(tokens.index_select(0, journey.rows), *there)
        out_weights, work_weights = travel(weights.index_select(0, journey.rows), *there)
        work.wait()
        work_weights.wait()
        return out, out_weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        back = (ctx.journey.sent, ctx.journey.received, ctx.group)
        home, work = travel(grad.contiguous(), *back)
        home_weights, work_weights = travel(grad_weights.contiguous(), *back)
        work.wait()
        work_weights.wait()
        return add_rows(home, ctx.journey), add_rows(home_weights, ctx.journey), None, None


class Combine(torch.autograd.Function):
    """Rows (Q, H) at their experts' ranks, back home and added up by token: (T, H)."""

    @staticmethod
    def forward(ctx, output: Tensor, journey: Journey, group: dist.ProcessGroup) -> Tensor:
        ctx.journey, ctx.group = journey, group
        home, work = travel(output, journey.sent, journey.received, group)
        work.wait()
        return add_rows(home, journey)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        there, work = travel(grad.index_select(0, ctx.journey.rows), ctx.journey.received, ctx.journey.sent, ctx.group)
        work.wait()
        return there, None, None


# %% [markdown]
# ## Stages 2 and 4
#
# The exchange that a [layer's driver](30_stages.py) calls.


# %%
#| export
class ExpertExchange:
    """Expert parallelism over `group`: rank r of n holds the r-th n-th of every layer's experts."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.ranks, self.rank = group, group.size(), group.rank()

    def share(self, experts: int) -> range:
        if experts % self.ranks:
            raise UserError(f"mesh.ep: {self.ranks} does not divide model.experts, {experts}")
        own = experts // self.ranks
        return range(self.rank * own, (self.rank + 1) * own)

    def dispatch(self, tokens: Tensor, routed: Routed) -> tuple[Arrived, Journey]:
        own = len(self.share(routed.probs.shape[1]))
        slots, counts = plan_rows(routed.expert_ids, own, self.ranks)
        both = torch.stack([counts, counts])
        dist.all_to_all_single(both[1], both[0].clone(), group=self.group)
        sent, received = both.tolist()  # the one wait for the device
        rows = torch.empty(sum(sent), dtype=torch.long, device=tokens.device)
        token, rank = (slots >= 0).nonzero(as_tuple=True)
        rows[slots[token, rank]] = token
        journey = Journey(rows, sent, received, len(tokens))
        target = torch.arange(self.ranks, device=rows.device).repeat_interleave(torch.tensor(sent, device=rows.device))
        ids = routed.expert_ids.index_select(0, rows) - (target * own).unsqueeze(1)
        ids = torch.where((ids >= 0) & (ids < own), ids, -1)
        out_ids, work = travel(ids, received, sent, self.group)
        out, weights = Dispatch.apply(tokens, routed.weights, journey, self.group)
        work.wait()
        return Arrived(out, out_ids, weights), journey

    def combine(self, output: Tensor, journey: Journey) -> Tensor:
        return Combine.apply(output, journey, self.group)
