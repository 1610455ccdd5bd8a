# %% [markdown]
# # Which token travels in which row
#
# > The index computation of expert-parallel dispatch: from the router's choice to the rows that each rank gets.
#
# With $n$ ranks, rank $r$ holds the $r$-th share of $m = E / n$ experts. A token *visits* every rank that holds
# one of its experts, and travels there once, in one row. Before anything can be sent it must be known how
# many rows go to each rank, which token each row carries, and which experts of that rank it is meant for.
#
# ```
# expert_ids (m = 4, n = 2)     visits      slots                rows            local ids
#  token 0: 0 1 7                x x        0 2                  0: token 0      0  1 -1   ┐ to rank 0
#  token 1: 4 5 6                . x       -1 3                  1: token 2      2  3 -1   ┘
#  token 2: 2 3 4                x x        1 4                  2: token 0     -1 -1  3   ┐
#                                                                3: token 1      0  1  2   │ to rank 1
#                        counts  2 3                             4: token 2     -1 -1  0   ┘
# ```
#
# Rows stand in the order of their rank, and within it of their token. So a rank's rows are one contiguous
# piece, which is what an all-to-all wants, and the order never depends on timing.

# %%
#| default_exp kernels.dispatch

# %%
#| export
from typing import NamedTuple

import torch
from torch import Tensor

from pithtrain.kernels.lang import kernels_serve, tl, triton, want

# %% [markdown]
# The number of rows is known on the device alone. A token visits no more than $\min(K, n)$ ranks, so buffers
# of $T \min(K, n)$ rows always suffice, and nothing has to wait for the host: whoever learns the counts cuts
# the buffers there.


# %%
#| export
class Plan(NamedTuple):
    """Rows in which T tokens travel to n ranks; K = top_k. The first `counts.sum()` rows are valid."""

    counts: Tensor  #: (n,) int64, rows for each rank
    slots: Tensor  #: (T, n) int32, the row in which a token goes to a rank, -1 for none
    rows: Tensor  #: (T * min(K, n),) int64, the token of each row
    local_ids: Tensor  #: (T * min(K, n), K) int64, its experts numbered from the rank's first, -1 for others


# %% [markdown]
# ## The smallest true implementation
#
# Let $v_{tr}$ be 1 if token $t$ visits rank $r$. Its row is the number of visits before it, rank by rank:
#
# $$\mathrm{slot}_{tr} = \sum_{r' < r} \sum_{t'} v_{t'r'} + \sum_{t' < t} v_{t'r}.$$


# %%
#| export
def reference_plan_rows(expert_ids: Tensor, experts_per_rank: int, ranks: int) -> Plan:
    """`plan_rows` in plain PyTorch; its `rows` and `local_ids` end with the last valid row."""
    visits = torch.zeros(len(expert_ids), ranks, dtype=torch.bool, device=expert_ids.device)
    visits.scatter_(1, expert_ids // experts_per_rank, True)
    by_rank = visits.t()
    slots = (by_rank.flatten().cumsum(0) - 1).view_as(by_rank).masked_fill(~by_rank, -1)
    rank, rows = by_rank.nonzero(as_tuple=True)
    local = expert_ids[rows] - (rank * experts_per_rank).unsqueeze(1)
    local_ids = torch.where((local >= 0) & (local < experts_per_rank), local, -1)
    return Plan(visits.sum(dim=0), slots.t().int(), rows, local_ids)


# %%
ids = torch.tensor([[0, 1, 7], [4, 5, 6], [2, 3, 4]])
for name, value in reference_plan_rows(ids, experts_per_rank=4, ranks=2)._asdict().items():
    print(f"{name:10}{value.tolist()}")

# %% [markdown]
# ## The kernels
#
# Two launches over blocks of 64 tokens. The first counts each block's visits to each rank into a row of a
# (blocks, n) table. In the second every program adds up the table for itself, the rows before its own and all:
# the table is small (256 blocks of 8 ranks: 8 KB, out of the cache), and a third launch would take longer.
# A running count within the block does the rest.


# %%
#| export
@triton.jit
def block_visits(id_ptr, t, T, own, K: tl.constexpr, BT: tl.constexpr, WIDTH: tl.constexpr):
    """(BT, WIDTH) int32: 1 where token t visits the rank of that column."""
    visits = tl.zeros([BT, WIDTH], tl.int32)
    for k in tl.static_range(K):
        expert = tl.load(id_ptr + t * K + k, mask=t < T, other=-1)
        rank = tl.where(expert >= 0, expert // own, -1)
        visits = tl.where(rank[:, None] == tl.arange(0, WIDTH)[None, :], 1, visits)
    return visits


# %%
#| export
@triton.jit
def visits_kernel(id_ptr, table_ptr, T, own, K: tl.constexpr, BT: tl.constexpr, WIDTH: tl.constexpr):
    """Visits of one block of tokens to each rank, into its row of the table (blocks, WIDTH)."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    visits = block_visits(id_ptr, t, T, own, K, BT, WIDTH)
    tl.store(table_ptr + tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.sum(visits, 0))


# %%
from pithtrain.kernels.lang import runs_triton

if runs_triton(ids):
    table = torch.empty(2, 2, dtype=torch.int32)
    visits_kernel[(2,)](ids, table, 3, 4, K=3, BT=2, WIDTH=2)
    print("visits of tokens 0 and 1, and of token 2, to each rank:", table.tolist())
    assert table.tolist() == [[1, 2], [1, 1]]


# %%
#| export
@triton.jit
def rows_kernel(
    id_ptr, table_ptr, count_ptr, slot_ptr, row_ptr, local_ptr, T, own, ranks, blocks,
    K: tl.constexpr, BT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Slots of one block of tokens, and the token and local ids of each of their rows; program 0 writes counts."""
    block, r = tl.program_id(0), tl.arange(0, WIDTH)
    before, total = tl.zeros([WIDTH], tl.int32), tl.zeros([WIDTH], tl.int32)
    for start in range(0, blocks, STEP):
        b = start + tl.arange(0, STEP)
        counts = tl.load(table_ptr + b[:, None] * WIDTH + r[None, :], mask=b[:, None] < blocks, other=0)
        before += tl.sum(tl.where(b[:, None] < block, counts, 0), 0)
        total += tl.sum(counts, 0)
    if block == 0:
        tl.store(count_ptr + r, total.to(tl.int64), mask=r < ranks)
    t = block * BT + tl.arange(0, BT)
    visits = block_visits(id_ptr, t, T, own, K, BT, WIDTH)
    row = (tl.cumsum(total, 0) - total + before)[None, :] + tl.cumsum(visits, 0) - visits
    tl.store(
        slot_ptr + t[:, None] * ranks + r[None, :],
        tl.where(visits > 0, row, -1),
        mask=(t[:, None] < T) & (r[None, :] < ranks),
    )
    row = row.to(tl.int64)
    tl.store(row_ptr + row, tl.zeros([BT, WIDTH], tl.int64) + t[:, None], mask=visits > 0)
    for k in tl.static_range(K):
        local = tl.load(id_ptr + t * K + k, mask=t < T, other=-1)[:, None] - r[None, :] * own
        local = tl.where((local >= 0) & (local < own), local, -1)
        tl.store(local_ptr + row * K + k, local.to(tl.int64), mask=visits > 0)


# %%
#| export
def triton_plan_rows(expert_ids: Tensor, experts_per_rank: int, ranks: int, block: int = 64) -> Plan:
    """`plan_rows` by the kernels, whatever the device, in blocks of `block` tokens."""
    want("expert_ids", expert_ids, (None, None), (torch.int32, torch.int64))
    if experts_per_rank < 1 or ranks < 1:
        raise ValueError(f"experts_per_rank is {experts_per_rank} and ranks {ranks}; want at least 1 of each")
    T, K = expert_ids.shape
    new = lambda *shape, dtype=torch.int64: torch.empty(shape, dtype=dtype, device=expert_ids.device)  # noqa: E731
    longest = T * min(K, ranks)
    plan = Plan(new(ranks), new(T, ranks, dtype=torch.int32), new(longest), new(longest, K))
    if T == 0:
        return plan._replace(counts=plan.counts.zero_())
    ids, blocks, width = expert_ids.contiguous(), triton.cdiv(T, block), triton.next_power_of_2(ranks)
    table, warps = new(blocks, width, dtype=torch.int32), 4 if width <= 64 else 8
    visits_kernel[(blocks,)](ids, table, T, experts_per_rank, K, block, width, num_warps=warps)
    rows_kernel[(blocks,)](
        ids, table, *plan, T, experts_per_rank, ranks, blocks, K, block, width, max(1, 4096 // width), num_warps=warps
    )
    return plan


# %%
def agree(ids, own, ranks):
    fast, true = triton_plan_rows(ids, own, ranks, block=16), reference_plan_rows(ids, own, ranks)
    assert torch.equal(fast.counts, true.counts) and torch.equal(fast.slots, true.slots)
    assert torch.equal(fast.rows[: len(true.rows)], true.rows)
    assert torch.equal(fast.local_ids[: len(true.rows)], true.local_ids)


if runs_triton(ids):
    agree(ids, 4, 2)
    agree(torch.rand(75, 12).topk(5).indices, own=4, ranks=3)

# %% [markdown]
# ## Which runs when


# %%
#| export
def plan_rows(expert_ids: Tensor, experts_per_rank: int, ranks: int) -> Plan:
    """Where tokens travel: the kernels on CUDA, the reference elsewhere.

    `expert_ids` (T, K) int64, each within [0, ranks * experts_per_rank). On CUDA nothing waits for the host, and
    `rows` and `local_ids` are as long as they can become; cut them once the counts are known."""
    run = triton_plan_rows if kernels_serve(expert_ids) else reference_plan_rows
    return run(expert_ids, experts_per_rank, ranks)


# %% [markdown]
# A picture of a plan: 40 tokens, 16 experts on four ranks, four experts a token. Each point is a row that travels.
# Left of a line are the rows for lower ranks; within a rank tokens ascend. Every token appears at most once in
# each rank's piece, and in as many pieces as it visits ranks.

# %%
import matplotlib.pyplot as plt

torch.manual_seed(0)
many = torch.rand(40, 16).topk(4).indices
plan = plan_rows(many, 4, 4)
fig, ax = plt.subplots(figsize=(8, 3))
rank_of_row = torch.arange(4).repeat_interleave(plan.counts)
experts_meant = (plan.local_ids >= 0).sum(dim=1)
ax.scatter(range(len(plan.rows)), plan.rows, c=[f"C{r}" for r in rank_of_row], s=12 * experts_meant)
for edge in plan.counts.cumsum(0)[:-1]:
    ax.axvline(edge - 0.5, color="0.7", lw=1)
ax.set(title="Rows by rank (colour); a point's size is the number of experts meant", xlabel="row", ylabel="token")
fig

# %%
print(f"{many.numel()} (token, expert) pairs travel in {len(plan.rows)} rows")
assert int(experts_meant.sum()) == many.numel()  # every pair is served exactly once

# %% [markdown]
# ## Rows come home
#
# Up to $\min(K, n)$ rows come back for a token, and are added up:
# $\mathrm{out}_t = \sum_{r} \mathrm{values}[\mathrm{slot}_{tr}]$ over the ranks that $t$ visited. PyTorch's
# `index_add_` needs an fp32 buffer of the whole sum, an fp32 copy of the rows, and on a GPU atomics, whose order
# changes from run to run. With `slots` at hand a program can *gather* instead: it owns a tile of the output, reads the
# rows that belong to it, always in the order of ranks, adds in fp32 registers, and writes once. In bytes, for 16,384
# tokens of Qwen3-30B-A3B on eight ranks, whose choices are random:

# %%
import math

T, H, E, K, n = 16384, 2048, 128, 8, 8
P = round(T * n * (1 - math.comb(E - E // n, K) / math.comb(E, K)))
moved = {
    "gathered": 2 * P * H + 2 * T * H + 4 * T * n,  # rows read, the sum written; slots
    "index_add_": (2 + 4) * P * H + (4 + 8) * P * H + (4 + 4 + 2) * T * H,  # to fp32, added in place; zeroed, rounded
}
for name, size in moved.items():
    print(f"{P} rows, {name:11} {size / 1e6:6.0f} MB")


# %%
#| export
def reference_gather_sum(values: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """`gather_sum` in plain PyTorch: added in fp32, or in float64 for float64 values."""
    wide = torch.promote_types(values.dtype, torch.float32)
    total = torch.zeros(len(slots), values.shape[1], dtype=wide, device=values.device)
    return total.index_add_(0, rows, values.to(wide)).to(values.dtype)


# %%
home = torch.arange(5.0).unsqueeze(1)  # row p brings the number p
plan = reference_plan_rows(ids, 4, 2)
print(reference_gather_sum(home, plan.rows, plan.slots).flatten().tolist(), "from rows", plan.slots.tolist())


# %%
#| export
@triton.jit
def gather_sum_kernel(
    value_ptr, slot_ptr, out_ptr, T, H, RANKS: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """out (T, H): a tile of BT tokens and BH columns, the sum of the tokens' rows in the order of ranks."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BH + tl.arange(0, BH)[None, :]
    acc = tl.zeros([BT, BH], tl.float32)
    for r in tl.range(0, RANKS, loop_unroll_factor=8):
        slot = tl.load(slot_ptr + t.to(tl.int64) * RANKS + r, mask=t < T, other=-1).to(tl.int64)[:, None]
        acc += tl.load(value_ptr + slot * H + column, mask=(slot >= 0) & (column < H), other=0.0).to(tl.float32)
    out = out_ptr + t.to(tl.int64)[:, None] * H + column
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(t[:, None] < T) & (column < H))


# %%
#| export
def triton_gather_sum(values: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """`gather_sum` by the kernel, whatever the device; `rows` is not read."""
    want("values", values, (None, None), (torch.float32, torch.bfloat16, torch.float16))
    want("slots", slots, (None, None), (torch.int32,), values.device)
    (T, ranks), H = slots.shape, values.shape[1]
    out = values.new_empty(T, H)
    if out.numel():
        columns = min(1024, triton.next_power_of_2(H))
        tokens = 1024 // columns
        grid = (triton.cdiv(T, tokens), triton.cdiv(H, columns))
        gather_sum_kernel[grid](values.contiguous(), slots.contiguous(), out, T, H, ranks, tokens, columns)
    return out


# %%
if runs_triton(home):
    torch.manual_seed(0)
    plan = reference_plan_rows(torch.rand(75, 12).topk(5).indices, 4, 3)
    for width in (1, 3, 40):
        values = torch.randn(len(plan.rows), width)
        true = reference_gather_sum(values.double(), plan.rows, plan.slots)
        difference = (triton_gather_sum(values, plan.rows, plan.slots) - true).norm() / true.norm()
        print(f"width {width:2}: relative difference from the sum in float64 {difference:.1e}")
        assert difference < 1e-6


# %%
#| export
def gather_sum(values: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """For each token the sum of its rows among `values` (P, H), added in fp32: (T, H) in the dtype of `values`.

    `rows` (P,) int64 is the token of each row, `slots` (T, n) int32 the row of each visit or -1, both from `plan_rows`.
    The kernel on CUDA, whose result does not change from run to run; the reference elsewhere."""
    run = triton_gather_sum if kernels_serve(values) else reference_gather_sum
    return run(values, rows, slots)


# %%
assert torch.equal(gather_sum(values, plan.rows, plan.slots), reference_gather_sum(values, plan.rows, plan.slots))

# %% [markdown]
# What both take on a GPU, beside what their bytes would take, stands in [the benchmark](85_bench.py);
# [expert parallelism](41_expert_parallel.py) moves the rows. Next: [rotation](17_rotary_kernel.py) of queries and keys.
