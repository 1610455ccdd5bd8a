# %% [markdown]
# # Batches
#
# > Which tokens a training step sees: a shuffled order that is a pure function of the seed and the step.

# %%
#| default_exp train.batches

# %% [markdown]
# ## The idea
#
# Training reads **windows** of $S + 1$ neighbouring tokens: $S$ inputs, and the same shifted by one as targets.
# A data loader usually walks through them with a random generator, and to resume at step 10,000 it must save
# its state or replay 10,000 steps. Ours keeps no state at all. Number every window that training will ever
# read $r = 0, 1, 2, \dots$ and call that number a **row**. Step $t$ with batch size $B$ reads rows
# $tB, \dots, tB + B - 1$, and a row's tokens are a formula in $(\text{seed}, r)$.
#
# - Any step is reached at once, so resuming costs nothing and cannot drift.
# - Data-parallel ranks each take a slice of a step's rows; nothing about ranks is in here.

# %% [markdown]
# ## The maths
#
# Close the row of $N$ training tokens to a ring. One epoch is $n = \lfloor N / S \rfloor$ windows that lie end
# to end on it, from an offset $o_e$ that is different in each epoch $e$, so that a token sits at a new place in
# its window each time and no pair of neighbours is torn apart for ever:
#
# $$ e = \lfloor r / n \rfloor, \qquad w = \pi_e(r \bmod n), \qquad
#    \text{start} = (o_e + w S) \bmod N $$
#
# $\pi_e$ is a permutation of $0 \dots n - 1$. Each epoch predicts every token of the ring exactly once, but for
# the $N \bmod S$ that do not fill a window, and those are different ones each time.
#
# The permutation must be computable at one point without listing it. A **Feistel network** is: split a number
# of $2b$ bits in halves $(L, R)$ and repeat
#
# $$ (L, R) \leftarrow (R,\; L \oplus F_k(R)) $$
#
# Whatever $F_k$ is, each round can be undone, so the whole is a permutation of $0 \dots 4^b - 1$. To get one of
# $0 \dots n - 1$, take $4^b \ge n$ and, when the result is $n$ or more, apply it again until it is not
# ("cycle walking", Black and Rogaway 2002); as $4^b < 4n$ that is under four applications on average.

# %% [markdown]
# ## The smallest true implementation


# %%
def simple_permute(index: int, n: int, key: int) -> int:
    half = 1
    while 4**half < n:
        half += 1
    while True:
        left, right = index >> half, index & (2**half - 1)
        for number in range(4):
            left, right = right, left ^ (hash((right, key, number)) & (2**half - 1))
        index = left << half | right
        if index < n:
            return index


print([simple_permute(index, 10, key=7) for index in range(10)])
assert sorted(simple_permute(index, 10, key=7) for index in range(10)) == list(range(10))

# %% [markdown]
# ## The one to use
#
# The same in numpy over many numbers at once, with a fixed mixing function: an order of training data must not
# change with the version of a library's random generator. `mix` is the finaliser of SplitMix64 (Steele, Lea
# and Flood, 2014); it turns neighbouring numbers into unrelated ones.

# %%
#| export
from collections.abc import Iterator

import numpy as np
import torch

from pithtrain.config import UserError
from pithtrain.train.shards import Tokens


# %%
#| export
def mix(numbers: np.ndarray) -> np.ndarray:
    """Scramble uint64 numbers, one to one (the finaliser of SplitMix64)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


# %%
print([f"{number:016x}" for number in mix(np.arange(3, dtype=np.uint64))])

# %% [markdown]
# Keys chain: the key of an epoch is `mix` of seed and epoch, the key of a round `mix` of that and the round.


# %%
#| export
def epoch_keys(seed: int, epochs: np.ndarray) -> np.ndarray:
    """One uint64 key for each epoch under this seed."""
    return mix(mix(np.array([seed], dtype=np.int64).view(np.uint64)) ^ epochs.astype(np.uint64))


# %%
print([f"{key:016x}" for key in epoch_keys(seed=1, epochs=np.arange(3))])


# %%
#| export
def permute(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0..n-1 takes each index: int64, of the shape of `indices` and `keys`."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = indices.astype(np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        key = keys[outside]
        left, right = out[outside] >> half, out[outside] & mask
        for number in range(10):
            left, right = right, left ^ (mix(mix(key + np.uint64(number)) ^ right) & mask)
        out[outside] = left << half | right
        outside = out >= n
    return out.astype(np.int64)


# %%
n = 1000
order = permute(np.arange(n), n, np.full(n, epoch_keys(1, np.array([0]))))
assert sorted(order) == list(range(n))
print(order[:12])

# %% [markdown]
# Does it shuffle as well as a real shuffle? Two looks at 20,000 permutations of 12 things. Left, how often
# thing $i$ ends at place $j$: it should be a twelfth of the time everywhere, and the colours show how many
# standard deviations each is away. Right, the number of fixed points, which for a random permutation is
# Poisson with mean 1. The number of rounds was chosen by this test with ten times the trials: at four, some cells
# are off by nine standard deviations, at six by four; from ten on by no more than chance allows.

# %%
import math

import matplotlib.pyplot as plt

trials, n = 20_000, 12
keys = np.repeat(epoch_keys(5, np.arange(trials)), n)
orders = permute(np.tile(np.arange(n), trials), n, keys).reshape(trials, n)
landed = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
deviation = (landed - trials / n) / math.sqrt(trials / n * (1 - 1 / n))
assert np.abs(deviation).max() < 5  # no cell is off by more than chance allows
fixed = np.bincount((orders == np.arange(n)).sum(axis=1), minlength=7)[:7] / trials

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
image = left.imshow(deviation, cmap="RdBu", vmin=-5, vmax=5)
left.set(title="Deviation from a fair shuffle", xlabel="index", ylabel="place")
fig.colorbar(image, label="standard deviations")
right.bar(np.arange(7), fixed, label="Feistel")
right.plot(np.arange(7), [math.exp(-1) / math.factorial(k) for k in range(7)], "ko", label="Poisson(1)")
right.set(title="Fixed points of a permutation", xlabel="number of fixed points", ylabel="share of permutations")
right.legend()
fig.tight_layout()
fig

# %% [markdown]
# ## Training batches


# %%
#| export
class Batches:
    """Rows of `sequence_length` tokens, `batch_size` a step. A subclass has `read(rows)`: their inputs and targets."""

    batch_size: int
    sequence_length: int

    def rows(self, step: int) -> np.ndarray:
        """The rows of a step, (batch_size,) int64. A data-parallel rank reads its own part of them."""
        return step * self.batch_size + np.arange(self.batch_size)


class TrainBatches(Batches):
    """Shuffled windows of the training tokens. Row r is a pure function of (seed, r); step t is B rows.

    `windows` is the number of rows in an epoch. Raises UserError when the data is shorter than one window."""

    def __init__(self, tokens: Tokens, sequence_length: int, batch_size: int, seed: int):
        if len(tokens) <= sequence_length:
            cure = f"set it below its {len(tokens)} tokens, or give more text"
            raise UserError(f"train.sequence_length = {sequence_length}: longer than the training data: {cure}")
        self.tokens, self.sequence_length, self.batch_size, self.seed = tokens, sequence_length, batch_size, seed
        self.windows = len(tokens) // sequence_length

    def starts(self, rows: np.ndarray) -> np.ndarray:
        """Position of each row's first token, int64."""
        epochs, index = np.divmod(rows, self.windows)
        keys = epoch_keys(self.seed, epochs)
        offsets = (mix(keys) % np.uint64(len(self.tokens))).astype(np.int64)
        return (offsets + permute(index, self.windows, keys) * self.sequence_length) % len(self.tokens)

    def read(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of any rows, each (len(rows), sequence_length) int64."""
        positions = self.starts(rows)[:, None] + np.arange(self.sequence_length + 1)
        window = torch.from_numpy(self.tokens.take(positions % len(self.tokens)))
        return window[:, :-1], window[:, 1:]


# %% [markdown]
# With token $i$ at position $i$, a batch shows where it came from. Two ranks that take alternate rows read
# together exactly what one reads alone.

# %%
counting = Tokens([np.arange(1000, dtype=np.uint16)])
batches = TrainBatches(counting, sequence_length=8, batch_size=4, seed=1)
inputs, targets = batches.read(batches.rows(step=10_000))
print(inputs)
assert torch.equal(targets[:, :-1], inputs[:, 1:])
parts = [batches.read(batches.rows(10_000)[rank::2])[0] for rank in range(2)]
assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), inputs)

# %% [markdown]
# The picture: the tokens of a small corpus from left to right, one band for each epoch, coloured by *when* in
# the epoch they are read. Neighbouring windows come at unrelated times, their borders move from epoch to
# epoch, and the white sliver, the $N \bmod S$ tokens that are not predicted, moves as well.

# %%
small = Tokens([np.arange(620, dtype=np.uint16)])
batches = TrainBatches(small, sequence_length=32, batch_size=1, seed=3)
seen = np.full((5, len(small)), np.nan)
for row in range(5 * batches.windows):
    epoch, when = divmod(row, batches.windows)
    target = batches.read(batches.rows(row))[1].numpy()
    assert np.isnan(seen[epoch, target]).all()  # no token twice in an epoch
    seen[epoch, target] = when
assert (np.isnan(seen).sum(axis=1) == len(small) % 32).all()

fig, axis = plt.subplots(figsize=(9, 2.6))
image = axis.imshow(seen, aspect="auto", interpolation="nearest", cmap="viridis")
axis.set(xlabel="token", ylabel="epoch", title="When each token is predicted")
fig.colorbar(image, label="step within the epoch")
fig.tight_layout()
fig
# %% [markdown]
# ## Held-out batches
#
# Validation reads the held-out row once, in order, without overlap. Every token but the first is predicted
# exactly once; the last window is filled up with targets of -100, which a cross-entropy ignores. Batches all
# have one shape (whole rows of -100 at the very end), so that a compiled model sees no other, and ranks can
# take equal parts.

# %%
#| export
IGNORE = -100  # the target that torch's cross-entropy leaves out


# %%
#| export
class HeldOutBatches(Batches):
    """The held-out tokens in order, each but the first a target exactly once. `len` counts batches.

    The mean over a whole pass is a sum of losses over `targets` divided by the count of targets not IGNORE,
    which is len(tokens) - 1: batches hold different numbers of them."""

    def __init__(self, tokens: Tokens, sequence_length: int, batch_size: int):
        if len(tokens) < 2:
            raise UserError("the held-out data has no token to predict: give more text")
        self.tokens, self.sequence_length, self.batch_size = tokens, sequence_length, batch_size

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // (self.sequence_length * self.batch_size))

    def read(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of any rows, each (len(rows), sequence_length) int64; rows past the end are all IGNORE."""
        positions = rows[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        inside = positions < len(self.tokens)
        window = self.tokens.take(np.where(inside, positions, 0))
        targets = np.where(inside, window, IGNORE)[:, 1:]
        return torch.from_numpy(window[:, :-1]), torch.from_numpy(targets)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (self.read(self.rows(step)) for step in range(len(self)))


# %%
held_out = HeldOutBatches(Tokens([np.arange(20, dtype=np.uint16)]), sequence_length=8, batch_size=2)
for _, targets in held_out:
    print(targets.tolist())
every = torch.cat([targets[targets != IGNORE] for _, targets in held_out])
assert every.tolist() == list(range(1, 20))

# %% [markdown]
# ## What it costs
#
# Reading must be nothing beside a training step. Here a batch is drawn from a memory-mapped file of ten
# million tokens; the time does not depend on the step.

# %%
import tempfile
import time

with tempfile.NamedTemporaryFile() as file:
    np.random.default_rng(0).integers(0, 4096, 10_000_000).astype("<u2").tofile(file.name)
    large = Tokens([np.memmap(file.name, dtype="<u2", mode="r")])
    batches = TrainBatches(large, sequence_length=512, batch_size=32, seed=1)
    for step in (0, 1_000, 1_000_000_000):
        start = time.perf_counter()
        for repeat in range(20):
            batches.read(batches.rows(step + repeat))
        print(f"step {step:>13,}: {(time.perf_counter() - start) / 20 * 1e3:.2f} ms for 16,384 tokens")

# %% [markdown]
# ## Where to go next
#
# `64_baselines` scores two simple models on the very targets that `HeldOutBatches` gives.
