"""Generators against torch's own action tables, and what they refuse."""

import itertools
import logging
import re
from unittest.mock import MagicMock

import pytest
import torch.distributed.pipelining.schedules as oracle

from pithtrain.config import Qwen3MoeConfig
from pithtrain.parallel.pipeline.generate import (
    KINDS,
    dualpipev,
    generate,
    gpipe,
    interleaved,
    one_f_one_b,
    zb_h1,
    zbv,
)
from pithtrain.parallel.pipeline.schedule import (
    Action,
    Op,
    Schedule,
    ScheduleError,
    round_placement,
    split_layers,
    v_placement,
)
from pithtrain.parallel.pipeline.simulate import simulate
from pithtrain.train.step import head_cost


def torch_schedule(cls: type, pp: int, chunks: int, microbatches: int, placement: tuple[int, ...]) -> Schedule:
    """Torch's table for a kind, read as a schedule of ours."""
    stages = [MagicMock(group_size=pp, group_rank=0, num_stages=pp * chunks, stage_index=i) for i in range(chunks)]
    logging.disable(logging.WARNING)
    try:
        table = cls(stages[0] if cls is oracle.ScheduleGPipe else stages, microbatches).pipeline_order
    finally:
        logging.disable(logging.NOTSET)

    def read(text: str) -> Action | None:
        if "OVERLAP" in text:
            return Action(Op.OVERLAP, parts=tuple(map(read, text[1 : text.index(")")].split(";"))))
        stage, op, m = re.fullmatch(r"(\d+)([A-Z_]+)(\d*)", text).groups()
        return None if op == "REDUCE_GRAD" else Action(Op(op), int(stage), int(m))

    ranks = tuple(tuple(a for a in (read(str(x)) for x in table[r] if x is not None) if a) for r in range(pp))
    return Schedule("torch", placement, microbatches, ranks)


@pytest.mark.parametrize(("pp", "microbatches"), [(1, 1), (2, 3), (4, 8)])
def test_gpipe_is_torch_gpipe(pp, microbatches):
    theirs = torch_schedule(oracle.ScheduleGPipe, pp, 1, microbatches, round_placement(pp))
    assert gpipe(pp, microbatches).ranks == theirs.ranks


@pytest.mark.parametrize(
    ("pp", "chunks", "microbatches"), [(2, 2, 4), (2, 3, 6), (4, 2, 8), (4, 2, 4), (4, 3, 10), (3, 2, 4)]
)
def test_interleaved_is_torch_interleaved(pp, chunks, microbatches):
    theirs = torch_schedule(oracle.ScheduleInterleaved1F1B, pp, chunks, microbatches, round_placement(pp, chunks))
    assert interleaved(pp, microbatches, chunks).ranks == theirs.ranks


@pytest.mark.parametrize(("pp", "microbatches"), [(1, 3), (2, 4), (3, 6), (4, 8), (4, 16)])
def test_dualpipev_is_torch_dualpipev(pp, microbatches):
    theirs = torch_schedule(oracle.ScheduleDualPipeV, pp, 2, microbatches, v_placement(pp))
    assert dualpipev(pp, microbatches).ranks == theirs.ranks


@pytest.mark.parametrize(("pp", "microbatches"), [(1, 3), (2, 4), (3, 7), (4, 8), (4, 16), (8, 24)])
def test_zbv_is_torch_zbv(pp, microbatches):
    theirs = torch_schedule(oracle.ScheduleZBVZeroBubble, pp, 2, microbatches, v_placement(pp))
    assert zbv(pp, microbatches).ranks == theirs.ranks


@pytest.mark.parametrize(("pp", "microbatches"), [(4, 1), (4, 2), (4, 4), (4, 5), (6, 7)])
def test_zbv_is_no_worse_than_torch_where_microbatches_are_few(pp, microbatches):
    theirs = simulate(torch_schedule(oracle.ScheduleZBVZeroBubble, pp, 2, microbatches, v_placement(pp)))
    ours = simulate(zbv(pp, microbatches))
    assert ours.time <= theirs.time
    assert max(ours.peak) <= max(theirs.peak)


@pytest.mark.parametrize(("pp", "microbatches"), [(2, 4), (3, 6), (4, 8), (4, 12)])
def test_zb_h1_against_torch_interleaved_zero_bubble_of_one_chunk(pp, microbatches):
    theirs = simulate(torch_schedule(oracle.ScheduleInterleavedZeroBubble, pp, 1, microbatches, round_placement(pp)))
    ours = simulate(zb_h1(pp, microbatches))
    assert (ours.time, ours.bubble) == (theirs.time, theirs.bubble)
    assert max(ours.peak) <= max(theirs.peak)


def test_interleaved_of_one_chunk_is_1f1b():
    for pp, m in itertools.product(range(1, 5), range(1, 9)):
        assert interleaved(pp, m, 1).ranks == one_f_one_b(pp, m).ranks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pp", "microbatches"), [(0, 4), (2, 0), (-1, 3), (2, -2)])
def test_counts_that_make_no_sense_are_refused_in_one_line(kind, pp, microbatches):
    with pytest.raises(ScheduleError, match=kind) as caught:
        generate(kind, pp, microbatches)
    assert "\n" not in str(caught.value)


def test_what_a_kind_does_not_allow_is_refused_by_name():
    with pytest.raises(ScheduleError, match=r"dualpipev on 4 ranks .* microbatches >= 8, not 7"):
        generate("dualpipev", 4, 7)
    with pytest.raises(ScheduleError, match="chunks >= 1, not 0"):
        interleaved(2, 4, 0)
    with pytest.raises(ScheduleError, match=r"'zigzag'.*choose one of gpipe"):
        generate("zigzag", 2, 4)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [4, 5, 9])
@pytest.mark.parametrize(("embedding", "head"), [(0, 0), (1, 1), (0.5, 2.5), (3, 0)])
def test_split_layers_makes_the_heaviest_stage_as_light_as_can_be(stages, layers, embedding, head):
    split = split_layers(layers, stages, embedding, head)
    assert [layer for r in split for layer in r] == list(range(layers))

    def heaviest(counts):
        loads = [float(n) for n in counts]
        loads[0] += embedding
        loads[-1] += head
        return max(loads)

    every = (c for c in itertools.product(range(layers + 1), repeat=stages) if sum(c) == layers)
    assert heaviest([len(r) for r in split]) == min(map(heaviest, every))


def test_split_layers_favours_inner_stages():
    assert [len(r) for r in split_layers(8, 4, 0, 0)] == [2, 2, 2, 2]
    assert [len(r) for r in split_layers(6, 4, 0, 0)] == [1, 2, 2, 1]
    with pytest.raises(ScheduleError, match="2 layers cannot give 8 stages work"):
        split_layers(2, 8)


def test_a_large_vocabulary_leaves_the_last_stage_few_layers():
    """Qwen3-30B-A3B, whose head is 311 of the 368 million weights that its last layer and head use for a token."""
    sizes = {"vocab_size": 151_936, "layers": 48, "hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128}
    config = Qwen3MoeConfig(**sizes, experts=128, top_k=8, expert_hidden=768, tie_embeddings=False)
    head = head_cost(config)
    assert head == pytest.approx(311.16 / 56.9, rel=0.01)
    assert [len(r) for r in split_layers(48, 8, 0.1, head)] == [6, 7, 7, 7, 7, 7, 6, 1]
    assert len(split_layers(48, 16, 0.1, head)[15]) == 0
