# %% [markdown]
# # Six schedules
#
# > GPipe, 1F1B, interleaved 1F1B, ZB-H1, ZBV and DualPipeV: each a short function of ranks and microbatches.

# %%
#| default_exp parallel.pipeline.generate

# %% [markdown]
# ## The idea
#
# A generator decides order and nothing else: for each rank, which forward and backward passes follow which.
# It knows neither how long they take nor what has to be sent; those are worked out from the order. That is
# what keeps each of these functions short enough to be read beside a picture of its result.
#
# Throughout, $p$ is the number of ranks, $m$ of microbatches, $v$ of stages per rank (*chunks*), and rank $r$
# counts from 0.

# %%
#| export
from itertools import pairwise
from typing import Literal, get_args

from pithtrain.parallel.pipeline.schedule import Action, Op, Schedule, ScheduleError, round_placement, v_placement

# %% [markdown]
# A helper: one pass of every microbatch.


# %%
#| export
def _each(op: Op, stage: int, microbatches: int) -> list[Action]:
    return [Action(op, stage, m) for m in range(microbatches)]


# %% [markdown]
# ## GPipe
#
# All forwards, then all backwards (Huang et al., arXiv 1811.06965). Every rank holds $m$ activations at once:
# the reason that everything after it exists.


# %%
#| export
def gpipe(pp: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards; one stage per rank."""
    ranks = tuple(tuple(_each(Op.FORWARD, r, microbatches) + _each(Op.BACKWARD, r, microbatches)) for r in range(pp))
    return Schedule("gpipe", round_placement(pp), microbatches, ranks)


# %%
print(gpipe(2, 3))

# %% [markdown]
# ## 1F1B
#
# Start a backward as soon as there is one to start (the PipeDream-Flush order of arXiv 2104.04473). Rank $r$
# is $p-1-r$ hops from the loss, so after $p-1-r$ forwards it can alternate one forward with one backward.
# It never holds more than $p-r$ activations, however many microbatches there are. The bubble is GPipe's.


# %%
#| export
def one_f_one_b(pp: int, microbatches: int) -> Schedule:
    """One forward, one backward, after a warm-up of pp - 1 - r forwards; one stage per rank."""
    ranks = tuple(
        _alternate(_each(Op.FORWARD, r, microbatches), _each(Op.BACKWARD, r, microbatches), pp - 1 - r)
        for r in range(pp)
    )
    return Schedule("1f1b", round_placement(pp), microbatches, ranks)


# %%
#| export
def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> tuple[Action, ...]:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    pairs = zip(forwards[warmup:], backwards, strict=False)
    steady = [action for pair in pairs for action in pair]
    return tuple(forwards[:warmup] + steady + backwards[len(backwards) - warmup :])


# %%
print(one_f_one_b(3, 5))

# %% [markdown]
# ## Interleaved 1F1B
#
# Give each rank $v$ short stages instead of one long one, going round the ranks $v$ times (Narayanan et al.,
# arXiv 2104.04473). A rank then starts after waiting for stages $1/v$ as long, so the bubble shrinks by $v$,
# for $v$ times the communication. Microbatches pass in groups: a group goes through chunk 0, then the same
# group through chunk 1, and so on; backwards in the reverse order of chunks.
#
# A group of at least $p$ keeps every rank busy until the group's first microbatch comes round again. Megatron
# asks that $p$ divide $m$; cutting $m$ into $\lfloor m/p \rfloor$ groups of nearly equal size needs no such
# rule. Before its first backward, a rank runs all chunks but the last of the largest group, and two more for
# each rank after it: one for the way down, one for the way back. (With one chunk the second is pointless, and
# this is 1F1B.)


# %%
#| export
def interleaved(pp: int, microbatches: int, chunks: int = 2) -> Schedule:
    """1F1B over `chunks` stages per rank, placed round the ranks."""
    if chunks < 1:
        raise ScheduleError(f"interleaved needs chunks >= 1, not {chunks}: each rank holds at least one stage")
    rounds = max(1, microbatches // pp)
    cuts = [microbatches * i // rounds for i in range(rounds + 1)]
    groups = [range(a, b) for a, b in pairwise(cuts)]

    def rank(r: int) -> tuple[Action, ...]:
        down = [c * pp + r for c in range(chunks)]
        forwards = [Action(Op.FORWARD, s, m) for group in groups for s in down for m in group]
        backwards = [Action(Op.BACKWARD, s, m) for group in groups for s in reversed(down) for m in group]
        hops = (pp - 1 - r) * min(2, chunks)
        return _alternate(forwards, backwards, (chunks - 1) * max(map(len, groups)) + hops)

    ranks = tuple(map(rank, range(pp)))
    return Schedule("interleaved", round_placement(pp, chunks), microbatches, ranks)


# %%
print(interleaved(2, 5, chunks=2))
assert interleaved(3, 5, chunks=1).ranks == one_f_one_b(3, 5).ranks

# %% [markdown]
# ## ZB-H1
#
# Split the backward. Rank $r$ keeps its weight gradients $r$ microbatches behind (Qi et al., arXiv
# 2401.10241), for two reasons that fit together. Downstream ranks hold fewer activations in 1F1B, so rank
# $r$ can afford to keep $r$ of them a little longer; and they are idle longest at the end, when the last
# backwards travel up, which is just when there are $r$ weight gradients to fill the gap.


# %%
#| export
def zb_h1(pp: int, microbatches: int) -> Schedule:
    """1F1B with weight gradients kept r microbatches behind on rank r; one stage per rank."""

    def rank(r: int) -> tuple[Action, ...]:
        forwards = _each(Op.FORWARD, r, microbatches)
        weights = _each(Op.BACKWARD_WEIGHT, r, microbatches)
        ahead = min(pp - r, microbatches)
        actions = forwards[:ahead]
        for m in range(microbatches):
            actions.append(Action(Op.BACKWARD_INPUT, r, m))
            actions += weights[m - r : m - r + 1] if m >= r else []
            actions += forwards[m + ahead : m + ahead + 1]
        return tuple(actions + weights[max(0, microbatches - r) :])

    return Schedule("zb_h1", round_placement(pp), microbatches, tuple(map(rank, range(pp))))


# %%
print(zb_h1(3, 5))

# %% [markdown]
# ## A rank of a V
#
# The last two schedules place stages in a V: rank $r$ holds stage $r$ on the way down (chunk 0) and stage
# $2p-1-r$ on the way up (chunk 1). Both are written as phases, "so many of these, then so many of those",
# and the next microbatch of each is always the one after the last. `_VRank` counts them. A pass that cannot
# be next (no microbatch left, or a backward whose forward has not run) is left out, which lets the same
# phases serve when microbatches are few.


# %%
#| export
class _VRank:
    """Collects the actions of one rank of a V; passes are named by op and chunk, as in "F0" or "B1"."""

    def __init__(self, rank: int, pp: int, microbatches: int):
        self.stage = {"0": rank, "1": 2 * pp - 1 - rank}
        self.microbatches = microbatches
        self.next = {op + chunk: 0 for op in "FIW" for chunk in "01"}
        self.actions: list[Action] = []

    def left(self, name: str) -> int:
        """How many microbatches this pass has still to run."""
        return self.microbatches - self.next[name]

    def take(self, name: str) -> Action | None:
        op, chunk = name
        halves = "IW" if op == "B" else op
        m = self.next[halves[0] + chunk]
        before = {"F": None, "I": "F", "W": "I"}[halves[0]]
        if m == self.microbatches or (before and m >= self.next[before + chunk]):
            return None
        for half in halves:
            self.next[half + chunk] += 1
        return Action(Op(op), self.stage[chunk], m)

    def run(self, names: str) -> None:
        """Append passes, in order: "F0 F1" one after the other, "F0&B1" overlapped."""
        for name in names.split():
            parts = [action for part in name.split("&") if (action := self.take(part))]
            self.actions += parts if len(parts) < 2 else [Action(Op.OVERLAP, parts=tuple(parts))]


# %%
rank = _VRank(rank=0, pp=2, microbatches=4)
rank.run("F0 F0 F1 F0&B1")
print(*rank.actions)

# %% [markdown]
# ## How both begin
#
# The first microbatch comes back to rank $r$ after it has gone down $p-1-r$ ranks and up as many. Until then
# rank $r$ has time for $2(p-1-r)$ forwards of chunk 0. Now both chunks have work, and they alternate: $r+1$
# pairs, after which the first gradient arrives, that of microbatch 0, from rank $r-1$ (on rank 0, from the
# loss itself). While the gradient goes on down to the turn and comes back up, rank $r$ fills $p-1-r$ rounds with what
# chunk 1 offers: a backward, its weight gradient, and a forward.


# %%
#| export
def _begin_v(rank: int, pp: int, microbatches: int) -> _VRank:
    v = _VRank(rank, pp, microbatches)
    v.run("F0 " * 2 * (pp - 1 - rank))
    v.run("F0 F1 " * (rank + 1))
    v.run("I1 W1 F1 " * (pp - 1 - rank))
    return v


# %%
for r in range(3):
    print(r, *_begin_v(r, 3, 8).actions)

# %% [markdown]
# ## ZBV
#
# From there, ZBV (Qi et al., arXiv 2405.15362, with the zero-bubble memory setting) repeats a period of six
# passes, one of each kind, until the forwards run out. What is left are the last backwards on their way down
# and up. Input gradients go first, since others wait for them; weight gradients fill every gap.


# %%
#| export
def zbv(pp: int, microbatches: int) -> Schedule:
    """Zero-bubble V: two stages per rank, every backward split."""

    def rank(r: int) -> tuple[Action, ...]:
        v = _begin_v(r, pp, microbatches)
        v.run("I1 W1 F0 I0 W0 F1 " * v.left("F1"))
        v.run("I1 W1")
        v.run("I0 I1 " * v.left("I1"))
        v.run("I0 W0 " * v.left("I0"))
        v.run("W1 " * v.left("W1"))
        v.run("W0 " * v.left("W0"))
        return tuple(v.actions)

    return Schedule("zbv", v_placement(pp), microbatches, tuple(map(rank, range(pp))))


# %%
print(zbv(2, 4))

# %% [markdown]
# ## DualPipeV
#
# DeepSeek-V3's DualPipe (arXiv 2412.19437) feeds microbatches from both ends of the pipeline, so that in the
# steady state every rank always has one forward and one backward to run together, and keeps two copies of
# the model to do it. The V-shaped form, which DeepSeek's DualPipe repository credits to Sea AI Lab as the
# "cut-in-half" schedule, folds the pipeline instead: the two directions are the two arms of the V, and one
# copy suffices.
#
# After the common beginning, each rank alternates two overlapped actions: chunk 0 forward with chunk 1
# backward, then chunk 1 forward with chunk 0 backward. When forwards of chunk 0 run out, backwards of chunk 1
# run alone between the others; when all forwards have run, $r+1$ pairs of backwards are left to go down the V
# and up again. From the middle of these on backwards are split: their input gradients hurry ahead, and the
# weight gradients fill the gaps of the last $p-1-r$ rounds.
#
# One exception: on the last rank the first pair of the steady state is not overlapped. That rank is the turn
# of the V, where the chunk 1 gradient is what everybody above waits for, so it should leave first.


# %%
#| export
def dualpipev(pp: int, microbatches: int) -> Schedule:
    """DualPipe folded into a V: two stages per rank, passes overlapped; m >= 2 pp, which `generate` checks."""

    def rank(r: int) -> tuple[Action, ...]:
        v = _begin_v(r, pp, microbatches)
        for i in range(microbatches - 2 * pp + r + 1):
            v.run("F0 B1" if i == 0 and r == pp - 1 else "F0&B1")
            v.run("F1&B0")
        v.run("B1 F1&B0 " * (pp - 1 - r))
        backwards = ["1", "0"] * (r + 1)
        for i, chunk in enumerate(backwards):
            v.run(("B" if i <= r else "I") + chunk)
        late = backwards[r + 1 :] + ["0"] * (pp - 1 - r)  # the chunks whose weight gradients are still to come
        for chunk in late[: pp - 1 - r]:
            v.run(f"W{chunk} I0")
        for chunk in late[pp - 1 - r :]:
            v.run("W" + chunk)
        return tuple(v.actions)

    return Schedule("dualpipev", v_placement(pp), microbatches, tuple(map(rank, range(pp))))


# %%
print(dualpipev(2, 6))

# %% [markdown]
# ## By name
#
# A configuration file names a schedule by its kind. A `match` is all it takes, and a new schedule does not
# need to be here: whatever returns a `Schedule` can be simulated, drawn and run.

# %%
#| export
Kind = Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zbv", "dualpipev"]
KINDS: tuple[Kind, ...] = get_args(Kind)


# %%
#| export
def generate(kind: Kind, pp: int, microbatches: int, chunks: int = 2) -> Schedule:
    """The schedule of a kind; `chunks` counts for "interleaved" alone. Raises ScheduleError."""
    fewest = 2 * pp if kind == "dualpipev" else 1
    if pp < 1 or microbatches < fewest:
        raise ScheduleError(f"{kind} on {pp} ranks needs pp >= 1 and microbatches >= {fewest}, not {microbatches}")
    match kind:
        case "gpipe":
            return gpipe(pp, microbatches)
        case "1f1b":
            return one_f_one_b(pp, microbatches)
        case "interleaved":
            return interleaved(pp, microbatches, chunks)
        case "zb_h1":
            return zb_h1(pp, microbatches)
        case "zbv":
            return zbv(pp, microbatches)
        case "dualpipev":
            return dualpipev(pp, microbatches)
    raise ScheduleError(f"no schedule is called {kind!r}: choose one of {', '.join(KINDS)}")


# %%
for kind in KINDS:
    schedule = generate(kind, pp=4, microbatches=8)
    passes = sum(len(a.computes) for a in schedule.ranks[0])
    print(f"{kind:12} {schedule.stages} stages, {passes} passes on rank 0")

# %%
try:
    generate("dualpipev", 4, 7)
except ScheduleError as error:
    print(error)

# %% [markdown]
# Yours to do: [a schedule of one's own](exercises/51_schedule.py).
#
# Lists of letters hide what they mean. How long each takes, and who waits for whom, comes next, in
# [52_simulate](52_simulate.py); pictures in [55_draw](55_draw.py).
