"""Baselines: against counts in dictionaries, as probabilities, and at speed."""

import math
import time
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.train.baselines import Bigram, Unigram, bits_per_byte, discounts, nats_per_token, score_baselines
from pithtrain.train.batches import IGNORE, HeldOutBatches
from pithtrain.train.shards import Tokens

ROWS = st.lists(st.integers(0, 7), min_size=2, max_size=120)


def exact_bigram(train: list[int], vocab_size: int) -> list[list[Fraction]]:
    """The whole table of p(w | h) from the formulas, in exact fractions."""
    pairs = Counter(pairwise(train))
    n = Counter(pairs.values())
    y = Fraction(n[1], max(n[1] + 2 * n[2], 1))
    d = {k: min(max(k - (k + 1) * y * Fraction(n[k + 1], max(n[k], 1)), Fraction(1, 10)), k) for k in (1, 2, 3)}
    table = []
    for h in range(vocab_size):
        total = sum(count for (history, _), count in pairs.items() if history == h)
        saved = sum(d[min(count, 3)] for (history, _), count in pairs.items() if history == h)
        row = []
        for w in range(vocab_size):
            q = Fraction(sum(follower == w for _, follower in pairs) + 1, len(pairs) + vocab_size)
            count = pairs[h, w]
            row.append(
                q
                if not total
                else (count - d[min(count, 3)] if count else 0) / Fraction(total) + Fraction(saved) / total * q
            )
        table.append(row)
    return table


@settings(deadline=None)
@given(ROWS, st.integers(8, 11))
def test_bigram_equals_the_exact_table(train, vocab_size):
    table = exact_bigram(train, vocab_size)
    assert all(sum(row) == 1 for row in table)
    model = Bigram(np.array(train), vocab_size)
    histories, followers = np.divmod(np.arange(vocab_size**2), vocab_size)
    got = model.probability(histories, followers).reshape(vocab_size, vocab_size)
    assert np.allclose(got, np.array(table, dtype=float), rtol=1e-12, atol=0)
    assert (got > 0).all()


@given(ROWS, st.integers(8, 11))
def test_unigram_equals_counting(train, vocab_size):
    model = Unigram(np.array(train), vocab_size)
    expected = [(train.count(w) + 1) / (len(train) + vocab_size) for w in range(vocab_size)]
    got = model.probability(np.zeros(vocab_size, dtype=int), np.arange(vocab_size))
    assert np.allclose(got, expected, rtol=1e-12, atol=0) and math.isclose(got.sum(), 1)


def test_probabilities_sum_to_one_at_full_size():
    rng = np.random.default_rng(0)
    vocab_size = 4096
    train = (rng.zipf(1.2, 300_000) % (vocab_size - 5)).astype(np.uint16)
    model = Bigram(train, vocab_size)
    for history in (0, 1, 17, 4000, vocab_size - 1):
        p = model.probability(np.full(vocab_size, history), np.arange(vocab_size))
        assert math.isclose(p.sum(), 1, rel_tol=1e-9) and (p > 0).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_pair_numbers_do_not_overflow(dtype):
    """60,000 squared does not fit in 32 bits, let alone 16."""
    train = np.array([59_999, 59_998] * 50, dtype=dtype)
    model = Bigram(train, 60_000)
    assert model.probability(train[:1], train[1:2])[0] > 0.9
    assert nats_per_token(model, train) < 0.1


def test_discounts_by_hand():
    """10 pairs once, 5 twice, 4 three times, 2 four times, 3 more often: Y = 10/20."""
    counts = np.repeat([1, 2, 3, 4, 9], [10, 5, 4, 2, 3])
    assert np.allclose(discounts(counts), [0, 1 - 2 * 0.5 * 0.5, 2 - 3 * 0.5 * 4 / 5, 3 - 4 * 0.5 * 2 / 4])


@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.lists(st.integers(0, 5), min_size=2, max_size=60))
def test_scores_are_means_over_every_target_but_the_first(train, held_out):
    scores = score_baselines(np.array(train), np.array(held_out), vocab_size=6)
    table = exact_bigram(train, 6)
    bigram = -sum(math.log(table[h][w]) for h, w in pairwise(held_out)) / (len(held_out) - 1)
    unigram = -sum(math.log((train.count(w) + 1) / (len(train) + 6)) for w in held_out[1:]) / (len(held_out) - 1)
    assert scores == pytest.approx({"bigram": bigram, "unigram": unigram}, rel=1e-9)


@pytest.mark.parametrize("length, batch_size", [(7, 3), (64, 2)])
def test_the_targets_are_those_the_model_is_scored_on(length, batch_size):
    rng = np.random.default_rng(2)
    train, held_out = rng.integers(0, 20, 2000), rng.integers(0, 20, 301)
    model = Bigram(train, 20)
    total = count = 0
    for inputs, targets in HeldOutBatches(Tokens([held_out]), length, batch_size):
        valid = (targets != IGNORE).numpy()
        total -= np.log(model.probability(inputs.numpy()[valid], targets.numpy()[valid])).sum()
        count += valid.sum()
    assert count == 300 and math.isclose(total / count, nats_per_token(model, held_out), rel_tol=1e-12)


def test_a_markov_chain_is_scored_at_its_entropy_rate():
    rng = np.random.default_rng(3)
    chain = rng.dirichlet(np.ones(8), size=8)
    row = [0]
    for uniform in rng.random(60_000):
        row.append(min(int(np.searchsorted(chain[row[-1]].cumsum(), uniform)), 7))
    row = np.array(row)
    visits = np.bincount(row, minlength=8) / len(row)
    entropy = -(visits[:, None] * chain * np.log(chain)).sum()
    scores = score_baselines(row[:50_000], row[50_000:], vocab_size=8)
    assert abs(scores["bigram"] - entropy) < 0.02 < scores["unigram"] - scores["bigram"]


def test_bits_per_byte():
    assert math.isclose(bits_per_byte(math.log(256), targets=100, text_bytes=100), 8)
    assert math.isclose(bits_per_byte(2.0, targets=50, text_bytes=200), 2 * 50 / 200 / math.log(2))


def test_five_million_tokens_in_time():
    rng = np.random.default_rng(4)
    train = (rng.zipf(1.3, 5_000_000) % 4096).astype(np.uint16)
    start = time.process_time()
    score_baselines(train, train[:500_000], vocab_size=4096)
    assert time.process_time() - start < 10
