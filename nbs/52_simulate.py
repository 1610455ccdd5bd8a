# %% [markdown]
# # Simulating a schedule
#
# > A timeline from a schedule and its costs: how long a step takes, how long ranks idle, how much they hold.

# %%
#| default_exp parallel.pipeline.simulate

# %% [markdown]
# ## The idea
#
# A schedule fixes the order on every rank, so nothing is left to chance: a pass starts when the rank has
# finished the pass before it and the data it needs is there. With $\tau_a$ the time that action $a$ takes,
# $\text{prev}(a)$ the action before it on its rank, and $\text{needs}(a)$ what it waits for,
#
# $$ \text{start}(a) = \max\Big(\text{end}(\text{prev}(a)),\; \max_{b \,\in\, \text{needs}(a)} \text{end}(b)\Big),
# \qquad \text{end}(a) = \text{start}(a) + \tau_a . $$
#
# These equations have a solution if and only if no action waits for itself along some chain. That does not
# depend on $\tau$: a schedule that finishes once finishes at any speed, so a single simulation, with any
# costs, decides whether it can deadlock.

# %%
#| export
import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pithtrain.parallel.pipeline.generate import Kind
from pithtrain.parallel.pipeline.schedule import Action, Op, Schedule, ScheduleError, needs, partner

# %% [markdown]
# ## Costs
#
# One unit serves for all times; which one does not matter. Stages may differ: give a tuple instead of a
# number. Overlapping a forward with a backward hides some share of the shorter under the longer:
# $\mathsf{F\&B} = \mathsf{F} + \mathsf{B} - \texttt{hidden} \cdot \min(\mathsf{F}, \mathsf{B})$, from
# nothing gained at 0 to $\max(\mathsf{F}, \mathsf{B})$ at 1.


# %%
#| export
@dataclass(frozen=True)
class Costs:
    """What actions take, in one unit of time; per-stage where a tuple is given.

    `send` is one activation or gradient from rank to rank, `unshard` and `reduce` one stage's parameters;
    `memory` is one live activation of a stage, in any unit. A whole backward takes what its halves take, unless
    `backward` says otherwise. Raises ScheduleError for times below zero."""

    forward: float | tuple[float, ...] = 1.0
    backward_input: float | tuple[float, ...] = 1.0
    backward_weight: float | tuple[float, ...] = 1.0
    hidden: float = 0.0
    send: float = 0.0
    unshard: float = 0.0
    reduce: float = 0.0
    memory: float | tuple[float, ...] = 1.0
    backward: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(x >= 0 and math.isfinite(x) for x in numbers):
                raise ScheduleError(f"costs.{name} is {value}: give finite numbers >= 0")
        if self.hidden > 1:
            raise ScheduleError(f"costs.hidden is {self.hidden}: it is a share, at most 1")

    def of(self, action: Action) -> float:
        """The time of one action; a whole exchange takes none of the rank's own."""
        match action.op:
            case Op.FORWARD:
                return at(self.forward, action.stage)
            case Op.BACKWARD_INPUT:
                return at(self.backward_input, action.stage)
            case Op.BACKWARD_WEIGHT:
                return at(self.backward_weight, action.stage)
            case Op.BACKWARD if self.backward is not None:
                return at(self.backward, action.stage)
            case Op.BACKWARD:
                return at(self.backward_input, action.stage) + at(self.backward_weight, action.stage)
            case Op.OVERLAP:
                parts = [self.of(part) for part in action.parts]
                return sum(parts) - self.hidden * min(parts)
            case Op.UNSHARD:
                return self.unshard
            case Op.REDUCE:
                return self.reduce
        return 0.0

    def split(self, chunks: int) -> "Costs":
        """These costs, of equal stages, where stages are `chunks` times shorter: all shrink but those of transfers."""
        stays = ("hidden", "send")
        shrunk = {name: value / chunks for name, value in vars(self).items() if value and name not in stays}
        return replace(self, **shrunk)


# %%
#| export
def at(value: float | tuple[float, ...], stage: int) -> float:
    """A cost of one stage: the number itself, or the stage's entry of a tuple."""
    return value[stage] if isinstance(value, tuple) else value


# %%
#| export
UNIT = Costs()  # one unit for each of F, I and W, and the rest free: the papers' usual picture

# %%
costs = Costs(forward=(1.0, 1.5), hidden=0.5)
both = Action(Op.OVERLAP, parts=(Action(Op.FORWARD, 1, 4), Action(Op.BACKWARD, 0, 2)))
print(f"{both} takes {costs.of(both)}: 1.5 + 2 - half of 1.5")
assert costs.of(both) == 2.75

# %% [markdown]
# ## The timeline
#
# The result keeps every pass as a span, so that it can be drawn, and what people ask of a schedule:
#
# - **idle** time of a rank is the whole step less what the rank computes. The **bubble** is that of the rank
#   which idles most. (Ranks differ when their stages do, or when some overlap more of their passes.)
# - an activation is **live** from the start of its forward to the end of its backward, or of its weight
#   gradient where the backward is split. The **peak** is the most that are live at once on a rank.


# %%
#| export
class Span(NamedTuple):
    """An action and when it ran."""

    action: Action
    start: float
    end: float


# %%
#| export
@dataclass(frozen=True)
class Timeline:
    """When each pass ran, per rank, and what follows from it."""

    schedule: Schedule
    compute: tuple[tuple[Span, ...], ...]
    peak: tuple[int, ...]  # live activations
    memory: tuple[float, ...]  # the most that live activations took, in units of costs.memory
    time: float  # of the whole step

    @property
    def idle(self) -> tuple[float, ...]:
        return tuple(self.time - sum(s.end - s.start for s in spans) for spans in self.compute)

    @property
    def bubble(self) -> float:
        return max(self.idle)


# %% [markdown]
# ## The smallest true simulation
#
# Let every rank run as far as it can, in turn, until nobody moves. If all have finished, that is the
# timeline; if not, somebody waits for something that never comes. For a schedule without explicit
# communication, this is all there is to it:

# %%
from pithtrain.parallel.pipeline.generate import generate


def simulate_small(schedule, costs):
    ends, clocks, positions = {}, [0.0] * len(schedule.ranks), [0] * len(schedule.ranks)
    moved = True
    while moved:
        moved = False
        for r, actions in enumerate(schedule.ranks):
            while positions[r] < len(actions):
                action = actions[positions[r]]
                wanted = needs(action, schedule, explicit=False)
                if any(w not in ends for w in wanted):
                    break
                clocks[r] = max([clocks[r], *(ends[w] for w in wanted)]) + costs.of(action)
                for done in action.computes:
                    ends[done] = clocks[r]
                    if done.op is Op.BACKWARD:
                        ends[done._replace(op=Op.BACKWARD_INPUT)] = clocks[r]
                positions[r] += 1
                moved = True
    return max(clocks)


print("1F1B, 4 ranks, 8 microbatches:", simulate_small(generate("1f1b", 4, 8), Costs()))

# %% [markdown]
# $(m + p - 1)(\mathsf{F} + \mathsf{B}) = 11 \cdot 3 = 33$, as it should be.
#
# ## With communication
#
# Once a schedule spells out its exchanges, the strictest reading of them is the one to trust, that of NCCL:
# a rank's exchanges run one after another on one stream, each send waits for its receive and each receive
# for its send, and an exchange is over when all of its parts are. In which order the parts of one exchange move is
# NCCL's affair: two sends to the same rank may well go one after the other, each beside a receive. So nothing of an
# exchange is counted on before all of its partners have come to it. Posting one does not hold the rank up, but
# a pass that needs what is received does wait. Whatever is free of deadlock under this reading is so under
# any kinder one (several streams, buffered sends).
#
# Parameter gathers and gradient reductions run on a stream of their own.


# %%
#| export
@dataclass
class _Rank:
    """How far one rank has come."""

    position: int = 0
    time: float = 0.0  # when its compute is free
    collectives: float = 0.0  # when its stream of gathers and reductions is free
    wire: float = 0.0  # when its stream of exchanges is free
    posted: deque = field(default_factory=deque)  # exchanges not yet over: (when posted, parts)
    gathered: dict = field(default_factory=dict)  # stage -> when its parameters are there
    live: list = field(default_factory=list)  # stages of live activations
    peak: int = 0
    memory: float = 0.0
    compute: list = field(default_factory=list)


# %%
#| export
def simulate(schedule: Schedule, costs: Costs = UNIT) -> Timeline:
    """Times a schedule, with or without explicit exchanges and gathers.

    Without exchanges, data reaches another rank `costs.send` after it was made. Raises ScheduleError, naming
    each rank that is stuck and what it waits for, if the schedule can deadlock."""
    explicit = any(action.op is Op.EXCHANGE for actions in schedule.ranks for action in actions)
    ranks = [_Rank() for _ in schedule.ranks]
    done: dict[Action, float] = {}
    moved = True
    while moved:
        moved = False
        for r, actions in enumerate(schedule.ranks):
            while ranks[r].position < len(actions) and _advance(schedule, costs, explicit, ranks, r, done):
                moved = True
            while _deliver(schedule, costs, ranks, r, done):
                moved = True
    stuck = [r for r, state in enumerate(ranks) if state.position < len(schedule.ranks[r]) or state.posted]
    if stuck:
        raise ScheduleError("; ".join(_explain(schedule, explicit, ranks, r, done) for r in stuck))
    return Timeline(
        schedule=schedule,
        compute=tuple(tuple(state.compute) for state in ranks),
        peak=tuple(state.peak for state in ranks),
        memory=tuple(state.memory for state in ranks),
        time=max(max(state.time, state.collectives, state.wire) for state in ranks),
    )


# %% [markdown]
# One action of one rank, if what it needs is there. A pass marks what it completes, and activations live or free:


# %%
#| export
def _advance(
    schedule: Schedule, costs: Costs, explicit: bool, ranks: list[_Rank], r: int, done: dict[Action, float]
) -> bool:
    state = ranks[r]
    action = schedule.ranks[r][state.position]
    start = state.time
    for need in needs(action, schedule, explicit):
        if need not in done:
            return False
        remote = not explicit and schedule.placement[need.stage] != r
        start = max(start, done[need] + costs.send * remote)
    state.position += 1
    match action.op:
        case Op.EXCHANGE:
            state.posted.append((start, action.parts))
        case Op.UNSHARD | Op.REDUCE:
            state.collectives = max(start, state.collectives) + costs.of(action)
            if action.op is Op.UNSHARD:
                state.gathered[action.stage] = state.collectives
        case Op.RESHARD:
            state.gathered.pop(action.stage, None)
        case _:
            start = max([start, *(state.gathered.get(part.stage, 0.0) for part in action.computes)])
            state.time = start + costs.of(action)
            state.compute.append(Span(action, start, state.time))
            # An overlapped forward is live before the backward beside it has freed anything.
            state.live += [part.stage for part in action.computes if part.op is Op.FORWARD]
            state.peak = max(state.peak, len(state.live))
            state.memory = max(state.memory, sum(at(costs.memory, stage) for stage in state.live))
            for part in action.computes:
                done[part] = state.time
                if part.op is Op.BACKWARD:
                    done[part._replace(op=Op.BACKWARD_INPUT)] = state.time
                    done[part._replace(op=Op.BACKWARD_WEIGHT)] = state.time
                if part.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT) and part.stage in state.live:
                    state.live.remove(part.stage)
    return True


# %% [markdown]
# An exchange happens when it, those of its partners, theirs and so on have all come to the head of their ranks'
# streams:


# %%
#| export
def _deliver(schedule: Schedule, costs: Costs, ranks: list[_Rank], r: int, done: dict[Action, float]) -> bool:
    """Runs the exchange at the head of a rank's stream and all that hang together with it; True if that could be."""
    together = [r]
    for member in together:  # grows on the way
        if not ranks[member].posted:
            return False
        for other in map(partner, ranks[member].posted[0][1]):
            peer = schedule.placement[other.stage] if 0 <= other.stage < schedule.stages else r
            if not ranks[peer].posted or other not in ranks[peer].posted[0][1]:
                return False
            together += [] if peer in together else [peer]
    end = max(max(ranks[member].posted[0][0], ranks[member].wire) for member in together) + costs.send
    for member in together:
        ranks[member].wire = end
        done.update(dict.fromkeys(ranks[member].posted.popleft()[1], end))
    return True


# %%
#| export
def _explain(schedule: Schedule, explicit: bool, ranks: list[_Rank], r: int, done: dict[Action, float]) -> str:
    state = ranks[r]
    if state.position == len(schedule.ranks[r]):
        part = state.posted[0][1][0]
        return f"rank {r} ends with {part} unmatched: no {partner(part)} is posted in its turn"
    action = schedule.ranks[r][state.position]
    need = next(need for need in needs(action, schedule, explicit) if need not in done)
    text = f"rank {r} is stuck at {action}: it waits for {need}"
    if need.op in (Op.RECV_FORWARD, Op.RECV_BACKWARD):
        if not any(need in parts for _, parts in state.posted):
            return text + ", which it has not posted"
        part = state.posted[0][1][0]
        return text + ("" if part == need else f", behind {part}") + f", which waits for {partner(part)}"
    return text + f" on rank {schedule.placement[need.stage]}"


# %%
timeline = simulate(generate("1f1b", pp=4, microbatches=8))
print("time", timeline.time, " bubble", timeline.bubble, " peak", timeline.peak)
for kind in ("gpipe", "1f1b", "zb_h1"):
    schedule = generate(kind, 4, 8)
    for costs in (Costs(), Costs(forward=(1.0, 2.0, 0.5, 3.0))):
        assert simulate(schedule, costs).time == simulate_small(schedule, costs)

# %% [markdown]
# A schedule that cannot finish says why. Here both ranks of a pair want the other to go first:

# %%
one = generate("1f1b", 2, 1)
swapped = Schedule("swapped", one.placement, 1, (one.ranks[0], one.ranks[1][::-1]))
try:
    simulate(swapped)
except ScheduleError as error:
    print(error)

# %% [markdown]
# ## What the papers promise
#
# The published closed forms, with $\mathsf{B}$ the full backward, $\mathsf{W}$ its weight part, and
# $\mathsf{F\&B}$ the overlapped pair, all for *one stage*, and no cost of communication:
#
# | schedule | bubble | live activations | from |
# |---|---|---|---|
# | GPipe | $(p-1)(\mathsf{F}+\mathsf{B})$ | $m$ | arXiv 1811.06965 |
# | 1F1B | $(p-1)(\mathsf{F}+\mathsf{B})$ | $p$ | arXiv 2104.04473 |
# | interleaved | $(p-1)(\mathsf{F}+\mathsf{B})$ | $(v-1)p+2(p-1)+1$ short ones | arXiv 2104.04473 |
# | ZB-H1 | $(p-1)(\mathsf{F}+\mathsf{B}-2\mathsf{W})$ | $p$ | arXiv 2401.10241 |
# | ZBV | none inside a rank, at $\mathsf{F}=\mathsf{I}=\mathsf{W}$ | $2p$ short ones | arXiv 2405.15362 |
# | DualPipeV | $(p-1)(\mathsf{F\&B}+\mathsf{B}-3\mathsf{W})$ | $2p+1$ short ones | DeepSeek's DualPipe repository |
#
# They are derived for typical costs, and it takes a simulator to see how far they carry. It turns out
# (tests/test_pipeline_simulate.py holds this to random costs) that
#
# - 1F1B and GPipe meet theirs always, interleaved whenever $m \ge p$;
# - the order of ZB-H1 gives $(p-1)\max(\mathsf{F}, \mathsf{I}, \mathsf{F}+\mathsf{I}-\mathsf{W})$ for
#   $m \ge p$: the published form where $\mathsf{W} \le \min(\mathsf{F}, \mathsf{I})$. No schedule does better
#   than the first two terms, for the last rank starts $(p-1)\mathsf{F}$ late, and the first waits
#   $(p-1)\mathsf{I}$ for its first gradient;
# - DualPipeV meets its form where $\mathsf{F} = \mathsf{I} \ge \mathsf{W}$, and beats it or meets it where
#   $\mathsf{F} \le \mathsf{I} \ge \mathsf{W}$;
# - ZBV's bubble is $(p-1)\max(\mathsf{I}, 2(\mathsf{I}-\mathsf{W}))$ where
#   $\mathsf{F} \le \mathsf{I} \ge \mathsf{W}$ and $m \ge 2p$. With all three equal this is $(p-1)\mathsf{F}$:
#   exactly the time that the last rank is idle before it can start.
#
# For costs outside of such a region there still is a bound. The equations at the top hold sums and maxima alone, so
# a step never gets longer when a cost gets smaller: it takes at most what it takes with $\mathsf{I}$ raised to
# $\max(\mathsf{F}, \mathsf{I}, \mathsf{W})$, where ZBV's form and DualPipeV's hold.


# %%
#| export
class ClosedForm(NamedTuple):
    """What a paper promises: the formula as text, the bubble by it, and the peak of live activations."""

    formula: str
    bubble: float
    peak: int
    lacks: str = ""  #: the condition of the formula, if these costs and counts do not meet it


# %%
#| export
def closed_form(kind: Kind, pp: int, microbatches: int, costs: Costs, chunks: int = 2) -> ClosedForm:
    """The closed form of a kind for equal stages, in units of one stage, with communication free.

    That of "zbv" is measured by this simulator; the others are published (sources in notebook 52). Raises
    ScheduleError for per-stage costs, which they do not cover."""
    if any(isinstance(value, tuple) for value in vars(costs).values()):
        raise ScheduleError("closed forms are for equal stages: give one number for each cost")
    p, m = pp, microbatches
    f, i, w, b = costs.forward, costs.backward_input, costs.backward_weight, costs.of(Action(Op.BACKWARD, 0))
    v_shaped = "" if f <= i >= w and m >= 2 * p else "F <= I >= W, m >= 2p"
    match kind:
        case "gpipe":
            return ClosedForm("(p-1)(F+B)", (p - 1) * (f + b), m)
        case "1f1b":
            return ClosedForm("(p-1)(F+B)", (p - 1) * (f + b), min(m, p))
        case "interleaved":
            group = math.ceil(m / max(1, m // p))
            peak = min(m * chunks, (chunks - 1) * group + 2 * (p - 1) + 1)
            return ClosedForm("(p-1)(F+B)", (p - 1) * (f + b), peak, "" if m >= p else "m >= p")
        case "zb_h1":
            lacks = "" if w <= min(f, i) and m >= p else "W <= F, W <= I, m >= p"
            return ClosedForm("(p-1)(F+B-2W)", (p - 1) * (f + b - 2 * w), min(m, p), lacks)
        case "zbv":
            formula, bubble = "(p-1)max(I,2I-2W), as measured here", (p - 1) * max(i, 2 * (i - w))
            return ClosedForm(formula, bubble, min(2 * m, 2 * p), v_shaped)
        case "dualpipev":
            overlapped = f + b - costs.hidden * min(f, b)
            return ClosedForm("(p-1)(F&B+B-3W)", (p - 1) * (overlapped + b - 3 * w), 2 * p + 1, v_shaped)
    raise ScheduleError(f"no closed form is known for {kind!r}")


# %%
from pithtrain.parallel.pipeline.generate import KINDS

print(f"{'4 ranks, 16 microbatches':12}  bubble  closed   peak  closed")
for kind in KINDS:
    timeline = simulate(generate(kind, 4, 16), Costs())
    form = closed_form(kind, 4, 16, Costs())
    print(f"{kind:24}  {timeline.bubble:6.1f}  {form.bubble:6.1f}  {max(timeline.peak):5}  {form.peak:6}")
    assert (timeline.bubble, max(timeline.peak)) == (form.bubble, form.peak)

# %% [markdown]
# The last three columns of that table are not comparable as they stand, since interleaved, ZBV and DualPipeV
# have stages half as long. For one and the same model, with the work per rank held equal, this is what the
# bubble costs:

# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
counts = [8, 12, 16, 24, 32, 48, 64]
for kind in KINDS:
    half = 0.5 if kind in ("interleaved", "zbv", "dualpipev") else 1.0
    costs = Costs(half, half, half, hidden=0.0)
    shares = [simulate(generate(kind, 4, m), costs) for m in counts]
    ax.plot(counts, [100 * t.bubble / t.time for t in shares], marker="o", ms=3, label=kind)
ax.set(title="Bubble on 4 ranks, F = I = W", xlabel="microbatches", ylabel="idle time, % of the step")
ax.set_ylim(bottom=0)
ax.legend(ncols=2)
fig

# %% [markdown]
# GPipe hides behind 1F1B: their bubbles are equal, only their memory differs. Without any overlap to gain,
# DualPipeV is level with ZB-H1 here, and ZBV wins. What overlap does is seen in [56](56_describe.py), where expert
# communication is counted.
#
# **Next:** where the sends and receives go, in [53_lower](53_lower.py).
