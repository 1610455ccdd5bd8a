"""Costs fitted to a timeline of known costs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.parallel.pipeline.fit import fit_costs, timeline_of
from pithtrain.parallel.pipeline.generate import KINDS, generate
from pithtrain.parallel.pipeline.lower import lower
from pithtrain.parallel.pipeline.simulate import Costs, simulate

HIDDEN = st.integers(0, 8).map(lambda n: n / 8)
TIME = st.integers(4, 16).map(lambda n: n / 8)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(data=st.data(), pp=st.integers(2, 4), hidden=HIDDEN, share=st.sampled_from([0.5, 0.75, 1.0]))
def test_costs_that_made_a_timeline_are_found_again(kind, data, pp, hidden, share):
    schedule = lower(generate(kind, pp, 4 * pp))
    per_stage = st.tuples(*[TIME] * schedule.stages) | TIME.map(lambda t: (t,) * schedule.stages)
    times = [data.draw(per_stage) for _ in range(3)]
    if kind in ("gpipe", "1f1b", "interleaved"):
        times[2] = times[1]  # halves are equal where only wholes are seen
    wholes = tuple(share * (i + w) for i, w in zip(*times[1:], strict=True))  # a whole may take less than its halves
    true = simulate(schedule, Costs(*times, hidden=hidden, backward=wholes))
    fitted = fit_costs(schedule, true.compute)
    if kind in ("gpipe", "1f1b", "interleaved"):
        times[1:] = [tuple(b / 2 for b in wholes)] * 2
    for name, want in zip(("forward", "backward_input", "backward_weight"), times, strict=True):
        assert getattr(fitted, name) == pytest.approx(want)
    assert fitted.backward == (None if kind in ("zb_h1", "zbv") else pytest.approx(wholes))
    assert fitted.hidden == pytest.approx(hidden if kind == "dualpipev" else 0.0, abs=1e-9)
    if all(len(set(stages)) == 1 for stages in times):  # between unequal stages, waits pass for transfers
        assert fitted.send == pytest.approx(0.0, abs=1e-9)
        assert simulate(schedule, fitted).time == pytest.approx(true.time)


@pytest.mark.parametrize("kind", KINDS)
def test_transfers_are_found_in_the_gaps(kind):
    schedule = lower(generate(kind, 4, 12))
    true = simulate(schedule, Costs(1.0, 1.2, 0.8, send=0.03))
    fitted = fit_costs(schedule, true.compute)
    assert fitted.send == pytest.approx(0.03, rel=0.5)
    assert simulate(schedule, fitted).time == pytest.approx(true.time, rel=0.03)


def test_a_recorded_timeline_begins_at_zero():
    schedule = lower(generate("1f1b", 2, 3))
    true = simulate(schedule)
    late = [[span._replace(start=span.start + 7, end=span.end + 7) for span in spans] for spans in true.compute]
    moved = timeline_of(schedule, late)
    assert (moved.compute, moved.time, moved.idle) == (true.compute, true.time, true.idle)
