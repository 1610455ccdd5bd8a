# %% [markdown]
# # Sorting tokens by expert
#
# > A counting sort of (token, expert) pairs that never asks the host anything.
#
# After routing, each of $T$ tokens holds $K$ expert ids. A matrix product wants the opposite: for each
# expert, all of its tokens side by side. So the $T \times K$ *pairs* are sorted by expert. Nothing moves
# but integers: a pair's number is `token * K + k`, and the sort gives a permutation of pair numbers.
#
# ```
# expert_ids          pairs in expert order              slot: where each pair went
#  token 0: 2 0        row  0 1 | 2 3 4 | 5 6 7           token 0: 5 0
#  token 1: 1 2        pair 1 4 | 2 5 7 | 0 3 6           token 1: 2 6
#  token 2: 0 1             e=0     e=1     e=2           token 2: 1 3
#  token 3: 2 1        offsets  0 2 5 8                   token 3: 7 4
#
#                      tile 0   | 1 1 2   | 3 3 4         two rows a tile, all of one expert
#                      first_tile  0 1 3 5                tile_expert  0 1 1 2 2
# ```
#
# The sort is *stable* (tokens stay in order within an expert), so sums over an expert's tokens always add
# up in the same order and a run repeats bit for bit.
#
# ## Why no host
#
# How many tokens an expert got is known only on the GPU. Asking for it (`.item()`, `.tolist()`) makes the
# host wait until the GPU is idle, then the GPU waits for the host. So every size the host needs is an upper
# bound it knows already, and kernels read the true counts from memory.
#
# A grouped matrix product then walks over *tiles* of $B$ rows (`tile_rows`) that never straddle two experts. There are
# at most $\lceil TK/B \rceil + E$ of them, for $E$ experts, so the sort also writes which expert each tile belongs to.

# %%
#| default_exp kernels.sort

# %%
#| export
from typing import NamedTuple

import torch
from torch import Tensor

from pithtrain.kernels.lang import tl, triton, want


# %%
#| export
class Sorted(NamedTuple):
    """Pairs (token, k) brought into expert order: T tokens, K = top_k, E experts, P rows, all int32."""

    pair: Tensor  #: (P,) pair number `token * K + k` of each sorted row; absent pairs leave the last ones unwritten
    slot: Tensor  #: (T, K) sorted row of each pair, -1 for a pair that has none
    offsets: Tensor  #: (E + 1,) expert e owns rows offsets[e] : offsets[e + 1]
    first_tile: Tensor  #: (E + 1,) expert e owns tiles first_tile[e] : first_tile[e + 1]
    tile_expert: Tensor  #: (tiles,) expert of each tile; an upper bound of tiles, the rest is not read


# %% [markdown]
# ## The smallest true implementation
#
# An id of -1 says that the pair's expert lives on another rank. Such pairs are left out: they sort behind
# everything, and have no slot.


# %%
#| export
def reference_sort_pairs(expert_ids: Tensor, num_experts: int, tile_rows: int) -> Sorted:
    """`sort_pairs` in plain PyTorch, which waits for the GPU."""
    device, flat = expert_ids.device, expert_ids.flatten().long()
    valid = (flat >= 0) & (flat < num_experts)
    order = torch.where(valid, flat, num_experts).argsort(stable=True)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(order), device=device)
    counts = torch.bincount(flat[valid], minlength=num_experts)
    tiles = (counts + tile_rows - 1) // tile_rows
    zero = counts.new_zeros(1)
    return Sorted(
        order.int(),
        torch.where(valid, slot, -1).view_as(expert_ids).int(),
        torch.cat([zero, counts.cumsum(0)]).int(),
        torch.cat([zero, tiles.cumsum(0)]).int(),
        torch.repeat_interleave(torch.arange(num_experts, device=device), tiles).int(),
    )


# %%
ids = torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1]])
for name, value in reference_sort_pairs(ids, num_experts=3, tile_rows=2)._asdict().items():
    print(f"{name:12} {value.tolist()}")

# %% [markdown]
# ## The kernels
#
# A counting sort of chunks of 512 pairs, in three launches:
#
# 1. **count**: each program makes the histogram of its chunk, a row of a (chunks, E) table.
# 2. **scan**: one program turns the table, column by column, into "how many pairs of expert `e` come before
#    this chunk", and finds the experts' offsets and the expert of each tile.
# 3. **place**: a program for each 32 pairs compares them with all of their chunk up to themselves, which gives each its
#    position among the chunk's pairs of its expert, and writes both directions of the permutation.
#
# A pair has 8 bytes of id, read by *count* and again by *place* (which reads its neighbours in the chunk too, but from
# the cache), and 4 + 4 bytes are written. For 131,072 pairs that is 3.1 MB, a microsecond at 3 TB/s. What
# it costs is three launches and the latency of the one-program scan.


# %%
#| export
@triton.jit
def count_kernel(id_ptr, table_ptr, pairs, experts, E: tl.constexpr, CHUNK: tl.constexpr):
    """Histogram of one chunk of expert ids into its row of the table (chunks, E); E is a power of two."""
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(id_ptr + i, mask=i < pairs, other=-1).to(tl.int32)
    valid = (ids >= 0) & (ids < experts)
    counts = tl.histogram(tl.where(valid, ids, 0), E, mask=valid)
    tl.store(table_ptr + tl.program_id(0) * E + tl.arange(0, E), counts)


# %%
from pithtrain.kernels.lang import runs_triton


def show_counts(ids, experts, chunk):
    table = torch.empty(-(-ids.numel() // chunk), experts, dtype=torch.int32)
    count_kernel[(len(table),)](ids, table, ids.numel(), experts, experts, chunk)
    return table


if runs_triton(ids):
    print(show_counts(ids, experts=4, chunk=4))


# %%
#| export
@triton.jit
def scan_kernel(
    table_ptr, offset_ptr, first_ptr, tile_expert_ptr, chunks, experts, tiles,
    E: tl.constexpr, TILE_ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Turn the table of counts into the row where each (chunk, expert) starts; find the experts' tiles."""
    e = tl.arange(0, E)
    total = tl.zeros([E], tl.int32)
    for start in range(0, chunks, STEP):
        c = start + tl.arange(0, STEP)
        at = table_ptr + c[:, None] * E + e[None, :]
        counts = tl.load(at, mask=c[:, None] < chunks, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, 0) - counts, mask=c[:, None] < chunks)
        total += tl.sum(counts, 0)
    ends = tl.cumsum(total, 0)
    tl.store(offset_ptr + e, ends - total, mask=e < experts)
    tl.store(offset_ptr + experts, tl.max(ends, 0))
    own_tiles = (total + TILE_ROWS - 1) // TILE_ROWS
    last = tl.cumsum(own_tiles, 0)
    tl.store(first_ptr + e, last - own_tiles, mask=e < experts)
    tl.store(first_ptr + experts, tl.max(last, 0))
    for start in range(0, tiles, STEP):
        t = start + tl.arange(0, STEP)
        owner = tl.sum((last[None, :] <= t[:, None]).to(tl.int32), 1)
        tl.store(tile_expert_ptr + t, owner, mask=t < tiles)


# %% [markdown]
# Positions within a chunk: pair $i$ comes after every pair $j < i$ of the same expert, so its position is
# $\sum_{j<i} [e_i = e_j]$. Comparing 32 with 32 at a time keeps the comparisons in registers.


# %%
#| export
@triton.jit
def place_kernel(
    id_ptr, table_ptr, offset_ptr, pair_ptr, slot_ptr, pairs, experts,
    E: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the row of each pair of a block, and the pair of each row."""
    block = tl.program_id(0)
    chunk = block * BLOCK // CHUNK
    i = block * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(id_ptr + i, mask=i < pairs, other=-1).to(tl.int32)
    position = tl.zeros([BLOCK], tl.int32)
    for start in range(chunk * CHUNK, block * BLOCK + BLOCK, BLOCK):
        j = start + tl.arange(0, BLOCK)
        others = tl.load(id_ptr + j, mask=j < pairs, other=-1).to(tl.int32)
        before = (others[None, :] == ids[:, None]) & (j[None, :] < i[:, None])
        position += tl.sum(before.to(tl.int32), 1)
    valid = (ids >= 0) & (ids < experts)
    row = tl.load(offset_ptr + ids, mask=valid, other=0) + tl.load(table_ptr + chunk * E + ids, mask=valid, other=0)
    row = tl.where(valid, row + position, -1)
    tl.store(slot_ptr + i, row, mask=i < pairs)
    tl.store(pair_ptr + row, i, mask=valid)


# %%
#| export
def sort_pairs(expert_ids: Tensor, num_experts: int, tile_rows: int) -> Sorted:
    """Sort the pairs of `expert_ids` (T, K) int32 or int64 by expert, stably, without host synchronisation.

    An id outside [0, num_experts), by custom -1 and within 32 bits, means "no expert here". Experts' rows are cut
    into tiles of `tile_rows`. Raises TypeError or ValueError, one line, on bad arguments."""
    want("expert_ids", expert_ids, (None, None), (torch.int32, torch.int64))
    if num_experts < 1 or tile_rows < 1:
        raise ValueError(f"num_experts is {num_experts} and tile_rows {tile_rows}; want at least 1 of each")
    ids = expert_ids.contiguous()
    pairs = ids.numel()
    width, chunk, block = max(triton.next_power_of_2(num_experts), 16), 512, 32
    chunks, tiles = triton.cdiv(pairs, chunk), triton.cdiv(pairs, tile_rows) + num_experts
    new = lambda *shape: torch.empty(shape, dtype=torch.int32, device=ids.device)  # noqa: E731
    table, offsets, first_tile = new(chunks, width), new(num_experts + 1), new(num_experts + 1)
    pair, slot, tile_expert = new(pairs), new(*ids.shape), new(tiles)
    count_kernel[(chunks,)](ids, table, pairs, num_experts, width, chunk)
    step = max(16, 8192 // width)
    scan_kernel[(1,)](
        table, offsets, first_tile, tile_expert, chunks, num_experts, tiles, width, tile_rows, step, num_warps=8
    )
    place_kernel[(triton.cdiv(pairs, block),)](ids, table, offsets, pair, slot, pairs, num_experts, width, chunk, block)
    return Sorted(pair, slot, offsets, first_tile, tile_expert)


# %%
def agree(ids, experts, tile_rows):
    got, true = sort_pairs(ids, experts, tile_rows), reference_sort_pairs(ids, experts, tile_rows)
    valid, tiles = int(true.offsets[-1]), len(true.tile_expert)
    assert torch.equal(got.pair[:valid], true.pair[:valid]) and torch.equal(got.slot, true.slot)
    assert torch.equal(got.offsets, true.offsets) and torch.equal(got.first_tile, true.first_tile)
    assert torch.equal(got.tile_expert[:tiles], true.tile_expert)


if runs_triton(ids):
    agree(ids, 3, 2)
    agree(torch.randint(-1, 20, (317, 3)), 20, 16)

# %% [markdown]
# What it does to memory access, drawn: rows of the sorted buffer against the token they come from. Left, the
# order in which pairs are born; right, sorted. Each line is an expert, and along it tokens still ascend.

# %%
import matplotlib.pyplot as plt

torch.manual_seed(0)
many = torch.rand(200, 8).topk(2).indices
done = reference_sort_pairs(many, 8, 16)
fig, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
axes[0].scatter(range(400), torch.arange(400) // 2, c=many.flatten(), s=6, cmap="tab10")
axes[1].scatter(range(400), done.pair // 2, c=many.flatten()[done.pair.long()], s=6, cmap="tab10")
axes[0].set(title="as routed", xlabel="row", ylabel="token")
axes[1].set(title="sorted by expert (colour)", xlabel="row")
fig

# %% [markdown]
# Next: the matrix products that use it, [the expert MLP](12_expert_mlp.py).
