# %% [markdown]
# # Overlap
#
# > One microbatch's forward and another's backward together: each one's tokens travel under the other's compute.

# %%
#| default_exp parallel.pipeline.overlap

# %% [markdown]
# ## The idea
#
# With experts on many ranks a layer sends its tokens out and home again in every forward, and their gradients out and
# home again in every backward. A microbatch cannot go on before its tokens are there. Another one can: DeepSeek-V3's
# DualPipe (arXiv 2412.19437) pairs a forward with a backward of another microbatch and interleaves them, so that while
# the tokens of one are on the wire, the other computes. DualPipeV's [lists](51_generate.py) are full of such pairs,
# written `(0F6;1B2)`. Here is what runs one.
#
# A layer's [five stages](30_stages.py) are three that compute, A (attend), E (experts), G (aggregate), and two that
# travel, D (dispatch) and C (combine). A forward runs A D E C G of each layer, a backward G' C' E' D' A', where
# dispatching back is what combining was, and the other way round. Compute and travel alternate in both. Put
# side by side:
#
# | compute | A |   | E' |   | E |    | A' G' |   |
# |---|---|---|---|---|---|---|---|---|
# | **travel** | C' | | D |   | D' |   | C |   |
#
# Every travelling stage has a computing one of the *other* microbatch above it. So the order in which the host
# launches is: **A, E', D, D', E, A' G', C, C'**, then the next layer of each. D is launched behind E', not in front of
# it, because of the one thing that the host has to wait for: how many rows each rank will send
# ([41](41_expert_parallel.py)). Asked right behind A, it is answered while the device is busy with E'.

# %%
#| export
from collections.abc import Callable, Iterator
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor

from pithtrain.layers.attention import Sequences
from pithtrain.layers.router import Routed
from pithtrain.models.decoder import Decoder
from pithtrain.models.stages import Layer
from pithtrain.parallel.pipeline.engine import BackwardPass, ForwardPass, ModuleStage
from pithtrain.parallel.pipeline.pieces import Crossing, Tape

# %% [markdown]
# ## A decoder in pieces
#
# A [piece](56a_pieces.py) for each stage of each layer, and one each for what is before and behind the layers. What
# travels, and the question in front of it, runs aside. A `yield` stands where the other microbatch should have its
# turn: behind a stage that computed, since what comes next will travel, and behind one that travels, since what comes
# next will wait for it.
#
# Layers without experts have nothing that travels, and make no pause. Stages that are to be recomputed are run again
# when their backward comes; nothing travels twice.


# %%
#| export
class PartStage(ModuleStage):
    """A part of a decoder as a stage of a pipeline, whose pieces are the stages of its layers.

    `close` makes the stage's output of the part's (see `Decoder.forward`), its routing by layer, and the batch,
    which has `inputs`, `positions` and `targets` for the part. On a GPU tokens travel on the stream `beside`."""

    def __init__(
        self,
        part: Decoder,
        close: Callable[[Tensor, list[Routed | None], Any], Tensor],
        beside: torch.cuda.Stream | None = None,
    ):
        super().__init__(part, beside)
        self.part, self.close = part, close

    def forward_steps(self, tape: Tape, x: Tensor | None, batch: Any) -> Iterator[None]:
        part = self.part
        start = batch.inputs if part.place.first else tape.begin(x)
        hidden, sequences = tape.run("begin", part.begin, start, batch.positions)
        routing = []
        for number, layer in part.layers.items():
            hidden, routed = yield from self.layer_steps(tape, number, layer, hidden, sequences)
            routing.append(routed)

        def end(hidden: Tensor, routing: list[Routed | None]) -> Tensor:
            return self.close(part.finish(hidden, batch.targets if part.place.last else None), routing, batch)

        tape.end(tape.run("end", end, hidden, routing))

    def layer_steps(self, tape: Tape, number: str, layer: Layer, hidden: Crossing, sequences: Sequences) -> Iterator:
        """The stages of one layer; returns its output and where tokens went, as crossings."""
        place, exchange, run = self.part.place, self.part.place.exchange, tape.run
        again = place.recompute in ("attention", "layer")
        residual, tokens, routed = run(f"attend {number}", layer.attend, hidden, sequences, again=again)
        if routed is None:
            return residual, None
        announced = run(f"announce {number}", exchange.announce, routed, aside=True)
        yield
        arrived, journey = run(f"dispatch {number}", exchange.dispatch, tokens, routed, announced, aside=True)
        yield
        again = place.recompute in ("experts", "layer")
        output = run(f"experts {number}", layer.experts, *arrived, again=again)
        yield
        output = run(f"combine {number}", exchange.combine, output, journey, aside=True)
        yield
        return run(f"aggregate {number}", layer.aggregate, residual, output), routed


# %% [markdown]
# ## Two at a time
#
# What is left is to take turns. The backward goes first, from the loss to its first travelling stage; from then on
# both advance a step at a time, forward first, until neither has one left. If one is longer than the other, or has
# layers without experts, the pairs shift, and the result is the same.


# %%
#| export
def overlapped(forward: ForwardPass, backward: BackwardPass) -> tuple[tuple[Tensor, Tape], Tensor | None]:
    """The two passes of an overlapped action, taking turns: what both return. Their stages are `ModuleStage`s."""
    tape = Tape(forward.stage.beside)
    ahead = forward.stage.forward_steps(tape, forward.x, forward.batch)
    back = backward.stage.backward_steps(backward.saved, backward.grad)
    for _ in islice(back, 2):
        pass
    for _ in zip_longest(ahead, back):
        pass
    first = backward.saved.first
    return (tape.take(), tape), None if first is None else first.grad


# %% [markdown]
# ## The order, recorded
#
# Two parts of a model, two layers each, with an [exchange](41_expert_parallel.py) over a group of one rank that sends
# everything to itself. Each piece is noted as it begins. The same two passes are then run in turn: every gradient is
# the same to the last bit.

# %%
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the figures below are of the order alone
from typing import NamedTuple

import torch.distributed as dist

from pithtrain.config import Qwen3MoeConfig
from pithtrain.models.build import build
from pithtrain.models.decoder import initialise
from pithtrain.models.stages import Place
from pithtrain.parallel.expert import ExpertExchange
from pithtrain.parallel.pipeline.engine import in_turn


class Batch(NamedTuple):
    inputs: Tensor
    positions: Tensor
    targets: Tensor


def loss_or_hidden(output, routing, batch):
    return output


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
config = Qwen3MoeConfig(
    vocab_size=300, layers=4, hidden=64, heads=4, head_dim=16, experts=8, expert_hidden=64, tie_embeddings=False
)
exchange = ExpertExchange(dist.group.WORLD)


def stages(recompute="none"):
    """The first and the second half of the model."""
    places = (
        Place(exchange=exchange, layers=range(0, 2), last=False, recompute=recompute),
        Place(exchange=exchange, layers=range(2, 4), first=False, recompute=recompute),
    )
    parts = [build(config, place) for place in places]
    for part in parts:
        initialise(part, seed=0)
    return [PartStage(part, loss_or_hidden) for part in parts]


def batch(seed):
    tokens = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1], torch.arange(32), tokens[:, 1:])


order, lane = [], Tape.lane


def noted(tape, name, aside):
    order.append(name.split())
    return lane(tape, name, aside)


Tape.lane = noted  # every piece begins by entering its lane


def pair(overlap, recompute="none"):
    """Microbatch 0 forward through both halves; then its backward through the second, with 1 forward in the first."""
    first, second = stages(recompute)
    x, _ = first.forward(None, batch(0))
    loss, saved = second.forward(x, batch(0))
    order.clear()
    (y, _), dx = overlap(ForwardPass(first, None, batch(1)), BackwardPass(second, saved, torch.ones_like(loss)))
    return list(order), [y, dx, *(p.grad for p in second.part.parameters())]


turns, results = pair(overlapped)
apart, expected = pair(in_turn)
assert len(turns) == len(apart) and all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
for recompute in ("attention", "experts", "layer"):
    assert all(torch.equal(a, b) for a, b in zip(pair(overlapped, recompute)[1], expected, strict=True))
print("\n".join(" ".join(words) for words in turns[:12]), "...", sep="\n")

# %% [markdown]
# What would two streams make of that order? Each piece starts when its stream is free and the piece before it in its
# own microbatch is done. Say that computing takes 3 units for attention or experts, and twice that backward, and that
# the tokens of a layer travel for 3.

# %%
import matplotlib.pyplot as plt

TIMES = {"attend": 3, "dispatch": 3, "experts": 3, "combine": 3, "end": 1}  # of others: 0.2
TRAVELS = ("announce", "dispatch", "combine")


def two_streams(order):
    """(way, name, travels, start, end) of each piece."""
    free, before, spans = {True: 0.0, False: 0.0}, {"forward": 0.0, "backward": 0.0}, []
    for way, name, *_ in order:
        travels = name in TRAVELS
        start = max(free[travels], before[way])
        end = start + TIMES.get(name, 0.2) * (2 if way == "backward" and not travels else 1)
        free[travels] = before[way] = end
        spans.append((way, name, travels, start, end))
    return spans


def draw(ax, spans, title):
    for way, name, travels, start, end in spans:
        colour, label = ("C0", name[0].upper()) if way == "forward" else ("C2", name[0].upper() + "'")
        ax.barh(int(travels), end - start, left=start, color=colour, alpha=0.45 if travels else 0.9, edgecolor="w")
        if end - start > 2:
            ax.text((start + end) / 2, int(travels), label, ha="center", va="center", fontsize=8)
    ax.set(title=title, yticks=[0, 1], yticklabels=["compute", "travel"])
    ax.invert_yaxis()


together, in_sequence = two_streams(turns), two_streams(apart)
length = [max(span[4] for span in spans) for spans in (together, in_sequence)]
fig, axes = plt.subplots(2, 1, figsize=(10, 3.2), sharex=True, layout="constrained")
draw(axes[0], together, f"overlapped: {length[0]:.0f} units")
draw(axes[1], in_sequence, f"one after the other: {length[1]:.0f} units")
axes[1].set_xlabel("time, units")
assert length[0] < 0.75 * length[1]
fig

# %% [markdown]
# Blue is the forward, green the backward. Above, the compute stream has no gap between its first piece and its last.
# Below, every travelling stage is a hole in it.
#
# On a GPU that order is launched on two streams, and no code differs. Without one, the pieces run one after the other
# in that very order.

# %%
dist.destroy_process_group()

# %% [markdown]
# ## On a GPU
#
# `tools/overlap_trace.py` runs two pipeline stages, each of two layers of Qwen3-30B-A3B's shape, as a rank in the
# middle of DualPipeV has them, on one GPU, and writes down every kernel of one overlapped action. A rank alone has no
# peers: its tokens travel through NCCL from its memory to itself, and that takes next to nothing. So there is a second
# run, in which a wire of 50 GB/s is *emulated*: behind each transfer a kernel sleeps for as long as its bytes would
# take.

# %%
import json
from pathlib import Path

import pithtrain

file = Path(pithtrain.__file__).parent.parent / "docs" / "benchmarks" / "overlap-h200.json"
result = json.loads(file.read_text()) if file.exists() else {"runs": []}
if result["runs"]:
    print(
        f"{result['device']}, torch {result['versions']['torch']}, {result['date']}; {result['shape']['tokens']} tokens"
    )
for run in result["runs"]:
    wire, times, seen = run["wire_gigabytes_a_second"], run["pair_ms"], run["check"]
    apart, both = (sorted(times[name])[1] for name in ("in turn", "overlapped"))
    launched = [piece["name"].split()[:2] for piece in run["pieces"]]
    assert launched == [words[:2] for words in turns] and seen["kernels_in_order_of_launch"]
    assert all(len(streams) == 1 for streams in seen["streams"].values())
    share = seen["travel_under_compute_of_the_other_us"] / seen["travel_us"]
    print(
        f"wire: {f'{wire:.0f} GB/s, emulated' if wire else 'none':20} in turn {apart:.1f} ms, overlapped {both:.1f} ms"
    )
    computing = [k for k in run["kernels"] if run["pieces"][k["piece"]]["name"].split()[1] not in TRAVELS]
    busy = sum(k["end"] - k["start"] for k in computing) / 1e3
    span = (max(k["end"] for k in run["kernels"]) - min(k["start"] for k in run["kernels"])) / 1e3
    print(f"    the compute stream is busy for {busy:.1f} of {span:.1f} ms")
    print(
        f"    {share:.0%} of {seen['travel_us'] / 1e3:.1f} ms on the second stream lie under compute of the other one"
    )

# %% [markdown]
# The kernels were launched in the order that was recorded above, piece for piece, the compute on one stream and all
# that travels on one other. This is where they ran:

# %%
fig, axes = plt.subplots(2, 1, figsize=(10, 3.6), sharex=True, layout="constrained")
for ax, run in zip(axes, result["runs"], strict=False):
    ways = [piece["name"].split()[:2] for piece in run["pieces"]]
    middles = {}
    for kernel in run["kernels"]:
        way, name = ways[kernel["piece"]]
        start, end, travels = kernel["start"] / 1e3, kernel["end"] / 1e3, name in TRAVELS
        colour = "C0" if way == "forward" else "C2"
        ax.barh(int(travels), end - start, left=start, color=colour, alpha=0.45 if travels else 0.9)
        middles.setdefault(kernel["piece"], []).append((start + end) / 2)
    for piece, at in middles.items():
        way, name = ways[piece]
        if name in ("attend", "experts"):
            ax.text(
                sum(at) / len(at), 0, name[0].upper() + "'" * (way == "backward"), ha="center", va="center", fontsize=8
            )
    wire = run["wire_gigabytes_a_second"]
    title = f"a wire of {wire:.0f} GB/s, emulated" if wire else "to itself, no wire"
    ax.set(title=title, yticks=[0, 1], yticklabels=["compute", "travel"])
    ax.invert_yaxis()
axes[1].set_xlabel("milliseconds")
fig

# %% [markdown]
# With the emulated wire the compute stream is full: nothing in it waits for what travels below. Overlapping gains even
# without a wire: in turn, the device stands still while [the host waits for counts](41_expert_parallel.py), where
# another microbatch's work is queued here. A wire that sleeps for 12 ms costs 3: three of our experts' kernels that
# begin beside a sleeping one take nearly twice as long. They are persistent, one program for each multiprocessor; it
# seems that the sleeper holds one, and the program meant for that one runs after the others.
#
# On four GPUs of one host, overlapping made a step of Qwen3-30B-A3B's shape 13 % faster, and one of DeepSeek-V2-Lite's
# 2 % slower ([figures](../docs/performance.md)). Between hosts it was not measured.
#
# **Next:** what the whole step takes, [simulated and recorded](58_fit.py).
