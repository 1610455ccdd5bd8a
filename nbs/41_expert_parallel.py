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
from pithtrain.kernels.dispatch import Plan, gather_sum, plan_rows
from pithtrain.layers.router import Routed
from pithtrain.models.stages import Arrived, Exchange

# %% [markdown]
# ## A token's journey
#
# Two ranks with three tokens and two experts each; every token visits two experts.
# [Which row goes where](16_dispatch_kernel.py) is computed for each rank by `plan_rows`, and the picture is drawn
# from what it says.

# %%
import matplotlib.pyplot as plt

chosen = [torch.tensor([[0, 1], [1, 2], [2, 3]]), torch.tensor([[3, 1], [3, 2], [0, 1]])]  # experts of ranks' tokens
plans = [plan_rows(ids, experts_per_rank=2, ranks=2) for ids in chosen]
sent = [list(zip(plan.rows.tolist(), plan.local_ids.tolist(), strict=True)) for plan in plans]
pieces = [[rows[: plan.counts[0]], rows[plan.counts[0] :]] for rows, plan in zip(sent, plans, strict=True)]
there = [[(source, *row) for source in range(2) for row in pieces[source][rank]] for rank in range(2)]

fig, ax = plt.subplots(figsize=(9, 4.6))
TOP = [0, 6.5]  # where a rank's part begins


def box(x, y, text, token, tall=0.72):
    ax.add_patch(plt.Rectangle((x - 0.26, y - tall / 2), 0.52, tall, color=f"C{token}", alpha=0.35))
    ax.text(x, y, text, ha="center", va="center", fontsize=8)


def line(x, y, to, token):
    ax.plot([x + 0.26, x + 0.74], [y, to], color=f"C{token}", lw=1.2)


for rank in range(2):
    ax.axhspan(TOP[rank] - 0.8, TOP[rank] + 4.8, color="0.95")
    for t in range(3):
        token, y = 3 * rank + t, TOP[rank] + 2 * t
        box(0, y, f"token {token}\n" + " ".join(f"e{e}" for e in chosen[rank][t]), token, tall=1.2)
        box(4, y, f"token {token}", token)
    for row, (t, _) in enumerate(sent[rank]):
        token, y, to = 3 * rank + t, TOP[rank] + row, int(row >= plans[rank].counts[0])
        box(1, y, f"row {row}", token)
        box(3, y, f"row {row}", token)
        line(0, TOP[rank] + 2 * t, y, token)
        line(3, y, TOP[rank] + 2 * t, token)
        place = TOP[to] + [(source, at) for source, at, _ in there[to]].index((rank, t))
        line(1, y, place, token)
        line(2, place, y, token)
    for y, (source, t, ids) in enumerate(there[rank]):
        box(2, TOP[rank] + y, " + ".join(f"e{2 * rank + e}" for e in ids if e >= 0), 3 * source + t)
names = ["tokens", "rows sent", "at their experts", "rows home", "added up"]
ax.set(title="Dispatch and combine on two ranks", xlabel="what becomes of six tokens, from left to right")
ax.set(xticks=range(5), xticklabels=names, yticks=[TOP[0] + 2, TOP[1] + 2], yticklabels=["rank 0", "rank 1"])
ax.invert_yaxis()
fig

# %% [markdown]
# A colour is a token. Token 0 visits two experts of rank 0 and is one row, in which `e0 + e1` are added up before it
# returns. Token 1 visits one expert on each rank, is two rows, and is added up at home. Rows leave in the order of
# their rank, and rows from rank 0 arrive before those from rank 1: no sorting at either end.
#
# ## Measured against the closed form
#
# Random routing of 4,096 tokens to 128 experts, counted by `plan_rows` itself: what leaves the rank on the way out,
# with and without deduplication. A row is a bf16 token of width 2,048, and beside it the numbers and the fp32 weights
# of K experts; a copy for one expert needs one of each.

# %%
from math import comb


def sent_bytes(top_k, ranks, experts=128, tokens=4096, width=2048):
    choice = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).topk(top_k).indices
    plan = plan_rows(choice, experts // ranks, ranks)
    away = plan.counts[1:].sum().item()  # rank 0 is home
    copies = (choice >= experts // ranks).sum().item()
    visits = (ranks - 1) * (1 - comb(experts - experts // ranks, top_k) / comb(experts, top_k))
    row, copy = (width * 2 + k * (plan.local_ids.element_size() + 4) for k in (top_k, 1))
    return away * row, copies * copy, visits * tokens * row


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
axes[0].set(xlabel="top_k (8 ranks)", ylabel="MB sent by a rank, on the way out", title="More experts a token")
axes[1].set(xlabel="ranks (top_k 8)", title="More ranks", xscale="log")
axes[0].legend()
fig

# %% [markdown]
# Eight experts on eight ranks: deduplication saves a third of the bytes. The larger K is beside n, the more.
#
# ## The one wait
#
# What both directions need is kept in a `Journey`. The device knows how many rows go where; but transfers are
# given their sizes, and memory is taken, by the host. So once a layer the host waits: in `announce` every rank tells
# the others how many rows it will send, and the copy of the 2n numbers to the host is started; `dispatch` waits for
# the event behind that copy. If it does so at once, the device has done all that was queued, up to the router, and
# stands still until the host has launched the next transfer. A [pipeline](57a_overlap.py) queues another microbatch's
# work in between. Nothing else here waits: rows and ids are computed into buffers of the largest possible
# size, which are cut when the numbers are known, and the way home and both backward passes use the same numbers again.


# %%
#| export
class Journey(NamedTuple):
    """How T tokens went out in P rows, Q of them arriving here from all n ranks."""

    rows: Tensor  #: (P,) int64, the token of each row sent
    slots: Tensor  #: (T, n) int32, the row of each token's visit to a rank, -1 for none
    sent: list[int]  #: rows to each rank
    received: list[int]  #: rows from each rank


# %%
#| export
class Announced(NamedTuple):
    """What a rank will send, and how many rows go where, on their way to the host."""

    plan: Plan
    counts: Tensor  #: (2, n) on the host: rows to each rank, rows from each rank
    copied: torch.cuda.Event | None  #: after which the counts are there


def wait_for_counts(announced: Announced) -> tuple[list[int], list[int]]:
    """Rows to each rank and rows from each: the host waits until it knows."""
    if announced.copied is not None:
        announced.copied.synchronize()
    sent, received = announced.counts.tolist()
    return sent, received


# %%
counts = torch.stack([plans[0].counts, torch.stack([plan.counts[0] for plan in plans])])
sent, received = wait_for_counts(Announced(plans[0], counts, None))
print("rank 0 sends", sent, "rows to the ranks and receives", received)


# %%
#| export
def travel(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends the rows of `x`, `sent[r]` of them to rank r; the rows that arrive. On a GPU, in the current stream."""
    arriving = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(arriving, x, received, sent, group=group)
    return arriving


# %% [markdown]
# Here a rank is alone: a group of one, which sends to itself. (`tests/test_expert_parallel.py` runs all of
# this on two and four processes.)

# %%
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
alone = dist.group.WORLD
travel(torch.arange(3.0).unsqueeze(1), [3], [3], alone).flatten().tolist()

# %% [markdown]
# The two directions are each other's backward: the gradient of what was gathered and sent is received and
# added up, and the other way round.


# %%
#| export
class Dispatch(torch.autograd.Function):
    """Tokens (T, H) and weights (T, K) as rows at their experts' ranks: (Q, H), (Q, K)."""

    @staticmethod
    def forward(ctx, tokens: Tensor, weights: Tensor, journey: Journey, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        ctx.journey, ctx.group = journey, group
        there = (journey.received, journey.sent, group)
        rows = journey.rows
        return travel(tokens.index_select(0, rows), *there), travel(weights.index_select(0, rows), *there)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        back = (ctx.journey.sent, ctx.journey.received, ctx.group)
        home, home_weights = travel(grad.contiguous(), *back), travel(grad_weights.contiguous(), *back)
        rows, slots = ctx.journey.rows, ctx.journey.slots
        return gather_sum(home, rows, slots), gather_sum(home_weights, rows, slots), None, None


class Combine(torch.autograd.Function):
    """Rows (Q, H) at their experts' ranks, back home and added up by token: (T, H)."""

    @staticmethod
    def forward(ctx, output: Tensor, journey: Journey, group: dist.ProcessGroup) -> Tensor:
        ctx.journey, ctx.group = journey, group
        return gather_sum(travel(output, journey.sent, journey.received, group), journey.rows, journey.slots)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = (ctx.journey.received, ctx.journey.sent, ctx.group)
        return travel(grad.index_select(0, ctx.journey.rows), *back), None, None


# %% [markdown]
# Out and home again, with nothing done in between: every token comes back once for each rank it visited, which is
# once here, and so does its gradient.

# %%
plan = plan_rows(chosen[0], experts_per_rank=4, ranks=1)
journey = Journey(plan.rows, plan.slots, [3], [3])
tokens = torch.randn(3, 5, requires_grad=True)
rows, weights = Dispatch.apply(tokens, torch.rand(3, 2), journey, alone)
back = Combine.apply(rows, journey, alone)
(gradient,) = torch.autograd.grad(back.sum(), tokens)
assert torch.equal(back, tokens) and torch.equal(gradient, torch.ones(3, 5))

# %% [markdown]
# ## Stages 2 and 4
#
# The exchange that a [layer's driver](30_stages.py) calls.


# %%
#| export
class ExpertExchange(Exchange):
    """Expert parallelism over `group`: rank r of n holds the r-th n-th of every layer's experts."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.ranks, self.rank = group, group.size(), group.rank()

    def share(self, experts: int) -> range:
        if experts % self.ranks:
            raise UserError(f"mesh.ep: {self.ranks} does not divide model.experts, {experts}")
        own = experts // self.ranks
        return range(self.rank * own, (self.rank + 1) * own)

    def announce(self, routed: Routed) -> Announced:
        own = len(self.share(routed.probs.shape[1]))
        plan = plan_rows(routed.expert_ids, own, self.ranks)
        both = torch.stack([plan.counts, plan.counts])  # the second row is written over
        dist.all_to_all_single(both[1], plan.counts, group=self.group)
        if not both.is_cuda:
            return Announced(plan, both, None)
        counts = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
        counts.copy_(both, non_blocking=True)
        return Announced(plan, counts, torch.cuda.current_stream().record_event())

    def dispatch(self, tokens: Tensor, routed: Routed, announced: Announced) -> tuple[Arrived, Journey]:
        plan, (sent, received) = announced.plan, wait_for_counts(announced)
        rows, ids = plan.rows[: sum(sent)], plan.local_ids[: sum(sent)]
        journey = Journey(rows, plan.slots, sent, received)
        out_ids = travel(ids, received, sent, self.group)
        out, weights = Dispatch.apply(tokens, routed.weights, journey, self.group)
        return Arrived(out, out_ids, weights), journey

    def combine(self, output: Tensor, journey: Journey) -> Tensor:
        return Combine.apply(output, journey, self.group)


# %% [markdown]
# Through an exchange a layer computes what it computes [at home](22_experts.py):

# %%
from pithtrain.layers.experts import Experts
from pithtrain.layers.router import Router
from pithtrain.models.stages import AtHome

torch.manual_seed(0)
router, experts = Router(16, experts=8, top_k=3, renormalise=True), Experts(16, experts=8, expert_hidden=12)
for parameter in (*router.parameters(), *experts.parameters()):
    torch.nn.init.normal_(parameter, std=0.3)
tokens = torch.randn(20, 16)
outputs = []
for exchange in (AtHome(), ExpertExchange(alone)):
    routed = router(tokens)
    arrived, journey = exchange.dispatch(tokens, routed, exchange.announce(routed))
    outputs.append(exchange.combine(experts(*arrived), journey))
assert torch.equal(*outputs)
print(f"{journey.sent[0]} rows travelled; largest difference {(outputs[0] - outputs[1]).abs().max().item()}")
dist.destroy_process_group()

# %% [markdown]
# Yours to do: [send each token once](exercises/41_dispatch.py). Next: sequences that no rank holds whole, in
# [ring attention](42_ring_attention.py).
