"""ExpertExchange on 2 and 4 processes against AtHome with all experts in float64: outputs and all gradients."""

import random
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pithtrain.config import UserError
from pithtrain.kernels.expert_mlp import reference_expert_mlp
from pithtrain.layers.experts import ExpertMLP
from pithtrain.layers.router import Routed
from pithtrain.models.stages import AtHome
from pithtrain.parallel.expert import ExpertExchange

NAMES = ("output", "tokens", "weights", "gate_up", "down")

# `only` names the experts that are chosen, as a function of (ranks, experts of a rank); `tokens` those of each rank.
NAMED = {
    "balanced": dict(),
    "one token": dict(tokens=lambda rank: 1),
    "one expert each": dict(own=1, top_k=1),
    "more choices than ranks": dict(own=5, top_k=7),
    "every expert": dict(own=2, top_k=-1),
    "the last rank gets everything": dict(top_k=3, only=lambda n, own: range((n - 1) * own, n * own)),
    "the first rank gets everything": dict(top_k=3, only=lambda n, own: range(own)),
    "one expert gets everything": dict(top_k=1, only=lambda n, own: [own]),
    "no tokens on the first rank": dict(tokens=lambda rank: 0 if rank == 0 else 9),
    "tokens on the last rank alone": dict(tokens=lambda rank: 7 * (rank == dist.get_world_size() - 1)),
    "no tokens there, no rows here": dict(
        tokens=lambda rank: 0 if rank == 0 else 5, top_k=2, only=lambda n, own: range((n - 1) * own, n * own)
    ),
    "wide tokens": dict(hidden=33, tokens=lambda rank: 40 + rank),
}


def random_case(seed, ranks):
    draw = random.Random(seed)
    own = draw.choice([1, 2, 3, 6])
    liked = draw.sample(range(ranks * own), draw.randint(1, ranks * own))
    loads = [draw.choice([0, 1, 5, 17]) for _ in range(ranks)]
    sizes = dict(own=own, top_k=draw.randint(1, len(liked)), hidden=draw.choice([1, 8, 20]), seed=seed)
    return sizes | dict(only=lambda n, own: liked, tokens=lambda rank: loads[rank])


def compare(group, own=4, top_k=3, hidden=16, tokens=lambda rank: 12, only=lambda n, own: range(n * own), seed=0):
    """This rank's relative errors by name, and whether rows travelled once for each rank that a token visits."""
    generator, ranks, rank = torch.Generator().manual_seed(seed), group.size(), group.rank()
    new = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    experts, wide, loads, chosen = ranks * own, 6, [tokens(r) for r in range(ranks)], list(only(ranks, own))
    T, K = sum(loads), len(chosen) if top_k == -1 else top_k
    order = torch.rand(T, len(chosen), generator=generator).argsort(dim=1)[:, :K]
    ids, probs = torch.tensor(chosen)[order], torch.rand(T, experts, generator=generator)
    x, weights, upstream = new(T, hidden), torch.rand(T, K, generator=generator).double(), new(T, hidden)
    gate_up, down = new(experts, 2 * wide, hidden), new(experts, hidden, wide)

    def run(exchange, mlp, here, held, dtype):
        """Output and gradients for the tokens `here` and the experts `held`."""
        given = (x[here], weights[here], gate_up[held], down[held])
        x_, w_, g_, d_ = (t.to(dtype).clone().requires_grad_() for t in given)
        routed = Routed(w_, ids[here], probs[here], probs.new_zeros(0))
        arrived, journey = exchange.dispatch(x_, routed, exchange.announce(routed))
        output = exchange.combine(mlp(arrived.tokens, arrived.expert_ids, arrived.weights, g_, d_), journey)
        grads = torch.autograd.grad(output, (x_, w_, g_, d_), upstream[here].to(dtype))
        return [output.detach(), *grads], journey

    true, _ = run(AtHome(), reference_expert_mlp, slice(None), slice(None), torch.float64)
    exchange = ExpertExchange(group)
    held = exchange.share(experts)
    assert held == range(rank * own, rank * own + own)
    here, held = slice(sum(loads[:rank]), sum(loads[: rank + 1])), slice(held.start, held.stop)
    got, journey = run(exchange, ExpertMLP.apply, here, held, torch.float32)
    visits = lambda start, load, r: sum((ids[t] // own == r).any().item() for t in range(start, start + load))  # noqa: E731
    assert journey.sent == [visits(here.start, loads[rank], r) for r in range(ranks)]
    assert journey.received == [visits(sum(loads[:r]), loads[r], rank) for r in range(ranks)]
    errors = {}
    for name, part, a, b in zip(NAMES, (here, here, here, held, held), got, true, strict=True):
        size, b = b.norm() / max(b.numel(), 1) ** 0.5, b[part]
        assert a.shape == b.shape and a.isfinite().all(), name
        floor = 0.1 * size * max(b.numel(), 1) ** 0.5  # a share that cancels is judged by the size of the whole
        errors[name] = ((a.double() - b).norm() / max(b.norm(), floor, 1e-30)).item()
    return errors


def worker(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    group = dist.new_group(list(range(ranks)))
    found = {name: compare(group, **case) for name, case in NAMED.items()}
    found["random"] = [compare(group, **random_case(seed, ranks)) for seed in range(30)]
    try:
        ExpertExchange(group).share(ranks + 1)
    except UserError as error:
        found["refusal"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def results(request):
    """What every rank found, with processes started once."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, (request.param, folder), nprocs=request.param, start_method="forkserver")
        yield [torch.load(f"{folder}/{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", NAMED)
def test_equals_all_experts_at_home(results, name):
    for rank, found in enumerate(results):
        assert max(found[name].values()) < 1e-5, f"rank {rank}: {found[name]}"


def test_equals_all_experts_at_home_in_random_cases(results):
    for rank, found in enumerate(results):
        for seed, errors in enumerate(found["random"]):
            assert max(errors.values()) < 1e-5, f"rank {rank}, seed {seed}: {errors}"


def test_experts_that_cannot_be_shared_are_refused(results):
    for found in results:
        assert found["refusal"] == f"mesh.ep: {len(results)} does not divide model.experts, {len(results) + 1}"


@pytest.mark.gpu
def test_gpu_a_group_of_one_equals_home_and_waits_once(monkeypatch):
    from pithtrain.kernels.expert_mlp import triton_expert_mlp
    from pithtrain.parallel import expert

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        torch.manual_seed(0)
        new = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        x, gate_up, down, upstream = new(1000, 256), new(8, 256, 256) / 16, new(8, 256, 128) / 11, new(1000, 256)
        weights, ids = torch.rand(1000, 8, device="cuda").softmax(dim=1).topk(3)

        def run(exchange):
            leaves = [t.detach().requires_grad_() for t in (x, weights, gate_up, down)]
            routed = Routed(leaves[1], ids, weights.new_zeros(1000, 8), weights.new_zeros(8))
            arrived, journey = exchange.dispatch(leaves[0], routed, exchange.announce(routed))
            output = triton_expert_mlp(arrived.tokens, arrived.expert_ids, arrived.weights, *leaves[2:])
            output = exchange.combine(output, journey)
            return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]

        exchange, waits, wait = ExpertExchange(dist.group.WORLD), [], expert.wait_for_counts
        monkeypatch.setattr(expert, "wait_for_counts", lambda a: (waits.append(a.counts.numel()), wait(a))[1])
        run(exchange)
        waits.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = run(exchange)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert waits == [2]
        for name, a, b in zip(NAMES, got, run(AtHome()), strict=True):
            assert torch.equal(a, b), name
    finally:
        dist.destroy_process_group()
