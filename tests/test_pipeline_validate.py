"""Lowering and validation: everything made is valid, and everything broken is noticed."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pithtrain.parallel.pipeline.generate import KINDS, generate
from pithtrain.parallel.pipeline.lower import add_exchanges, add_sharding, lower
from pithtrain.parallel.pipeline.schedule import Action, Op, Schedule, ScheduleError
from pithtrain.parallel.pipeline.simulate import Costs, simulate
from pithtrain.parallel.pipeline.validate import validate

TIME = st.integers(1, 64).map(lambda n: n / 8)


@st.composite
def schedules(draw, most_ranks=6):
    kind = draw(st.sampled_from(KINDS))
    pp = draw(st.integers(1, most_ranks))
    fewest = 2 * pp if kind == "dualpipev" else 1
    return generate(kind, pp, draw(st.integers(fewest, fewest + 12)), draw(st.integers(2, 3)))


@st.composite
def costs_for(draw, schedule):
    per_stage = st.tuples(*[TIME] * schedule.stages)
    return Costs(draw(per_stage), draw(per_stage), draw(per_stage), draw(st.integers(0, 8)) / 8)


@settings(deadline=None, max_examples=200)
@given(schedule=schedules(), data=st.data())
def test_everything_generated_and_lowered_is_valid(schedule, data):
    validate(schedule)
    order = data.draw(costs_for(schedule))
    resident = data.draw(st.sampled_from([None, 2, 3]))
    lowered = lower(schedule, order, resident)
    validate(lowered)
    simulate(lowered, data.draw(costs_for(schedule)))  # finishes at any speed
    passes = tuple(tuple(a for a in actions if a.computes) for actions in lowered.ranks)
    assert passes == schedule.ranks


@settings(deadline=None, max_examples=100)
@given(schedule=schedules(), data=st.data())
def test_exchanges_cost_nothing_where_transfers_take_no_time(schedule, data):
    costs = data.draw(costs_for(schedule))
    assert simulate(add_exchanges(schedule, costs), costs).time == simulate(schedule, costs).time


@settings(deadline=None, max_examples=200)
@given(schedule=schedules(most_ranks=4), data=st.data())
def test_leaving_out_any_action_is_noticed(schedule, data):
    lowered = lower(schedule, resident=data.draw(st.sampled_from([None, 2])))
    rank = data.draw(st.integers(0, len(lowered.ranks) - 1))
    index = data.draw(st.integers(0, len(lowered.ranks[rank]) - 1))
    with pytest.raises(ScheduleError) as caught:
        validate(change(lowered, rank, lambda a: a.pop(index)))
    assert "\n" not in str(caught.value) and "rank " in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(schedule=schedules(most_ranks=4), data=st.data())
def test_repeating_any_action_is_noticed(schedule, data):
    lowered = lower(schedule)
    rank = data.draw(st.integers(0, len(lowered.ranks) - 1))
    index = data.draw(st.integers(0, len(lowered.ranks[rank]) - 1))
    with pytest.raises(ScheduleError):
        validate(change(lowered, rank, lambda a: a.insert(index, a[index])))


@settings(deadline=None, max_examples=200)
@given(schedule=schedules(most_ranks=4), data=st.data())
def test_a_shuffled_list_is_refused_or_still_right(schedule, data):
    """Swapping two actions either is refused, or leaves a list in which all passes find what they need."""
    lowered = lower(schedule)
    rank = data.draw(st.integers(0, len(lowered.ranks) - 1))
    n = len(lowered.ranks[rank])
    i, j = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
    assume(i < j)

    def swap(actions):
        actions[i], actions[j] = actions[j], actions[i]

    changed = change(lowered, rank, swap)
    try:
        validate(changed)
    except ScheduleError:
        return
    seen = set()
    for action in changed.ranks[rank]:
        for part in action.computes:
            before = {Op.FORWARD: None, Op.BACKWARD_WEIGHT: Op.BACKWARD_INPUT}.get(part.op, Op.FORWARD)
            assert before is None or part._replace(op=before) in seen
        seen.update(action.computes)


def change(schedule: Schedule, rank: int, edit) -> Schedule:
    lists = [list(actions) for actions in schedule.ranks]
    edit(lists[rank])
    return replace(schedule, ranks=tuple(map(tuple, lists)))


def exchange(*parts: Action) -> Action:
    return Action(Op.EXCHANGE, parts=parts)


GOOD = add_exchanges(generate("1f1b", 2, 2))


def test_half_a_backward_is_not_overlapped():
    parts = Action(Op.FORWARD, 0, 1), Action(Op.BACKWARD_INPUT, 0, 0)
    acts = Action(Op.FORWARD, 0, 0), Action(Op.OVERLAP, parts=parts), *(Action(op, 0, 1) for op in "IW")
    with pytest.raises(ScheduleError, match=r"overlaps \(0F1;0I0\): give one forward, then one backward, whole"):
        validate(Schedule("halves", (0,), 2, ((*acts, Action(Op.BACKWARD_WEIGHT, 0, 0)),)))


@pytest.mark.parametrize(
    ("rank", "edit", "says"),
    [
        (0, lambda a: a.append(Action(Op.FORWARD, 1, 0)), r"rank 0 runs 1F0, but it holds stages \(0,\)"),
        (0, lambda a: a.append(Action(Op.FORWARD, 0, 2)), "rank 0 runs 0F2, but there are 2 microbatches"),
        (0, lambda a: a.append(Action(Op.BACKWARD_WEIGHT, 0, 0)), "rank 0 runs 0B0 1 times, 0I0 0 and 0W0 1"),
        (0, lambda a: a.append(Action(Op.SEND_FORWARD, 0, 0)), "0SEND_F0 by itself: put it in an exchange"),
        (0, lambda a: a.append(exchange(Action(Op.FORWARD, 0, 0))), "give sends and receives alone"),
        (0, lambda a: a.append(exchange(Action(Op.SEND_BACKWARD, 0, 0))), "there is no stage -1"),
        (0, lambda a: a.append(Action(Op.REDUCE, 0)), "rank 0 runs 0F0 without parameters: put 0UNSHARD before"),
        (
            0,
            lambda a: a.append(Action(Op.OVERLAP, parts=(Action(Op.FORWARD, 0, 0),))),
            "one forward, then one backward",
        ),
    ],
)
def test_errors_name_the_action_and_its_rank(rank, edit, says):
    with pytest.raises(ScheduleError, match=says):
        validate(change(GOOD, rank, edit))


def test_a_transfer_within_a_rank_is_refused():
    v = add_exchanges(generate("zbv", 1, 1))
    parts = exchange(Action(Op.SEND_FORWARD, 0, 0), Action(Op.RECV_FORWARD, 1, 0))
    with pytest.raises(ScheduleError, match="0SEND_F0 to itself"):
        validate(change(v, 0, lambda a: a.insert(1, parts)))


def test_ranks_without_a_stage_are_refused():
    with pytest.raises(ScheduleError, match="does not use ranks 0 to 2"):
        validate(replace(GOOD, ranks=(*GOOD.ranks, ())))


def test_a_circle_through_three_ranks_is_explained():
    """Each pair of ranks agrees on its order, and yet 0 waits for 2, 2 for 1 and 1 for 0."""
    lowered = add_exchanges(generate("interleaved", 3, 3, 2))
    early = Action(Op.RECV_FORWARD, 3, 0)  # rank 0 takes back from rank 2 before it sends anything to rank 1

    def hurry(actions):
        kept = [a._replace(parts=tuple(p for p in a.parts if p != early)) for a in actions]
        actions[:] = [exchange(early), *(a for a in kept if a.op is not Op.EXCHANGE or a.parts)]

    with pytest.raises(ScheduleError) as caught:
        validate(change(lowered, 0, hurry))
    assert str(caught.value).split("; ") == [
        "rank 0 is stuck at 3F0: it waits for 3RECV_F0, which waits for 2SEND_F0",
        "rank 1 is stuck at 1F0: it waits for 1RECV_F0, which waits for 0SEND_F0",
        "rank 2 is stuck at 2F0: it waits for 2RECV_F0, which waits for 1SEND_F0",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exchange_done_twice_is_explained_without_validate(rank):
    again = next(action for action in GOOD.ranks[rank] if action.op is Op.EXCHANGE)
    with pytest.raises(ScheduleError, match=f"rank {rank} ends with .* unmatched"):
        simulate(change(GOOD, rank, lambda a: a.append(again)))


@pytest.mark.parametrize("resident", [2, 3])
def test_no_more_stages_are_gathered_than_may_be_resident(resident):
    schedule = add_sharding(generate("interleaved", 2, 4, 4), resident)
    validate(schedule)
    for actions in schedule.ranks:
        held = set()
        for action in actions:
            held |= {action.stage} if action.op is Op.UNSHARD else set()
            held -= {action.stage} if action.op is Op.RESHARD else set()
            assert len(held) <= resident


def test_overlap_needs_two_stages_resident():
    with pytest.raises(ScheduleError, match="raise resident from 1 to 2"):
        add_sharding(generate("dualpipev", 2, 4), resident=1)


def test_passes_that_take_no_time_cannot_be_ordered():
    with pytest.raises(ScheduleError, match="takes no time"):
        add_exchanges(generate("1f1b", 2, 2), Costs(forward=0.0))


def test_schedules_need_no_torch():
    """The command line answers at once, so none of this may import torch."""
    modules = "pithtrain.parallel.pipeline.describe, pithtrain.parallel.pipeline.draw"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
