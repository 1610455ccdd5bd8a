"""The simulator against closed forms, over random sizes and costs."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain import cli
from pithtrain.parallel.pipeline.describe import compare, describe
from pithtrain.parallel.pipeline.draw import draw, draw_timelines
from pithtrain.parallel.pipeline.generate import KINDS, generate
from pithtrain.parallel.pipeline.lower import add_exchanges, lower
from pithtrain.parallel.pipeline.schedule import Op, ScheduleError
from pithtrain.parallel.pipeline.simulate import Costs, closed_form, simulate

# Multiples of a power of two add up exactly, so equalities below are exact.
TIME = st.integers(1, 64).map(lambda n: n / 8)
HIDDEN = st.integers(0, 8).map(lambda n: n / 8)
RANKS = st.integers(1, 6)


@st.composite
def sizes(draw, fewest_per_rank=1):
    pp = draw(RANKS)
    return pp, draw(st.integers(fewest_per_rank * pp, 5 * pp))


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@settings(deadline=None, max_examples=60)
@given(pp=RANKS, m=st.integers(1, 20), f=TIME, i=TIME, w=TIME)
def test_gpipe_and_1f1b_meet_their_forms_always(kind, pp, m, f, i, w):
    costs = Costs(f, i, w)
    timeline, form = simulate(generate(kind, pp, m), costs), closed_form(kind, pp, m, costs)
    assert timeline.idle == (form.bubble,) * pp
    assert max(timeline.peak) == form.peak
    assert timeline.time == form.bubble + m * (f + i + w)


@settings(deadline=None, max_examples=60)
@given(size=sizes(), chunks=st.integers(2, 4), f=TIME, i=TIME, w=TIME)
def test_interleaved_meets_its_form_with_enough_microbatches(size, chunks, f, i, w):
    costs = Costs(f, i, w)
    timeline = simulate(generate("interleaved", *size, chunks), costs)
    form = closed_form("interleaved", *size, costs, chunks)
    assert (timeline.bubble, max(timeline.peak)) == (form.bubble, form.peak)


@settings(deadline=None, max_examples=100)
@given(size=sizes(), f=TIME, i=TIME, w=TIME)
def test_zb_h1(size, f, i, w):
    costs = Costs(f, i, w)
    timeline, form = simulate(generate("zb_h1", *size), costs), closed_form("zb_h1", *size, costs)
    assert timeline.bubble == (size[0] - 1) * max(f, i, f + i - w)
    assert timeline.peak == (form.peak,) * size[0]
    if w <= min(f, i):  # where the published form holds
        assert timeline.bubble == form.bubble


@settings(deadline=None, max_examples=100)
@given(size=sizes(2), times=st.tuples(TIME, TIME, TIME), hidden=HIDDEN)
def test_dualpipev_is_never_worse_than_its_form(size, times, hidden):
    a, b, i = sorted(times)  # F <= I >= W
    for f, w in ((a, b), (b, a)):
        costs = Costs(f, i, w, hidden=hidden)
        timeline, form = simulate(generate("dualpipev", *size), costs), closed_form("dualpipev", *size, costs)
        assert timeline.bubble <= form.bubble
        assert max(timeline.peak) <= form.peak


@settings(deadline=None, max_examples=60)
@given(size=sizes(2), a=TIME, b=TIME, hidden=HIDDEN)
def test_dualpipev_meets_its_form(size, a, b, hidden):
    w, f = sorted((a, b))
    costs = Costs(f, f, w, hidden=hidden)
    timeline, form = simulate(generate("dualpipev", *size), costs), closed_form("dualpipev", *size, costs)
    assert (timeline.bubble, timeline.peak) == (form.bubble, (form.peak,) * size[0])


@settings(deadline=None, max_examples=100)
@given(size=sizes(2), times=st.tuples(TIME, TIME, TIME))
def test_zbv_meets_its_form(size, times):
    a, b, i = sorted(times)
    for f, w in ((a, b), (b, a)):
        costs = Costs(f, i, w)
        timeline, form = simulate(generate("zbv", *size), costs), closed_form("zbv", *size, costs)
        assert timeline.bubble == form.bubble
        assert max(timeline.peak) == form.peak
        if f == i == w:  # the published claim: no gap inside any rank
            for spans in timeline.compute:
                assert spans[-1].end - spans[0].start == sum(s.end - s.start for s in spans)


@pytest.mark.parametrize("kind", ["zbv", "dualpipev"])
@settings(deadline=None, max_examples=60)
@given(size=sizes(2), f=TIME, i=TIME, w=TIME, hidden=HIDDEN)
def test_a_form_bounds_the_step_at_any_costs(kind, size, f, i, w, hidden):
    """With I raised to the largest of F, I and W the form holds, and a step never gets longer when a cost shrinks."""
    hidden = hidden if kind == "dualpipev" else 0.0
    raised = Costs(f, max(f, i, w), w, hidden=hidden)
    form, bound = closed_form(kind, *size, raised), simulate(generate(kind, *size), raised)
    assert not form.lacks and bound.bubble <= form.bubble
    assert simulate(generate(kind, *size), Costs(f, i, w, hidden=hidden)).time <= bound.time
    if kind == "zbv":
        assert bound.time == form.bubble + 2 * size[1] * (f + max(f, i, w) + w)


def test_a_form_outside_its_region_says_what_it_needs():
    assert "which needs F <= I >= W, m >= 2p" in describe(generate("zbv", 4, 5))
    assert "which needs m >= p" in describe(generate("interleaved", 4, 3))
    assert "which needs W <= F, W <= I, m >= p" in describe(generate("zb_h1", 4, 8), Costs(backward_weight=2.0))
    assert not any("needs" in describe(generate(kind, 4, 8)) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_gives_every_kind_the_same_model(kind, tmp_path, capsys):
    """One unit for all: the table of a kind has the step time of its row in the comparison."""
    options = ["--pp", "4", "--microbatches", "8", "--hidden", "0.5", "--send", "0.125"]
    assert cli.main(["schedule", "--kind", "all", *options]) == 0
    rows = {row.split()[0]: row.split() for row in capsys.readouterr().out.splitlines()}
    assert cli.main(["schedule", "--kind", kind, *options, "--picture", str(tmp_path / "picture.png")]) == 0
    out = capsys.readouterr().out
    time = next(line.split()[2] for line in out.splitlines() if line.startswith("step time"))
    assert time == rows[kind][2] and "unit of time: the forward of 1/4 of the model" in out
    if kind != "interleaved":
        assert cli.main(["schedule", "--kind", kind, "--chunks", "3"]) == 2
        assert "only interleaved" in capsys.readouterr().err


def test_a_picture_of_many_passes_has_few_artists_and_numbers_all_or_none():
    for microbatches, numbered in ((8, True), (200, False)):
        schedule = generate("dualpipev", 4, microbatches)
        ax = draw(schedule).axes[0]
        passes = sum(len(action.computes) for actions in schedule.ranks for action in actions)
        assert len(ax.texts) == (passes if numbered else 0)
        assert len(ax.collections) <= 9 and not ax.patches  # one for each colour, and one for idle time


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), size=sizes(2), send=TIME, scale=st.integers(1, 8))
def test_timelines_are_sound(kind, data, size, send, scale):
    """No rank does two things at once, nothing starts before what it needs, and time scales with costs."""
    schedule = generate(kind, *size)
    per_stage = st.tuples(*[TIME] * schedule.stages)
    costs = Costs(data.draw(per_stage), data.draw(per_stage), data.draw(per_stage), 0.25, send)
    timeline = simulate(schedule, costs)
    begun, ended = {}, {}
    for spans in timeline.compute:
        assert all(a.end <= b.start for a, b in pairwise(spans))
        for span in spans:
            assert math.isclose(span.end - span.start, costs.of(span.action))
            for part in span.action.computes:
                way = "F" if part.op is Op.FORWARD else "W" if part.op is Op.BACKWARD_WEIGHT else "I"
                begun[way, part.stage, part.microbatch] = span.start
                ended[way, part.stage, part.microbatch] = span.end
    for (way, stage, m), start in begun.items():
        source = {"F": stage - 1, "I": stage + 1, "W": stage}[way]
        if 0 <= source < schedule.stages:
            remote = schedule.placement[source] != schedule.placement[stage]
            assert start >= ended["I" if way == "W" else way, source, m] + send * remote
        if way == "I":
            assert start >= ended["F", stage, m]
    scaled = Costs(
        *(tuple(scale * x for x in v) for v in (costs.forward, costs.backward_input, costs.backward_weight)),
        hidden=0.25,
        send=scale * send,
    )
    assert math.isclose(simulate(schedule, scaled).time, scale * timeline.time)


def test_memory_is_in_units_of_each_stage():
    schedule = generate("1f1b", 2, 4)
    assert simulate(schedule, Costs(memory=(3.0, 5.0))).memory == (6.0, 5.0)


def test_gathers_delay_first_passes_and_reductions_end_the_step():
    schedule = lower(generate("1f1b", 2, 4))
    plain, slow = simulate(schedule), simulate(schedule, Costs(unshard=2.0, reduce=5.0))
    assert slow.compute[0][0].start == 2.0
    assert slow.time == plain.time + 2.0 + 5.0


@pytest.mark.parametrize("bad", [{"forward": -1.0}, {"send": math.nan}, {"hidden": 1.5}, {"memory": (1.0, -2.0)}])
def test_costs_that_make_no_sense_are_refused(bad):
    with pytest.raises(ScheduleError, match=f"costs.{next(iter(bad))}"):
        Costs(**bad)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_tables(kind, tmp_path):
    schedule = generate(kind, 2, 4)
    draw(schedule, path=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    draw_timelines([simulate(schedule), simulate(add_exchanges(schedule), Costs(send=0.25))], ["one", "two"])
    text = describe(schedule)
    form = closed_form(kind, 2, 4, Costs())
    assert f"{form.bubble:.2f}  {form.bubble:11.2f}" in text and form.formula in text


def test_a_kind_of_ones_own_is_described_without_a_closed_form():
    schedule = generate("1f1b", 2, 4)
    text = describe(type(schedule)("mine", schedule.placement, 4, schedule.ranks))
    assert "no closed form is known for 'mine'" in text
    assert "give one number for each cost" in describe(schedule, Costs(forward=(1.0, 2.0)))


def test_compare_gives_a_row_to_each_kind_and_a_reason_to_those_refused():
    rows = compare(4, 6).splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(KINDS)
    assert "needs pp >= 1 and microbatches >= 8, not 6" in rows[-1]
