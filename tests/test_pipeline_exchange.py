"""Exchanges as NCCL may run them: one after another on a rank, and none of its parts before all partners are there."""

import dataclasses
from itertools import groupby

import pytest

from pithtrain.parallel.pipeline.generate import KINDS, generate
from pithtrain.parallel.pipeline.lower import lower
from pithtrain.parallel.pipeline.schedule import Action, Op, Schedule, ScheduleError
from pithtrain.parallel.pipeline.validate import validate


def batched(schedule: Schedule) -> Schedule:
    """All transfers between two passes of a rank in one exchange, which is what hung two GPUs."""

    def rank(actions: tuple[Action, ...]) -> tuple[Action, ...]:
        merged = []
        for exchanges, run in groupby(actions, lambda action: action.op is Op.EXCHANGE):
            run = list(run)
            merged += [Action(Op.EXCHANGE, parts=tuple(p for e in run for p in e.parts))] if exchanges else run
        return tuple(merged)

    return dataclasses.replace(schedule, ranks=tuple(map(rank, schedule.ranks)))


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_what_lower_makes_runs_under_the_strictest_reading(kind, pp):
    for microbatches in (2 * pp, 3 * pp, 4 * pp):
        validate(lower(generate(kind, pp, microbatches)))


@pytest.mark.parametrize("pp, microbatches", [(2, 4), (2, 8), (4, 8)])
def test_an_exchange_that_waits_for_its_own_answer_is_refused(pp, microbatches):
    with pytest.raises(ScheduleError, match=r"stuck|unmatched"):
        validate(batched(lower(generate("dualpipev", pp, microbatches))))
