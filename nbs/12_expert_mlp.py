# %% [markdown]
# # The expert MLP: grouped matrix products that waste nothing
#
# > For every token the weighted sum of its experts' outputs, forward and backward, in Triton.
#
# This is where a Mixture-of-Experts spends its time. Token $t$ has $K$ experts $e_{tk}$ with weights
# $w_{tk}$, and each expert is a small gated MLP:
#
# $$o_t = \sum_k w_{tk}\, D_{e}\, a_{tk}, \qquad a_{tk} = \mathrm{silu}(g_{tk}) \odot u_{tk}, \qquad
#   \begin{pmatrix} g_{tk} \\ u_{tk} \end{pmatrix} = W_{e}\, x_t, \qquad e = e_{tk}.$$
#
# $x_t$ has $H$ features, and $a_{tk}$ has $I$, the expert's hidden size. $W_e$ (`gate_up[e]`, $2I \times H$) stacks the
# gate rows on the up rows; $D_e$ is `down[e]`, $H \times I$. There are $E$ experts, $T$ tokens and $P = TK$ rows, which
# are the (token, expert) pairs [sorted by expert](11_sort.py). A bar is a gradient:
# $\bar o_t = \partial L / \partial o_t$. `projected` is $(g, u)$ of all rows, before the activation. `dispatch` and
# `combine` move rows within one GPU; those [between ranks](41_expert_parallel.py) do the same on a larger scale.

# %%
#| default_exp kernels.expert_mlp

# %%
#| export
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pithtrain.kernels.lang import INTERPRETED, PRODUCTS_OF, TensorDescriptor, tl, triton, want, wanted
from pithtrain.kernels.sort import Sorted, sort_pairs

# %% [markdown]
# ## The smallest true implementation
#
# A loop over experts. It is the oracle for everything below, and PyTorch derives its gradients. Given a bias for gate
# and up, the activation is that of [GPT-OSS](22a_clamped_experts.py).


# %%
#| export
def reference_expert_mlp(
    tokens: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`triton_expert_mlp` as a loop over experts."""
    out = tokens.new_zeros(tokens.shape, dtype=torch.promote_types(tokens.dtype, torch.float32))
    for e, (own_gate_up, own_down) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        t, k = torch.where(expert_ids == e)
        own_bias = None if bias is None else bias[e]
        gate, up = F.linear(tokens[t], own_gate_up.to(tokens.dtype), own_bias).chunk(2, dim=-1)
        if bias is not None:
            gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
        activated = F.silu(gate) * up if bias is None else gate * torch.sigmoid(1.702 * gate) * up
        y = F.linear(activated, own_down.to(tokens.dtype))
        out.index_add_(0, t, weights[t, k, None] * y)
    return out.to(tokens.dtype)


# %%
# ruff: noqa: E741  (I is the expert hidden size, as in the maths)
def problem(T, H, I, E, K, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    tensors = [torch.randn(T, H), torch.rand(T, K), torch.randn(E, 2 * I, H) / H**0.5, torch.randn(E, H, I) / I**0.5]
    x, w, gate_up, down = (t.to(dtype if i != 1 else torch.float32).requires_grad_() for i, t in enumerate(tensors))
    return x, torch.rand(T, E).topk(K).indices, w, gate_up, down


args = problem(T=6, H=8, I=4, E=3, K=2)
print(reference_expert_mlp(*args).shape)

# %% [markdown]
# ## What moves through memory
#
# Count bytes before writing a kernel. Take Qwen3-30B-A3B in bf16 with 16,384 tokens: $H = 2048$, $I = 768$,
# $E = 128$, $K = 8$, so $P = TK = 131{,}072$ rows. Forward and backward are 3.7 TFLOP, which PyTorch's grouped products
# do in 6.9 ms on an H200, whose memory moves 33 GB in that time. These are the tensors of the forward pass;
# a straightforward implementation writes all of them, and backward a gradient of each, some of them more than once:

# %%
T, H, I, E, K = 16384, 2048, 768, 128, 8
P, MB = T * K, 1e6
row = {"tokens gathered": P * H, "gate and up": P * 2 * I, "activated": P * I, "expert outputs": P * H}
for name, elements in row.items():
    print(f"{name:16} {2 * elements / MB:6.0f} MB")
print(f"{'weights':16} {2 * E * 3 * I * H / MB:6.0f} MB,  {'tokens':6} {2 * T * H / MB:4.0f} MB")

# %% [markdown]
# The plan is to write each of these at most once, but for the gathered tokens of large experts, written twice:
#
# ```
# forward    tokens ──rows──▶ [up] ──▶ projected (P, 2I) ─ kept for backward
#                               └─ SwiGLU in the epilogue ─▶ activated (P, I)
#            activated ──▶ [down] ──▶ outputs (P, H) ──▶ [combine: un-permute, weigh, add] ──▶ out (T, H)
#
# backward   d_out ──rows──▶ [d activated] + projected
#                               └─ epilogue: SwiGLU again and its gradient ─▶ d_projected (P, 2I),
#                                  w * activated (P, I), d_weights
#            d_projected ──▶ [d tokens] ──▶ (P, H) ──▶ [combine] ──▶ d_tokens (T, H)
#            d_projected ᵀ × rows of tokens    ──▶ d_gate_up      these two can wait: some pipeline
#            rows of d_out ᵀ × (w * activated) ──▶ d_down         schedules run them later
#
# rows       small experts   (T, H) ──▶ each kernel gathers as it goes: 2PH bytes read in each, none written
#            large experts   (T, H) ──▶ [dispatch] ──▶ (P, H) in expert order: 2PH bytes written, then read;
#                            three times: tokens forward, tokens again backward (they are not kept), d_out
# ```
#
# Two identities keep the backward pass small.
#
# * **The gradient of a router weight is a row's dot product.** $\partial L/\partial w_{tk} = \langle
#   \bar o_t, D_e a_{tk} \rangle = \langle D_e^\top \bar o_t, a_{tk} \rangle$, and $D_e^\top \bar o_t$ is the
#   accumulator of the kernel that computes the activation's gradient. The expert outputs $D_e a$ need not be
#   kept. (The idea is SonicMoE's, arXiv 2512.14080.)
# * **The weight goes to the small side.** The gradient of $D_e$ is $\sum w\,\bar o\, a^\top$; scaling $a$
#   ($I$ wide) instead of $\bar o$ ($H$ wide) lets the raw $\bar o$ be gathered.
#
# ## A tile of a grouped product
#
# The kernels that multiply are *persistent*: as many programs as the GPU has multiprocessors, each walking over tiles.
# In all but one, `flatten=True` lets the compiler fetch the first blocks of the next tile while this one is being
# written. Products with an expert's weights take its tiles one after another, down its rows first, so that a block of
# its weights, once in the cache, serves them all.
#
# But at most 16 tiles down before the next block of columns. The rows of a crowded expert do not fit in the cache, 50
# MB on an H100: going all the way down would read them from memory once for every block of columns. Take GPT-OSS's
# *down* and an expert with 16,384 rows; what a cache that forgets the least recently used block must read from memory,
# by how many tiles go down:

# %%
from collections import OrderedDict


def read_from_memory(band: int, down: int = 16384 // 128, across: int = -(-2880 // 256)) -> float:
    """MB read for all tiles of an expert, whose rows and columns are 2,880 numbers long, in bf16."""
    cache, held, read = OrderedDict(), 0, 0
    for top in range(0, down, band):
        for tile in ((i, j) for j in range(across) for i in range(top, min(top + band, down))):
            for block in (("rows", tile[0], 128), ("columns", tile[1], 256)):
                if block not in cache:
                    cache[block] = None
                    held, read = held + block[2], read + block[2]
                cache.move_to_end(block)
                while held * 2880 * 2 > 50e6:
                    held -= cache.popitem(last=False)[0][2]
    return read * 2880 * 2 / 1e6


for band in (1, 4, 16, 32, 128):
    print(f"{band:3} down: {read_from_memory(band):6.0f} MB")

# %% [markdown]
# Up to 16 each block is read once, so the cache alone would allow even 1. With 16, more of the tiles in flight, one on
# each of 132 multiprocessors, share a block of weights.
#
# Which blocks: 128 x 256 with 64 deep is the largest tile whose accumulator fits the registers of two
# warpgroups, and larger tiles read the cache less. On the CPU the interpreter gets small blocks, so that
# small problems still have many tiles. float32 runs on the ordinary arithmetic units, exactly, and slowly.
#
# `rows`, `columns` and `inner` are the kernels' `BM`, `BN` and `BK`. A *stage* is a block of each operand in shared
# memory, 48 KB together: while one is multiplied, the next are on their way. Of the 227 KB that a program may take on
# these GPUs, *up* needs 224: four stages, and half a tile on its way out. The plain products store an expert's last
# tile whole, 64 KB, beside which there is room for three. *d activated* has three and stores from registers. The weight
# gradients ask for five, of which two only bring the numbers of the rows to gather: with half a tile, Triton takes 177
# KB.


# %%
#| export
class Blocks(NamedTuple):
    """The tile of a grouped product and how a program runs it."""

    rows: int
    columns: int
    inner: int
    warps: int = 8
    stages: int = 4


def blocks_for(tensor: Tensor) -> Blocks:
    """Blocks for this device and dtype; half precision on Hopper GPUs is what they were measured on."""
    if INTERPRETED:
        return Blocks(16, 32, 16)
    if tensor.dtype == torch.float32:
        return Blocks(64, 64, 32, warps=4, stages=2)
    if torch.cuda.get_device_capability(tensor.device)[0] < 9:
        return Blocks(128, 128, 32, stages=3)
    return Blocks(128, 256, 64)


def programs_on(tensor: Tensor) -> int:
    """How many persistent programs to launch: one for each multiprocessor; three for the interpreter."""
    if INTERPRETED:
        return 3
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


# %%
#| export
@triton.jit
def locate(tile, across, tile_expert_ptr, first_tile_ptr, offset_ptr, BM: tl.constexpr):
    """Expert, first row, end of the expert's rows and column block of a tile; `across` tiles lie side by side."""
    e = tl.load(tile_expert_ptr + tile // across)
    first = tl.load(first_tile_ptr + e)
    down = tl.load(first_tile_ptr + e + 1) - first
    local = tile - first * across
    band = local // (16 * across) * 16
    local -= band * across
    down = tl.minimum(down - band, 16)
    row = tl.load(offset_ptr + e) + (band + local % down) * BM
    return e, row, tl.load(offset_ptr + e + 1), local // down


# %%
#| export
@triton.jit
def halves(x, R: tl.constexpr, C: tl.constexpr):
    """Left and right half of the columns of `x` (R, C). In the layout of an accumulator this moves nothing."""
    return x.reshape(R, 2, C // 2).permute(0, 2, 1).split()


# %% [markdown]
# `locate` and `halves` are used inside the kernels that follow; a drawing shows the walk: six experts with
# uneven loads, tiles of four rows, at most three down, numbered in the order in which they are visited.

# %%
import matplotlib.pyplot as plt


def walk(loads, across, rows, band):
    order, first = [], 0
    for e, load in enumerate(loads):
        down = -(-load // rows)
        for top in range(0, down, band):
            order += [(first + top + i, j, e) for j in range(across) for i in range(min(band, down - top))]
        first += down
    return order


fig, ax = plt.subplots(figsize=(6, 3))
for n, (r, c, e) in enumerate(walk([9, 3, 0, 19, 4, 6], across=3, rows=4, band=3)):
    ax.add_patch(plt.Rectangle((c, r), 1, 1, color=f"C{e}", alpha=0.5, ec="w"))
    ax.text(c + 0.5, r + 0.5, n, ha="center", va="center", fontsize=7)
ax.set(xlim=(0, 3), ylim=(12, 0), title="The order of tiles", xlabel="block of columns", ylabel="tile of rows")
fig

# %% [markdown]
# ## Two ways to the rows of an expert
#
# The tokens of an expert lie anywhere. A kernel can *gather* them as it goes, by a pointer for each row: nothing is
# written for it, but the addresses take a share of every block's time. Or `dispatch` puts them in expert order, which
# writes $(P, H)$; from then on they are a regular matrix. The GPU's tensor memory accelerator brings it through a
# *descriptor*, without taking any thread's time. A descriptor fills what lies outside the tensor with zeros, so no
# block size has to divide the sizes. PyTorch's own grouped product, in bf16, takes such a matrix too.
#
# A product costs $2PHN$ operations for $N$ columns of output ($2I$ for *up*), and a dispatch writes $2PH$ bytes that
# gathering does not, so the larger $N$, the less it counts. The table at the end has each product by either way, and
# their sums: gathering is faster at 768 hidden units (Qwen3-30B-A3B), dispatching at 2,880 (GPT-OSS), and at 1,408
# (DeepSeek-V2-Lite) they are equal. The line is drawn at 1,024.


# %%
#| export
@triton.jit
def dispatch_kernel(x_ptr, slot_ptr, out_ptr, H: tl.constexpr, K: tl.constexpr, BH: tl.constexpr):
    """out[slot[t, k]] = x[t] for every k."""
    t, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BH + tl.arange(0, BH)
    x = tl.load(x_ptr + t * H + column, mask=column < H, other=0.0)
    for k in tl.static_range(K):
        slot = tl.load(slot_ptr + t * K + k).to(tl.int64)
        tl.store(out_ptr + slot * H + column, x, mask=(column < H) & (slot >= 0))


# %%
#| export
def dispatch(x: Tensor, order: Sorted) -> Tensor:
    """Rows of x (T, H) copied to their places in expert order: (P, H)."""
    (T, K), H = order.slot.shape, x.shape[1]
    out, width = x.new_empty(len(order.pair), H), min(1024, triton.next_power_of_2(H))
    dispatch_kernel[(T, triton.cdiv(H, width))](x, order.slot, out, H, K, width)
    return out


# %%
if INTERPRETED:
    x, ids, w, gate_up, down = (t.detach() for t in problem(T=20, H=24, I=40, E=4, K=2))
    order = sort_pairs(ids, 4, blocks_for(x).rows)
    assert torch.equal(dispatch(x, order), x[order.pair.long() // 2])


# %%
#| export
def dispatch_first(x: Tensor, down: Tensor) -> bool:
    """Whether rows of x (T, H) are put in expert order once, for the experts of `down` (E, H, I), or gathered."""
    large = down.shape[2] >= 1024 and x.dtype == torch.bfloat16 and x.is_cuda
    return large and torch.cuda.get_device_capability(x.device) >= (9, 0)


# %% [markdown]
# The kernels that read rows take either, decided when they are compiled (`IN_ORDER`).


# %%
#| export
@triton.jit
def places(
    x, row, end, pair_ptr,
    H: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """Where `block_of_rows` finds the BM rows from `row`: that row if IN_ORDER, else pointers (BM, BK) into tokens."""
    if IN_ORDER:
        return row
    else:
        rows = row + tl.arange(0, BM)
        token = tl.load(pair_ptr + rows, mask=rows < end, other=0) // K
        return x + token.to(tl.int64)[:, None] * H + tl.arange(0, BK)[None, :]


@triton.jit
def block_of_rows(x, at, start, H: tl.constexpr, BK: tl.constexpr, IN_ORDER: tl.constexpr):
    """Columns `start` to `start` + BK of BM rows, `at` what `places` found; x is their descriptor if IN_ORDER."""
    if IN_ORDER:
        return x.load([at, start])
    elif H % BK == 0:
        return tl.load(at + start)
    else:
        return tl.load(at + start, mask=tl.arange(0, BK)[None, :] + start < H, other=0.0)


# %% [markdown]
# ## Up: two products and SwiGLU
#
# The weights are regular and come through a descriptor. One load brings the gate rows and the matching up rows as one
# block of `BN`, so a single product of full width serves both, and the accumulator is cut in two at the end.
#
# What follows the product is one function of a gate and an up, and has another form in
# [GPT-OSS](22a_clamped_experts.py): both are clamped, and a bias comes before. Which form it is, is known when the
# kernel is compiled, so neither pays for the other.


# %%
#| export
@triton.jit
def swiglu(gate, up, CLAMPED: tl.constexpr):
    """silu(gate) * up, or the form of layers.clamped_experts; and its derivatives by gate and by up. In fp32."""
    if CLAMPED:
        # a GPU's minimum hides NaN, unless told otherwise
        g = tl.minimum(gate, 7.0, tl.PropagateNan.ALL)
        u = tl.minimum(tl.maximum(up, -7.0, tl.PropagateNan.ALL), 7.0, tl.PropagateNan.ALL) + 1
        s = tl.sigmoid(1.702 * g)
        by_gate = tl.where(gate <= 7.0, u * s * (1 + 1.702 * g * (1 - s)), 0.0)
        by_up = tl.where(tl.abs(up) <= 7.0, g * s, 0.0)
        return g * s * u, by_gate, by_up
    else:
        s = tl.sigmoid(gate)
        return gate * s * up, up * s * (1 + gate * (1 - s)), gate * s


# %%
#| export
@triton.jit
def up_kernel(
    x, pair_ptr, gate_up_desc, bias_ptr, projected_ptr, activated_ptr, tile_expert_ptr, first_tile_ptr, offset_ptr,
    H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, IN_ORDER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr, CLAMPED: tl.constexpr,
):  # fmt: skip
    """projected (P, 2I) = tokens of each row @ gate_up^T, with the expert's bias if CLAMPED; activated (P, I)."""
    HALF: tl.constexpr = BN // 2
    ACROSS: tl.constexpr = (I + HALF - 1) // HALF
    for tile in tl.range(tl.program_id(0), tl.load(first_tile_ptr + E) * ACROSS, PROGRAMS, flatten=True):
        e, row, end, block = locate(tile, ACROSS, tile_expert_ptr, first_tile_ptr, offset_ptr, BM)
        rows = row + tl.arange(0, BM)
        at = places(x, row, end, pair_ptr, H, K, BM, BK, IN_ORDER)
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, H, BK):
            left = block_of_rows(x, at, start, H, BK, IN_ORDER)
            w = gate_up_desc.load([e, 0, block * HALF, start]).reshape(BN, BK)
            acc = tl.dot(left, w.T, acc, input_precision="ieee")
        gate, up = halves(acc, BM, BN)
        columns = block * HALF + tl.arange(0, HALF)[None, :]
        mask = (rows < end)[:, None] & (columns < I)
        rows = rows.to(tl.int64)[:, None]
        if CLAMPED:
            gate += tl.load(bias_ptr + e * (2 * I) + columns, mask=columns < I, other=0.0)
            up += tl.load(bias_ptr + e * (2 * I) + columns + I, mask=columns < I, other=0.0)
        gate, up = gate.to(projected_ptr.dtype.element_ty), up.to(projected_ptr.dtype.element_ty)
        tl.store(projected_ptr + rows * (2 * I) + columns, gate, mask=mask)
        tl.store(projected_ptr + rows * (2 * I) + columns + I, up, mask=mask)
        activated, _, _ = swiglu(gate.to(tl.float32), up.to(tl.float32), CLAMPED)
        tl.store(activated_ptr + rows * I + columns, activated.to(activated_ptr.dtype.element_ty), mask=mask)


# %%
#| export
def up_projection(
    tokens: Tensor, gate_up: Tensor, order: Sorted, in_order: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """projected (P, 2I) and activated (P, I) of every sorted row; gate_up (E, 2I, H), bias (E, 2I).

    `tokens` is (T, H), or (P, H) where they were put `in_order` before."""
    E, two_I, H = gate_up.shape
    I, P, b, programs = two_I // 2, len(order.pair), blocks_for(tokens), programs_on(tokens)
    projected, activated = tokens.new_empty(P, two_I), tokens.new_empty(P, I)
    weights = TensorDescriptor.from_tensor(gate_up.view(E, 2, I, H), [1, 2, b.columns // 2, b.inner])
    up_kernel[(programs,)](
        TensorDescriptor.from_tensor(tokens, [b.rows, b.inner]) if in_order else tokens,
        order.pair, weights, bias, projected, activated, order.tile_expert, order.first_tile, order.offsets,
        H, I, E, order.slot.shape[1], in_order, b.rows, b.columns, b.inner, programs, bias is not None,
        num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return projected, activated


# %%
if INTERPRETED:
    projected, activated = up_projection(x, gate_up, order)
    torch.testing.assert_close(up_projection(dispatch(x, order), gate_up, order, in_order=True), (projected, activated))
    pair = order.pair[0].item()
    gate, up = (gate_up[ids.flatten()[pair]] @ x[pair // 2]).chunk(2)
    torch.testing.assert_close(projected[0], torch.cat([gate, up]))
    torch.testing.assert_close(activated[0], F.silu(gate) * up)

# %% [markdown]
# ## Down, and the gradient of the tokens: the plain grouped product
#
# Rows are already in expert order, so both operands are regular. `down` multiplies by the transposed weights,
# the tokens' gradient by the weights as they are.
#
# The way out matters too. Stored through pointers, a tile keeps its threads busy with addresses and masks until its
# last row is gone; through a descriptor the memory accelerator carries it away while the next tile is multiplied.
# But it knows no masks: an expert's last tile, which mostly ends early, would overwrite the rows of the next expert, so
# that one goes through pointers. The two halves of a tile leave one after the other, because both at once would take
# the shared memory that the inputs need. (Both branches make all they use from `row`, `end` and `block`: Triton 3.6
# cannot flatten the loop when they share a vector with what comes before.)


# %%
#| export
@triton.jit
def product_kernel(
    x_desc, weight_desc, y_desc, y_ptr, tile_expert_ptr, first_tile_ptr, offset_ptr,
    INNER: tl.constexpr, N: tl.constexpr, E: tl.constexpr, TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """y (P, N) = x (P, INNER) @ weights of the row's expert, (N, INNER) if TRANSPOSED, else (INNER, N)."""
    ACROSS: tl.constexpr = (N + BN - 1) // BN
    for tile in tl.range(tl.program_id(0), tl.load(first_tile_ptr + E) * ACROSS, PROGRAMS, flatten=True):
        e, row, end, block = locate(tile, ACROSS, tile_expert_ptr, first_tile_ptr, offset_ptr, BM)
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, INNER, BK):
            x = x_desc.load([row, start])
            if TRANSPOSED:
                w = weight_desc.load([e, block * BN, start]).reshape(BN, BK).T
            else:
                w = weight_desc.load([e, start, block * BN]).reshape(BK, BN)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        if row + BM <= end:
            left, right = halves(acc, BM, BN)
            y_desc.store([row, block * BN], left.to(y_ptr.dtype.element_ty))
            y_desc.store([row, block * BN + BN // 2], right.to(y_ptr.dtype.element_ty))
        else:
            rows = row + tl.arange(0, BM)
            columns = block * BN + tl.arange(0, BN)[None, :]
            mask = (rows < end)[:, None] & (columns < N)
            tl.store(y_ptr + rows.to(tl.int64)[:, None] * N + columns, acc.to(y_ptr.dtype.element_ty), mask=mask)


# %%
#| export
def grouped_product(x: Tensor, weights: Tensor, order: Sorted, transposed: bool) -> Tensor:
    """(P, N): x (P, inner) in expert order by its expert's weights, (E, N, inner) if transposed, or (E, inner, N)."""
    E, N, inner = weights.shape if transposed else (weights.shape[0], weights.shape[2], weights.shape[1])
    b, programs = blocks_for(x), programs_on(x)
    y = x.new_empty(len(x), N)
    box = [1, b.columns, b.inner] if transposed else [1, b.inner, b.columns]
    stages = max(b.stages - 1, 2) if inner > b.inner else 1  # Triton 3.6 cannot pipeline a loop of one round
    product_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [b.rows, b.inner]), TensorDescriptor.from_tensor(weights, box),
        TensorDescriptor.from_tensor(y, [b.rows, b.columns // 2]), y,
        order.tile_expert, order.first_tile, order.offsets, inner, N, E, transposed,
        b.rows, b.columns, b.inner, programs, num_warps=b.warps, num_stages=stages,
    )  # fmt: skip
    return y


# %%
if INTERPRETED:
    outputs = grouped_product(activated, down, order, transposed=True)
    torch.testing.assert_close(outputs[0], down[ids.flatten()[pair]] @ activated[0])
    back = grouped_product(projected, gate_up, order, transposed=False)
    torch.testing.assert_close(back[0], projected[0] @ gate_up[ids.flatten()[pair]])

# %% [markdown]
# ## Combine: un-permute, weigh and add in one pass
#
# One program makes 1,024 columns of one token: it reads that token's rows from wherever the sort put them,
# and adds in fp32. In the backward pass the same kernel adds the tokens' gradients (all weights 1), and picks
# up the router-weight gradients, which the next kernel leaves as one partial sum for each block of columns.


# %%
#| export
@triton.jit
def combine_kernel(
    y_ptr, slot_ptr, weight_ptr, partial_ptr, out_ptr, d_weight_ptr, P,
    H: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, PARTIALS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weights[t, k] * y[slot[t, k]]; d_weights[t, k] = sum over partials of its row."""
    t, column = tl.program_id(0), tl.program_id(1) * BH + tl.arange(0, BH)
    acc = tl.zeros([BH], tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slot_ptr + t * K + k).to(tl.int64)
        y = tl.load(y_ptr + slot * H + column, mask=(column < H) & (slot >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weight_ptr + t * K + k, mask=slot >= 0, other=0.0)
        acc += y
        if PARTIALS > 0 and tl.program_id(1) == 0:
            total = 0.0
            for p in tl.static_range(PARTIALS):
                total += tl.load(partial_ptr + p * P + slot, mask=slot >= 0, other=0.0)
            tl.store(d_weight_ptr + t * K + k, total)
    tl.store(out_ptr + t.to(tl.int64) * H + column, acc.to(out_ptr.dtype.element_ty), mask=column < H)


# %%
#| export
def combine(
    y: Tensor, order: Sorted, weights: Tensor | None, partials: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """out (T, H) from expert rows y (P, H), weighted by weights (T, K) or not; and summed partials (n, P), (T, K)."""
    (T, K), H = order.slot.shape, y.shape[1]
    out, d_weights = y.new_empty(T, H), None if partials is None else partials.new_empty(T, K)
    width = min(1024, triton.next_power_of_2(H))
    combine_kernel[(T, triton.cdiv(H, width))](
        y, order.slot, weights, partials, out, d_weights, len(y),
        H, K, weights is not None, 0 if partials is None else len(partials), width,
    )  # fmt: skip
    return out, d_weights


# %%
if INTERPRETED:
    out, _ = combine(outputs, order, w)
    torch.testing.assert_close(out, reference_expert_mlp(x, ids, w, gate_up, down))

# %% [markdown]
# That is the whole forward pass. Now backwards.
#
# ## The activation's gradient, and everything that depends on it
#
# With $\bar o$ the gradient of the output and $z = D_e^\top \bar o_t$ in the accumulator, the epilogue
# recomputes $s = \sigma(g)$, $a = g s u$ from `projected` and leaves
#
# $$\bar w = \langle z, a\rangle, \quad \bar g = w z \odot u \odot s(1 + g(1 - s)), \quad
#   \bar u = w z \odot g s, \quad w a.$$
#
# It works through the accumulator in quarters, because registers are short: 128 x 256 sums in fp32 fill half
# of them. For the same reason this kernel alone is not flattened: the fetches of the next tile would push the
# epilogue's numbers out to memory. Flattened, gathering takes longer; on rows in order it gains nothing.
#
# One more duty: the weight-gradient kernel reads whole blocks of rows, and the last block may reach past the
# last valid row. Those few rows are set to zero here, because 0 times an uninitialised NaN is NaN.


# %%
#| export
@triton.jit
def activation_gradient_kernel(
    grad, pair_ptr, down_desc, weight_ptr, projected_ptr, d_projected_ptr, scaled_ptr, partial_ptr,
    tile_expert_ptr, first_tile_ptr, offset_ptr, P,
    H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, IN_ORDER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr, PAD: tl.constexpr,
    CLAMPED: tl.constexpr,
):  # fmt: skip
    """d_projected (P, 2I), scaled = weight * activated (P, I), partial (ACROSS, P) sums of the weights' gradients."""
    ACROSS: tl.constexpr = (I + BN - 1) // BN
    QUARTER: tl.constexpr = BN // 4
    for past in range(tl.program_id(0), PAD, PROGRAMS):
        row = tl.load(offset_ptr + E).to(tl.int64) + past
        for start in range(0, I, BN):
            columns = start + tl.arange(0, BN)
            mask = (columns < I) & (row < P)
            zero = tl.zeros([BN], scaled_ptr.dtype.element_ty)
            tl.store(scaled_ptr + row * I + columns, zero, mask=mask)
            tl.store(d_projected_ptr + row * (2 * I) + columns, zero, mask=mask)
            tl.store(d_projected_ptr + row * (2 * I) + columns + I, zero, mask=mask)
    for tile in tl.range(tl.program_id(0), tl.load(first_tile_ptr + E) * ACROSS, PROGRAMS):
        e, row, end, block = locate(tile, ACROSS, tile_expert_ptr, first_tile_ptr, offset_ptr, BM)
        rows = row + tl.arange(0, BM)
        at = places(grad, row, end, pair_ptr, H, K, BM, BK, IN_ORDER)
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, H, BK):
            left = block_of_rows(grad, at, start, H, BK, IN_ORDER)
            w = down_desc.load([e, start, block * BN]).reshape(BK, BN)
            acc = tl.dot(left, w, acc, input_precision="ieee")
        pair = tl.load(pair_ptr + rows, mask=rows < end, other=0)
        weight = tl.load(weight_ptr + pair)[:, None]
        d_weight = tl.zeros([BM], tl.float32)
        left, right = halves(acc, BM, BN)
        quarters = halves(left, BM, BN // 2) + halves(right, BM, BN // 2)
        for q in tl.static_range(4):
            z = quarters[q]
            columns = block * BN + q * QUARTER + tl.arange(0, QUARTER)[None, :]
            mask = (rows < end)[:, None] & (columns < I)
            wide = rows.to(tl.int64)[:, None] * (2 * I) + columns
            gate = tl.load(projected_ptr + wide, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(projected_ptr + wide + I, mask=mask, other=0.0).to(tl.float32)
            activated, by_gate, by_up = swiglu(gate, up, CLAMPED)
            d_weight += tl.sum(z * activated, 1)
            z *= weight
            dtype = d_projected_ptr.dtype.element_ty
            tl.store(d_projected_ptr + wide, (z * by_gate).to(dtype), mask=mask)
            tl.store(d_projected_ptr + wide + I, (z * by_up).to(dtype), mask=mask)
            narrow = rows.to(tl.int64)[:, None] * I + columns
            tl.store(scaled_ptr + narrow, (weight * activated).to(dtype), mask=mask)
        tl.store(partial_ptr + block.to(tl.int64) * P + rows, d_weight, mask=rows < end)


# %%
#| export
def activation_gradient(
    grad: Tensor, down: Tensor, weights: Tensor, projected: Tensor, order: Sorted, in_order: bool = False,
    clamped: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_projected (P, 2I), weight * activated (P, I) and partial sums (n, P) of d_weights.

    `grad`, of the output, is (T, H), or (P, H) where it was put `in_order` before."""
    (E, H, I), P, b, programs = down.shape, len(projected), blocks_for(grad), programs_on(grad)
    d_projected, scaled = torch.empty_like(projected), projected.new_empty(P, I)
    # zeros, not empty: autograd's thread has no current CUDA context before its first ordinary launch, and building
    # a descriptor needs one
    partials = projected.new_zeros(triton.cdiv(I, b.columns), P, dtype=torch.float32)
    activation_gradient_kernel[(programs,)](
        TensorDescriptor.from_tensor(grad, [b.rows, b.inner]) if in_order else grad,
        order.pair, TensorDescriptor.from_tensor(down, [1, b.inner, b.columns]), weights, projected,
        d_projected, scaled, partials, order.tile_expert, order.first_tile, order.offsets, P,
        H, I, E, weights.shape[1], in_order, b.rows, b.columns, b.inner, programs, b.inner, clamped,
        num_warps=b.warps, num_stages=max(b.stages - 1, 2),
    )  # fmt: skip
    return d_projected, scaled, partials


# %% [markdown]
# From there it is one product and one `combine` to the gradients of everything that is not a weight of an expert:

# %%
if INTERPRETED:
    x, ids, w, gate_up, down = args = problem(T=20, H=24, I=40, E=4, K=2)
    reference_expert_mlp(*args).sum().backward()
    d_projected, scaled, partials = activation_gradient(torch.ones_like(x), down.detach(), w.detach(), projected, order)
    d_sorted = grouped_product(d_projected, gate_up.detach(), order, transposed=False)
    d_tokens, d_weights = combine(d_sorted, order, None, partials)
    torch.testing.assert_close(d_tokens, x.grad)
    torch.testing.assert_close(d_weights, w.grad)

# %% [markdown]
# ## Weight gradients
#
# For each expert, (left rows)ᵀ (right rows), summed over its rows. One side is sorted and regular, the other is
# gathered token by token (or both are in order, and PyTorch's grouped product does it): `d_gate_up` gathers tokens on
# the right, `d_down` gathers `grad` on the left. Here the *inner* dimension is ragged: a last block reaches into the
# next experts' rows. There the gathered side is masked to zero, and with it the product, as long as the regular side is
# finite. A row of NaN spoils, besides its own expert, those just before it whose last block reaches it; that step is
# lost anyway. A gathered row costs an address, so the gathered side is the narrow one of the tile.


# %%
#| export
@triton.jit
def weight_gradient_kernel(
    sorted_desc, token_ptr, pair_ptr, out_desc, offset_ptr,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, K: tl.constexpr, GATHER_LEFT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """out[e] (M, N) = left^T right over the rows of e; the side gathered from tokens is GATHER_LEFT or the right."""
    DOWN: tl.constexpr = (M + BM - 1) // BM
    ACROSS: tl.constexpr = (N + BN - 1) // BN
    WIDTH: tl.constexpr = M if GATHER_LEFT else N
    for tile in tl.range(tl.program_id(0), E * DOWN * ACROSS, PROGRAMS, flatten=True):
        e = tile // (DOWN * ACROSS)
        m = (tile // ACROSS) % DOWN * BM
        n = tile % ACROSS * BN
        end = tl.load(offset_ptr + e + 1)
        gathered = (m + tl.arange(0, BM) if GATHER_LEFT else n + tl.arange(0, BN))[None, :]
        acc = tl.zeros([BM, BN], tl.float32)
        for row in range(tl.load(offset_ptr + e), end, BK):
            rows = row + tl.arange(0, BK)
            token = tl.load(pair_ptr + rows, mask=rows < end, other=0) // K
            mask = (rows < end)[:, None] & (gathered < WIDTH)
            t = tl.load(token_ptr + token.to(tl.int64)[:, None] * WIDTH + gathered, mask=mask, other=0.0)
            if GATHER_LEFT:
                acc = tl.dot(t.T, sorted_desc.load([row, n]), acc, input_precision="ieee")
            else:
                acc = tl.dot(sorted_desc.load([row, m]).T, t, acc, input_precision="ieee")
        left, right = halves(acc, BM, BN)
        out_desc.store([e, m, n], left.reshape(1, BM, BN // 2))
        out_desc.store([e, m, n + BN // 2], right.reshape(1, BM, BN // 2))


# %%
#| export
def weight_gradient(
    rows: Tensor, others: Tensor, order: Sorted, gather_left: bool, dtype: torch.dtype, in_order: bool = False
) -> Tensor:
    """Sum over each expert's rows of left^T right: (E, ., .) in `dtype`.

    `others` is the left side if `gather_left`, else the right, and `rows` (P, .) the other one. `others` is (T, .) and
    gathered or, `in_order`, already (P, .): then PyTorch multiplies, rounds to bf16, and that is converted."""
    left, right = (others, rows) if gather_left else (rows, others)
    if in_order:
        return F.grouped_mm(left.T, right, offs=order.offsets[1:]).to(dtype)
    E, (M, N), programs = len(order.offsets) - 1, (left.shape[1], right.shape[1]), programs_on(rows)
    b = blocks_for(rows)
    narrow, wide = min(b.rows, b.columns), max(b.rows, b.columns)
    tall, across = (narrow, wide) if gather_left else (wide, narrow)
    out = rows.new_empty(E, M, N, dtype=dtype)
    weight_gradient_kernel[(programs,)](
        TensorDescriptor.from_tensor(rows, [b.inner, wide]), others, order.pair,
        TensorDescriptor.from_tensor(out, [1, tall, across // 2]), order.offsets, M, N, E, order.slot.shape[1],
        gather_left, tall, across, b.inner, programs, num_warps=b.warps, num_stages=b.stages + 1,
    )  # fmt: skip
    return out


# %%
if INTERPRETED:
    d_gate_up = weight_gradient(d_projected, x.detach(), order, gather_left=False, dtype=x.dtype)
    d_down = weight_gradient(scaled, torch.ones_like(x), order, gather_left=True, dtype=x.dtype)
    torch.testing.assert_close(d_gate_up, gate_up.grad)
    torch.testing.assert_close(d_down, down.grad)

# %% [markdown]
# ## Together
#
# Weights kept in float32 are rounded here, not by the caller, whose conversion would also round their gradients and
# take another pass over all of them: `weight_gradient` stores its float32 accumulator as it is. PyTorch's grouped
# product returns bf16 alone, so where rows are put in order, gradients are rounded, and then converted.
#
# The backward pass needs `projected` (P, 2I), the inputs, and the weights as they were multiplied: of float32 weights a
# copy in half precision is kept until then, for Qwen3-30B-A3B 1.2 GB a layer beside 0.4 GB of `projected`. `d_down` is
# made first, so that `scaled` is gone before the larger `d_gate_up` is made.
#
# A zero-bubble pipeline (arXiv 2401.10241) walks the graph twice: once for the gradients of the inputs, which
# another rank waits for, and later for those of the weights. Autograd calls this node both times, so it asks which
# gradients are [wanted](10_triton.py), and does only that half's products; what both halves share,
# `activation_gradient`, runs twice.


# %%
#| export
class TritonExpertMLP(torch.autograd.Function):
    """`triton_expert_mlp` with its gradients."""

    @staticmethod
    def forward(ctx, tokens, expert_ids, weights, gate_up, down, bias):
        order = sort_pairs(expert_ids, len(gate_up), blocks_for(tokens).rows)
        in_order = dispatch_first(tokens, down)
        ctx.dtype, gate_up, down = gate_up.dtype, gate_up.to(tokens.dtype), down.to(tokens.dtype)
        rows = dispatch(tokens, order) if in_order else tokens
        projected, activated = up_projection(rows, gate_up, order, in_order, bias)
        out, _ = combine(grouped_product(activated, down, order, transposed=True), order, weights)
        ctx.save_for_backward(tokens, weights, gate_up, down, projected, *order)
        ctx.clamped = bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tokens, weights, gate_up, down, projected, *order = ctx.saved_tensors
        order, grad = Sorted(*order), grad.contiguous()
        d_tokens = d_weights = d_gate_up = d_down = d_bias = None
        wants_tokens, _, wants_weights, wants_gate_up, wants_down, *wants_bias = wanted(ctx)
        in_order = dispatch_first(tokens, down)
        grad = dispatch(grad, order) if in_order else grad
        d_projected, scaled, partials = activation_gradient(
            grad, down, weights, projected, order, in_order, ctx.clamped
        )
        if wants_down:
            d_down = weight_gradient(scaled, grad, order, True, ctx.dtype, in_order)
        del scaled, grad
        if wants_tokens or wants_weights:
            d_sorted = grouped_product(d_projected, gate_up, order, transposed=False)
            d_tokens, d_weights = combine(d_sorted, order, None, partials)
            del d_sorted
        if wants_gate_up:
            rows = dispatch(tokens, order) if in_order else tokens
            d_gate_up = weight_gradient(d_projected, rows, order, False, ctx.dtype, in_order)
            del rows
        if any(wants_bias):  # a bias is the weight of an input that is always 1; a descriptor's rows take 16 bytes
            ones = tokens.new_ones(len(tokens), 16 // tokens.element_size())
            d_bias = weight_gradient(d_projected, ones, order, False, d_projected.dtype)[..., 0]
        return d_tokens, None, d_weights, d_gate_up, d_down, d_bias


# %%
#| export
def triton_expert_mlp(
    tokens: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, bias: Tensor | None = None
) -> Tensor:
    """For each token the weighted sum over its experts of down @ (silu(gate x) * (up x)): (T, H), as `tokens`.

    tokens (T, H) in float32, bfloat16 or float16; expert_ids (T, K) int32 or int64, -1 for an expert that is not on
    this rank (contributes nothing); weights (T, K) float32; gate_up (E, 2I, H), gate rows first; down (E, H, I); both
    as `tokens`, or float32: then they are rounded to it, and their gradients are float32, not rounded on the way
    where rows are gathered (see `dispatch_first`). Given `bias` (E, 2I) as `tokens`, of gate and up, the form is that
    of layers.clamped_experts. Nothing waits for the GPU. The gradient of `weights` where the id is -1 is zero.
    Raises TypeError or ValueError, one line, on bad arguments."""
    want("tokens", tokens, (None, None), PRODUCTS_OF)
    (T, H), device = tokens.shape, tokens.device
    want("expert_ids", expert_ids, (T, None), (torch.int32, torch.int64), device)
    want("weights", weights, expert_ids.shape, (torch.float32,), device)
    want("down", down, (None, H, None), (tokens.dtype, torch.float32), device)
    E, _, I = down.shape
    want("gate_up", gate_up, (E, 2 * I, H), (down.dtype,), device)
    if bias is not None:
        want("bias", bias, (E, 2 * I), (tokens.dtype,), device)
        bias = bias.contiguous()
    sizes = {"hidden size": H, "expert hidden size": I, "number of experts": E, "top_k": expert_ids.shape[1]}
    for name, size in sizes.items():
        if size == 0:
            raise ValueError(f"{name} is 0; want at least 1")
    for name, size in (("hidden size", H), ("expert hidden size", I)):
        if size * tokens.element_size() % 16:
            raise ValueError(
                f"{name} {size} in {tokens.dtype} is no multiple of 16 bytes; pad it for the Triton expert MLP"
            )
    if T == 0:
        return tokens * 0 + sum(t.sum() for t in (weights, gate_up, down, bias) if t is not None) * 0
    gate_up, down = (t.contiguous() for t in (gate_up, down))
    gate_up, down = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (gate_up, down))  # as descriptors want it
    return TritonExpertMLP.apply(tokens.contiguous(), expert_ids, weights.contiguous(), gate_up, down, bias)


# %% [markdown]
# The proof, against the reference in float64. (The interpreter cannot multiply bfloat16, so half precision is
# checked in float16 here and in bfloat16 on a GPU.)

# %%
if INTERPRETED:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        fast = problem(T=50, H=72, I=40, E=6, K=3, dtype=dtype)
        true = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in fast]
        ours, oracle = triton_expert_mlp(*fast), reference_expert_mlp(*true)
        grad = torch.randn_like(ours)
        ours.backward(grad)
        oracle.backward(grad.double())
        pairs = {"out": (ours, oracle), "tokens": (fast[0].grad, true[0].grad), "weights": (fast[2].grad, true[2].grad)}
        pairs |= {"gate_up": (fast[3].grad, true[3].grad), "down": (fast[4].grad, true[4].grad)}
        errors = {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}
        print(dtype, {name: f"{error:.1e}" for name, error in errors.items()})
        assert max(errors.values()) < tolerance

# %% [markdown]
# ## Which runs when
#
# [The layer](22_experts.py) decides: these kernels on a GPU, portions of experts on a CPU. `reference_expert_mlp` is
# what tests hold both against, and what [clamped experts](22a_clamped_experts.py) run where the kernels do not serve.
#
# ## Where the time goes
#
# Each product alone, on an H200 (`tools/expert_products.py`), beside PyTorch's grouped product of the same size. Ours
# do more: *up* applies SwiGLU, and *d activated* SwiGLU's gradient and the router weights'. *Gathering* finds rows
# token by token; *in order* reads what `dispatch` wrote. In order, the weight gradients are `grouped_mm`'s own, so that
# column is empty there. The last line sums what differs: *gathering*; or *in order*, `grouped_mm`'s two weight
# gradients, and three dispatches. What order speeds up is *up* and most weight gradients, not *d activated*. Each was
# timed alone; the six of `grouped_mm` add up to [the benchmark's floor](85_bench.py) within one percent.

# %%
import json
from pathlib import Path

home = next((p for p in [Path.cwd(), *Path.cwd().parents] if (p / "docs" / "benchmarks").is_dir()), None)
if home:
    measured = json.loads((home / "docs/benchmarks/products-h200.json").read_text())
    versions = ", ".join(f"{package} {version}" for package, version in measured["versions"].items())
    print(f"{measured['device']}, {versions}, {measured['date']}: median ms, bf16, 16,384 tokens")
    for shape, rows in measured["shapes"].items():
        print(f"\n{shape:18}{'grouped_mm':>12}{'gathering':>12}{'in order':>12}")
        for row in rows:
            times = (row[way] for way in ("grouped_mm", "gathering", "in_order"))
            print(f"  {row['product']:16}" + "".join(f"{ms:12.2f}" if ms else " " * 12 for ms in times))
        by_token = [row for row in rows if row["gathering"]]
        ordered = sum(row["in_order"] or row["grouped_mm"] for row in by_token) + 3 * rows[-1]["in_order"]
        print(f"  {'sum of what differs':28}{sum(row['gathering'] for row in by_token):12.2f}{ordered:12.2f}")

# %% [markdown]
# What was tried and lost:
#
# * two smaller tiles at a time on each multiprocessor, so that one writes while the other multiplies: small tiles read
#   the cache too often;
# * `projected` brought into the cache ahead of the epilogue, or its next quarter loaded while one is used: there are no
#   registers left;
# * descriptors for what *d activated* loads or stores (slower), or for what *up* stores (no gain);
# * programs that start at staggered times: no gain, and much slower where the delay is long, since programs in step
#   share what they read;
# * tiles of 128 x 192, which divide 2,880 without a remainder, as two products in one loop;
# * Triton 3.6's automatic warp specialisation: it hung, or changed nothing.

# %% [markdown]
# How fast it is on a GPU, against the bare matrix products and other implementations, is in
# [the benchmark](85_bench.py). Next: [the router](13_router_kernel.py).
