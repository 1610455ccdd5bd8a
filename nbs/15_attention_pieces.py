# %% [markdown]
# # Attention in pieces
#
# > Softmax attention over a part of the keys, forward and backward, such that the parts add up to the whole.
#
# A softmax needs all of its scores, so attention seems to need all keys in one place. It does not: the
# result over two sets of keys follows from the two results, if each remembers the logarithm of its
# denominator. Everything here rests on that. Packed documents and sliding windows become rectangles of the
# score matrix that are computed, and others that are skipped. An attention sink becomes one more set, of a
# single key. And when the keys of a sequence live on several ranks, [the ring](42_ring_attention.py)
# computes each rank's part as it arrives.

# %%
#| default_exp kernels.attention

# %%
#| export
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pithtrain.kernels.lang import FLOATS, want

# %%
#| export
TILE = 128
"""Most queries in a piece whose scores are written to memory: bounds that memory, and the scores computed unseen."""

# %% [markdown]
# ## The maths
#
# Over a set $A$ of keys a query with scores $s_j = \text{scale} \cdot q \cdot k_j$ gets
#
# $$o_A = \sum_{j \in A} e^{s_j - \ell_A}\, v_j, \qquad \ell_A = \log \sum_{j \in A} e^{s_j}.$$
#
# $\ell$ is the *log-sum-exp*, `lse` in the code. For disjoint sets $A$ and $B$ the whole is
#
# $$\ell = \log\left(e^{\ell_A} + e^{\ell_B}\right), \qquad
#   o = e^{\ell_A - \ell}\, o_A + e^{\ell_B - \ell}\, o_B.$$
#
# This is the online softmax of FlashAttention (arXiv 2205.14135), used there between blocks of one chip's
# fast memory. All exponents are differences to a larger logarithm: nothing overflows.
#
# The gradient is even simpler, because the *final* $o$ and $\ell$ are known by then. With the upstream
# gradient $g$ and $p_j = e^{s_j - \ell}$, key $j$'s true share of the whole softmax,
#
# $$\partial v_j = p_j\, g, \qquad \partial s_j = p_j \left( g \cdot v_j - g \cdot o \right),$$
#
# where no sum over other keys is left. Each part is differentiated alone, and nothing has to be merged.
#
# The smallest true implementation, on two halves of 6 keys:

# %%
torch.manual_seed(0)
q, k, v = torch.randn(3, 4), torch.randn(6, 4), torch.randn(6, 2)


def attend_some(keys):
    scores = q @ k[keys].T
    lse = scores.logsumexp(dim=-1, keepdim=True)
    return (scores - lse).exp() @ v[keys], lse


(out_a, lse_a), (out_b, lse_b) = attend_some(slice(0, 3)), attend_some(slice(3, 6))
lse = torch.logaddexp(lse_a, lse_b)
merged = (lse_a - lse).exp() * out_a + (lse_b - lse).exp() * out_b
print("shares of the first half in each query:", [round(s, 3) for s in (lse_a - lse).exp().flatten().tolist()])
torch.testing.assert_close(merged, (q @ k.T).softmax(dim=-1) @ v)

# %% [markdown]
# ## Cutting the score matrix
#
# Which keys a query sees depends on three things: its position (no key after it), the document (no key before its
# start) and the window (the query and the `window - 1` keys before it). All three are ranges of positions. So of a
# stretch of queries against a stretch of keys, each document leaves one rectangle, two of whose corners may be cut off
# diagonally: a band, which FlashAttention's kernels can walk. A `Piece` is such a rectangle, trimmed until every query
# in it sees a key (a softmax over nothing has no value).


# %%
#| export
class Piece(NamedTuple):
    """A rectangle of queries (of S) against keys (of L), in which each query sees at least one key.

    Query i sees the keys from i + L - S - left to i + L - S + right; -1 sets no limit on that side."""

    rows: slice
    """Of the batch."""
    queries: slice
    """Of the queries at hand, as `keys` is of the keys at hand."""
    keys: slice
    left: int
    right: int
    cuts: Tensor | None = None
    """(N + 1,) int32 on the CPU: the piece is N documents, between these tokens of its rows laid end to end."""


# %% [markdown]
# A rank's tokens are *runs* of positions: one run where it holds whole sequences, two in a ring. Documents
# come as boundaries over all rows laid end to end, as the data loader packs them, and there may be thousands:
# those that a run has anything to do with are found by bisection.


# %%
#| export
def documents_from(
    start: int, stop: int, rows: int, length: int, documents: list[int] | None
) -> Iterator[tuple[slice, range]]:
    """Each row's documents from the one that holds position `start` to the last that begins before `stop`."""
    if documents is None:
        yield slice(None), range(length)
        return
    for row in range(rows):
        at = bisect_right(documents, row * length + start) - 1
        while documents[at] < row * length + stop:
            yield slice(row, row + 1), range(documents[at] - row * length, documents[at + 1] - row * length)
            at += 1


# %%
print([(row.start, document) for row, document in documents_from(4, 8, 2, 8, [0, 3, 6, 8, 16])])

# %% [markdown]
# Two details of the cutting serve speed. Where no fused kernel fits, all scores of a piece are written to memory: there
# queries are cut into tiles of `TILE`, so that scores stay few, and few of them lie outside the causal band or the
# window. FlashAttention's kernels need no tiles, and take any number of documents in one call: where a run meets
# itself, they are one piece with `cuts`.


# %%
#| export
def pieces(
    queries: list[range], keys: list[range], rows: int, length: int,
    window: int | None = None, documents: Tensor | None = None, tile: int | None = None,
) -> list[Piece]:  # fmt: skip
    """What queries at some positions see of keys at others, in `rows` sequences of `length` tokens.

    `documents` are boundaries 0, ..., rows * length, in order, those between rows included. With `tile`, no piece has
    more queries than that; without, the documents in which a run meets itself are one piece. Raises ValueError for
    wrong boundaries, or a window without a key."""
    bounds = None if documents is None else documents.tolist()
    if bounds is not None:
        if not bounds or (bounds[0], bounds[-1]) != (0, rows * length):
            ends = f"go from {bounds[0]} to {bounds[-1]}" if bounds else "are missing"
            raise ValueError(f"documents: boundaries {ends}; want 0 to {rows} x {length} tokens")
        if bounds != sorted(bounds) or not set(bounds).issuperset(range(0, rows * length, length)):
            raise ValueError(
                f"documents: boundaries must ascend, and one must stand before each row of {length} tokens"
            )
    if window is not None and window < 1:
        raise ValueError(f"window: is {window}; want at least 1, the query's own key")
    window, found = window or length, []
    limit = window - 1 if window < length else -1
    if documents is not None and not tile and queries == keys == [range(length)]:
        return [Piece(slice(None), slice(None), slice(None), limit, 0, documents.to(torch.int32))]
    runs = [
        (run[start : start + (tile or length)], at + start)
        for run, at in zip(queries, accumulate(map(len, queries), initial=0), strict=False)
        for start in range(0, len(run), tile or length)
    ]
    for run, at in runs:
        for key_run, key_at in zip(keys, accumulate(map(len, keys), initial=0), strict=False):
            cut, starts = [], []
            for row, document in documents_from(run.start, min(run.stop, key_run.stop), rows, length, bounds):
                q0 = max(run.start, key_run.start, document.start)
                k0 = max(key_run.start, document.start, q0 - window + 1)
                k1 = min(run.stop, key_run.stop, document.stop)
                q1 = min(run.stop, document.stop, k1 + window - 1)
                # Of keys wholly in the past, some queries see all, and the rest miss more and more: two pieces.
                middle = min(max(k0 + window, q0), q1) if k1 <= q0 + 1 else q0
                for start, stop in ((q0, middle), (middle, q1)):
                    if start < stop and k0 < k1:
                        right, left = stop - k1, window - 1 - (stop - k1)
                        left, right = left if left < k1 - k0 - 1 else -1, right if right < stop - start - 1 else -1
                        of_queries = slice(at + start - run.start, at + stop - run.start)
                        of_keys = slice(key_at + k0 - key_run.start, key_at + k1 - key_run.start)
                        cut.append(Piece(row, of_queries, of_keys, left, right))
                starts.append((row.start or 0) * len(run) + q0 - run.start)
            if len(cut) > 1 and run == key_run and not tile:
                cuts = torch.tensor([*starts, rows * len(run)], dtype=torch.int32)
                of_queries, of_keys = slice(at, at + len(run)), slice(key_at, key_at + len(run))
                cut = [Piece(slice(None), of_queries, of_keys, limit, 0, cuts)]
            found += cut
    return found


# %% [markdown]
# The same 24 tokens three times: causal, with a window of 7, and with three documents. Dark scores are seen. The
# outlines are the pieces, in tiles of 6 queries: the plain mathematics computes all inside, and nothing outside.

# %%
import matplotlib.pyplot as plt

cases = {
    "causal": {},
    "window of 7": {"window": 7},
    "documents of 5, 10, 9": {"documents": torch.tensor([0, 5, 15, 24])},
}
fig, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True)
for ax, (name, case) in zip(axes, cases.items(), strict=True):
    seen, computed = torch.zeros(24, 24), 0
    for piece in pieces([range(24)], [range(24)], 1, 24, tile=6, **case):
        rows, columns = torch.arange(24)[piece.queries], torch.arange(24)[piece.keys]
        ahead = columns - piece.keys.stop - (rows - piece.queries.stop).unsqueeze(1)
        sees = (ahead <= (piece.right if piece.right >= 0 else 24)) & (
            -ahead <= (piece.left if piece.left >= 0 else 24)
        )
        assert sees.any(dim=1).all()
        seen[piece.queries, piece.keys] += sees
        computed += sees.numel()
        corner = piece.keys.start - 0.5, piece.queries.start - 0.5
        ax.add_patch(plt.Rectangle(corner, len(columns), len(rows), fill=False, edgecolor="C3"))
    ax.imshow(seen, cmap="Greys", vmin=0, vmax=1.4)
    ax.set(xlabel="key position")
    ax.set_title(f"{name}\n{int(seen.sum())} scores seen, {computed} computed", fontsize=9)
axes[0].set_ylabel("query position")
fig.tight_layout()
fig

# %% [markdown]
# ## One piece, forward and backward
#
# The plain mathematics, for any device and dtype. Grouped queries need no copies of their key: the heads of
# a group are laid end to end as more queries of one head, and the matrix product does the rest, including
# the sum over the group in the gradients of keys and values. It computes in fp32 at least.


# %%
#| export
def grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(B, heads, S, D) to (B, kv_heads, group * S, D), at least fp32."""
    rows = x.shape[1] // kv_heads * x.shape[2]
    return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(x.shape[0], kv_heads, rows, x.shape[-1])


# %%
#| export
def piece_scores(q: Tensor, k: Tensor, scale: float, piece: Piece) -> Tensor:
    """(B, kv_heads, group * S, L) scores of a piece's own queries and keys, -inf where a query must not see."""
    queries, keys = q.shape[2], k.shape[2]
    scores = (grouped(q, k.shape[1]) @ grouped(k, k.shape[1]).mT).mul_(scale)
    if piece.left < 0 and piece.right < 0:
        return scores
    i, j = torch.arange(queries, device=q.device).unsqueeze(1), torch.arange(keys, device=q.device)
    ahead = (j - keys) - (i - queries)
    hidden = ahead > (piece.right if piece.right >= 0 else queries)
    if piece.left >= 0:
        hidden |= ahead < -piece.left
    return scores.masked_fill_(hidden.repeat(q.shape[1] // k.shape[1], 1), -torch.inf)


# %% [markdown]
# The last four of six positions, with a window of 3; key $j$ scores $j$, and dots are scores set to $-\infty$:

# %%
q, k = torch.ones(1, 1, 4, 1), torch.arange(6.0).view(1, 1, 6, 1)
for row in piece_scores(q, k, 1.0, Piece(slice(None), slice(None), slice(None), left=2, right=0))[0, 0].tolist():
    print(" ".join("." if score == -torch.inf else str(int(score)) for score in row))

# %% [markdown]
# On a GPU, in bf16 or fp16, the kernels that torch ships do the same without ever storing scores. Their entry
# points below `scaled_dot_product_attention` return the log-sum-exp and, in the backward pass, take any
# output and log-sum-exp that we say are final. FlashAttention-2 (arXiv 2307.08691) takes all that a piece may
# be: the band, and documents as cumulative lengths. cuDNN's kernel, for Hopper GPUs and newer, is faster, and takes
# squares, full or causal; it prepares a plan for each new shape, so that pieces that follow the lengths of
# documents are not for it.
#
# FlashAttention-4 is a package of its own (`pip install -e '.[fa4]'`) for the same GPUs as cuDNN's. Where it is
# installed it replaces FlashAttention-2, and cuDNN below 256 features, for the head sizes of published models, at which
# a test holds it against float64. Of other sizes, release 4.0.0b18 did not compile some (16 features) and returned
# wrong gradients for others (48 features, values of 32). Its kernels are compiled when they are first called, which
# took some ten seconds for each pair of head sizes and kind of mask.


# %%
#| export
def flash_fits(q: Tensor, value_features: int) -> bool:
    """Whether FlashAttention's kernels take these queries, with values of so many features."""
    half, features = q.dtype in (torch.bfloat16, torch.float16), q.shape[-1]
    return q.is_cuda and half and features <= 256 and features % 8 == 0 and value_features <= features


# %%
#| export
@cache
def installed_flash_attention_4() -> ModuleType | None:
    """FlashAttention-4's module of both directions; None where the extra `fa4` is not installed."""
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return None
    from flash_attn.cute import interface

    return interface


# %%
#| export
def flash_attention_4(q: Tensor, value_features: int) -> ModuleType | None:
    """FlashAttention-4, if it is installed and takes these queries, with values of so many features."""
    held_against_float64 = (q.shape[-1], value_features) in ((64, 64), (128, 128), (192, 128), (256, 256))
    takes = held_against_float64 and flash_fits(q, value_features)
    return installed_flash_attention_4() if takes and torch.cuda.get_device_capability(q.device) >= (9, 0) else None


# %%
#| export
def cudnn_fits(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> bool:
    """Whether cuDNN's kernels take these queries, keys and values of a piece, and are the faster choice."""
    square = piece.cuts is None and piece.rows == slice(None) and q.shape[2] == k.shape[2]
    if not square or piece.left >= 0 or piece.right > 0 or torch.cuda.get_device_capability(q.device) < (9, 0):
        return False
    if q.shape[-1] < 256 and flash_attention_4(q, v.shape[-1]):
        return False
    given = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, piece.right == 0, q.shape[1] != k.shape[1])
    return torch.backends.cuda.can_use_cudnn_attention(given)


# %%
#| export
def flash_layout(piece: Piece, features: int | None, *tensors: Tensor) -> list[Tensor]:
    """(B, heads, tokens, D) to (B, tokens, heads, D), or (tokens of all rows, ...) if there are cuts.

    Values narrower than `features`, as in latent attention, are padded with zeros."""
    laid = [t if features in (None, t.shape[-1]) else F.pad(t, (0, features - t.shape[-1])) for t in tensors]
    laid = [(t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2) for t in laid]
    return laid if piece.cuts is None else [t.flatten(0, 1) for t in laid]


# %%
#| export
def flash_arguments(q: Tensor, k: Tensor, piece: Piece) -> tuple[tuple, dict[str, int]]:
    """What both directions tell FlashAttention of a piece: cuts, lengths, no dropout, causal; the window."""
    causal = piece.left < 0 and piece.right == 0
    window = {"window_size_left": piece.left, "window_size_right": piece.right}
    if piece.cuts is None:
        return (None, None, q.shape[2], k.shape[2], 0.0, causal), window
    cuts, longest = piece.cuts.to(q.device, non_blocking=True), int(piece.cuts.diff().max())
    return (cuts, cuts, longest, longest, 0.0, causal), window


# %%
#| export
def flash_4_arguments(q: Tensor, k: Tensor, piece: Piece, scale: float) -> dict[str, Any]:
    """The same for FlashAttention-4, by its names; a side without a limit is None."""
    (cuts, _, queries, keys, _, causal), window = flash_arguments(q, k, piece)
    sides = {side: None if limit < 0 else limit for side, limit in window.items()}
    lengths = {"cu_seqlens_q": cuts, "cu_seqlens_k": cuts, "max_seqlen_q": queries, "max_seqlen_k": keys}
    return {"softmax_scale": scale, "causal": causal, **sides, **lengths}


# %% [markdown]
# What the kernels are told of two rows of 8 tokens, packed with three documents and a window of 4:

# %%
q = torch.zeros(2, 4, 8, 16)
(packed,) = pieces([range(8)], [range(8)], 2, 8, window=4, documents=torch.tensor([0, 3, 8, 16]))
print("queries", list(flash_layout(packed, 16, q)[0].shape))
for name, value in flash_4_arguments(q, q, packed, scale=0.25).items():
    print(f"{name:18} {value}")

# %% [markdown]
# With these, one piece, forward:


# %%
#| export
def attend_piece(q: Tensor, k: Tensor, v: Tensor, scale: float, piece: Piece) -> tuple[Tensor, Tensor]:
    """Attention within a piece of q (B, heads, S, D), k (B, kv_heads, L, D), v (B, kv_heads, L, Dv).

    Returns the output (rows, heads, queries, Dv) and its log-sum-exp (rows, heads, queries). Both are at least fp32,
    except that FlashAttention and cuDNN return the output in the dtype of q."""
    q, k, v = q[piece.rows, :, piece.queries], k[piece.rows, :, piece.keys], v[piece.rows, :, piece.keys]
    (batch, heads, queries, features), (kv_heads, wide) = q.shape, v.shape[1::2]
    aten = torch.ops.aten
    if flash_fits(q, wide):
        if cudnn_fits(q, k, v, piece):
            causal = piece.right == 0
            out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
            return out, lse.view(batch, heads, queries)
        if flash_4 := flash_attention_4(q, wide):
            told = flash_4_arguments(q, k, piece, scale)
            out, lse, *_ = flash_4._flash_attn_fwd(*flash_layout(piece, None, q, k, v), return_lse=True, **told)
        else:
            arguments, band = flash_arguments(q, k, piece)
            laid = flash_layout(piece, features, q, k, v)
            out, lse, *_ = aten._flash_attention_forward(*laid, *arguments, False, scale=scale, **band)
        if piece.cuts is not None:
            out, lse = out.unflatten(0, (batch, queries)), lse.view(heads, batch, queries).transpose(0, 1)
        return out[..., :wide].transpose(1, 2), lse
    if piece.cuts is not None:
        raise ValueError(
            f"a piece of several documents is for FlashAttention, not {q.dtype} on {q.device}: give a tile"
        )
    scores = piece_scores(q, k, scale, piece)
    top = scores.amax(dim=-1, keepdim=True)
    shares = scores.sub_(top).exp_()
    total = shares.sum(dim=-1, keepdim=True)
    out = (shares @ grouped(v, kv_heads)) / total
    return out.view(batch, heads, queries, wide), (top + total.log()).view(batch, heads, queries)


# %% [markdown]
# And backward. It wants the final output and log-sum-exp: with those of the piece alone it would
# differentiate a softmax over the piece alone.


# %%
#| export
def piece_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, piece: Piece
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a piece's queries, keys and values, from the *final* `out` and `lse` of all queries."""
    grad, q, out, lse = (t[piece.rows, :, piece.queries] for t in (grad, q, out, lse))
    k, v = k[piece.rows, :, piece.keys], v[piece.rows, :, piece.keys]
    (batch, heads, queries, features), (kv_heads, wide) = q.shape, v.shape[1::2]
    aten = torch.ops.aten
    if flash_fits(q, wide):
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # no dropout uses it
        if cudnn_fits(q, k, v, piece):
            # The output's strides are those of the queries, as the forward pass makes it.
            grad, lse = torch.empty_like(out).copy_(grad), lse.contiguous().unsqueeze(-1)
            lengths = None, None, queries, queries, 0.0, piece.right == 0
            saved = q, k, v, out, lse, seed[0], seed[1], None
            return aten._scaled_dot_product_cudnn_attention_backward(grad, *saved, *lengths, scale=scale)
        lse = lse.contiguous() if piece.cuts is None else lse.transpose(0, 1).reshape(heads, -1)
        if flash_4 := flash_attention_4(q, wide):
            told = flash_4_arguments(q, k, piece, scale)
            told["deterministic"] = torch.are_deterministic_algorithms_enabled()
            found = flash_4._flash_attn_bwd(*flash_layout(piece, None, q, k, v, out, grad), lse, **told)[:3]
        else:
            arguments, band = flash_arguments(q, k, piece)
            laid = flash_layout(piece, features, grad, q, k, v, out)
            found = aten._flash_attention_backward(*laid, lse, *arguments, seed, seed, scale=scale, **band)
        if piece.cuts is not None:
            found = [t.unflatten(0, (batch, -1)) for t in found]
        dq, dk, dv = (t.transpose(1, 2) for t in found)
        return dq, dk, dv[..., :wide]
    shares = (piece_scores(q, k, scale, piece) - grouped(lse.unsqueeze(-1), kv_heads)).exp_()
    grad, out, q, k, v = (grouped(t, kv_heads) for t in (grad, out, q, k, v))
    dv = shares.mT @ grad
    dscores = shares.mul_((grad @ v.mT).sub_((grad * out).sum(dim=-1, keepdim=True))).mul_(scale)
    return (dscores @ k).view(batch, heads, queries, features), dscores.mT @ q, dv


# %% [markdown]
# If the piece is all there is, both agree with torch's attention and its automatic differentiation:

# %%
inputs = [torch.randn(1, heads, 5, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
(piece,) = pieces([range(5)], [range(5)], 1, 5)
true = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.5, enable_gqa=True)
upstream = torch.randn_like(true)
with torch.no_grad():
    out, lse = attend_piece(*inputs, 0.5, piece)
    by_hand = piece_gradients(upstream, *inputs, out, lse, 0.5, piece)
torch.testing.assert_close((out, *by_hand), (true, *torch.autograd.grad(true, inputs, upstream)))

# %% [markdown]
# All pieces of a block of keys add to the same totals.


# %%
#| export
def block_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, cut: list[Piece],
    *totals: Tensor,
) -> None:  # fmt: skip
    """Add the gradients of all pieces of a block to `totals`, those of q, k and v, in place."""
    for piece in cut:
        parts = piece_gradients(grad, q, k, v, out, lse, scale, piece)
        for total, part, tokens in zip(totals, parts, (piece.queries, piece.keys, piece.keys), strict=True):
            total[piece.rows, :, tokens] += part


# %% [markdown]
# ## Merging
#
# Where a query meets its keys in several pieces, their results are merged as they come, into the running
# `out` and `lse` of the queries. A query that has met nothing yet has $\ell = -\infty$. With
# $w = e^{\ell_B} / (e^{\ell_A} + e^{\ell_B})$, a sigmoid of $\ell_B - \ell_A$, the sum above is
# $o = o_A + w\,(o_B - o_A)$.


# %%
#| export
def merge(out: Tensor, lse: Tensor, piece: Piece, piece_out: Tensor, piece_lse: Tensor) -> None:
    """Add a piece's result to the running `out` (B, heads, S, Dv) and `lse` (B, heads, S), in place."""
    out, lse = out[piece.rows, :, piece.queries], lse[piece.rows, :, piece.queries]
    out.lerp_(piece_out.to(out.dtype), (piece_lse - lse).sigmoid_().unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, piece_lse))


# %% [markdown]
# The keys of one sequence in two runs that arrive one after the other, as in a ring, with a window and two
# documents across them; against the matrix written out:


# %%
q, k, v = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 6)
out, lse = torch.zeros(1, 4, 12, 6), torch.full((1, 4, 12), -torch.inf)
for run in (range(0, 6), range(6, 12)):
    here = slice(run.start, run.stop)
    for piece in pieces([range(12)], [run], 1, 12, window=4, documents=torch.tensor([0, 5, 12]), tile=64):
        merge(out, lse, piece, *attend_piece(q, k[:, :, here], v[:, :, here], 0.3, piece))
position = torch.arange(12)
distance, document = position[:, None] - position, (position >= 5).long()
seen = (distance >= 0) & (distance < 4) & (document[:, None] == document)
scores = (q @ k.repeat_interleave(2, dim=1).mT * 0.3).masked_fill(~seen, -torch.inf)
torch.testing.assert_close(out, scores.softmax(dim=-1) @ v.repeat_interleave(2, dim=1))

# %% [markdown]
# ## Sinks
#
# A softmax must put its weight somewhere, also when no key is of interest; trained models then load it on
# the first token (arXiv 2309.17453). GPT-OSS gives each head a *sink*: a learned logit $\sigma$ that takes
# part in the softmax and has no value. To us it is one more set of keys, with $o = 0$ and
# $\ell = \sigma$: merging it only scales the output. In the backward pass its gradient is that of any score,
# $\partial \sigma = -\sum_t p_\sigma \, (g_t \cdot o_t)$, and the pieces need no change, since they are
# differentiated with the final $o$ and $\ell$.


# %%
#| export
def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Let each head's sink (heads,) join the softmax: scales `out`, raises `lse`, in place."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(-1))
    out.mul_((lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)


# %% [markdown]
# Like any key's, its gradient needs of each query only $\ell$ and $g \cdot o$.


# %%
#| export
def sink_gradients(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """(heads,) from the upstream gradient and the final `out` and `lse`."""
    share = (sinks.to(lse.dtype).unsqueeze(-1) - lse).exp_()
    return -(share * (grad * out).sum(dim=-1, dtype=lse.dtype)).sum(dim=(0, 2)).to(sinks.dtype)


# %% [markdown]
# ## With gradients
#
# On one rank all keys are at hand: every query meets its keys in exactly one piece, and the results are put
# side by side. FlashAttention's kernels compute a single piece that covers all.


# %%
#| export
class AttendPieces(torch.autograd.Function):
    """Attention in pieces that share no query: (q, k, v, sinks or None, scale, pieces) -> out, as `attend_piece`.

    Raises TypeError or ValueError, one line, on bad arguments."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, cut: list[Piece]) -> Tensor:
        want("q", q, (None, None, None, None), FLOATS, q.device)
        want("k", k, (len(q), None, None, q.shape[3]), (q.dtype,), q.device)
        want("v", v, (*k.shape[:3], None), (q.dtype,), q.device)
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise ValueError(f"k has {k.shape[1]} heads, which do not divide the {q.shape[1]} of q")
        if sinks is not None:
            want("sinks", sinks, (q.shape[1],), FLOATS, q.device)
        if len(cut) == 1:
            out, lse = attend_piece(q, k, v, scale, cut[0])
            out = out.to(q.dtype)
        else:
            out = q.new_empty(*q.shape[:3], v.shape[-1])
            lse = out.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
            for piece in cut:
                at = piece.rows, slice(None), piece.queries
                out[at], lse[at] = attend_piece(q, k, v, scale, piece)
        if sinks is not None:
            add_sinks(out, lse, sinks)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.scale, ctx.cut = scale, cut
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        if len(ctx.cut) == 1 and q.shape[2] == k.shape[2]:
            dq, dk, dv = piece_gradients(grad, q, k, v, out, lse, ctx.scale, ctx.cut[0])
        else:
            dq, dk, dv = (torch.zeros_like(t, dtype=lse.dtype) for t in (q, k, v))
            block_gradients(grad, q, k, v, out, lse, ctx.scale, ctx.cut, dq, dk, dv)
        dsinks = None if sinks is None else sink_gradients(grad, out, lse, sinks)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None


# %% [markdown]
# A numerical derivative, in float64, agrees with every gradient: of a batch of two rows, with grouped heads,
# values narrower than keys, sinks, a window, documents, and tiles.

# %%
q, k, v, sinks = (
    torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for shape in ((2, 4, 7, 3), (2, 2, 7, 3), (2, 2, 7, 2), 4)
)
cut = pieces([range(7)], [range(7)], 2, 7, window=4, documents=torch.tensor([0, 5, 7, 14]), tile=3)
print(len(cut), "pieces")
assert torch.autograd.gradcheck(lambda *x: AttendPieces.apply(*x, 0.5, cut), (q, k, v, sinks))

# %% [markdown]
# What a sink does to a head whose scores are all low: without one, the weights of a query sum to 1 whatever
# the scores; with one, a head can stay silent, and the lower its scores, the quieter it is.

# %%
levels = torch.linspace(-6, 6, 49)
q, ones = torch.ones(1, 49, 8, 1), torch.ones(1, 49, 8, 1)
weight = AttendPieces.apply(
    q, levels.view(1, -1, 1, 1) * ones, ones, torch.zeros(49), 1.0, pieces([range(8)], [range(8)], 1, 8)
)
fig, ax = plt.subplots(figsize=(5.5, 3))
for seen in (1, 2, 8):
    ax.plot(levels, weight[0, :, seen - 1, 0], label=f"{seen} keys")
ax.axhline(1, color="0.6", linestyle=":", label="without a sink")
ax.set(title="Weight left for keys beside a sink of logit 0", xlabel="score of each key", ylabel="sum of weights")
ax.legend(fontsize=8)
fig

# %% [markdown]
# ## Which kernel, on an H200
#
# Forward and backward of one piece, 4 rows of 4,096 tokens in bf16 (`tools/attention_kernels.py`); the numbers behind
# the names are the features of a head (query heads differ between the cases: 64 of 64 features, 32 of 128, 16 of more).
# Documents have random lengths; named is the mean distance of the cuts within rows. FlashAttention-4 is the fastest but
# for a causal square of 256 features, where cuDNN is.

# %%
import json
from pathlib import Path

home = next((p for p in [Path.cwd(), *Path.cwd().parents] if (p / "docs" / "benchmarks").is_dir()), None)
if home:
    measured = json.loads((home / "docs/benchmarks/attention-h200.json").read_text())
    print(measured["device"], measured["versions"], measured["date"])
    fig, ax = plt.subplots(figsize=(7, 3.6))
    for shift, kernel in zip((-0.27, 0, 0.27), ("FlashAttention-2", "FlashAttention-4", "cuDNN"), strict=True):
        heights = [case.get(kernel, 0) for case in measured["ms"].values()]
        bars = ax.barh([i + shift for i in range(len(heights))], heights, height=0.25, label=kernel)
        ax.bar_label(bars, [f"{ms:.2f}" if ms else "" for ms in heights], fontsize=6)
    ax.set_yticks(range(len(measured["ms"])), measured["ms"])
    ax.invert_yaxis()
    ax.set(title="Attention, forward and backward", xlabel="ms")
    ax.legend(fontsize=8)
    fig.tight_layout()
fig

# %% [markdown]
# The [attention layer](26_attention.py) chooses between this and torch's own attention, and the
# [ring](42_ring_attention.py) uses it for keys that live elsewhere. Next: tokens whose experts do,
# [row by row](16_dispatch_kernel.py).
