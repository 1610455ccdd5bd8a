# %% [markdown]
# # Ring attention
#
# > Context parallelism: ranks share each sequence, keys and values travel round, and all work equally.
#
# A sequence of a million tokens does not fit one device: not its activations, and the time of attention
# grows with the square. Everything but attention treats tokens alone, so a sequence can simply be cut, each
# rank taking a share. Attention then needs keys from every rank. In *ring attention* (arXiv 2310.01889)
# queries stay where they are, and each rank's keys and values are passed from neighbour to neighbour until
# they have met all queries. While a rank computes with the block it holds, the next one is already coming:
# the exchange costs no time as long as it is shorter than the compute.

# %%
#| default_exp parallel.ring

# %%
#| export
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pithtrain.config import UserError
from pithtrain.kernels.attention import TILE, add_sinks, attend_piece, block_gradients, flash_fits, merge, pieces
from pithtrain.kernels.attention import sink_gradients
from pithtrain.layers.attention import OneRank, expand_latent

# %% [markdown]
# ## The maths
#
# Rank $r$ of $n$ holds the queries $Q_r$ and the block $(K_r, V_r)$. After $h$ hops it holds the block of rank
# $r - h$, computes its queries' attention over that block alone, $o_h$ and the log-sum-exp $\ell_h$, and
# [merges](15_attention_pieces.py) them into what it has:
#
# $$\ell \leftarrow \log\left(e^{\ell} + e^{\ell_h}\right), \qquad
#   o \leftarrow e^{\ell_{old} - \ell}\, o + e^{\ell_h - \ell}\, o_h.$$
#
# The smallest true implementation has all ranks in one process; a hop moves each block one place on in a list.
# It is not causal: every query sees every key.

# %%
torch.manual_seed(0)
ranks, features = 4, 8
q, k, v = (torch.randn(32, features, dtype=torch.float64) for _ in range(3))
queries, held = q.chunk(ranks), list(zip(k.chunk(ranks), v.chunk(ranks), strict=True))
out, lse = [0.0] * ranks, [torch.full((8, 1), -torch.inf, dtype=torch.float64)] * ranks
true = (q @ k.T).softmax(dim=-1) @ v
for hop in range(ranks):
    for rank in range(ranks):
        keys, values = held[rank]
        scores = queries[rank] @ keys.T
        lse_hop = scores.logsumexp(dim=-1, keepdim=True)
        total = torch.logaddexp(lse[rank], lse_hop)
        part = (scores - lse_hop).exp() @ values
        out[rank] = (lse[rank] - total).exp() * out[rank] + (lse_hop - total).exp() * part
        lse[rank] = total
    held = held[-1:] + held[:-1]  # every rank sends to the next, and receives from the one before
    error = (torch.cat(out) - true).norm() / true.norm()
    print(f"after hop {hop}: error {error:.1e}")
assert error < 1e-14

# %% [markdown]
# ## Zigzag: equal work for every rank
#
# A causal query has as many keys as its position. Cut the sequence into $n$ equal shares, and the last
# rank has most of the work; the ring takes its time, and the first rank waits. The cure (Llama 3, arXiv
# 2407.21783; *striped* attention, arXiv 2311.09431, does it with single tokens) is to cut into $2n$ chunks
# and fold: rank $r$ holds chunk $r$ from the front and chunk $2n - 1 - r$ from the back. What one lacks, the
# other has.


# %%
#| export
def zigzag_runs(length: int, ranks: int, rank: int) -> list[range]:
    """The two chunks of a sequence that a rank holds, as positions. Raises UserError if 2 * ranks does not divide."""
    if length % (2 * ranks):
        where = f"a sequence of {length} tokens over {ranks} context-parallel ranks"
        raise UserError(f"{where}: is cut into {2 * ranks} equal chunks; choose a multiple of {2 * ranks}")
    chunk = length // (2 * ranks)
    return [range(i * chunk, (i + 1) * chunk) for i in (rank, 2 * ranks - 1 - rank)]


# %%
print(zigzag_runs(16, ranks=2, rank=0), zigzag_runs(16, ranks=2, rank=1))


# %% [markdown]
# The data loader cuts with `zigzag`: its indices pick a rank's tokens out of a sequence, and they are the
# positions that the rotary table of these tokens is made of.


# %%
#| export
def zigzag(length: int, ranks: int, rank: int) -> Tensor:
    """(length / ranks,) int64: the positions, in order, of a rank's tokens. Raises as `zigzag_runs`."""
    return torch.cat([torch.arange(run.start, run.stop) for run in zigzag_runs(length, ranks, rank)])


# %%
sequence = torch.arange(100, 116)
for rank in range(2):
    print(sequence[zigzag(16, 2, rank)].tolist())

# %% [markdown]
# The figure counts scores with the same `pieces` that the ring computes. Above, who owns which rows of the
# score matrix (queries), for the contiguous cut and for the zigzag. Below, each rank's work in each hop. All
# ranks wait for the busiest in every hop, since the next block comes from a neighbour: the dashed
# line is the sum of these maxima, which is the time that the ring takes.

# %%
import matplotlib.pyplot as plt


def work(owned, window=None):
    """Scores that each rank (row) computes in each hop (column)."""
    n = len(owned)
    length = sum(len(run) for runs in owned for run in runs)
    table = torch.zeros(n, n)
    for rank in range(n):
        for hop in range(n):
            for piece in pieces(owned[rank], owned[(rank - hop) % n], 1, length, window, tile=1):
                table[rank, hop] += piece.keys.stop - piece.keys.start
    return table


ranks, length = 4, 64
shares = {
    "contiguous": [[range(r * 16, (r + 1) * 16)] for r in range(ranks)],
    "zigzag": [zigzag_runs(length, ranks, r) for r in range(ranks)],
}
fig, axes = plt.subplots(2, 2, figsize=(9, 6), height_ratios=[1.25, 1])
for (matrix, bars), (name, owned) in zip(axes.T, shares.items(), strict=True):
    picture = torch.full((length, length), torch.nan)
    for rank, runs in enumerate(owned):
        for run in runs:
            for t in run:
                picture[t, : t + 1] = rank
    matrix.imshow(picture, cmap="tab10", vmin=0, vmax=9)
    matrix.set(title=f"{name}: rank by colour", xlabel="key position", ylabel="query position")
    table, left = work(owned), torch.zeros(ranks)
    for hop in range(ranks):
        bars.barh(range(ranks), table[:, hop], left=left, color=[f"C{r}" for r in range(ranks)], alpha=1 - 0.2 * hop)
        left += table[:, hop]
    time = table.amax(dim=0).sum()
    bars.axvline(time, color="0.3", linestyle="--")
    efficiency = table.sum() / (ranks * time)
    bars.set(title=f"busy {efficiency:.0%} of the time", xlabel="scores, hop after hop", ylabel="rank", xlim=(0, 950))
    bars.set(yticks=range(ranks))
    bars.invert_yaxis()
    print(f"{name:>10}: scores of each rank {table.sum(dim=1).int().tolist()}, time {int(time)}")
fig.tight_layout()
assert work(shares["zigzag"]).std(dim=0).max() == 0
fig

# %% [markdown]
# In zigzag every bar is as long as the next, and so is every segment of it: in each hop every rank has the
# same number of scores. In the contiguous cut rank 0 has a single segment, its own block, and the others'
# blocks all lie in its future.
#
# ## Passing round
#
# One hop: send to the next rank, receive from the one before, all at once. `Passing` holds on to what is
# being sent until it has left.


# %%
#| export
class Passing(NamedTuple):
    """An exchange under way."""

    works: list[dist.Work]
    sent: list[Tensor]
    received: list[Tensor]

    def wait(self) -> list[Tensor]:
        """What came from the rank before."""
        for work in self.works:
            work.wait()
        return self.received


# %% [markdown]
# ## Forward and backward
#
# Forward is the loop above, with the exchange posted before the compute. In the backward pass the blocks
# travel once more, and each takes along the gradients that it has gathered so far, in fp32: a rank adds its
# part and passes them on, and after a full circle they are home. The gradients of a hop travel while the next
# is computed. The gradient of the queries never leaves its rank.
#
# For latent attention (arXiv 2405.04434) the block is the latents and the one rotated key that all heads share:
# for DeepSeek-V2's 128 heads of 192 and 128 features, 576 numbers a token travel, not 40,960. Each rank
# expands a block when it arrives, and in the backward pass again.


# %%
#| export
class RingAttention(torch.autograd.Function):
    """(ring, q, sinks, expand, scale, cuts, wide, *block) -> out. The block is k and v or, with `expand`, latents.

    cuts: for each rank, the pieces of this rank's queries and that rank's keys. wide: features of a value."""

    @staticmethod
    def forward(ctx, ring, q, sinks, expand, scale, cuts, wide, *block):
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        out = lse.new_zeros(*q.shape[:3], wide)
        for source, held in ring.hops(list(block)):
            if cuts[source]:
                k, v = held if expand is None else expand_latent(*held, expand, q.shape[-1])
                for piece in cuts[source]:
                    merge(out, lse, piece, *attend_piece(q, k, v, scale, piece))
        if sinks is not None:
            add_sinks(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, sinks, expand, out, lse, *block)
        ctx.given = ring, scale, cuts
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, sinks, expand, out, lse, *block = ctx.saved_tensors
        ring, scale, cuts = ctx.given

        def zeros(*tensors):
            return [torch.zeros_like(t, dtype=lse.dtype) for t in tensors]

        (dq,), dexpand, passing = zeros(q), None if expand is None else zeros(expand), None
        for source, held in ring.hops(block):
            gathered = zeros(*held)
            if cuts[source] and expand is None:
                block_gradients(grad, q, *held, out, lse, scale, cuts[source], dq, *gathered)
            elif cuts[source]:
                leaves = [t.detach().requires_grad_() for t in (*held, expand)]
                with torch.enable_grad():
                    both = expand_latent(*leaves, q.shape[-1])
                upstream = zeros(*both)
                block_gradients(grad, q, *both, out, lse, scale, cuts[source], dq, *upstream)
                upstream = [total.to(t.dtype) for total, t in zip(upstream, both, strict=True)]
                parts = torch.autograd.grad(both, leaves, upstream)
                for total, part in zip(gathered + dexpand, parts, strict=True):
                    total += part
            if passing is not None:
                for total, part in zip(gathered, passing.wait(), strict=True):
                    total += part
            passing = ring.pass_on(gathered)
        dblock = [total.to(t.dtype) for total, t in zip(passing.wait(), block, strict=True)]
        dsinks = None if sinks is None else sink_gradients(grad, out, lse, sinks)
        return None, dq.to(q.dtype), dsinks, dexpand and dexpand[0].to(expand.dtype), None, None, None, *dblock


# %% [markdown]
# ## The core
#
# `Ring` is an attention core, as `OneRank` is: a layer is given one of them and does not ask which. Windows
# and documents need no care here: [`pieces`](15_attention_pieces.py) cuts a rank's two runs against those
# that the arriving block holds, and where nothing is seen, nothing is computed.
#
# Some layers cannot see a sequence in blocks: the delta rule is a recurrence over all tokens. For those,
# ranks exchange sequence shards for head shards (DeepSpeed-Ulysses, arXiv 2309.14509): an all-to-all after
# which each rank holds whole sequences of some heads, in natural order, and another one back.


# %%
#| export
class AllToAll(torch.autograd.Function):
    """(x, group): slice i of axis 0 goes to rank i, and slice i of the result is from rank i."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, received = group, torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return AllToAll.apply(grad.contiguous(), ctx.group), None  # what came goes back the way it came


# %%
#| export
class Ring(OneRank):
    """The core of a rank that holds its zigzag share of each sequence; what its methods take is told there."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None,
        window: int | None = None, sinks: Tensor | None = None, expand: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """With `expand`, latents travel, never the keys made of them. UserError for odd lengths and a cache."""
        if k.shape[-2] != q.shape[2]:
            raise UserError("generation with a cache runs without context parallelism: set cp = 1")
        length, wide = q.shape[2] * self.size, v.shape[-1]
        if expand is not None:
            wide = expand.shape[1] - (q.shape[-1] - wide)
        owned = [zigzag_runs(length, self.size, rank) for rank in range(self.size)]
        tile = None if flash_fits(q, wide) else TILE
        cuts = [pieces(owned[self.rank], keys, q.shape[0], length, window, documents, tile) for keys in owned]
        return RingAttention.apply(self, q, sinks, expand, scale, cuts, wide, k.contiguous(), v.contiguous())

    def whole_sequence(self, x: Tensor) -> Tensor:
        """Raises UserError if the number of ranks does not divide the heads."""
        self.held(x.shape[2])
        chunk = len(zigzag_runs(x.shape[1] * self.size, self.size, self.rank)[0])
        shares = x.unflatten(2, (self.size, -1)).movedim(2, 0).contiguous()
        front, back = AllToAll.apply(shares, self.group).unflatten(2, (2, chunk)).unbind(2)
        return torch.cat([front, back.flip(0)]).movedim(0, 1).flatten(1, 2)

    def own_sequence(self, x: Tensor) -> Tensor:
        front, back = x.unflatten(1, (2 * self.size, -1)).movedim(1, 0).chunk(2)
        shares = torch.cat([front, back.flip(0)], dim=2)
        return AllToAll.apply(shares, self.group).movedim(0, 2).flatten(2, 3)

    def held(self, heads: int) -> slice:
        """Raises as `whole_sequence`."""
        if heads % self.size:
            raise UserError(f"mesh.cp: {heads} heads cannot be shared by {self.size} ranks; choose a divisor of them")
        share = heads // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def hops(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """This rank's block, then those of the ranks before it, each with its rank; the next one is on its way."""
        for hop in range(self.size):
            passing = self.pass_on(block) if hop + 1 < self.size else None
            yield (self.rank - hop) % self.size, block
            block = block if passing is None else passing.wait()

    def pass_on(self, tensors: list[Tensor]) -> Passing:
        """Start to send contiguous `tensors` to the next rank and to receive their like from the one before."""
        if self.size == 1:
            return Passing([], tensors, tensors)
        received = [torch.empty_like(t) for t in tensors]
        ahead, behind = (dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1))
        sends = [dist.P2POp(dist.isend, t, ahead, self.group) for t in tensors]
        receives = [dist.P2POp(dist.irecv, t, behind, self.group) for t in received]
        return Passing(dist.batch_isend_irecv(sends + receives), tensors, received)


# %% [markdown]
# ## Two real processes
#
# The program below is started twice. The processes meet through a file, take a layer apiece that differs from
# [the usual one](26_attention.py) in its core alone, and each its own tokens. Each also computes the whole
# alone, to compare. (Every feature, 2 and 4 ranks, and all gradients are compared in `tests/test_ring.py`.)
# The first line of each process shows what `whole_sequence` does.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

program = """
import sys, torch, torch.distributed as dist
from pithtrain.layers.attention import Attention, Sequences
from pithtrain.layers.rotary import rotary_table
from pithtrain.parallel.ring import Ring, zigzag

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
layer, x = Attention(hidden=64, heads=8, kv_heads=2, head_dim=8, norm_eps=1e-6), torch.randn(2, 32, 64)
upstream, mine = torch.randn(2, 32, 64), zigzag(32, 2, rank)

def run(positions):
    layer.zero_grad()
    out = layer(x[:, positions], Sequences(*rotary_table(positions, 8, 10_000.0)))
    out.backward(upstream[:, positions])
    return out.detach(), layer.key.weight.grad

true, true_grad = run(torch.arange(32))
layer.core = Ring(dist.group.WORLD)
out, grad = run(mine)
dist.all_reduce(grad)  # each rank's tokens give a part of a weight's gradient
errors = [((a - b).norm() / b.norm()).item() for a, b in ((out, true[:, mine]), (grad, true_grad))]
whole = layer.core.whole_sequence(mine.view(1, -1, 1, 1).repeat(1, 1, 2, 1)).flatten()
print(f"rank {rank}: 2 heads of tokens {mine[7:10].tolist()} ... become 1 head of tokens {whole[7:10].tolist()} ...")
print(f"rank {rank}: output differs by {errors[0]:.1e}, the gradient of the key weights by {errors[1]:.1e}")
assert max(errors) < 1e-5
del layer  # else it holds the group, whose threads then live on into the exit of the process
dist.destroy_process_group()
"""
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "ring.py").write_text(program)
    commands = [[sys.executable, f"{folder}/ring.py", str(rank), f"{folder}/store"] for rank in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        print(process.communicate(timeout=300)[0], end="")
        assert process.returncode == 0

# %% [markdown]
# ## What travels
#
# A rank sends its block in each hop but the last: two times `kv_heads * head_dim` numbers a token. The
# compute grows with the square of a rank's share and the exchange with the share itself, so that long shares
# hide it. The figure divides one by the other for one layer of Qwen3-30B-A3B (32 heads of 128, 4 key heads, bf16)
# and names the exchange speed at which both take the same time, if attention runs at 500 TFLOP/s
# (a round figure for the picture, not a measurement). The dotted lines are the nominal speeds of two links.

# %%
share = 2 ** torch.arange(9, 18)
flops = 2 * 2 * 32 * 128 * (share.double() ** 2) / 2  # two products, and half of the scores of a share against another
bytes_sent = share * 2 * 4 * 128 * 2
needed = bytes_sent / (flops / 500e12) / 1e9
print("GB/s needed:", {int(n): round(speed) for n, speed in zip(share, needed.tolist(), strict=True)})
fig, ax = plt.subplots(figsize=(6, 3))
ax.loglog(share, needed, "o-", label="needed to hide a hop")
for name, speed in (("InfiniBand, 400 Gbit/s", 50), ("NVLink 4, one direction", 450)):
    ax.axhline(speed, color="0.5", linestyle=":")
    ax.text(share[-1], speed * 1.15, name, ha="right", fontsize=8)
ax.set(title="Exchange speed that hides under attention", xlabel="tokens of a rank", ylabel="GB/s")
ax.legend(fontsize=8)
fig

# %% [markdown]
# The line falls: from some thousand tokens a rank on, the forward exchange of a hop fits under its compute
# even between hosts. Where the curve is above a dotted line, the ring waits for its wires.
#
# Cutting and merging have a price of their own, even where nothing travels: each of the smaller calls fills the GPU
# worse than one large one, and every hop merges its piece into the sum.
#
# Yours to do: [merge two softmaxes](exercises/42_ring.py). Next: how the parameters themselves are
# spread: [sharding](43_sharding.py).
