# %% [markdown]
# # Lowering a schedule
#
# > Adds what it takes to run an order of passes: exchanges that cannot deadlock, parameter gathers, reductions.

# %%
#| default_exp parallel.pipeline.lower

# %% [markdown]
# ## The idea
#
# A generator says which passes follow which. From that, one can work out everything else that a rank has to
# do, and write it down as more actions of the same list, so that the engine has nothing left to decide.
#
# **Transfers** are the delicate part. With NCCL, a rank's exchanges run in the order in which they were
# posted, and a send stays until its receive is posted too. Two ranks that send to each other first and
# receive second wait forever. The cure is a *global order*: if every transfer has its place in one order $t_1
# < t_2 < \dots$ that all ranks follow, then the earliest transfer that is not yet done has nothing before it
# on either of its ranks, and can go.
#
# Time itself is such an order. Simulate the passes alone; let $t$ be the time at which the data of a transfer
# was made. Both ranks post the transfer between the same two passes of theirs:
#
# - the sender right after the pass that made the data;
# - the receiver in front of its first pass that ends after $t$, so that the data travels while that pass runs.
#
# Every pass that a rank runs before it posts a transfer has ended by $t$, so it needed data made before $t$
# only. By induction over $t$ every transfer gets done, *whatever the passes really cost*: the simulated times
# fix an order, and the order is all that is used.
#
# Transfers of the same $t$ that a rank posts between the same two passes become one exchange: batched sends and
# receives. Those of different times stay apart, although they could be posted together: a rank may make what it sends
# at the later time from what it receives at the earlier one, and a batch may wait for its last part before its first is
# through. (An overlapped pair of passes sends two tensors at once, in a V often to the same rank. Lists that batched
# them with what comes back for them hung on two GPUs; gloo, which buffers, had run the same lists for long.)

# %%
#| export
from bisect import bisect_right
from dataclasses import replace

from pithtrain.parallel.pipeline.schedule import Action, Op, Schedule, ScheduleError, partner
from pithtrain.parallel.pipeline.simulate import UNIT, Costs, simulate


# %%
#| export
def add_exchanges(schedule: Schedule, costs: Costs = UNIT) -> Schedule:
    """The same passes with their sends and receives between them, in the order of a simulation by `costs`.

    Neighbouring stages on one rank hand over without a transfer. The result is free of deadlock for any
    costs. Raises ScheduleError where a pass would take no time, since then times are no order."""
    ends = [[span.end for span in spans] for spans in simulate(schedule, replace(costs, send=0.0)).compute]
    if any(a >= b for times in ends for a, b in zip([0.0, *times], times, strict=False)):
        raise ScheduleError("a pass takes no time: give forward and backward costs above 0 to order transfers")
    gaps: list[list[dict[float, list[Action]]]] = [[{} for _ in range(len(times) + 1)] for times in ends]
    for time, send in sorted(_sends(schedule, ends)):
        for end in (send, partner(send)):
            rank = schedule.placement[end.stage]
            gaps[rank][bisect_right(ends[rank], time)].setdefault(time, []).append(end)

    def rank(r: int) -> tuple[Action, ...]:
        actions = []
        for before, action in zip(gaps[r], (*schedule.ranks[r], None), strict=True):
            actions += [Action(Op.EXCHANGE, parts=tuple(parts)) for parts in before.values()]
            actions += [action] if action else []
        return tuple(actions)

    return replace(schedule, ranks=tuple(map(rank, range(len(schedule.ranks)))))


# %%
#| export
def _sends(schedule: Schedule, ends: list[list[float]]) -> list[tuple[float, Action]]:
    """Every send between two ranks, with the time at which its data is made."""
    place, sends = schedule.placement, []
    for actions, times in zip(schedule.ranks, ends, strict=True):
        for action, time in zip(actions, times, strict=True):
            for part in action.computes:
                to = part.stage + 1 if part.op is Op.FORWARD else part.stage - 1
                stays = not 0 <= to < schedule.stages or place[to] == place[part.stage]
                if stays or part.op is Op.BACKWARD_WEIGHT:
                    continue
                op = Op.SEND_FORWARD if part.op is Op.FORWARD else Op.SEND_BACKWARD
                sends.append((time, Action(op, part.stage, part.microbatch)))
    return sends


# %%
from pithtrain.parallel.pipeline.generate import KINDS, generate

lowered = add_exchanges(generate("1f1b", pp=2, microbatches=3))
print(lowered)

# %% [markdown]
# In the steady state each rank sends and receives in one exchange. Nothing was lost by spelling it out: with
# transfers that take no time, the step takes exactly what the passes alone take.

# %%
for kind in KINDS:
    passes = generate(kind, 4, 8)
    costs = Costs(forward=1.0, backward_input=1.3, backward_weight=0.9, hidden=0.4)
    assert simulate(add_exchanges(passes, costs), costs).time == simulate(passes, costs).time

# %% [markdown]
# How much does the strict reading of exchanges (one stream per rank, in order) cost when transfers do take
# time, beside a network of unlimited capacity and the same delay?

# %%
print("one transfer takes 0.1 of a forward; 4 ranks, 16 microbatches")
for kind in KINDS:
    costs = Costs(send=0.1)
    free, strict = generate(kind, 4, 16), add_exchanges(generate(kind, 4, 16))
    print(f"{kind:12} delay only {simulate(free, costs).time:6.1f}   in order {simulate(strict, costs).time:6.1f}")

# %% [markdown]
# ## Parameters that come and go
#
# With fully sharded parameters, a stage's parameters are gathered before it runs (`UNSHARD`), dropped when
# they are not needed for a while (`RESHARD`), and its gradients are summed over the data-parallel ranks once,
# after its last backward (`REDUCE`). A rank that holds several stages chooses between memory and traffic: keep
# all gathered for the whole step, or only the `resident` stages that it will use next. Looking ahead in the
# list, the next distinct stages are gathered early, so that gathers run under compute.


# %%
#| export
def add_sharding(schedule: Schedule, resident: int | None = None) -> Schedule:
    """Adds gathers and reductions, with at most `resident` stages of a rank gathered at once (None: all).

    Raises ScheduleError if an overlapped action needs more stages at once than may be resident."""
    return replace(schedule, ranks=tuple(_shard_rank(actions, resident) for actions in schedule.ranks))


# %%
#| export
def _shard_rank(actions: tuple[Action, ...], resident: int | None) -> tuple[Action, ...]:
    orders: list[tuple[int, ...]] = []  # at each action, the stages still to be used, soonest first
    order: tuple[int, ...] = ()
    for action in reversed(actions):
        used = tuple(part.stage for part in action.computes)
        order = used + tuple(stage for stage in order if stage not in used)
        orders.append(order)
    result: list[Action] = []
    gathered: tuple[int, ...] = ()
    for action, ahead in zip((*actions, None), (*reversed(orders), ()), strict=True):
        if action is None or action.computes:
            keep = ahead[:resident]
            if action and not {part.stage for part in action.computes} <= set(keep):
                raise ScheduleError(f"{action} needs two stages gathered: raise resident from {resident} to 2")
            for stage in gathered:
                result += [] if stage in ahead else [Action(Op.REDUCE, stage)]
                result += [] if stage in keep else [Action(Op.RESHARD, stage)]
            result += [Action(Op.UNSHARD, stage) for stage in keep if stage not in gathered]
            gathered = keep
        result += [action] if action else []
    return tuple(result)


# %%
passes = generate("interleaved", pp=2, microbatches=2, chunks=3)
print("all resident: ", *add_sharding(passes).ranks[0])
print("two resident: ", *add_sharding(passes, resident=2).ranks[0])

# %% [markdown]
# Gathers of the first list are all posted at the start; those of the second come one stage ahead of use.
#
# ## Both


# %%
#| export
def lower(schedule: Schedule, costs: Costs = UNIT, resident: int | None = None) -> Schedule:
    """A schedule that can be run: its passes with exchanges, gathers and reductions between them."""
    return add_sharding(add_exchanges(schedule, costs), resident)


# %%
for r, actions in enumerate(lower(generate("dualpipev", pp=2, microbatches=4)).ranks):
    print(f"rank {r}")
    print(*(f"    {action}" for action in actions[:14]), "    ...", sep="\n")

# %% [markdown]
# On rank 1, the turn of the V, nothing is sent between stages 1 and 2: both live there.
#
# **Next:** a check that a list can be trusted, whoever wrote it, in [54_validate](54_validate.py).
