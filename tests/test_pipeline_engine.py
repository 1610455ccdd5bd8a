"""The engine on 1, 2 and 4 gloo processes against one process that runs the whole model."""

import copy
import gc
import weakref
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from pithtrain.parallel.pipeline.engine import Engine, ModuleStage
from pithtrain.parallel.pipeline.generate import KINDS, generate
from pithtrain.parallel.pipeline.lower import lower
from pithtrain.parallel.pipeline.pieces import Tape
from pithtrain.parallel.pipeline.schedule import Action, Op, Schedule, ScheduleError, split_layers
from pithtrain.parallel.pipeline.simulate import simulate

WIDTH, LAYERS, MICROBATCHES, STEPS = 12, 10, 9, 3
RECOMPUTE = ("nothing", "layers")  # by torch's checkpoint around each layer
torch.set_num_threads(1)  # small tensors: more threads only wait for each other


class Layer(nn.Module):
    """Norm and a gated MLP with a residual; its up projection is used twice, as tied weights are."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.up(self.norm(x))).relu() + x))


class Part(nn.Module):
    """Some layers in a row, with embedding in front or loss behind where the model begins or ends."""

    def __init__(self, layers, embedding, head, checkpointed):
        super().__init__()
        self.layers, self.embedding, self.head, self.checkpointed = nn.ModuleList(layers), embedding, head, checkpointed

    def forward(self, x, batch):
        tokens, targets = batch
        x = self.embedding(tokens) if self.embedding else x
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return nn.functional.cross_entropy(self.head(x), targets) / MICROBATCHES if self.head else x


def whole_model():
    torch.manual_seed(0)
    return Part([Layer() for _ in range(LAYERS)], nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11), checkpointed=False)


def batches(step, replica):
    generator = torch.Generator().manual_seed(100 * step + replica)
    return [torch.randint(0, 11, (2, 6), generator=generator).unbind() for _ in range(MICROBATCHES)]


@cache
def reference(replicas):
    """Losses by step, and gradients and weights after the last, of one process that sees all replicas' batches."""
    model = whole_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        each = [[model(None, b) for b in batches(step, r)] for r in range(replicas)]
        (sum(loss for row in each for loss in row) / replicas).backward()
        optimizer.step()
        losses.append([[loss.item() for loss in row] for row in each])
    return losses, model


class Averaged(ModuleStage):
    """A stage whose gradients are averaged over `replicas`."""

    def __init__(self, module, replicas):
        super().__init__(module)
        self.replicas = replicas

    def reduce(self):
        for parameter in self.module.parameters() if self.replicas else ():
            dist.all_reduce(parameter.grad, group=self.replicas)
            parameter.grad /= self.replicas.size()


def worst_error(schedule, group, replicas, replica, recompute):
    """The largest difference between this rank's losses, gradients and weights and the reference."""
    expected_losses, expected = reference(replicas.size() if replicas else 1)
    model = whole_model()
    rank = group.rank() if group else 0
    splits = split_layers(LAYERS, schedule.stages, 1, 1)

    def part(source, s):
        return Part(
            [source.layers[i] for i in splits[s]],
            source.embedding if s == 0 else None,
            source.head if s == schedule.stages - 1 else None,
            recompute == "layers",
        )

    held = schedule.held_by(rank)
    modules = {s: part(model, s) for s in held}
    stages = {s: Averaged(modules[s], replicas) for s in held}
    engine = Engine(schedule, stages, torch.empty(6, WIDTH), group)
    optimizer = torch.optim.SGD([p for m in modules.values() for p in m.parameters()], lr=0.5, momentum=0.9)
    error = 0.0
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = engine.step(batches(step, replica))
        optimizer.step()
        assert bool(losses) == (schedule.stages - 1 in held)
        for got, want in zip(losses, expected_losses[step][replica], strict=bool(losses)):
            error = max(error, abs(got.item() - want))
        assert not engine.tensors and not engine.saved and not engine.posted and not engine.gathering
    for s in held:
        for got, want in zip(modules[s].parameters(), part(expected, s).parameters(), strict=True):
            error = max(error, (got.grad - want.grad).abs().max().item(), (got - want).abs().max().item())
    return error


def work(rank, pp, dp, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=pp * dp)
    mesh = dist.init_device_mesh("cpu", (pp, dp), mesh_dim_names=("pp", "dp"))
    group, replicas = mesh.get_group("pp"), mesh.get_group("dp") if dp > 1 else None
    errors = {}
    for kind in KINDS:
        for recompute in RECOMPUTE:
            schedule = lower(generate(kind, pp, MICROBATCHES), resident=2)
            error = worst_error(schedule, group, replicas, rank % dp, recompute)
            gathered = [None] * (pp * dp)
            dist.all_gather_object(gathered, error)
            errors[kind, recompute] = max(gathered)
    if rank == 0:
        torch.save(errors, f"{folder}/errors")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[(2, 1), (4, 1), (2, 2)], ids=["pp2", "pp4", "pp2-dp2"])
def errors(request, tmp_path_factory):
    pp, dp = request.param
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (pp, dp, str(folder)), nprocs=pp * dp)
    return torch.load(f"{folder}/errors")


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_and_weights_equal_one_process(errors, kind, recompute):
    if (kind, recompute) not in errors:
        pytest.fail(f"{kind} was not run")
    assert errors[kind, recompute] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_needs_no_process_group(kind):
    assert worst_error(lower(generate(kind, 1, MICROBATCHES)), None, None, 0, "nothing") < 1e-5


def backwards_first(pp, microbatches):
    """A schedule of one's own: the last microbatch first, all of them in flight, weight gradients at the end."""
    ops = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT
    ranks = [[Action(op, r, m) for op in ops for m in reversed(range(microbatches))] for r in range(pp)]
    return Schedule("all at once, backwards", tuple(range(pp)), microbatches, tuple(map(tuple, ranks)))


def work_own(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    error = worst_error(lower(backwards_first(2, MICROBATCHES)), dist.group.WORLD, None, 0, "nothing")
    assert error < 1e-5, error
    with pytest.raises(ScheduleError, match="call `lower` first"):
        Engine(generate("1f1b", 2, 2), {rank: None}, torch.empty(1), dist.group.WORLD)
    dist.destroy_process_group()


def test_a_schedule_of_ones_own_runs_untouched(tmp_path):
    mp.spawn(work_own, (str(tmp_path),), nprocs=2)


def halves(module, x):
    """Gradients of a module by B, and by I and W; both start from the same weights."""
    results = []
    for split in (False, True):
        stage = ModuleStage(copy.deepcopy(module))
        y, saved = stage.forward(x, None)
        if split:
            dx, rest = stage.backward_input(saved, torch.ones_like(y))
            stage.backward_weight(rest)
        else:
            dx = stage.backward(saved, torch.ones_like(y))
        results.append([dx, *(p.grad for p in stage.module.parameters())])
    return results


class Takes(nn.Module):
    """A function of x and two weights as a module."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.function = function

    def forward(self, x, batch):
        return self.function(x, self.a, self.b)


FUNCTIONS = {
    "chain": lambda x, a, b: (x @ a).relu() @ b,
    "shared weight": lambda x, a, b: ((x @ a).relu() @ b).relu() @ a,
    "weight of weights": lambda x, a, b: x @ (a.tanh() @ b),
    "weights alone beside x": lambda x, a, b: x @ a + (b * 2).sum(0),
    "several outputs": lambda x, a, b: (lambda p, q: p * q.sigmoid())(*torch.cat([x @ a, x @ b], -1).chunk(2, -1)),
    "unused weight": lambda x, a, b: x @ a,
    "x twice": lambda x, a, b: (x @ a) * (x @ b) + x,
    "recomputed": lambda x, a, b: checkpoint(lambda t: (t @ a).relu() @ b, x, use_reentrant=False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_input_and_weight_halves_make_a_whole_backward(name):
    torch.manual_seed(0)
    whole, split = halves(Takes(FUNCTIONS[name]), torch.randn(3, WIDTH))
    for a, b in zip(whole, split, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_input_half_leaves_weights_alone_and_computes_no_weight_gradient():
    wanted = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            want = [torch._C._will_engine_execute_node(child) for child, _ in ctx.next_functions]
            wanted.append(want)
            return grad @ w.T if want[0] else None, x.T @ grad if want[1] else None

    module = Takes(lambda x, a, b: Counted.apply(Counted.apply(x, a), b))
    stage = ModuleStage(module)
    y, saved = stage.forward(torch.randn(3, WIDTH), None)
    _, rest = stage.backward_input(saved, torch.ones_like(y))
    assert wanted == [[True, False]] * 2 and module.a.grad is None
    stage.backward_weight(rest)
    assert wanted[2:] == [[False, True]] * 2 and module.a.grad is not None


class Product(torch.autograd.Function):
    """A node that is a Python object, which torch may free with the graph that it is in."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.T, x.T @ grad


@pytest.mark.parametrize("last", ["relu", "itself"])
def test_nodes_from_python_outlive_what_led_to_them(last):
    """W with nothing left of the output: its branches are of nodes that only the graph owned."""
    act = torch.relu if last == "relu" else lambda x: x
    stage = ModuleStage(Takes(lambda x, a, b: act(Product.apply(torch.relu(Product.apply(x, a)), b))))
    x, grad = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    y, saved = stage.forward(x, None)
    _, rest = stage.backward_input(saved, grad)
    del y, saved
    gc.collect()
    stage.backward_weight(rest)
    a, b = stage.module.a, stage.module.b
    wanted = torch.autograd.grad(act(torch.relu(x @ a) @ b), (a, b), grad)
    assert all(torch.allclose(p.grad, w, atol=1e-6) for p, w in zip((a, b), wanted, strict=True))


class Link(nn.Module):
    """One product; the first takes the batch, and the last makes a loss."""

    def __init__(self, first, last):
        super().__init__()
        self.weight, self.first, self.last = nn.Parameter(torch.randn(WIDTH, WIDTH)), first, last

    def forward(self, x, batch):
        y = (batch if self.first else x) @ self.weight
        return y.sum() if self.last else y


class Token:
    """Stands for what a forward keeps."""


class Watched(ModuleStage):
    """Counts forwards whose backward is still to come, and tensors from the stage before that are still in memory."""

    def __init__(self, module, alive, inputs, most):
        super().__init__(module)
        self.alive, self.inputs, self.most = alive, inputs, most

    def forward(self, x, batch):
        y, saved = super().forward(x, batch)
        token = Token()
        self.alive.add(token)
        self.inputs += [] if x is None else [weakref.ref(x.untyped_storage())]
        held = sum(storage() is not None for storage in self.inputs)
        self.most[:] = max(self.most[0], len(self.alive)), max(self.most[1], held)
        return y, (saved, token)

    def backward(self, saved, grad):
        return super().backward(saved[0], grad)

    def backward_input(self, saved, grad):
        dx, rest = super().backward_input(saved[0], grad)
        return dx, (rest, saved[1])

    def backward_weight(self, saved):
        super().backward_weight(saved[0])


def work_freed(rank, size, folder):
    """The number of live graphs never exceeds, and at some point equals, what the simulator says; nor do inputs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    gc.disable()  # references alone must free
    for kind in KINDS:
        schedule = lower(generate(kind, size, 4))
        alive, inputs, most, last = weakref.WeakSet(), [], [0, 0], schedule.stages - 1
        stages = {s: Watched(Link(s == 0, s == last), alive, inputs, most) for s in schedule.held_by(rank)}
        engine = Engine(schedule, stages, torch.empty(3, WIDTH), dist.group.WORLD)
        engine.step([torch.randn(3, WIDTH)] * 4)
        peak = simulate(schedule).peak[rank]
        assert most[0] == peak and most[1] <= peak, (kind, most, peak)
        assert not alive and not [storage for storage in inputs if storage() is not None], kind
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2])
def test_activations_are_freed_when_the_list_says(size, tmp_path):
    mp.spawn(work_freed, (size, str(tmp_path)), nprocs=size)


@pytest.mark.parametrize("first", [False, True])
def test_a_piece_that_is_run_again_is_run_once_for_both_halves(first):
    calls, weight = [], torch.randn(WIDTH, WIDTH, requires_grad=True)

    class Again(ModuleStage):
        def forward_steps(self, tape, x, batch):
            def product(x):
                calls.append(torch.is_grad_enabled())
                return (batch if first else x) @ weight

            tape.end(tape.run("product", product, tape.begin(x), again=True))
            yield

    stage, x = Again(None), torch.randn(3, WIDTH)
    y, saved = stage.forward(None if first else x, x)
    dx, rest = stage.backward_input(saved, torch.ones_like(y))
    assert weight.grad is None
    stage.backward_weight(rest)
    assert calls == [False, True]
    assert torch.allclose(weight.grad, x.T @ torch.ones_like(y))
    assert dx is None if first else torch.allclose(dx, torch.ones_like(y) @ weight.T)


def test_gradients_of_a_tensor_that_enters_several_pieces_are_added():
    x, weight = torch.randn(3, WIDTH), torch.randn(WIDTH, WIDTH, requires_grad=True)
    tape = Tape()
    (h,) = tape.run("one", lambda x: (x @ weight,), tape.begin(x))
    a = tape.run("two", torch.tanh, h)
    tape.end(tape.run("three", lambda a, h: a * h, a, h))
    tape.last.grad = torch.ones(3, WIDTH)
    while tape.pieces:
        tape.backward(tape.pieces.pop())
    x.requires_grad_()
    h = x @ weight
    dx, dw = torch.autograd.grad((h.tanh() * h).sum(), (x, weight))
    assert torch.allclose(tape.first.grad, dx) and torch.allclose(weight.grad, dw)


def test_errors_are_one_line_and_name_the_action():
    schedule = lower(generate("1f1b", 1, 2))
    engine = Engine(schedule, {0: ModuleStage(Takes(lambda x, a, b: x @ a))}, torch.empty(3, WIDTH))
    with pytest.raises(ScheduleError, match="3 batches for a schedule of 2"):
        engine.step([None] * 3)
    with pytest.raises(TypeError) as caught:
        engine.step([None] * 2)
    assert caught.value.__notes__ == ["in action 0F0 of pipeline rank 0 (1f1b)"]
    with pytest.raises(ScheduleError, match=r"rank 0 holds \(0,\), but was given \(1,\)"):
        Engine(schedule, {1: None}, torch.empty(1))
    with pytest.raises(ScheduleError, match="for 2 ranks, the group has 1"):
        Engine(lower(generate("1f1b", 2, 2)), {}, torch.empty(1))
