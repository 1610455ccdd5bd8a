# %% [markdown]
# # A schedule in one table
#
# > The table that `pithtrain schedule` prints: bubble and live activations beside the closed form.

# %%
#| default_exp parallel.pipeline.describe

# %% [markdown]
# ## The idea
#
# Before a run, one wants to know: how long will ranks idle, and how many activations must fit? Two answers
# stand side by side, the simulator's and the paper's, so that either can be distrusted.

# %%
#| export
from pithtrain.parallel.pipeline.generate import KINDS, generate
from pithtrain.parallel.pipeline.lower import lower
from pithtrain.parallel.pipeline.schedule import Schedule, ScheduleError
from pithtrain.parallel.pipeline.simulate import UNIT, Costs, closed_form, simulate
from pithtrain.parallel.pipeline.validate import validate


# %%
#| export
def describe(schedule: Schedule, costs: Costs = UNIT) -> str:
    """A table of one schedule: time, bubble and live activations per rank, and the closed form of its kind.

    The schedule is simulated as given. Raises ScheduleError if it is not valid."""
    validate(schedule)
    timeline = simulate(schedule, costs)
    lines = [
        f"{schedule.kind}: {len(schedule.ranks)} ranks, {schedule.stages} stages, {schedule.microbatches} microbatches",
        "",
        "rank  stages      busy      idle  live activations",
    ]
    for r, idle in enumerate(timeline.idle):
        held = ", ".join(map(str, schedule.held_by(r)))
        lines.append(f"{r:4}  {held:8}{timeline.time - idle:8.2f}  {idle:8.2f}  {timeline.peak[r]:16}")
    share = timeline.bubble / timeline.time
    lines += [
        "",
        f"{'':17}simulated  closed form" + ", transfers free" * (costs.send > 0),
        f"step time        {timeline.time:9.2f}",
    ]
    bubble = f"bubble           {timeline.bubble:9.2f}"
    peak = f"live activations {max(timeline.peak):9}"
    try:
        chunks = len(schedule.held_by(0))
        form = closed_form(schedule.kind, len(schedule.ranks), schedule.microbatches, costs, chunks)
        bubble += f"  {form.bubble:11.2f}  = {form.formula}" + (f", which needs {form.lacks}" if form.lacks else "")
        peak += f"  {form.peak:11}"
    except ScheduleError as error:  # a kind of one's own, or unequal stages
        bubble += f"  {'none':>11}  ({error})"
    return "\n".join([*lines, bubble, peak, f"idle share       {share:9.1%}"])


# %%
print(describe(generate("dualpipev", pp=4, microbatches=16), Costs(hidden=0.4)))

# %% [markdown]
# With hidden communication the ranks overlap unequal numbers of passes, so their idle times differ; the closed
# form speaks of the rank that idles most.
#
# ## All kinds for one model
#
# The kinds differ in how many stages they cut the model into. A fair comparison fixes the model: `costs` are
# those of $1/p$ of it, and kinds with two stages per rank get stages half as long and half as large.


# %%
#| export
def compare(pp: int, microbatches: int, costs: Costs = UNIT) -> str:
    """A table of all kinds for one model; `costs` are of 1/pp of it, equal for all ranks.

    Schedules are simulated with their exchanges spelled out, so transfers cost what `costs.send` says.
    Memory is in units of costs.memory. A kind that refuses these counts has its reason in its row."""
    lines = [f"{'kind':12} {'stages':>6} {'time':>8} {'bubble':>8} {'idle':>6} {'memory':>8}"]
    for kind in KINDS:
        try:
            schedule = lower(generate(kind, pp, microbatches))
        except ScheduleError as error:
            lines.append(f"{kind:12} {error}")
            continue
        t = simulate(schedule, costs.split(schedule.stages // pp))
        lines.append(
            f"{kind:12} {schedule.stages:6} {t.time:8.2f} {t.bubble:8.2f} {t.bubble / t.time:6.1%} {max(t.memory):8.2f}"
        )
    return "\n".join(lines)


# %%
print("transfers free, nothing hidden by overlap\n" + compare(4, 16))
print("\na transfer takes 0.05, overlap hides 60%\n" + compare(4, 16, Costs(hidden=0.6, send=0.05)))

# %% [markdown]
# Read the first table for what orders alone can do, and the second for why DualPipeV is worth its length. Where
# expert communication is a large part of a pass and can be hidden, it wins by far more than any bubble.

# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
shares = [i / 10 for i in range(11)]
for kind in ("1f1b", "zb_h1", "zbv", "dualpipev"):
    chunks = 2 if kind in ("zbv", "dualpipev") else 1
    schedule = generate(kind, 4, 16)
    times = [simulate(schedule, Costs(hidden=h).split(chunks)).time for h in shares]
    ax.plot([100 * h for h in shares], times, marker="o", ms=3, label=kind)
ax.set(
    title="One step on 4 ranks, 16 microbatches, F = I = W = 1",
    xlabel="share of a forward that overlap hides, %",
    ylabel="time",
)
ax.legend()
fig

# %% [markdown]
# Only DualPipeV has overlapped passes, so only its line falls.
#
# ## What an engine must honour
#
# The list that `lower` makes is complete. Whoever runs it needs to know these rules and no schedule by name:
#
# 1. **Order.** A rank runs its actions first to last. Passes (`F`, `B`, `I`, `W`, overlapped) hold the rank
#    up; exchanges and gathers are posted and run beside. A reduction may be, and is waited for at the end of the
#    step; that of a [sharded stage](43_sharding.py) is FSDP2's, which returns when its own work is done.
# 2. **Exchanges.** One exchange is one batch of sends and receives. The exchanges of a rank are posted in the
#    order of the list, each whole. A pass that uses a received tensor waits for the exchange it came in, and
#    by then all earlier exchanges of that rank may be waited for too: `validate` has proved that this ends.
# 3. **Neighbours on one rank** hand over directly: $y$ of stage $s$ is $x$ of stage $s+1$, cut from the
#    graph so that each stage's backward is its own.
# 4. **Memory.** A forward's activations live until its `B` or `W`, and no longer. What was sent is dropped when
#    its exchange has been waited for, by the next pass that needs that exchange or a later one, or is seen to be
#    over when another is posted. On the last stage a live microbatch holds the gradient of the whole head in fp32,
#    vocabulary by hidden, which [its loss](27_loss.py) makes in the forward.
# 5. **Weight gradients** add up over microbatches, in whatever order the list has, into one sum per parameter.
# 6. **Parameters.** A stage's are complete from `UNSHARD` (a pass waits for it) to `RESHARD`. `REDUCE` comes
#    once, after the stage's last weight gradient, and is complete at the end of the step.
# 7. **Overlap.** `(F;B)` gives both passes to one function, which may interleave them as it likes. Both have
#    all they need when it starts; both are complete when it returns.
# 8. **Nothing else.** No barrier, no schedule's name, no count of warm-up steps. A list that passes `validate`
#    runs.
#
# **Next:** an engine that does so, in [57_engine](57_engine.py).
