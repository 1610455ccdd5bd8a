"""Overlapped passes against the same passes one after the other, in every family; their order; what they leave."""

import gc
import weakref
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from families import random_model
from test_verify import FAMILIES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pithtrain.layers.balance import switch_loss
from pithtrain.layers.router import expert_load
from pithtrain.models.stages import AtHome, Place
from pithtrain.parallel.expert import ExpertExchange
from pithtrain.parallel.pipeline.engine import BackwardPass, ForwardPass, ModuleStage, in_turn
from pithtrain.parallel.pipeline.overlap import PartStage, overlapped
from pithtrain.parallel.pipeline.pieces import Tape
from pithtrain.train.step import Attach

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


class Batch(NamedTuple):
    inputs: Tensor
    positions: Tensor
    targets: Tensor


def batch(seed, device=CPU, sequences=2, length=12):
    tokens = torch.randint(300, (sequences, length + 1), generator=torch.Generator().manual_seed(seed)).to(device)
    return Batch(tokens[:, :-1], torch.arange(length, device=device), tokens[:, 1:])


def close(output, routing, batch):
    """Balance losses ride on the output, as in the training step."""
    routed = [r for r in routing if r is not None]
    balance = sum(0.1 * switch_loss(r.probs, expert_load(r.expert_ids.flatten(), r.probs.shape[1])) for r in routed)
    return output + balance if output.dim() == 0 or not routed else Attach.apply(output, balance)


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ExpertExchange(dist.group.WORLD)
    dist.destroy_process_group()


def stages(config, exchange, cut, recompute="none", device=CPU, dtype=torch.float32, beside=None):
    first = Place(exchange, layers=range(cut), last=False, recompute=recompute, dtype=dtype)
    second = replace(first, layers=range(cut, config.layers), first=False, last=True)
    return [PartStage(random_model(config, place).to(device), close, beside) for place in (first, second)]


def two_microbatches(config, exchange, overlap, cut=2, recompute="none", split=False, device=CPU, **options):
    """The gradients of two microbatches; the second goes forward in the first stage as the first comes back."""
    first, second = stages(config, exchange, cut, recompute, device, **options)
    one, two = batch(0, device), batch(1, device)
    x, saved_first = first.forward(None, one)
    loss, saved = second.forward(x, one)
    forward, backward = ForwardPass(first, None, two), BackwardPass(second, saved, torch.ones_like(loss))
    (x, saved_two), dx = overlap(forward, backward)
    other, saved = second.forward(x, two)
    later = []
    if split:  # all input gradients, then all those of weights
        for stage, kept, grad in ((first, saved_first, dx), (second, saved, torch.ones_like(other))):
            dx, rest = stage.backward_input(kept, grad)
            later.append((stage, rest))
        later.append((first, first.backward_input(saved_two, dx)[1]))
        for stage, rest in later:
            stage.backward_weight(rest)
    else:
        first.backward(saved_first, dx)
        first.backward(saved_two, second.backward(saved, torch.ones_like(other)))
    grads = {name: p.grad for stage in (first, second) for name, p in stage.part.named_parameters()}
    return {"loss": loss, "other": other, **grads}


def assert_same(got, wanted, limit=1e-5):
    assert got.keys() == wanted.keys()
    for name in wanted:
        size = wanted[name].norm()
        assert (got[name] - wanted[name]).norm() <= limit * size + 1e-7, name


def plain(config, recompute="none"):
    """The whole model in one piece, by autograd alone."""
    model = random_model(config, Place(recompute=recompute))
    losses = []
    for seed in range(2):
        b = batch(seed)
        output, routing = model(b.inputs, b.positions, targets=b.targets)
        losses.append(close(output, routing, b))
    sum(losses).backward()
    return {"loss": losses[0].detach(), "other": losses[1].detach(), **{n: p.grad for n, p in model.named_parameters()}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_every_family_equals_plain_autograd(group_of_one, family, recompute):
    config, wanted = FAMILIES[family], plain(FAMILIES[family])
    got = two_microbatches(config, group_of_one, overlapped, recompute=recompute)
    grads = {name for name in wanted if name not in ("loss", "other")}
    assert_same({n: got[n] for n in grads}, {n: wanted[n] for n in grads})


@pytest.mark.parametrize("recompute", ["none", "attention", "experts", "layer"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_taking_turns_changes_no_bit(group_of_one, recompute, cut):
    """Also where one of the two is longer, and with a layer that has no experts (the first)."""
    for family, exchange in (("qwen3-moe", group_of_one), ("deepseek v2", group_of_one), ("deepseek v2", AtHome())):
        wanted = two_microbatches(FAMILIES[family], exchange, in_turn, cut)
        got = two_microbatches(FAMILIES[family], exchange, overlapped, cut, recompute)
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor), (family, name)


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_halves_of_a_backward_in_pieces(group_of_one, family, recompute):
    config = FAMILIES[family]
    whole = two_microbatches(config, group_of_one, overlapped)
    assert_same(two_microbatches(config, group_of_one, overlapped, recompute=recompute, split=True), whole)


def test_input_gradients_leave_weights_alone(group_of_one):
    _, second = stages(FAMILIES["qwen3-moe"], group_of_one, 2)
    x = torch.randn(2, 12, 32)
    loss, saved = second.forward(x, batch(0))
    dx, rest = second.backward_input(saved, torch.ones_like(loss))
    assert dx.shape == x.shape and all(p.grad is None for p in second.part.parameters())
    second.backward_weight(rest)
    assert all(p.grad is not None for p in second.part.parameters())


class Products(TorchDispatchMode):
    """Counts the multiplications of all matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.count += args[-2].numel() * args[-1].shape[-1]
        return function(*args, **(kwargs or {}))


def test_both_halves_of_a_backward_cost_one_whole_and_what_they_share():
    """Of a model's matrix products only one is in both halves: the gradient of the experts' activations."""
    config = FAMILIES["qwen3-moe"]
    counts = []
    for split in (False, True):
        stage = PartStage(random_model(config, Place(layers=range(2, 4), first=False)), close)
        loss, saved = stage.forward(torch.randn(2, 12, 32), batch(0))
        with Products() as counted:
            if split:
                _, rest = stage.backward_input(saved, torch.ones_like(loss))
                counts.append(counted.count)
                stage.backward_weight(rest)
            else:
                stage.backward(saved, torch.ones_like(loss))
        counts.append(counted.count)
    whole, inputs, both = counts
    shared = 2 * (2 * 12 * config.top_k) * config.hidden * config.expert_hidden
    assert both - whole == shared < 0.15 * whole
    assert 0.4 * both < inputs < 0.6 * both


TRAVELS = ("announce", "dispatch", "combine")


def test_all_that_travels_lies_beside_compute_of_the_other(group_of_one, monkeypatch):
    """Between a piece whose results travel and the piece that waits for them, the other microbatch launches compute."""
    order, lane = [], Tape.lane

    def noted(tape, name, aside):
        order.append((*name.split(), aside))
        return lane(tape, name, aside)

    monkeypatch.setattr(Tape, "lane", noted)
    first, second = stages(FAMILIES["qwen3-moe"], group_of_one, 2)
    x, _ = first.forward(None, batch(0))
    loss, saved = second.forward(x, batch(0))
    order.clear()
    overlapped(ForwardPass(first, None, batch(1)), BackwardPass(second, saved, torch.ones_like(loss)))
    assert all(entry[-1] == (entry[1] in TRAVELS) for entry in order)
    travelling = [at for at, entry in enumerate(order) if entry[1] in ("dispatch", "combine")]
    for at in travelling:
        way = order[at][0]
        own = [i for i, entry in enumerate(order) if entry[0] == way and not entry[-1]]
        made, waits = max(i for i in own if i < at), min(i for i in own if i > at)
        assert any(entry[0] != way and not entry[-1] for entry in order[made:waits]), (order[at], order)
    assert len(travelling) == 8
    # The host asks how many rows will arrive, launches compute of the other microbatch, and only then waits.
    for layer in ("0", "1"):
        asked, waited = (order.index(("forward", name, layer, True)) for name in ("announce", "dispatch"))
        between = order[asked + 1 : waited]
        assert [e[:2] for e in between] == [("backward", "experts")], between


def test_what_a_backward_has_used_is_free(group_of_one):
    first, second = stages(FAMILIES["qwen3-moe"], group_of_one, 2, recompute="attention")
    gc.disable()  # references alone must free
    try:
        x, saved_first = first.forward(None, batch(0))
        loss, saved = second.forward(x, batch(0))
        tapes = [weakref.ref(saved), weakref.ref(saved_first)]
        dx = second.backward(saved, torch.ones_like(loss))
        assert not saved.pieces
        _, rest = first.backward_input(saved_first, dx)
        first.backward_weight(rest)
        del saved, saved_first, rest
        assert [tape() for tape in tapes] == [None, None]
    finally:
        gc.enable()


def test_pieces_keep_no_more_than_one_graph():
    """Bytes that operations keep for their backward, behind a forward of the same part."""
    kept = []
    part = random_model(FAMILIES["qwen3-moe"], Place(last=False))
    for stage in (PartStage(part, close), ModuleStage(lambda x, b: close(*part(b.inputs, b.positions), b))):
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _, _tape = stage.forward(None, batch(0))
        kept.append(sum(storage.nbytes() for storage in saved.values()))
    assert kept[0] == kept[1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_gpu_two_streams_equal_one(recompute):
    """Through a NCCL group of one, again and again, while memory is given away and taken."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        config = replace(FAMILIES["qwen3-moe"], hidden=256, heads=4, head_dim=64, expert_hidden=256, experts=16)
        exchange, options = ExpertExchange(dist.group.WORLD), {"device": CUDA, "dtype": torch.bfloat16}
        wanted = two_microbatches(config, exchange, in_turn, **options)
        again = two_microbatches(config, exchange, in_turn, **options)
        exact = {name for name in wanted if torch.equal(wanted[name], again[name])}
        for _ in range(10):
            beside = torch.cuda.Stream(priority=-1)
            got = two_microbatches(config, exchange, overlapped, recompute=recompute, beside=beside, **options)
            for name in wanted:
                if name in exact:
                    assert torch.equal(got[name], wanted[name]), name
                else:
                    assert ((got[name] - wanted[name]).norm() / wanted[name].norm()).item() < 1e-3, name
        assert len(exact) > len(wanted) / 2
    finally:
        dist.destroy_process_group()
