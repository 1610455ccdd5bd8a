# %% [markdown]
# # Baselines
#
# > What counting scores: a unigram and a bigram model, on the very targets that the neural model is scored on.

# %%
#| default_exp train.baselines

# %% [markdown]
# ## The idea
#
# A loss of 3.9 nats per token says little by itself. Two models made of counts alone give it a scale. The
# **unigram** knows how often each token occurs; the **bigram** also knows the token before. A language model
# that does not beat a *well smoothed* bigram has not learned to use its context, so the bigram here is as
# strong as one can be: interpolated, with the modified Kneser-Ney discounts of Chen and Goodman (1998,
# "An Empirical Study of Smoothing Techniques for Language Modeling", arXiv cmp-lg/9606011 for its first form).
#
# Each prediction sees exactly what the neural model's sees: target $w_i$ for $i = 1, \dots, N - 1$ of the
# held-out row, given what stands before.

# %% [markdown]
# ## The maths
#
# With $c(w)$ the count of a token in $N$ training tokens and a vocabulary of $V$, add-one smoothing gives
#
# $$ p_1(w) = \frac{c(w) + 1}{N + V} $$
#
# For the bigram let $c(h, w)$ be the count of $w$ right after $h$, and $c(h) = \sum_w c(h, w)$. Most pairs
# that are possible were never seen, so a discount $D$ is taken from each pair that was, and what is saved is
# spread over all tokens by a second distribution $q$:
#
# $$ p_2(w \mid h) = \frac{\max(c(h, w) - D_{c(h,w)},\, 0)}{c(h)} + \lambda(h)\, q(w), \qquad
#    \lambda(h) = \frac{\sum_{w : c(h,w) > 0} D_{c(h,w)}}{c(h)} $$
#
# $\lambda(h)$ is just what makes the sum over $w$ one, and for a history never seen $\lambda = 1$. There are
# three discounts, for pairs seen once, twice, and more often. With $n_k$ the number of pairs seen $k$ times,
#
# $$ Y = \frac{n_1}{n_1 + 2 n_2}, \qquad D_k = k - (k + 1)\, Y\, \frac{n_{k+1}}{n_k} \quad (k = 1, 2, 3) $$
#
# so the discounts follow from the training counts alone, with nothing to tune. The insight of Kneser and Ney is
# that $q$ should not be $p_1$: it is consulted where the history is no help, so it should say in how many
# *different* histories a token turns up, $t(w) = |\{h : c(h, w) > 0\}|$ of $T = \sum_w t(w)$ pairs (with one
# added, so that no token is impossible):
#
# $$ q(w) = \frac{t(w) + 1}{T + V} $$

# %% [markdown]
# ## The smallest true implementation
#
# A dictionary of counts and the formula, one pair at a time.

# %%
from collections import Counter
from itertools import pairwise


def simple_bigram(train: list[int], vocab_size: int):
    pairs = Counter(pairwise(train))
    seen = Counter(pairs.values())
    y = seen[1] / max(seen[1] + 2 * seen[2], 1)
    discount = {k: min(max(k - (k + 1) * y * seen[k + 1] / max(seen[k], 1), 0.1), k) for k in (1, 2, 3)}

    def probability(history: int, token: int) -> float:
        follow = {w: count for (h, w), count in pairs.items() if h == history}
        q = (sum(w == token for _, w in pairs) + 1) / (len(pairs) + vocab_size)
        if not follow:
            return q
        total = sum(follow.values())
        saved = sum(discount[min(count, 3)] for count in follow.values())
        own = follow[token] - discount[min(follow[token], 3)] if token in follow else 0
        return own / total + saved / total * q

    return probability


probability = simple_bigram([1, 2, 1, 2, 1, 3, 2, 1, 0, 2], vocab_size=5)
print([round(probability(1, token), 4) for token in range(5)])
assert abs(sum(probability(1, token) for token in range(5)) - 1) < 1e-12

# %% [markdown]
# ## The ones to use
#
# In numpy a pair is one number, $hV + w$. Sorting all pairs counts them, and looking one up is a binary search,
# so nothing of size $V^2$ is ever made.

# %%
#| export
import numpy as np

from pithtrain.train.shards import Tokens


# %%
#| export
class Unigram:
    """Token frequencies with add-one smoothing, from training tokens (1-D integers)."""

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        counts = np.bincount(tokens, minlength=vocab_size)
        self.p = (counts + 1) / (len(tokens) + vocab_size)

    def probability(self, histories: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Probability of each token; the histories make no difference."""
        return self.p[tokens]


# %%
import math

unigram = Unigram(np.array([0, 1, 1, 1]), vocab_size=3)
print(unigram.p, unigram.p.sum())

# %% [markdown]
# The discounts, kept inside $[0.1, k]$: tiny corpora can have no pair seen once or twice.


# %%
#| export
def discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts (float64, 4) for pairs seen 0, 1, 2 and at least 3 times, from all pairs' counts."""
    n = np.bincount(np.minimum(counts, 5), minlength=5)
    y = n[1] / max(n[1] + 2 * n[2], 1)
    k = np.arange(1, 4)
    return np.concatenate([[0.0], np.clip(k - (k + 1) * y * n[2:5] / np.maximum(n[1:4], 1), 0.1, k)])


# %%
rng = np.random.default_rng(0)
draws = rng.geometric(0.5, size=10_000)
print(discounts(draws))


# %%
#| export
class Bigram:
    """Interpolated bigram with modified Kneser-Ney discounts, from training tokens (1-D integers)."""

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        tokens = tokens.astype(np.int64)
        self.vocab_size = vocab_size
        self.pairs, self.counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
        self.discounts = discounts(self.counts)
        histories, followers = np.divmod(self.pairs, vocab_size)
        self.totals = np.bincount(tokens[:-1], minlength=vocab_size)
        saved = np.bincount(histories, self.discounts[np.minimum(self.counts, 3)], minlength=vocab_size)
        self.weights = np.where(self.totals > 0, saved / np.maximum(self.totals, 1), 1.0)
        self.lower = (np.bincount(followers, minlength=vocab_size) + 1) / (len(self.pairs) + vocab_size)

    def probability(self, histories: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Probability of each token after its history, float64 of their shape."""
        wanted = histories.astype(np.int64) * self.vocab_size + tokens
        found = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        counts = np.where(self.pairs[found] == wanted, self.counts[found], 0)
        own = (counts - self.discounts[np.minimum(counts, 3)]) / np.maximum(self.totals[histories], 1)
        return own + self.weights[histories] * self.lower[tokens]


# %% [markdown]
# Checked against the dictionary, on random tokens with a few that never occur; and over all tokens the
# probabilities of every history sum to one.

# %%
vocab_size = 12
train = rng.zipf(1.5, size=300) % 10
bigram, simple = Bigram(train, vocab_size), simple_bigram(train.tolist(), vocab_size)
histories, followers = np.divmod(np.arange(vocab_size**2), vocab_size)
fast = bigram.probability(histories, followers)
slow = [simple(h, w) for h, w in zip(histories.tolist(), followers.tolist(), strict=True)]
print("largest difference", np.abs(fast - slow).max())
assert np.allclose(fast, slow, rtol=1e-12, atol=0)
assert np.allclose(fast.reshape(vocab_size, vocab_size).sum(axis=1), 1)

# %% [markdown]
# ## The score


# %%
#| export
def nats_per_token(model: Unigram | Bigram, tokens: np.ndarray | Tokens) -> float:
    """Mean of -ln p over tokens[1:], each given the token before it: the targets of `HeldOutBatches`."""
    total, targets = 0.0, len(tokens) - 1
    for start in range(0, targets, 2**20):  # a part at a time: they need not fit into memory
        part = tokens.take(np.arange(start, min(start + 2**20, targets) + 1))
        total -= np.log(model.probability(part[:-1], part[1:])).sum()
    return float(total / targets)


# %%
print(f"{nats_per_token(bigram, train):.3f} nats per token on the bigram's own training tokens")


# %%
#| export
def score_baselines(train: np.ndarray, held_out: np.ndarray | Tokens, vocab_size: int) -> dict[str, float]:
    """What both models, fitted on the training tokens, score on the held-out ones, in nats per token."""
    models = {"bigram": Bigram(train, vocab_size), "unigram": Unigram(train, vocab_size)}
    return {name: nats_per_token(model, held_out) for name, model in models.items()}


# %%
#| export
def bits_per_byte(nats: float, targets: int, text_bytes: int) -> float:
    """A mean loss in nats over `targets` tokens as bits per byte of the text they make up."""
    return nats * targets / (text_bytes * np.log(2))


# %% [markdown]
# Fair coin flips need one bit each, and a bigram can do no better.

# %%
flips = rng.integers(0, 2, 200_000)
scores = score_baselines(flips[:100_000], flips[100_000:], vocab_size=2)
print(scores, f"ln 2 = {math.log(2):.4f}")
assert abs(scores["unigram"] - math.log(2)) < 1e-3 and abs(scores["bigram"] - math.log(2)) < 1e-3
assert abs(bits_per_byte(math.log(2), targets=8, text_bytes=1) - 8) < 1e-12

# %% [markdown]
# ## On the standard library
#
# The default corpus, whole.

# %%
import tempfile
import time

from pithtrain.config import DataConfig
from pithtrain.train.shards import prepare

scratch = tempfile.TemporaryDirectory()
start = time.perf_counter()
shards = prepare(DataConfig(folder=scratch.name + "/shards"), vocab_size=4096)
print(f"prepared in {time.perf_counter() - start:.1f} s")
train = shards.train.take(np.arange(len(shards.train)))
held_out = shards.held_out.take(np.arange(len(shards.held_out)))
start = time.perf_counter()
scores = score_baselines(train, held_out, vocab_size=4096)
print(f"fitted on {len(train):,} tokens, scored on {len(held_out):,}: {time.perf_counter() - start:.1f} s")

text_bytes = shards.manifest.held_out.bytes
for name, nats in (("uniform", math.log(4096)), ("unigram", scores["unigram"]), ("bigram", scores["bigram"])):
    print(f"{name}: {nats:.3f} nats per token, {bits_per_byte(nats, len(held_out) - 1, text_bytes):.3f} bits per byte")

# %% [markdown]
# Is Kneser-Ney the strong choice? The older way to interpolate is Jelinek and Mercer's,
# $\lambda_h\, c(h, w)/c(h) + (1 - \lambda_h)\, p_1(w)$, with one weight for each bucket of histories (here by how
# many times each of its followers was seen on average) fitted by expectation maximisation, each training pair
# left out of its own counts. It can be fitted as carefully as one likes, and stays behind.


# %%
def jelinek_mercer(train: np.ndarray, vocab_size: int, held_out: np.ndarray, rounds: int = 20) -> float:
    model, p1 = Bigram(train, vocab_size), Unigram(train, vocab_size).p
    history, follower = np.divmod(model.pairs, vocab_size)
    types = np.bincount(history, minlength=vocab_size)
    bucket = np.floor(2 * np.log2(np.maximum(model.totals, 1) / np.maximum(types, 1))).astype(np.int64)
    weight = np.full(bucket.max() + 1, 0.5)
    own = (model.counts - 1) / np.maximum(model.totals[history] - 1, 1)
    for _ in range(rounds):
        w = weight[bucket[history]]
        share = model.counts * w * own / (w * own + (1 - w) * p1[follower])
        size = np.bincount(bucket[history], model.counts, minlength=len(weight))
        weight = np.clip(np.bincount(bucket[history], share, minlength=len(weight)) / np.maximum(size, 1), 0, 0.999)
    h, w = held_out[:-1], held_out[1:]
    found = np.minimum(np.searchsorted(model.pairs, h * vocab_size + w), len(model.pairs) - 1)
    counts = np.where(model.pairs[found] == h * vocab_size + w, model.counts[found], 0)
    lam = np.where(model.totals[h] > 0, weight[bucket[h]], 0)
    return float(-np.log(lam * counts / np.maximum(model.totals[h], 1) + (1 - lam) * p1[w]).mean())


older = jelinek_mercer(train, 4096, held_out)
print(f"Jelinek-Mercer {older:.3f}, modified Kneser-Ney {scores['bigram']:.3f} nats per token")
assert scores["bigram"] < older

# %% [markdown]
# How much text do the counts need? Left: both models fitted on more and more training windows. The unigram is
# done early, since it has $V$ numbers to learn; the bigram has $V^2$ and is still falling at the end. Right: how
# its single predictions are spread, from nearly sure to ten nats off. A mean hides a wide range.

# %%
import matplotlib.pyplot as plt

from pithtrain.train.batches import TrainBatches

batches = TrainBatches(shards.train, sequence_length=512, batch_size=1, seed=1)
shuffled = batches.read(np.arange(batches.windows))[0].numpy().ravel()
parts = [len(shuffled) >> shift for shift in range(7, -1, -1)]
curve = [score_baselines(shuffled[:part], held_out, vocab_size=4096) for part in parts]
model = Bigram(train, 4096)
nats = -np.log(model.probability(held_out[:-1], held_out[1:]))

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3))
left.plot(parts, [score["unigram"] for score in curve], "o-", label="unigram")
left.plot(parts, [score["bigram"] for score in curve], "o-", label="bigram")
left.set(xscale="log", xlabel="training tokens", ylabel="nats per token", title="Held-out loss of counting")
left.legend()
right.hist(nats, bins=60)
right.axvline(nats.mean(), color="black", label=f"mean {nats.mean():.2f}")
right.set(xlabel="nats", ylabel="held-out tokens", title="Single predictions of the bigram")
right.legend()
fig.tight_layout()
fig
# %% [markdown]
# What does a bigram know? Among histories that occur often, these have the most and the least predictable
# successor, by the entropy of $p_2(\cdot \mid h)$ in nats. After the name of a built-in function comes its
# bracket; after an opened quote, a lone underscore, a comma or `the`, anything goes.

# %%
frequent = np.flatnonzero(model.totals >= 500)
entropy = np.empty(len(frequent))
favourite = np.empty(len(frequent), dtype=np.int64)
for number, history in enumerate(frequent):
    p = model.probability(np.full(4096, history), np.arange(4096))
    entropy[number], favourite[number] = -(p * np.log(p)).sum(), p.argmax()
order = entropy.argsort()


def show(token: int) -> str:
    return repr(shards.tokenizer.decode([int(token)], skip_special_tokens=False))


for title, chosen in (("most predictable", order[:10]), ("least predictable", order[:-11:-1])):
    print(f"{title:24s} entropy  favourite successor")
    for number in chosen:
        print(f"  {show(frequent[number]):22.22s} {entropy[number]:7.2f}  {show(favourite[number])}")

# %%
scratch.cleanup()

# %% [markdown]
# ## Where to go next
#
# The optimiser, in `65_optimizer`; then the trainer, which prints its loss beside these.
