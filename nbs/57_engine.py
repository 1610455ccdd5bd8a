# %% [markdown]
# # The engine
#
# > Runs a rank's list of actions over real stages, literally: it knows no schedule by name.

# %%
#| default_exp parallel.pipeline.engine

# %% [markdown]
# ## The idea
#
# All decisions were made before: what runs when ([51](51_generate.py)), what is sent when
# ([53](53_lower.py)), and that it ends ([54](54_validate.py)). What is left is bookkeeping: which tensor
# belongs to which stage and microbatch, and when it may go. The rules are at the end of
# [56](56_describe.py).
#
# Two parties share the work. A **stage** owns its layers and its autograd graphs, and can run each pass. The
# **engine** owns the order, and the tensors that travel between stages.

# %%
#| export
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pithtrain.parallel.pipeline.pieces import Tape
from pithtrain.parallel.pipeline.schedule import Action, Op, Schedule, ScheduleError, partner
from pithtrain.parallel.pipeline.simulate import Span
from pithtrain.parallel.pipeline.validate import validate

# %%
import os

from torch import nn

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this notebook forks, which autograd allows only where there is no GPU

# %% [markdown]
# ## What a stage owes the engine
#
# One method per pass, and three for its weights. What a forward keeps for its backward is the stage's own affair: the
# engine holds it, unopened, until the list says backward, and then lets go of it.
#
# Any module can be a stage. Its forward is run on a [tape](56a_pieces.py) and its backward is that of the tape's
# pieces, whole or split. As a whole the module is one piece; [57a](57a_overlap.py) cuts a decoder at the stages of its
# layers. Both passes are written as *steps*, generators that pause where something else could run, and are here run
# through without pause.
#
# The output itself is not kept: once it has been sent, its memory is free unless some operation needs it for its
# backward.


# %%
#| export
class ModuleStage:
    """A stage made of any module called as module(x, batch). `beside` is the stream of pieces that are run aside.

    `x`, outputs and gradients have the shape of the boundary tensor. `unshard` may return works that the
    stage's next pass waits for, or None if it is done on return."""

    def __init__(self, module: Callable[[Tensor | None, Any], Tensor], beside: torch.cuda.Stream | None = None):
        self.module, self.beside = module, beside

    def forward_steps(self, tape: Tape, x: Tensor | None, batch: Any) -> Iterator[None]:
        """Runs the forward on `tape`, pausing where it pays to run something else."""
        tape.end(tape.run("module", lambda x: self.module(x, batch), tape.begin(x)))
        yield

    def backward_steps(self, tape: Tape, grad: Tensor) -> Iterator[None]:
        """Runs the backward of all that is on `tape`, pausing where tokens have left, and in front of that."""
        tape.last.grad = grad
        while tape.pieces:
            piece = tape.pieces.pop()
            tape.backward(piece)
            if piece.aside or (tape.pieces and tape.pieces[-1].aside):
                yield

    def forward(self, x: Tensor | None, batch: Any) -> tuple[Tensor, Tape]:
        """The output, and what backward needs. The first stage gets x = None; the last returns the loss."""
        tape = Tape(self.beside)
        deque(self.forward_steps(tape, x, batch), maxlen=0)
        return tape.take(), tape

    def backward(self, tape: Tape, grad: Tensor) -> Tensor | None:
        """Adds to weight gradients; the gradient of x, or None for the first stage."""
        deque(self.backward_steps(tape, grad), maxlen=0)
        return None if tape.first is None else tape.first.grad

    def backward_input(self, tape: Tape, grad: Tensor) -> tuple[Tensor | None, Any]:
        """The gradient of x alone, and what `backward_weight` needs."""
        if tape.first is None:  # nobody waits for the first stage: all of its backward can wait
            return None, (tape, grad)
        tape.last.grad = grad
        branches = []
        while tape.pieces:
            branches.append(tape.backward(tape.pieces.pop(), split=True))
        return tape.first.grad, branches

    def backward_weight(self, saved: Any) -> None:
        """Adds to weight gradients what `backward_input` left out."""
        if isinstance(saved, tuple):
            deque(self.backward_steps(*saved), maxlen=0)
            return
        while saved:
            saved.pop().backward()

    def unshard(self) -> Any:
        """Does nothing, as `reshard` and `reduce` do: all parameters are here."""

    reshard = reduce = unshard


# %%
class Block(nn.Module):
    """A little of everything: norm, attention, a gated MLP, residuals."""

    def __init__(self, width, last=False):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.last = last

    def forward(self, x, batch):
        x = batch if x is None else x
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        a, b = self.up(x).chunk(2, dim=-1)
        x = x + self.down(a.sigmoid() * b)
        return x.square().mean() if self.last else x


def gradients(module, split):
    stage, x = ModuleStage(module), torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    y, saved = stage.forward(x, None)
    module.zero_grad()
    if split:
        dx, rest = stage.backward_input(saved, torch.ones_like(y))
        assert all(p.grad is None for p in module.parameters())  # nothing yet
        stage.backward_weight(rest)
    else:
        dx = stage.backward(saved, torch.ones_like(y))
    return [dx, *(p.grad for p in module.parameters())]


block = Block(16)
pairs = zip(gradients(block, split=False), gradients(block, split=True), strict=True)
print("largest difference:", max((a - b).abs().max().item() for a, b in pairs))
assert all(torch.equal(a, b) for a, b in zip(gradients(block, False), gradients(block, True), strict=True))

# %% [markdown]
# Whole and split gradients are equal to the last bit.
#
# ## Overlap
#
# An overlapped action hands both passes to one function. The plainest one runs them in turn; one that knows
# the five stages of a layer ([57a](57a_overlap.py)) can send one microbatch's tokens under the other's compute.


# %%
#| export
class ForwardPass(NamedTuple):
    """A forward that is ready to run."""

    stage: ModuleStage
    x: Tensor | None
    batch: Any


# %%
#| export
class BackwardPass(NamedTuple):
    """A whole backward that is ready to run."""

    stage: ModuleStage
    saved: Any
    grad: Tensor


# %%
#| export
def in_turn(forward: ForwardPass, backward: BackwardPass) -> tuple[tuple[Tensor, Any], Tensor | None]:
    """The two passes of an overlapped action one after the other: what both return."""
    return forward.stage.forward(forward.x, forward.batch), backward.stage.backward(backward.saved, backward.grad)


# %% [markdown]
# ## The engine
#
# A tensor is known by the pass that needs it: the input of a forward, the gradient for a backward. It gets
# there in one of two ways. If the neighbouring stage lives here, its pass puts the tensor there itself; if
# not, an exchange brings it, and the first pass that asks waits for that exchange.


# %%
#| export
class Exchange(NamedTuple):
    """A batch of sends and receives under way; `sent` keeps what is sent alive until it has left."""

    works: list[dist.Work]
    sent: list[Tensor]
    received: list[tuple[tuple[str, int, int], Tensor]]


# %%
#| export
class Engine:
    """Runs one rank's part of a schedule that `lower` completed.

    `stages` holds this rank's stages by number; `boundary` is an example of the tensor between stages (its
    shape, dtype and device; equal everywhere); `group` connects the pipeline's ranks (None: this process is
    alone). Raises ScheduleError for a schedule that is not valid, or stages that are not the rank's."""

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, ModuleStage],
        boundary: Tensor,
        group: dist.ProcessGroup | None = None,
        overlap: Callable[[ForwardPass, BackwardPass], tuple[tuple[Tensor, Any], Tensor | None]] = in_turn,
    ):
        validate(schedule)
        self.rank = 0 if group is None else group.rank()
        size = 1 if group is None else group.size()
        if size != len(schedule.ranks):
            raise ScheduleError(f"the schedule is for {len(schedule.ranks)} ranks, the group has {size}")
        if set(stages) != set(schedule.held_by(self.rank)):
            raise ScheduleError(f"rank {self.rank} holds {schedule.held_by(self.rank)}, but was given {tuple(stages)}")
        if size > 1 and not any(action.op is Op.EXCHANGE for action in schedule.ranks[self.rank]):
            raise ScheduleError(f"the schedule ({schedule.kind}) has passes and no exchanges: call `lower` first")
        self.schedule, self.stages, self.boundary = schedule, stages, boundary
        self.group, self.overlap = group, overlap
        self.tensors: dict[tuple[str, int, int], Tensor] = {}  # what a pass is waiting for, or a send
        self.saved: dict[tuple[int, int], Any] = {}  # from forward to backward, from I to W
        self.posted: deque[Exchange] = deque()
        self.gathering: dict[int, Any] = {}  # stage -> its gather, until first used

    def step(self, batches: Sequence[Any], record: list[Span] | None = None) -> list[Tensor]:
        """Runs the list once: gradients are summed into the stages, and losses returned by microbatch.

        `batches` holds what each stage's forward gets beside x, by microbatch, on every rank. Only the rank of
        the last stage returns losses; others return []. `record` collects when each pass ran, in seconds; on a
        GPU, when it was launched."""
        if len(batches) != self.schedule.microbatches:
            raise ScheduleError(f"{len(batches)} batches for a schedule of {self.schedule.microbatches} microbatches")
        losses: dict[int, Tensor] = {}
        for action in self.schedule.ranks[self.rank]:
            try:
                self._run(action, batches, losses, record)
            except Exception as error:
                error.add_note(f"in action {action} of pipeline rank {self.rank} ({self.schedule.kind})")
                raise
        while self.posted:
            self._settle()
        return [losses[m] for m in sorted(losses)]

    def _run(self, action: Action, batches: Sequence, losses: dict[int, Tensor], record: list[Span] | None) -> None:
        op, stage, m, parts = action
        match op:
            case Op.EXCHANGE:
                return self._post(parts)
            case Op.UNSHARD:
                self.gathering[stage] = self.stages[stage].unshard()
                return None
            case Op.RESHARD:
                return self.stages[stage].reshard()
            case Op.REDUCE:
                return self.stages[stage].reduce()
        # The passes: first what they need, so that a recorded span holds no waiting.
        forward = backward = None
        for part in action.computes:
            for work in self.gathering.pop(part.stage, None) or ():
                work.wait()
            if part.op is Op.FORWARD:
                x = self._take("F", part.stage, part.microbatch) if part.stage else None
                forward = ForwardPass(self.stages[part.stage], x, batches[part.microbatch])
            elif part.op is not Op.BACKWARD_WEIGHT:
                grad = self._take("B", part.stage, part.microbatch)
                backward = BackwardPass(self.stages[part.stage], self.saved.pop((part.stage, part.microbatch)), grad)
        start = time.perf_counter()
        match op:
            case Op.OVERLAP:
                (y, saved), dx = self.overlap(forward, backward)
                self._forward_done(parts[0], y, saved, losses)
                self._backward_done(parts[1], dx)
            case Op.FORWARD:
                self._forward_done(action, *forward.stage.forward(forward.x, forward.batch), losses)
            case Op.BACKWARD:
                self._backward_done(action, backward.stage.backward(backward.saved, backward.grad))
            case Op.BACKWARD_INPUT:
                dx, self.saved[stage, m] = backward.stage.backward_input(backward.saved, backward.grad)
                self._backward_done(action, dx)
            case Op.BACKWARD_WEIGHT:
                self.stages[stage].backward_weight(self.saved.pop((stage, m)))
        if record is not None:
            record.append(Span(action, start, time.perf_counter()))

    def _forward_done(self, action: Action, y: Tensor, saved: Any, losses: dict[int, Tensor]) -> None:
        _, stage, m, _ = action
        self.saved[stage, m] = saved
        if stage == self.schedule.stages - 1:
            losses[m] = y
            self.tensors["B", stage, m] = torch.ones_like(y)
        else:
            self._pass_on("F", stage, stage + 1, m, y)

    def _backward_done(self, action: Action, dx: Tensor | None) -> None:
        if action.stage:
            self._pass_on("B", action.stage, action.stage - 1, action.microbatch, dx)

    def _pass_on(self, way: str, stage: int, to: int, m: int, tensor: Tensor) -> None:
        """To the neighbour if it lives here, else aside until it is sent."""
        here = self.schedule.placement[to] == self.rank
        self.tensors[(way, to, m) if here else ("SEND_" + way, stage, m)] = tensor

    def _take(self, way: str, stage: int, m: int) -> Tensor:
        """The tensor a pass needs; waits for exchanges, in order, until it is there."""
        while (way, stage, m) not in self.tensors:
            self._settle()
        return self.tensors.pop((way, stage, m))

    def _post(self, parts: tuple[Action, ...]) -> None:
        ops, sent, received = [], [], []
        for part in parts:
            peer = self.schedule.placement[partner(part).stage]
            if part.op in (Op.SEND_FORWARD, Op.SEND_BACKWARD):
                tensor = self.tensors.pop((part.op.value, part.stage, part.microbatch)).contiguous()
                sent.append(tensor)
                ops.append(dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer))
            else:
                tensor = torch.empty_like(self.boundary)
                received.append(((part.op.value[-1], part.stage, part.microbatch), tensor))
                ops.append(dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer))
        while self.posted and all(work.is_completed() for work in self.posted[0].works):
            self._settle()
        self.posted.append(Exchange(dist.batch_isend_irecv(ops), sent, received))

    def _settle(self) -> None:
        """Waits for the oldest exchange: what was sent is let go, and what was received can be taken."""
        exchange = self.posted.popleft()
        for work in exchange.works:
            work.wait()
        self.tensors.update(exchange.received)


# %% [markdown]
# ## Six schedules, one answer
#
# Four blocks on two processes, run under every kind, against the same four blocks in one process. The
# processes are forks of this one, and talk over gloo. Gradients are compared after two steps of accumulation.

# %%
import tempfile

import torch.multiprocessing as mp

from pithtrain.parallel.pipeline.generate import KINDS, generate
from pithtrain.parallel.pipeline.lower import lower

torch.manual_seed(0)
blocks = [Block(16, last=i == 3) for i in range(4)]
data = [torch.randn(2, 8, 16) for _ in range(6)]


def in_a_row(x, batch, layers):
    for layer in layers:
        x = layer(x, batch)
    return x


class Row(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, batch):
        return in_a_row(x, batch, self.layers)


def largest_difference(schedule, rank, reference):
    """Over this rank's losses and gradients."""
    per, held = 4 // schedule.stages, schedule.held_by(rank)
    stages = {s: ModuleStage(Row(blocks[s * per : (s + 1) * per])) for s in held}
    for block in blocks:
        block.zero_grad()
    engine = Engine(schedule, stages, torch.empty(2, 8, 16), dist.group.WORLD)
    losses = engine.step(data)
    engine.step(data)
    errors = [abs(a.item() - b) for a, b in zip(losses, reference["losses"], strict=False)]
    for s in held:
        for i in range(s * per, (s + 1) * per):
            for p, gradient in zip(blocks[i].parameters(), reference[i], strict=True):
                errors.append((p.grad - gradient).abs().max().item())
    return max(errors)


def one_rank(rank, folder, reference):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    errors = [largest_difference(lower(generate(kind, 2, len(data))), rank, reference) for kind in KINDS]
    torch.save(errors, f"{folder}/rank{rank}")
    dist.destroy_process_group()


losses = [in_a_row(None, batch, blocks) for batch in data]
(2 * sum(losses)).backward()  # two steps' worth
reference = {i: [p.grad.clone() for p in block.parameters()] for i, block in enumerate(blocks)}
reference["losses"] = [loss.item() for loss in losses]
with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(one_rank, (folder, reference), nprocs=2, start_method="fork")
    errors = [torch.load(f"{folder}/rank{rank}") for rank in range(2)]
for kind, *of_ranks in zip(KINDS, *errors, strict=True):
    print(f"{kind:12} largest difference {max(of_ranks):.1e}")
    assert max(of_ranks) < 1e-5

# %% [markdown]
# ## What the engine itself costs
#
# Stages that do nothing, on rank 1 of 4, over a transport that delivers at once: what remains is the engine.
# `tools/engine_cost.py` measured its CPU time.

# %%
import json
from pathlib import Path
from statistics import median

import pithtrain

file = Path(pithtrain.__file__).parent.parent / "docs" / "benchmarks" / "engine-cpu.json"
result = json.loads(file.read_text())
print(f"{result['device']}, torch {result['versions']['torch']}, {result['date']}")
for kind, times in result["microseconds"].items():
    print(f"{kind:12} {median(times):5.1f} microseconds an action")

# %% [markdown]
# **Next:** what takes the place of `in_turn` for a real model, in [57a_overlap](57a_overlap.py).
