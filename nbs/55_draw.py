# %% [markdown]
# # Drawing a schedule
#
# > A Gantt chart of a timeline: a row per rank, a colour per kind of pass, the bubble, the live activations.

# %%
#| default_exp parallel.pipeline.draw

# %% [markdown]
# ## The idea
#
# A schedule is understood by looking. The eye should find four things without a legend being studied first:
# where ranks wait (hatched grey), the wave of forwards going down (blue) and backwards coming up (warm
# colours), which microbatch a pass belongs to (its number), and which stage of a rank it is (the second
# chunk is darker). Overlapped pairs are drawn as one box, the forward above the backward, for they run at
# the same time.

# %%
#| export
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from pithtrain.parallel.pipeline.schedule import Action, Op, Schedule
from pithtrain.parallel.pipeline.simulate import UNIT, Costs, Timeline, simulate

# %% [markdown]
# ## Colours
#
# One hue per kind of pass, of about equal weight, told apart also without red and green; each chunk of a rank
# a shade darker than the one before.


# %%
#| export
SHADES = {  # of the first chunk of a rank, and of its last
    Op.FORWARD: ((0.66, 0.80, 0.95), (0.16, 0.38, 0.67)),
    Op.BACKWARD: ((0.99, 0.78, 0.55), (0.80, 0.36, 0.07)),
    Op.BACKWARD_INPUT: ((0.91, 0.74, 0.92), (0.53, 0.20, 0.56)),
    Op.BACKWARD_WEIGHT: ((0.76, 0.88, 0.70), (0.27, 0.51, 0.26)),
}


def colour(action: Action, schedule: Schedule) -> tuple[float, float, float]:
    """RGB of a pass: hue by its op, darker for later chunks of its rank."""
    light, dark = SHADES[action.op]
    chunks = schedule.held_by(schedule.placement[action.stage])
    shade = chunks.index(action.stage) / max(1, len(chunks) - 1)
    return tuple(a + (b - a) * shade for a, b in zip(light, dark, strict=True))


# %%
from pithtrain.parallel.pipeline.generate import generate

schedule = generate("dualpipev", 2, 4)
for op in "FBIW":
    print(op, [[round(x, 2) for x in colour(Action(Op(op), stage, 0), schedule)] for stage in (0, 3)])

# %% [markdown]
# ## The chart
#
# A long schedule has ten thousands of boxes, so all of one colour are drawn as one collection. Whether the numbers of
# microbatches fit is decided once for a picture, by its short passes: all are numbered, in one size, or none.


# %%
#| export
def gantt(ax: Axes, timeline: Timeline, title: str) -> None:
    """Draws a timeline into axes: a row per rank, a box per pass, the bubble hatched behind."""
    schedule, ranks = timeline.schedule, range(len(timeline.compute))
    idle = [Rectangle((0, rank - 0.4), timeline.time, 0.8) for rank in ranks]
    ax.add_collection(PatchCollection(idle, fc="#f3f3f3", ec="#d0d0d0", hatch="////", lw=0))
    lengths = sorted(span.end - span.start for spans in timeline.compute for span in spans)
    width = ax.figure.get_figwidth() * 72 * 0.85 * lengths[len(lengths) // 10] / timeline.time  # of a box, in points
    size = min(9.0, 1.3 * width / (1 + len(str(schedule.microbatches - 1))))
    boxes: dict[tuple[float, float, float], list[Rectangle]] = {}
    for rank, spans in enumerate(timeline.compute):
        for action, start, end in spans:
            height = 0.8 / len(action.computes)
            for i, part in enumerate(action.computes):
                fill, top = colour(part, schedule), rank - 0.4 + i * height
                boxes.setdefault(fill, []).append(Rectangle((start, top), end - start, height))
                if size >= 4.0:
                    ink = "white" if sum(fill) < 1.6 else "#202020"
                    middle, where = ((start + end) / 2, top + height / 2), {"ha": "center", "va": "center_baseline"}
                    ax.text(*middle, part.microbatch, fontsize=size, color=ink, **where)
    for fill, same in boxes.items():
        ax.add_collection(PatchCollection(same, fc=fill, ec="white", lw=0.5 if size >= 2 else 0))
    held = map(schedule.held_by, ranks)
    names = [f"rank {r}\nstage{'s' * (len(h) > 1)} {', '.join(map(str, h))}" for r, h in zip(ranks, held, strict=True)]
    ax.set_title(title, loc="left", fontsize=10)
    ax.set(xlim=(0, timeline.time), ylim=(len(ranks) - 0.5, -0.5), yticks=ranks, yticklabels=names)
    ax.tick_params(axis="y", length=0, labelsize=8)
    ax.spines[["top", "right", "left"]].set_visible(False)


# %% [markdown]
# Under the chart, the same time axis carries the activations that each rank holds. The list says when they
# are freed, so this is known as exactly as the rest.


# %%
#| export
def live_activations(ax: Axes, timeline: Timeline) -> None:
    """Draws each rank's count of live activations over time."""
    for rank, spans in enumerate(timeline.compute):
        changes: dict[float, int] = {0.0: 0}
        for span in spans:
            for part in span.action.computes:
                if part.op is Op.FORWARD:
                    changes[span.start] = changes.get(span.start, 0) + 1
                elif part.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
                    changes[span.end] = changes.get(span.end, 0) - 1
        times = sorted(changes)
        shade = rank / max(1, len(timeline.compute) - 1)
        # A little above each other, or equal counts would hide all ranks but the last.
        counts = [count + 0.12 * shade for count in accumulate(changes[time] for time in times)]
        ax.step(times, counts, where="post", lw=1.2, color=plt.cm.viridis(0.85 * shade), label=f"rank {rank}")
    ax.set(ylabel="live\nactivations", xlim=(0, timeline.time), ylim=(0, max(timeline.peak) + 0.8))
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    if len(timeline.compute) <= 8:
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, labelspacing=0.2)


# %%
#| export
def draw(schedule: Schedule, costs: Costs = UNIT, path: str | Path | None = None) -> Figure:
    """The picture of a schedule: its chart, the legend, and its live activations; saved where `path` says."""
    fig = draw_timelines([simulate(schedule, costs)], memory=True)
    if path is not None:
        fig.savefig(path, dpi=150)
    return fig


# %%
#| export
def draw_timelines(timelines: Sequence[Timeline], titles: Sequence[str] = (), memory: bool = False) -> Figure:
    """Several timelines above each other on one time axis, to be compared; `memory` adds live activations."""
    longest = max(t.time for t in timelines)
    busiest = max(len(spans) for t in timelines for spans in t.compute)
    heights = [h for t in timelines for h in (0.9 + 0.5 * len(t.compute), *[1.5] * memory)]
    size, options = (min(16.0, 6.0 + busiest / 8), sum(heights) + 0.4), {"squeeze": False, "layout": "constrained"}
    fig, axes = plt.subplots(len(heights), sharex=True, figsize=size, height_ratios=heights, **options)
    rows = iter(axes[:, 0])
    for t, title in zip(timelines, titles or [caption(t) for t in timelines], strict=True):
        gantt(next(rows), t, title)
        if memory:
            live_activations(next(rows), t)
    axes[-1, 0].set(xlabel="time", xlim=(0, longest))
    fig.legend(handles=legend(timelines), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return fig


# %%
#| export
def caption(timeline: Timeline) -> str:
    """A title: the kind, its sizes, its bubble and its peak."""
    s = timeline.schedule
    return (
        f"{s.kind}: {len(s.ranks)} ranks, {s.microbatches} microbatches, bubble {timeline.bubble:.3g} of"
        f" {timeline.time:.4g} ({timeline.bubble / timeline.time:.0%}), {max(timeline.peak)} live activations"
    )


# %%
#| export
def legend(timelines: Sequence[Timeline]) -> list[Patch]:
    """A patch for each kind of pass that occurs, and for the bubble."""
    names = dict(zip(SHADES, ("forward", "backward", "backward, input", "backward, weight"), strict=True))
    parts = {part.op for t in timelines for spans in t.compute for span in spans for part in span.action.computes}
    deepest = max((t.schedule for t in timelines), key=lambda s: len(s.held_by(0)))
    patches = [Patch(fc=colour(Action(op, 0), deepest), label=names[op]) for op in names if op in parts]
    if len(deepest.held_by(0)) > 1:
        later = Action(Op.FORWARD, deepest.held_by(0)[-1])
        patches.append(Patch(fc=colour(later, deepest), label="darker: later chunk"))
    return [*patches, Patch(fc="#f3f3f3", ec="#d0d0d0", hatch="////", lw=0, label="idle")]


# %% [markdown]
# ## Six pictures
#
# GPipe and 1F1B idle for the same time. What 1F1B changes is the lower half of the story: it never holds more
# than four activations on four ranks.

# %%
fig = draw(generate("gpipe", 4, 8))
fig
# %%
fig = draw(generate("1f1b", 4, 8))
fig
# %% [markdown]
# Interleaving shortens the stages (here by half, so that the same model is drawn), and with them the wait.
# The price is memory: rank 0 holds 11 short activations, worth 5.5 of the long ones.

# %%
short = Costs(forward=0.5, backward_input=0.5, backward_weight=0.5)
fig = draw(generate("interleaved", 4, 8), short)
fig
# %% [markdown]
# Splitting the backward (ZB-H1) leaves idle only what nobody can fill: the time until the first microbatch
# reaches a rank, and the time until its first gradient comes back. Green weight gradients move into the gaps.

# %%
fig = draw(generate("zb_h1", 4, 8))
fig
# %% [markdown]
# Folding the pipeline into a V (ZBV) brings the first gradient back to rank 0 at once: between the first pass
# of a rank and its last there is no gap at all.

# %%
fig = draw(generate("zbv", 4, 8), short)
fig
# %% [markdown]
# And DualPipeV. In the steady state every rank runs a forward and a backward together, and if that saves time
# (here 30% of the shorter one is hidden), the whole middle of the picture shrinks. The grey that is left is
# small, and memory is flat over all ranks.

# %%
fig = draw(generate("dualpipev", 4, 10), Costs(0.5, 0.5, 0.5, hidden=0.3))
fig
# %% [markdown]
# ## Two on one axis
#
# With transfers that take time, and overlap that hides expert communication: the same model, the same work,
# two schedules.

# %%
from pithtrain.parallel.pipeline.lower import lower

full = Costs(1.2, 1.2, 1.0, hidden=0.6, send=0.1)
half = Costs(0.6, 0.6, 0.5, hidden=0.6, send=0.1)
fig = draw_timelines(
    [simulate(lower(generate("1f1b", 4, 12)), full), simulate(lower(generate("dualpipev", 4, 12)), half)]
)
fig

# %% [markdown]
# The same function will show a simulated step above a recorded one.
#
# **Next:** the numbers beside the closed forms, for the command line, in [56_describe](56_describe.py).
