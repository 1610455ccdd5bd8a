# %% [markdown]
# # Simulated and recorded
#
# > Fits the simulator's costs to passes recorded in a real step, and puts both timelines on one axis.

# %%
#| default_exp parallel.pipeline.fit

# %% [markdown]
# ## The idea
#
# A simulation is worth as much as its costs. The engine can record when each pass ran; average those times by
# stage and by kind of pass, and the simulator has costs from life. If it then predicts the time of the whole
# step, its picture can be trusted: where it shows a gap, there is one, and a schedule that it likes better
# will be better.
#
# What a transfer takes is read from the gaps between passes. When a rank waited for data, its pass began some
# time after the pass that made the data had ended on the other rank; the median of these lags is the cost of a
# transfer. (All ranks of one machine read the same clock. On several machines clocks must be aligned first.)

# %%
#| export
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

from pithtrain.parallel.pipeline.schedule import Action, Op, Schedule, needs
from pithtrain.parallel.pipeline.simulate import Costs, Span, Timeline, simulate


# %%
#| export
def fit_costs(schedule: Schedule, recorded: Sequence[Sequence[Span]]) -> Costs:
    """Costs per stage, in seconds, from the spans that `Engine.step` recorded on each rank.

    What the engine does between passes is in: the mean gap in front of those that need no transfer. A stage
    with whole backwards only has each counted half as I and half as W; one with halves only, or with wholes in pairs
    alone, has the wholes that the other stages' suggest."""
    made: dict[Action, float] = {}
    for span in (span for spans in recorded for span in spans):
        for part in span.action.computes:
            made[part._replace(op=Op.BACKWARD_INPUT) if part.op is Op.BACKWARD else part] = span.end
    times: dict[tuple[Op, int], list[float]] = {}
    pairs: list[tuple[Action, float]] = []
    gaps: list[float] = []
    lags: list[float] = []
    for rank, spans in enumerate(recorded):
        free = spans[0].start
        for action, start, end in spans:
            remote = [n for n in needs(action, schedule, explicit=False) if schedule.placement[n.stage] != rank]
            ready = max((made[n] for n in remote), default=free)
            if ready > free:
                lags.append(max(0.0, start - ready))
            elif not remote:
                gaps.append(start - free)
            if action.op is Op.OVERLAP:
                pairs.append((action, end - start))
            else:
                times.setdefault((action.op, action.stage), []).append(end - start)
            free = end
    between = fmean(gaps) if gaps else 0.0
    means = {key: fmean(values) + between for key, values in times.items()}
    stages = range(schedule.stages)
    wholes = {s: means[Op.BACKWARD, s] for s in stages if (Op.BACKWARD, s) in means}
    halves = [
        tuple(means.get((op, s), wholes.get(s, 0.0) / 2) for s in stages)
        for op in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
    ]
    both = [i + w for i, w in zip(*halves, strict=True)]
    share = sum(wholes.values()) / sum(both[s] for s in wholes) if wholes else 1.0
    costs = Costs(
        tuple(means[Op.FORWARD, s] for s in stages),
        *halves,
        send=median(lags) if lags else 0.0,
        backward=tuple(wholes.get(s, share * both[s]) for s in stages) if wholes else None,
    )
    if pairs:
        apart = [[costs.of(part) for part in action.parts] for action, _ in pairs]
        saved = sum(map(sum, apart)) - sum(taken + between for _, taken in pairs)
        costs = replace(costs, hidden=min(1.0, max(0.0, saved / sum(map(min, apart)))))
    return costs


# %%
#| export
def timeline_of(schedule: Schedule, recorded: Sequence[Sequence[Span]]) -> Timeline:
    """Recorded spans as a timeline that begins at 0, to be drawn beside a simulated one."""
    start = min(span.start for spans in recorded for span in spans)
    moved = tuple(
        tuple(Span(span.action, span.start - start, span.end - start) for span in spans) for spans in recorded
    )
    order = simulate(schedule)  # how many activations are live is a matter of order alone
    return replace(order, compute=moved, time=max(span.end for spans in moved for span in spans))


# %% [markdown]
# ## A real step
#
# Four processes over gloo, DualPipeV, eight stages of a real model, each process computing on one core of its own:
# `tools/pipeline_record.py` writes down when every pass of six steps began and ended. Two steps warm up; costs are
# fitted to the third, and each of the others is predicted from them.

# %%
import json
from pathlib import Path

import pithtrain
from pithtrain.parallel.pipeline.draw import draw_timelines
from pithtrain.parallel.pipeline.generate import generate
from pithtrain.parallel.pipeline.lower import lower

file = Path(pithtrain.__file__).parent.parent / "docs" / "benchmarks" / "pipeline-cpu.json"
result = json.loads(file.read_text())
sizes = result["schedule"]
schedule = lower(generate(sizes["kind"], sizes["pp"], sizes["microbatches"]))
passes = [[action for action in actions if action.computes] for actions in schedule.ranks]
steps = [
    [[Span(action, *time) for action, time in zip(*rank, strict=True)] for rank in zip(passes, step, strict=True)]
    for step in result["steps"]
]
fitted = fit_costs(schedule, steps[2])
predicted = simulate(schedule, fitted)
print(f"{result['device']}, torch {result['versions']['torch']}, {result['date']}")
print("forward, ms:", *(f"{1e3 * t:.1f}" for t in fitted.forward), f"  a transfer: {1e3 * fitted.send:.2f} ms")
for i, step in enumerate(steps[3:], 3):
    measured = timeline_of(schedule, step).time
    print(
        f"step {i}: measured {measured:.3f} s, predicted {predicted.time:.3f} s ({predicted.time / measured - 1:+.1%})"
    )
    assert abs(predicted.time / measured - 1) < 0.15

# %%
fig = draw_timelines([predicted, timeline_of(schedule, steps[3])], ["simulated", "recorded"])
fig

# %% [markdown]
# Both are of one run: above, what the costs of its third step predict; below, its fourth step. How far they drift
# apart, and what a forward and a backward take together, beside the same two alone:

# %%
recorded = timeline_of(schedule, steps[3]).compute
late = [[1e3 * (real.start - told.start) for real, told in zip(*rank, strict=True)]
        for rank in zip(recorded, predicted.compute, strict=True)]  # fmt: skip
halfway = [rank[: len(rank) // 2] for rank in late]
print(f"a pass begins up to {max(map(max, halfway)):.0f} ms late in the first half of a rank's list, "
      f"up to {max(map(max, late)):.0f} ms in all of it")  # fmt: skip
pairs = [span for rank in steps[2] for span in rank if span.action.op is Op.OVERLAP]
alone = sum(fitted.of(part) for span in pairs for part in span.action.parts)
print(f"pairs took {sum(span.end - span.start for span in pairs) / alone:.2f} of a forward and a backward alone")
halves = sum(fitted.backward_input) + sum(fitted.backward_weight)
print(f"a whole backward took {sum(fitted.backward) / halves:.2f} of its two halves")

# %% [markdown]
# The recorded step falls behind where the first backwards meet the forwards, and keeps about that distance to its
# end. On a CPU nothing travels under compute, so overlapped pairs have nothing to save; they took a little longer
# than their parts, and the model, which knows gains alone, leaves `hidden` at zero. The two halves of a backward cost
# more than a whole one: a hand-written gradient that holds several weights, as that of [the experts](22_experts.py)
# does, goes through what lies between them in both.

# %% [markdown]
# ## A step to run anywhere
#
# The run above needs a core for each process. On two cores four processes that compute share them, and no model of
# one device per rank holds. So in this one each stage is a small module that also *waits*, as a host waits for its
# device: a different time for each stage, and its overlapped passes hide 70% of the shorter one. What is tested is all
# but the computing: engine, transfers, order.

# %%
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this notebook forks, which autograd allows only where there is no GPU
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pithtrain.parallel.pipeline.engine import Engine, ModuleStage

WIDTH = 32


class Layer(nn.Module):
    def __init__(self, first, last):
        super().__init__()
        self.linear, self.first, self.last = nn.Linear(WIDTH, WIDTH), first, last

    def forward(self, x, batch):
        y = self.linear(batch if self.first else x).relu()
        return y.mean() if self.last else y


class Device(ModuleStage):
    """A module on a device that takes `seconds` for a forward, and as long for each half of a backward."""

    def __init__(self, module, seconds):
        super().__init__(module)
        self.seconds = seconds

    def forward(self, x, batch, share=1.0):
        time.sleep(share * self.seconds)
        return super().forward(x, batch)

    def backward(self, saved, grad):
        time.sleep(2 * self.seconds)
        return super().backward(saved, grad)

    def backward_input(self, saved, grad):
        time.sleep(self.seconds)
        return super().backward_input(saved, grad)

    def backward_weight(self, saved):
        time.sleep(self.seconds)
        super().backward_weight(saved)


def together(forward, backward):
    hidden = 0.7 * min(1.0, 2 * backward.stage.seconds / forward.stage.seconds)
    return (
        forward.stage.forward(forward.x, forward.batch, share=1 - hidden),
        backward.stage.backward(backward.saved, backward.grad),
    )


def one_rank(rank, schedule, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    last = schedule.stages - 1
    stages = {s: Device(Layer(s == 0, s == last), seconds=0.010 + 0.003 * (s % 3)) for s in schedule.held_by(rank)}
    engine = Engine(schedule, stages, torch.empty(64, WIDTH), dist.group.WORLD, together)
    batches = [torch.randn(64, WIDTH) for _ in range(schedule.microbatches)]
    steps = []
    for _ in range(4):
        dist.barrier()
        steps.append([])
        engine.step(batches, record=steps[-1])
    torch.save(steps, f"{folder}/rank{rank}")
    dist.destroy_process_group()


def record(schedule):
    """Per step, per rank, the spans of a real run."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(one_rank, (schedule, folder), nprocs=4, start_method="fork")
        by_rank = [torch.load(f"{folder}/rank{rank}", weights_only=False) for rank in range(4)]
    return list(zip(*by_rank, strict=True))


schedule = lower(generate("dualpipev", pp=4, microbatches=10))
steps = record(schedule)
fitted = fit_costs(schedule, steps[1])
print("forward, ms:", *(f"{1e3 * t:.1f}" for t in fitted.forward))
print(f"a transfer: {1e3 * fitted.send:.2f} ms; hidden by overlap: {fitted.hidden:.0%}")
predicted = simulate(schedule, fitted)
for i, step in enumerate(steps[1:], 1):
    measured = timeline_of(schedule, step).time
    print(
        f"step {i}: measured {measured:.3f} s, predicted {predicted.time:.3f} s ({predicted.time / measured - 1:+.1%})"
    )

# %% [markdown]
# **Back to:** [the schedule](50_schedule.py), or on to the [training step](71_step.py), which runs all of this.
