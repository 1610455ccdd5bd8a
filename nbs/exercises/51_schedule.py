# %% [markdown]
# # Exercise: a schedule of one's own
#
# > Write 1F1B as a list of actions, check it, and look at it.
#
# A [schedule](../50_schedule.py) says, for each rank, which passes it does in which order. GPipe does all
# forwards and then all backwards: simple, and every rank holds the activations of all $m$ microbatches. 1F1B
# starts a backward as soon as there is one to start; rank $r$ of $p$ then never holds more than $p - r$.
#
# ## The task
#
# Write `my_1f1b(pp, microbatches)`, with one stage to a rank. Rank $r$ does $p - 1 - r$ forwards to warm up (or
# all, if there are fewer), then a forward and a backward in turn, then the backwards that are left. Return a
# tuple of actions for each rank.

# %%
from pithtrain.parallel.pipeline.schedule import Action, Op, Schedule, ScheduleError, round_placement
from pithtrain.parallel.pipeline.simulate import simulate
from pithtrain.parallel.pipeline.validate import validate

print(
    Action(Op.FORWARD, 0, 3), "is the forward of stage 0 for microbatch 3,", Action(Op.BACKWARD, 0, 3), "its backward"
)


def my_1f1b(pp, microbatches):
    raise NotImplementedError  # your turn


# %% [markdown]
# ## The check
#
# `validate` names whatever is missing or cannot happen; `simulate` gives the time and the activations held.


# %%
def check(generate):
    for pp, microbatches in ((1, 3), (2, 2), (4, 8), (4, 2), (3, 7)):
        case = f"{pp} ranks, {microbatches} microbatches"
        schedule = Schedule("mine", round_placement(pp), microbatches, tuple(map(tuple, generate(pp, microbatches))))
        validate(schedule)
        timeline = simulate(schedule)
        want = tuple(min(pp - rank, microbatches) for rank in range(pp))
        assert timeline.peak == want, f"{case}: ranks hold {timeline.peak} activations, want {want}"
        least = 3 * (microbatches + pp - 1)  # with a forward of 1 and a backward of 2
        assert timeline.time == least, f"{case}: takes {timeline.time:g}, want {least}"
    print("Right.")


try:
    check(my_1f1b)
except NotImplementedError:
    print("Not written yet.")

# %% [markdown]
# ## A mistake worth making
#
# Without a warm-up, rank 0 asks for a backward that nobody can have sent yet:


# %%
def hasty(pp, microbatches):
    return [
        [action for m in range(microbatches) for action in (Action(Op.FORWARD, r, m), Action(Op.BACKWARD, r, m))]
        for r in range(pp)
    ]


try:
    check(hasty)
    raise SystemExit("the check let a mistake pass")
except (AssertionError, ScheduleError) as error:
    print(error)

# %% [markdown]
# It is complete and does not lock up: each microbatch just crosses the pipeline alone, and all others wait.
#
# ## A solution


# %% tags=["hide-cell"]
def solution(pp, microbatches):
    ranks = []
    for r in range(pp):
        forwards = [Action(Op.FORWARD, r, m) for m in range(microbatches)]
        backwards = [Action(Op.BACKWARD, r, m) for m in range(microbatches)]
        warmup = min(pp - 1 - r, microbatches)
        actions = forwards[:warmup]
        for forward, backward in zip(forwards[warmup:], backwards, strict=False):
            actions += [forward, backward]
        ranks.append(actions + backwards[microbatches - warmup :])
    return ranks


check(solution)

# %% [markdown]
# What it looks like, above GPipe. Both take as long, and wait as long; the difference is what a rank holds
# while it does.

# %%
import matplotlib.pyplot as plt

from pithtrain.parallel.pipeline.draw import gantt
from pithtrain.parallel.pipeline.generate import gpipe

fig, rows = plt.subplots(2, 1, figsize=(8, 4.4), layout="constrained")
mine = Schedule("1f1b", round_placement(4), 8, tuple(map(tuple, solution(4, 8))))
for ax, schedule in zip(rows, (mine, gpipe(4, 8)), strict=True):
    timeline = simulate(schedule)
    gantt(ax, timeline, f"{schedule.kind}: ranks hold up to {max(timeline.peak)} activations")
fig

# %% [markdown]
# ## To think about
#
# - Both have the same bubble. What would make it smaller, and what does that cost? [Six
#   schedules](../51_generate.py) has four answers.
# - Where in the picture would a slower rank 2 hurt, and where not?
#
# Next: [a save that is whole or absent](66_checkpoint.py).
