# %% [markdown]
# # Validating a schedule
#
# > Proves that a schedule can run; if not, names the action, its rank and what it waits for.

# %%
#| default_exp parallel.pipeline.validate

# %% [markdown]
# ## The idea
#
# A wrong schedule seldom crashes. It hangs, on many machines at once, or it trains on gradients that miss a
# microbatch. Since a schedule is data, it can be checked in full before anything runs, in milliseconds, on
# one CPU. Three kinds of mistakes are possible:
#
# 1. **Something is missing, double or misplaced.** Each microbatch must pass each stage forward once and
#    backward once (in one piece, or as both halves), on the rank that holds the stage. Each transfer between
#    ranks must have both its ends, and transfers between the same two ranks must be posted in the same order
#    at both. Parameters must be gathered when they are used, and each stage's gradients reduced once, when
#    they are complete.
# 2. **Order within a rank.** A backward before its forward, a send before its data.
# 3. **Order across ranks.** Each list is sensible by itself, and together they wait in a circle.
#
# The first are counted. The others, all of them, are what the simulator of [52](52_simulate.py) finds when it
# gets stuck; and as its notebook argues, one run decides for every possible cost.

# %%
#| export
from collections import Counter, defaultdict

from pithtrain.parallel.pipeline.schedule import PARTNER, Action, Op, Schedule, ScheduleError, partner
from pithtrain.parallel.pipeline.simulate import simulate


# %%
#| export
def validate(schedule: Schedule) -> None:
    """Raises ScheduleError, in one line, unless the schedule is complete, consistent and free of deadlock.

    A schedule of passes alone is checked as such; one with exchanges or gathers must have all of them."""
    if set(schedule.placement) != set(range(len(schedule.ranks))):
        raise ScheduleError(
            f"placement {schedule.placement} does not use ranks 0 to {len(schedule.ranks) - 1}: give each a stage"
        )
    for r, actions in enumerate(schedule.ranks):
        for action in actions:
            for part in action.parts or (action,):
                _check_place(schedule, r, action, part)
    _check_passes(schedule)
    _check_transfers(schedule)
    for r, actions in enumerate(schedule.ranks):
        _check_sharding(schedule, r, actions)
    simulate(schedule)


# %% [markdown]
# Every atomic action names a stage that its rank holds, and a microbatch that exists. Composite actions hold
# what they should.


# %%
#| export
def _check_place(schedule: Schedule, rank: int, action: Action, part: Action) -> None:
    if not 0 <= part.stage < schedule.stages or schedule.placement[part.stage] != rank:
        raise ScheduleError(f"rank {rank} runs {part}, but it holds stages {schedule.held_by(rank)}")
    per_stage = part.op in (Op.UNSHARD, Op.RESHARD, Op.REDUCE)
    if not per_stage and not 0 <= part.microbatch < schedule.microbatches:
        raise ScheduleError(f"rank {rank} runs {part}, but there are {schedule.microbatches} microbatches")
    ops = [p.op for p in action.parts]
    if action.op is Op.OVERLAP and ops != [Op.FORWARD, Op.BACKWARD]:
        raise ScheduleError(f"rank {rank} overlaps {action}: give one forward, then one backward, whole")
    if action.op is Op.EXCHANGE and not set(ops) <= PARTNER.keys():
        raise ScheduleError(f"rank {rank} exchanges {action}: give sends and receives alone")
    if action.op in PARTNER:
        raise ScheduleError(f"rank {rank} runs {action} by itself: put it in an exchange")


# %% [markdown]
# Every microbatch passes every stage exactly once each way:


# %%
#| export
def _check_passes(schedule: Schedule) -> None:
    count = Counter(part for actions in schedule.ranks for action in actions for part in action.computes)
    for stage, rank in enumerate(schedule.placement):
        for m in range(schedule.microbatches):
            f, b, i, w = (count[Action(op, stage, m)] for op in "FBIW")
            if f != 1:
                raise ScheduleError(f"rank {rank} runs {stage}F{m} {f} times: each forward runs once")
            if (b, i, w) not in ((1, 0, 0), (0, 1, 1)):
                raise ScheduleError(
                    f"rank {rank} runs {stage}B{m} {b} times, {stage}I{m} {i} and {stage}W{m} {w}:"
                    " each backward runs once, whole or as both halves"
                )


# %% [markdown]
# Every transfer that is needed has both ends, once, and each pair of ranks posts its transfers in one order:


# %%
#| export
def _check_transfers(schedule: Schedule) -> None:
    place = schedule.placement
    exchanges = (action for actions in schedule.ranks for action in actions if action.op is Op.EXCHANGE)
    count = Counter(part for exchange in exchanges for part in exchange.parts)
    between: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for part in count:  # in the order of posting
        other = partner(part)
        if not 0 <= other.stage < schedule.stages:
            raise ScheduleError(f"rank {place[part.stage]} posts {part}, but there is no stage {other.stage}")
        if place[other.stage] == place[part.stage]:
            raise ScheduleError(f"rank {place[part.stage]} posts {part} to itself: hand it over without one")
        if count[part] != 1 or count[other] != 1:
            raise ScheduleError(
                f"rank {place[part.stage]} posts {part} {count[part]} times, and rank {place[other.stage]}"
                f" its partner {other} {count[other]} times: each transfer has one of both"
            )
        between[place[part.stage], place[other.stage]].append(part)
    for (a, b), ours in between.items():
        for mine, yours in zip(ours, between[b, a], strict=True):
            if mine != partner(yours):
                raise ScheduleError(f"rank {a} posts {mine} where rank {b} posts {yours}: use one order at both")


# %% [markdown]
# The parameters of a stage are there when it runs, and its gradients are reduced when they are complete. A
# schedule without any of these actions is one whose parameters stay put.


# %%
#| export
def _check_sharding(schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> None:
    if not any(action.op in (Op.UNSHARD, Op.RESHARD, Op.REDUCE) for action in actions):
        return
    gathered, reduced = set(), set()
    for action in actions:
        stage = action.stage
        for part in action.computes:
            if part.stage not in gathered:
                raise ScheduleError(f"rank {rank} runs {part} without parameters: put {part.stage}UNSHARD before")
            if part.stage in reduced and part.op is not Op.FORWARD:
                raise ScheduleError(f"rank {rank} runs {part} after {part.stage}REDUCE: its gradient is left out")
        match action.op:
            case Op.UNSHARD if stage in gathered:
                raise ScheduleError(f"rank {rank} repeats {action}: its parameters are there already")
            case Op.UNSHARD:
                gathered.add(stage)
            case Op.RESHARD if stage not in gathered:
                raise ScheduleError(f"rank {rank} runs {action} without {stage}UNSHARD before")
            case Op.RESHARD:
                gathered.remove(stage)
            case Op.REDUCE if stage in reduced:
                raise ScheduleError(f"rank {rank} repeats {action}: gradients are reduced once")
            case Op.REDUCE:
                reduced.add(stage)
    if gathered or reduced != set(schedule.held_by(rank)):
        raise ScheduleError(
            f"rank {rank} ends with stages {sorted(gathered)} gathered and {sorted(reduced)} reduced:"
            " reshard all and reduce each"
        )


# %% [markdown]
# ## Everything that is made here is valid

# %%
from pithtrain.parallel.pipeline.generate import KINDS, generate
from pithtrain.parallel.pipeline.lower import lower

for kind in KINDS:
    for pp, microbatches in ((1, 2), (2, 4), (3, 7), (4, 9)):
        validate(lower(generate(kind, pp, microbatches)))
print("valid:", ", ".join(KINDS))

# %% [markdown]
# ## Mistakes, and what is said of them
#
# Take a good schedule and break it in the ways that hand-written ones break.

# %%
from dataclasses import replace

good = lower(generate("1f1b", pp=2, microbatches=2))


def edit(rank, change):
    """The good schedule with one rank's list changed."""
    lists = [list(actions) for actions in good.ranks]
    change(lists[rank])
    return replace(good, ranks=tuple(map(tuple, lists)))


def drop(name):
    return lambda actions: actions.pop(list(map(str, actions)).index(name))


def swap(*names):
    def change(actions):
        i, j = (list(map(str, actions)).index(name) for name in names)
        actions[i], actions[j] = actions[j], actions[i]

    return change


print(*good.ranks[0])
print(*good.ranks[1], "\n")
mistakes = {
    "a pass left out": edit(0, drop("0F1")),
    "a receive left out": edit(1, drop("[1RECV_F0]")),
    "parameters gathered late": edit(0, swap("0UNSHARD", "0F0")),
    "backward before its gradient": edit(0, swap("[0RECV_B0]", "0B0")),
    "reduced too early": edit(0, swap("0B1", "0REDUCE")),
}
for name, broken in mistakes.items():
    try:
        validate(broken)
        print(f"{name}: not noticed")
        raise AssertionError(name)
    except ScheduleError as error:
        print(f"{name}:\n    {error}")

# %% [markdown]
# And one that no single rank can see: in every exchange both ranks send before they receive, politely, one
# thing at a time. With buffered sends it would work; over NCCL it hangs.


# %%
def sends_first(actions):
    for action in actions:
        if action.op is Op.EXCHANGE:
            parts = sorted(action.parts, key=lambda part: part.op.startswith("RECV"))
            yield from (Action(Op.EXCHANGE, parts=(part,)) for part in parts)
        else:
            yield action


good = lower(generate("1f1b", pp=2, microbatches=3))
polite = replace(good, ranks=tuple(tuple(sends_first(actions)) for actions in good.ranks))
try:
    validate(polite)
    raise AssertionError("not noticed")
except ScheduleError as error:
    print(error)

# %% [markdown]
# One exchange that holds both, as `lower` makes it, is free of this.
#
# **Next:** pictures, in [55_draw](55_draw.py).
