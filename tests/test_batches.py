"""Batches: every window once an epoch, any step at once, every held-out token scored once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.config import UserError
from pithtrain.train.batches import IGNORE, HeldOutBatches, TrainBatches, epoch_keys, mix, permute
from pithtrain.train.shards import Tokens


def counting(total: int, shards: int = 1) -> Tokens:
    """Token i at position i, over some shards."""
    return Tokens(np.array_split(np.arange(total, dtype=np.uint32), shards))


@given(st.integers(1, 3000), st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**9))
def test_permute_is_a_permutation(n, seed, epoch):
    order = permute(np.arange(n), n, np.full(n, epoch_keys(seed, np.array([epoch]))))
    assert np.array_equal(np.sort(order), np.arange(n))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50, unique=True))
def test_mix_keeps_numbers_apart(numbers):
    assert len(set(mix(np.array(numbers, dtype=np.uint64)).tolist())) == len(numbers)


def test_mix_is_splitmix64():
    """The first outputs of the published generator from state 0 are those of its finaliser at 0 and one step on."""
    golden = 0x9E3779B97F4A7C15
    out = mix(np.array([0, golden], dtype=np.uint64))
    assert [f"{number:016x}" for number in out] == ["e220a8397b1dcdaf", "6e789e6aa1b965f4"]


def test_the_order_is_the_same_for_ever():
    """Resuming an old run depends on it: these starts may never change."""
    starts = TrainBatches(counting(100_000), sequence_length=128, batch_size=4, seed=7).starts(np.arange(6))
    assert starts.tolist() == [52408, 62264, 95032, 78904, 62776, 13208]


@settings(max_examples=60)
@given(st.integers(2, 700), st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**31), st.integers(1, 5))
def test_an_epoch_predicts_every_token_once(total, length, batch_size, seed, shards):
    if total <= length:
        return
    batches = TrainBatches(counting(total, min(shards, total)), length, batch_size, seed)
    for epoch in (0, 3):
        rows = epoch * batches.windows + np.arange(batches.windows)
        inputs, targets = batches.read(rows)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (batches.windows, length)
        assert torch.equal(targets, (inputs + 1) % total)  # the next token on the ring
        seen = torch.bincount(targets.flatten(), minlength=total)
        assert seen.max() == 1 and seen.sum() == total - total % length


def test_no_step_leaves_a_gap_between_epochs():
    """A batch may lie in two epochs; the rows of consecutive steps follow each other."""
    batches = TrainBatches(counting(1000), sequence_length=32, batch_size=7, seed=1)
    rows = np.concatenate([batches.rows(step) for step in range(20)])
    assert np.array_equal(rows, np.arange(140))
    straddling = batches.windows // 7
    assert {row // batches.windows for row in batches.rows(straddling)} == {0, 1}
    together = torch.cat([batches.read(batches.rows(step))[0] for step in range(20)])
    assert torch.equal(together, batches.read(rows)[0])


def test_any_step_without_those_before():
    one = TrainBatches(counting(5000), 64, 8, seed=5)
    other = TrainBatches(counting(5000), 64, 8, seed=5)
    history = [one.read(one.rows(step)) for step in range(40)]
    for step in (39, 3, 17):
        assert torch.equal(other.read(other.rows(step))[0], history[step][0])
    far = other.read(other.rows(10**12))[0]
    assert far.shape == (8, 64) and far.min() >= 0 and far.max() < 5000


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_read_disjoint_parts_of_a_step(world):
    batches = TrainBatches(counting(5000), 64, 8, seed=5)
    whole = batches.read(batches.rows(11))[1]
    parts = [batches.read(np.split(batches.rows(11), world)[rank])[1] for rank in range(world)]
    assert torch.equal(torch.cat(parts), whole)
    assert len(set(whole.flatten().tolist())) == whole.numel()


def test_the_batch_size_does_not_change_the_order():
    small, large = (TrainBatches(counting(5000), 64, size, seed=5) for size in (4, 16))
    assert torch.equal(torch.cat([small.read(small.rows(step))[0] for step in range(4)]), large.read(large.rows(0))[0])


def test_epochs_and_seeds_differ_in_order_and_offset():
    batches = TrainBatches(counting(6413), 64, 4, seed=5)
    starts = [batches.starts(epoch * batches.windows + np.arange(batches.windows)) for epoch in range(4)]
    starts.append(TrainBatches(counting(6413), 64, 4, seed=6).starts(np.arange(batches.windows)))
    residues = {tuple(sorted(set((epoch % 64).tolist()))) for epoch in starts}
    assert len(residues) == len(starts)
    for first in range(len(starts)):
        for second in range(first):
            ranks = np.corrcoef(starts[first], starts[second])[0, 1]
            assert abs(ranks) < 0.5  # five standard deviations for 100 windows


def test_neighbouring_rows_are_not_neighbours_in_the_text():
    batches = TrainBatches(counting(640_000), 64, 4, seed=5)
    starts = batches.starts(np.arange(batches.windows))
    assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("total", [1, 15, 16])
def test_sequence_longer_than_the_data(total):
    with pytest.raises(UserError, match=rf"train.sequence_length = 16: longer than .* {total} tokens") as caught:
        TrainBatches(counting(total), sequence_length=16, batch_size=1, seed=0)
    assert "\n" not in str(caught.value)


def test_the_longest_sequence_that_fits():
    batches = TrainBatches(counting(17), sequence_length=16, batch_size=3, seed=0)
    assert batches.windows == 1 and batches.read(batches.rows(0))[0].shape == (3, 16)


@given(st.integers(2, 500), st.integers(1, 40), st.integers(1, 7), st.integers(1, 4))
def test_held_out_scores_every_token_once_in_order(total, length, batch_size, shards):
    batches = HeldOutBatches(counting(total, min(shards, total)), length, batch_size)
    everything = list(batches)
    assert len(everything) == len(batches)
    scored = []
    for inputs, targets in everything:
        assert inputs.shape == targets.shape == (batch_size, length)
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.min() >= 0
        valid = targets != IGNORE
        assert torch.equal(inputs[valid] + 1, targets[valid])
        scored += targets[valid].tolist()
    assert scored == list(range(1, total))
    assert (everything[-1][1] != IGNORE).any()  # no batch is all padding


def test_held_out_rows_are_independent():
    batches = HeldOutBatches(counting(100), sequence_length=16, batch_size=4)
    assert torch.equal(batches.read(np.array([5, 2]))[0], torch.cat([r[0] for r in batches])[[5, 2]])


def test_ignore_is_what_cross_entropy_ignores():
    _, targets = next(iter(HeldOutBatches(counting(12), sequence_length=8, batch_size=2)))
    logits = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    flat = targets.flatten()
    loss = torch.nn.functional.cross_entropy(logits, flat, reduction="sum")
    own = -logits.log_softmax(-1)[torch.arange(16), flat.clamp(min=0)][flat != IGNORE].sum()
    assert (flat != IGNORE).sum() == 11 and torch.allclose(loss, own)


def test_held_out_without_a_target():
    with pytest.raises(UserError, match="no token to predict"):
        HeldOutBatches(counting(1), sequence_length=4, batch_size=1)
