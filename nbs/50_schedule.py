# %% [markdown]
# # A schedule is data
#
# > The actions a pipeline is made of, and the schedule: for each rank, the list of actions it runs in order.

# %%
#| default_exp parallel.pipeline.schedule

# %% [markdown]
# ## The idea
#
# A model too deep for one device is cut into **stages**, runs of consecutive layers. A batch is cut into
# **microbatches**, which follow each other through the stages like cars through a factory. Which rank works
# on which microbatch of which stage, and when, is the *schedule*. It decides how long ranks wait for each
# other (the bubble) and how many activations they hold (the memory).
#
# Most systems write a schedule as a program that runs the model as it goes. Here it is a value: plain
# tuples, made by one function ([51](51_generate.py)), timed by another ([52](52_simulate.py)), completed
# with communication by a third ([53](53_lower.py)), proved free of deadlock by a fourth
# ([54](54_validate.py)) and drawn by a fifth ([55](55_draw.py)). Only then does an engine
# ([57](57_engine.py)) run it, literally. None of these but the last needs a tensor, so none imports torch.

# %% [markdown]
# ## The alphabet
#
# Let a stage be $y = f(x; w)$ and let $\mathcal{L}$ be the loss. Its work on one microbatch falls in three:
#
# $$ \mathsf{F}:\; y = f(x; w) \qquad
#    \mathsf{I}:\; \frac{\partial \mathcal{L}}{\partial x} =
#       \Big(\frac{\partial f}{\partial x}\Big)^{\!\top} \frac{\partial \mathcal{L}}{\partial y} \qquad
#    \mathsf{W}:\; \frac{\partial \mathcal{L}}{\partial w} \mathrel{+}=
#       \Big(\frac{\partial f}{\partial w}\Big)^{\!\top} \frac{\partial \mathcal{L}}{\partial y} $$
#
# The stage before is waiting for $\mathsf{I}$; nobody waits for $\mathsf{W}$. That is the whole idea of
# zero-bubble schedules (Qi et al., arXiv 2401.10241): do $\mathsf{I}$ at once, and keep $\mathsf{W}$ to fill
# the gaps. $\mathsf{B} = \mathsf{I} + \mathsf{W}$ is the ordinary backward pass in one piece, and an
# *overlapped* action runs an $\mathsf{F}$ and a $\mathsf{B}$ of two microbatches together, so that the
# expert communication of each hides under the compute of the other (DeepSeek-V3, arXiv 2412.19437).
#
# The other actions move data. A send or receive names the stage that *does* it: `0SEND_F3` and `1RECV_F3`
# are the two ends of one transfer. Several of them that are posted as one batch are an exchange.

# %%
#| export
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pithtrain.config import UserError


# %%
#| export
class Op(StrEnum):
    """What an action does. The values are what is printed."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    OVERLAP = "OVERLAP"  # parts: one forward and one backward, of two microbatches, run together
    EXCHANGE = "EXCHANGE"  # parts: sends and receives, posted as one batch
    SEND_FORWARD = "SEND_F"
    RECV_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECV_BACKWARD = "RECV_B"
    UNSHARD = "UNSHARD"  # gather a stage's parameters
    RESHARD = "RESHARD"  # drop what was gathered
    REDUCE = "REDUCE"  # sum a stage's gradients over the data-parallel ranks


# %% [markdown]
# An action is a named tuple, so it compares, sorts and hashes by value: two lists of actions are equal when
# they say the same.


# %%
#| export
class Action(NamedTuple):
    """One step of a rank: `op` on `stage` for `microbatch`, or several `parts` taken together.

    UNSHARD, RESHARD and REDUCE have a stage and no microbatch; OVERLAP and EXCHANGE have parts alone."""

    op: Op
    stage: int = -1
    microbatch: int = -1
    parts: tuple["Action", ...] = ()

    def __str__(self) -> str:
        match self.op:
            case Op.OVERLAP:
                return f"({';'.join(map(str, self.parts))})"
            case Op.EXCHANGE:
                return f"[{' '.join(map(str, self.parts))}]"
            case Op.UNSHARD | Op.RESHARD | Op.REDUCE:
                return f"{self.stage}{self.op}"
        return f"{self.stage}{self.op}{self.microbatch}"

    @property
    def computes(self) -> tuple["Action", ...]:
        """The forward and backward passes in this action: itself, its two parts, or none."""
        if self.op is Op.OVERLAP:
            return self.parts
        return (self,) if self.op in COMPUTE else ()


COMPUTE = frozenset({Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT})

# %%
forward, backward = Action(Op.FORWARD, 0, 3), Action(Op.BACKWARD, 7, 1)
overlapped = Action(Op.OVERLAP, parts=(forward, backward))
print(forward, backward, overlapped, Action(Op.UNSHARD, 2))
assert overlapped.computes == (forward, backward) and forward.computes == (forward,)

# %% [markdown]
# ## The schedule
#
# A schedule says which rank holds each stage (its *placement*) and what each rank does. Nothing in it is
# hidden: `kind` is a caption for tables and pictures, and no code decides by it.


# %%
#| export
class ScheduleError(UserError):
    """A schedule that cannot be made, or cannot run; the message is one line."""


# %%
#| export
@dataclass(frozen=True)
class Schedule:
    """`placement[s]` is the rank that holds stage s; `ranks[r]` is what rank r runs, first to last."""

    kind: str
    placement: tuple[int, ...]
    microbatches: int
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.placement)

    def held_by(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, in model order."""
        return tuple(s for s, holder in enumerate(self.placement) if holder == rank)

    def __str__(self) -> str:
        return "\n".join(f"rank {r}: {' '.join(map(str, acts))}" for r, acts in enumerate(self.ranks))


# %% [markdown]
# Two ranks, one stage each, one microbatch: the shortest schedule that needs communication.

# %%
relay = Schedule(
    kind="relay",
    placement=(0, 1),
    microbatches=1,
    ranks=(
        (Action(Op.FORWARD, 0, 0), Action(Op.BACKWARD, 0, 0)),
        (Action(Op.FORWARD, 1, 0), Action(Op.BACKWARD, 1, 0)),
    ),
)
print(relay)
assert relay.held_by(1) == (1,)

# %% [markdown]
# ## What waits for what
#
# Every tool below, and the engine, share one statement of what an action needs. With stage $s$ and
# microbatch $m$,
#
# - $\mathsf{F}_{s,m}$ needs $\mathsf{F}_{s-1,m}$ (its input),
# - $\mathsf{I}_{s,m}$ needs $\mathsf{F}_{s,m}$ (its activations) and $\mathsf{I}_{s+1,m}$ (its gradient),
# - $\mathsf{W}_{s,m}$ needs $\mathsf{I}_{s,m}$,
#
# where $\mathsf{B}$ counts as both $\mathsf{I}$ and $\mathsf{W}$. If the neighbour lives on another rank and
# the schedule spells out its communication, then what is needed is the receive.


# %%
#| export
def needs(action: Action, schedule: Schedule, explicit: bool) -> tuple[Action, ...]:
    """What must be complete before `action` starts; a full backward is looked up as its input half.

    With `explicit`, data from another rank is needed as its RECV; else as the action that makes it. A
    RECV itself waits for its partner alone, which is a matter of both ranks: see `partner`."""
    op, stage, m, parts = action
    place = schedule.placement

    def data(source: int, made_by: Op, received_by: Op) -> Action:
        remote = explicit and place[source] != place[stage]
        return Action(received_by, stage, m) if remote else Action(made_by, source, m)

    match op:
        case Op.FORWARD:
            return (data(stage - 1, Op.FORWARD, Op.RECV_FORWARD),) if stage else ()
        case Op.BACKWARD | Op.BACKWARD_INPUT:
            own = Action(Op.FORWARD, stage, m)
            last = stage == schedule.stages - 1
            return (own,) if last else (own, data(stage + 1, Op.BACKWARD_INPUT, Op.RECV_BACKWARD))
        case Op.BACKWARD_WEIGHT | Op.SEND_BACKWARD:
            return (Action(Op.BACKWARD_INPUT, stage, m),)
        case Op.SEND_FORWARD:
            return (Action(Op.FORWARD, stage, m),)
        case Op.REDUCE:
            return tuple(Action(Op.BACKWARD_WEIGHT, stage, k) for k in range(schedule.microbatches))
        case Op.OVERLAP | Op.EXCHANGE:
            return tuple(n for part in parts for n in needs(part, schedule, explicit))
    return ()


# %%
for action in relay.ranks[1]:
    for explicit in (False, True):
        wanted = [str(n) for n in needs(action, relay, explicit)]
        print(f"{action} needs {wanted}" + " (communication spelled out)" * explicit)


# %%
#| export
PARTNER = {  # the op at the other end of a transfer, and how many stages on it is
    Op.SEND_FORWARD: (Op.RECV_FORWARD, 1),
    Op.RECV_FORWARD: (Op.SEND_FORWARD, -1),
    Op.SEND_BACKWARD: (Op.RECV_BACKWARD, -1),
    Op.RECV_BACKWARD: (Op.SEND_BACKWARD, 1),
}


def partner(action: Action) -> Action:
    """The other end of a send or receive."""
    op, away = PARTNER[action.op]
    return Action(op, action.stage + away, action.microbatch)


# %%
send = Action(Op.SEND_FORWARD, 0, 3)
print(send, "meets", partner(send))
assert partner(partner(send)) == send

# %% [markdown]
# ## Where stages live
#
# With one stage per rank there is no choice. With more, the stages either go round the ranks again
# (interleaving, Narayanan et al., arXiv 2104.04473), or turn back at the last rank, in a V (Qi et al., arXiv
# 2405.15362): rank $r$ of $p$ holds stages $r$ and $2p-1-r$. In a V the first rank holds both ends of the
# model, so the loss and its first gradient are where the batch started, and the turn at the bottom needs no
# communication. It also evens out memory: the rank whose first stage waits longest for its backward has the
# last stage, which waits least.


# %%
#| export
def round_placement(pp: int, chunks: int = 1) -> tuple[int, ...]:
    """Stage s on rank s mod pp, with `chunks` stages per rank."""
    return tuple(range(pp)) * chunks


# %%
#| export
def v_placement(pp: int) -> tuple[int, ...]:
    """Two stages per rank: r and 2 pp - 1 - r."""
    return tuple(range(pp)) + tuple(reversed(range(pp)))


# %%
print("round:", round_placement(4, 2), " V:", v_placement(4))

# %% [markdown]
# ## Which layers a stage holds
#
# A pipeline runs at the speed of its slowest stage. The first stage also looks up embeddings, and the last
# computes the head and the loss, which for a large vocabulary costs as much as a few layers ([71](71_step.py) works
# out how many from the config). So count both in units of one layer, start with them, and give layers one at a time
# to whichever stage is lightest. For equal layers this greedy choice makes the heaviest stage as light as it can be.


# %%
#| export
def split_layers(layers: int, stages: int, embedding: float = 1.0, head: float = 1.0) -> list[range]:
    """The layers of each stage, as ranges; edge stages carry less by `embedding` and `head` layers' cost.

    An edge stage may end up with no layer of its own. Raises ScheduleError when a stage would have no work."""
    loads = [0.0] * stages
    loads[0] += embedding
    loads[-1] += head
    counts = [0] * stages
    for _ in range(layers):
        # Of equally light stages take the one nearest the middle: leftovers go where no edge work is.
        lightest = min(range(stages), key=lambda s: (loads[s], abs(2 * s - stages + 1)))
        counts[lightest] += 1
        loads[lightest] += 1
    if min(loads) == 0:
        raise ScheduleError(f"{layers} layers cannot give {stages} stages work")
    starts = [sum(counts[:s]) for s in range(stages)]
    return [range(start, start + n) for start, n in zip(starts, counts, strict=True)]


# %% [markdown]
# Eight stages for 27 layers, with a head that costs two and a half layers:

# %%
import matplotlib.pyplot as plt

split = split_layers(27, 8, embedding=0.5, head=2.5)
fig, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
ax.bar(range(8), [len(r) for r in split], color="#4878b0", label="layers")
ax.bar(0, 0.5, bottom=len(split[0]), color="#b8b8b8", label="embedding, head")
ax.bar(7, 2.5, bottom=len(split[7]), color="#b8b8b8")
ax.set(title="27 layers over 8 stages", xlabel="stage", ylabel="cost, in layers")
ax.set_ylim(0, 5.2)
ax.legend(loc="upper center", ncols=2, frameon=False)
assert [i for r in split for i in r] == list(range(27))
fig
# %% [markdown]
# No bar stands more than one layer above another, and the last stage holds fewer layers than the rest.
#
# Asking for the impossible is one line:

# %%
try:
    split_layers(3, 8)
except ScheduleError as error:
    print(error)

# %% [markdown]
# **Next:** the six schedules worth knowing, each a short function, in [51_generate](51_generate.py).
