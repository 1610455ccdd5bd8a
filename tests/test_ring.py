"""Ring attention on 2 and 4 processes against one rank with whole sequences in float64: values and all gradients."""

import random
import tempfile
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.config import UserError
from pithtrain.kernels.attention import pieces
from pithtrain.layers.attention import OneRank
from pithtrain.parallel.ring import Passing, Ring, zigzag, zigzag_runs

PACKED = [0, 3, 4, 11, 24, 31, 48]  # two rows of 24 tokens; chunks of 3 (4 ranks) and 6 (2 ranks)
SINGLE = [*range(0, 24, 2), 24, 48]

NAMED = {
    "one head": dict(heads=1, kv_heads=1),
    "grouped": dict(),
    "multi-query": dict(kv_heads=1),
    "narrow values": dict(wide=3),
    "wide values": dict(wide=9),
    "one row, one token a chunk": dict(rows=1, chunk=1),
    "sinks": dict(sinks=True),
    "strong sinks": dict(sinks=30.0),
    "window of one": dict(window=1),
    "window within a chunk": dict(window=2),
    "window of a chunk": dict(window=3),
    "window over chunks": dict(window=8),
    "window of all but one": dict(window=23),
    "window of all": dict(window=24),
    "window with sinks": dict(window=5, sinks=True),
    "documents": dict(documents=PACKED),
    "short documents": dict(documents=SINGLE),
    "documents, window, sinks": dict(documents=PACKED, window=4, sinks=True),
    "large scores": dict(size=6.0),
    "latent": dict(latent=5),
    "latent, documents": dict(latent=5, documents=PACKED),
    "latent, narrow values": dict(latent=5, wide=3),
}


def random_case(seed, ranks):
    draw = random.Random(seed)
    kv_heads, rows, chunk = draw.choice([1, 2, 3]), draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 5])
    length = 2 * ranks * chunk
    cuts = {draw.randrange(rows * length) for _ in range(draw.choice([0, 2, 9]))} | set(
        range(0, rows * length + 1, length)
    )
    case = dict(rows=rows, chunk=chunk, kv_heads=kv_heads, heads=kv_heads * draw.choice([1, 2, 4]), seed=seed)
    case |= dict(features=draw.choice([2, 8]), wide=draw.choice([2, 5]), documents=draw.choice([None, sorted(cuts)]))
    return case | dict(window=draw.choice([None, draw.randint(1, length + 1)]), sinks=draw.choice([False, True]))


def compare(
    ring, heads=4, kv_heads=2, rows=2, chunk=None, features=8, wide=8, window=None, documents=None, sinks=False,
    latent=None, size=1.0, seed=0,
):  # fmt: skip
    """The largest relative errors (fp32, float64) of this rank's output and gradients."""
    torch.manual_seed(seed)
    length = 24 if chunk is None else 2 * ring.size * chunk
    shapes = dict(q=(rows, heads, length, features))
    if latent is None:
        shapes |= dict(k=(rows, kv_heads, length, features), v=(rows, kv_heads, length, wide))
        shapes |= dict(sinks=(heads,)) if sinks else {}
        extra = dict(window=window)
    else:
        shapes |= dict(k=(rows, length, latent), v=(rows, length, 2))
        shapes |= dict(expand=(heads, features - 2 + wide, latent))
        extra = {}
    given = {name: size * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    if sinks:
        given["sinks"] = given["sinks"] * float(sinks)
    upstream = torch.randn(rows, heads, length, wide, dtype=torch.float64)
    extra |= dict(scale=0.3, documents=None if documents is None else torch.tensor(documents, dtype=torch.int32))
    mine = zigzag(length, ring.size, ring.rank)

    def run(core, dtype, share):
        inputs = {n: (x if n in ("sinks", "expand") else share(x)).to(dtype).requires_grad_() for n, x in given.items()}
        out = core.attend(**inputs, **extra)
        grads = torch.autograd.grad(out, inputs.values(), share(upstream).to(dtype))
        return [out.detach(), *grads]

    def own(x):
        return x.index_select(1 if latent is not None and x.ndim == 3 else 2, mine)

    true = run(OneRank(), torch.float64, lambda x: x)
    errors = []
    for dtype in (torch.float32, torch.float64):
        worst = 0.0
        for name, a, b in zip(("out", *given), run(ring, dtype, own), true, strict=True):
            assert a.dtype == dtype, name
            if name in ("sinks", "expand"):
                dist.all_reduce(a)
            else:
                b = own(b)
            # Gradients that vanish (a single key leaves its query no choice) are judged by what they are made of.
            floor = 1e-2 * b.numel() ** 0.5 * size
            worst = max(worst, ((a.double() - b).norm() / max(b.norm(), floor)).item() if a.isfinite().all() else 1e9)
        errors.append(worst)
    return errors


def exchange(ring):
    """Largest differences of whole_sequence, its way back, and the gradient through both."""
    length = 4 * ring.size
    x = torch.randn(2, length, 2 * ring.size, 3, generator=torch.Generator().manual_seed(0))
    weights, mine = torch.arange(float(x.numel())).view_as(x), zigzag(length, ring.size, ring.rank)
    heads = ring.held(2 * ring.size)
    assert heads == slice(2 * ring.rank, 2 * ring.rank + 2)
    own = x[:, mine].requires_grad_()
    whole = ring.whole_sequence(own)
    back = ring.own_sequence(whole)
    (grad,) = torch.autograd.grad((whole * weights[:, :, heads]).sum(), own)
    (round_trip,) = torch.autograd.grad((ring.own_sequence(ring.whole_sequence(own)) * weights[:, mine]).sum(), own)
    pairs = (whole, x[:, :, heads]), (back, own), (grad, weights[:, mine]), (round_trip, weights[:, mine])
    return [float((a - b).abs().max()) for a, b in pairs]


def refusals(ring):
    q, kept, said = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 4, 4), []
    for refused in (
        lambda: ring.attend(q, q, q, 1.0),
        lambda: ring.attend(kept[:, :, :2], kept, kept, 1.0),
        lambda: ring.whole_sequence(torch.randn(1, 2, ring.size + 1, 1)),
        lambda: ring.whole_sequence(torch.randn(1, 3, ring.size, 1)),
    ):
        try:
            refused()
            said.append("nothing")
        except UserError as error:
            said.append(str(error))
    return said


def worker(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    ring = Ring(dist.new_group(list(range(ranks))[::-1], use_local_synchronization=False))
    found = {name: compare(ring, **case) for name, case in NAMED.items()}
    found["random"] = [compare(ring, **random_case(seed, ranks)) for seed in range(20)]
    found["exchange"], found["refusals"], found["bytes"] = exchange(ring), refusals(ring), traffic(ring)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def traffic(ring):
    """Numbers that this rank sends for latents and for keys and values, forward alone."""
    sent, pass_on = [0], ring.pass_on

    def counted(tensors):
        sent[-1] += sum(t.numel() for t in tensors)
        return pass_on(tensors)

    ring.pass_on = counted
    q, kv = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    ring.attend(q, kv, kv, 1.0)
    sent.append(0)
    ring.attend(q, torch.randn(1, 6, 5), torch.randn(1, 6, 2), 1.0, expand=torch.randn(4, 6 + 8, 5))
    ring.pass_on = pass_on
    return sent


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def results(request):
    """What every rank found, with processes started once."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, (request.param, folder), nprocs=request.param, start_method="forkserver")
        yield [torch.load(f"{folder}/{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", NAMED)
def test_equals_one_rank(results, name):
    # Scores beyond 100, whose exponential fp32 cannot hold, are rounded 100 times as coarsely as those near 1.
    limits = (1e-4, 1e-12) if name == "large scores" else (1e-5, 1e-13)
    for rank, found in enumerate(results):
        single, double = found[name]
        assert single < limits[0] and double < limits[1], f"rank {rank}: {single:.1e} in fp32, {double:.1e} in float64"


def test_equals_one_rank_in_random_cases(results):
    for rank, found in enumerate(results):
        for seed, (single, double) in enumerate(found["random"]):
            assert single < 1e-5 and double < 1e-13, f"rank {rank}: {random_case(seed, len(results))}"


def test_sequence_shards_for_head_shards(results):
    for found in results:
        assert found["exchange"] == [0.0, 0.0, 0.0, 0.0]


def test_refusals_name_the_numbers(results):
    ranks = len(results)
    for found in results:
        odd, cache, heads, odd_exchange = found["refusals"]
        assert odd == odd_exchange
        assert f"{3 * ranks} tokens over {ranks} context-parallel ranks" in odd and f"multiple of {2 * ranks}" in odd
        assert "cp = 1" in cache
        assert f"{ranks + 1} heads cannot be shared by {ranks}" in heads


def test_blocks_travel_as_they_are(results):
    """Grouped keys are not copied for each query head, and latents are not expanded, before they travel."""
    hops = len(results) - 1
    for found in results:
        assert found["bytes"] == [hops * 2 * (2 * 6 * 8), hops * 6 * (5 + 2)]


@pytest.fixture(scope="module")
def ring_of_one():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield Ring(dist.group.WORLD)
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["grouped", "documents, window, sinks", "latent"])
def test_a_ring_of_one(ring_of_one, name):
    single, double = compare(ring_of_one, **NAMED[name])
    assert single < 1e-5 and double < 1e-13


class Loop(Ring):
    """A rank of a ring whose blocks are all in this process; what it would pass on is kept."""

    def __init__(self, rank, blocks):
        self.rank, self.size, self.blocks, self.gathered = rank, len(blocks), blocks, {}

    def hops(self, block):
        for hop in range(self.size):
            source = (self.rank - hop) % self.size
            yield source, self.blocks[source]

    def pass_on(self, tensors):
        self.gathered[(self.rank - len(self.gathered)) % self.size] = tensors
        return Passing([], [], [torch.zeros_like(t) for t in tensors])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "features, wide, kv_heads, latent, window",
    [
        (64, 64, 2, None, None),
        (64, 64, 2, None, 24),
        (64, 64, 2, None, 200),
        (48, 32, 4, None, 200),
        (48, 32, 4, 40, None),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_in_one_process(device, features, wide, kv_heads, latent, window, packed):
    """On a GPU these are FlashAttention's kernels, on a CPU the plain mathematics; both against float64."""
    torch.manual_seed(0)
    rows, heads, length, ranks = 2, 4, 512, 4
    given = dict(q=torch.randn(rows, heads, length, features))
    if latent is None:
        given |= dict(k=torch.randn(rows, kv_heads, length, features), v=torch.randn(rows, kv_heads, length, wide))
        given |= dict(sinks=torch.randn(heads))
        extra, replicated = dict(window=window), ("sinks",)
    else:
        given |= dict(k=torch.randn(rows, length, latent), v=torch.randn(rows, length, 16))
        given |= dict(expand=torch.randn(heads, features - 16 + wide, latent) / latent**0.5)
        extra, replicated = {}, ("expand",)
    given = {name: x.to(device, torch.bfloat16) for name, x in given.items()}
    extra |= dict(documents=torch.tensor([0, 5, 70, 300, 512, 1024], dtype=torch.int32) if packed else None)
    extra |= dict(scale=features**-0.5)
    upstream = torch.randn(rows, heads, length, wide, device=device, dtype=torch.bfloat16)

    def own(x, rank):
        return x.index_select(x.ndim - 2, zigzag(length, ranks, rank).to(device))

    doubles = {name: x.double().requires_grad_() for name, x in given.items()}
    true = OneRank().attend(**doubles, **extra)
    true_grads = dict(zip(given, torch.autograd.grad(true, doubles.values(), upstream.double()), strict=True))
    blocks = [[own(given[name], rank) for name in ("k", "v")] for rank in range(ranks)]
    totals = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in given.items()}

    def error(a, b):
        return ((a.double() - b).norm() / b.norm()).item()

    for rank in range(ranks):
        ring, here = Loop(rank, blocks), zigzag(length, ranks, rank).to(device)
        inputs = {n: (x if n in replicated else own(x, rank)).detach().requires_grad_() for n, x in given.items()}
        out = ring.attend(**inputs, **extra)
        assert error(out, own(true, rank)) < 1e-2
        grads = dict(zip(inputs, torch.autograd.grad(out, inputs.values(), own(upstream, rank)), strict=True))
        totals["q"][:, :, here] = grads["q"].double()
        for name in replicated:
            totals[name] += grads[name]
        for source, gathered in ring.gathered.items():
            for name, part in zip(("k", "v"), gathered, strict=True):
                totals[name].index_add_(part.ndim - 2, zigzag(length, ranks, source).to(device), part.double())
    for name, total in totals.items():
        assert error(total, true_grads[name]) < 1e-2, name


@given(ranks=st.integers(1, 6), chunk=st.integers(1, 5))
def test_zigzag_shares_a_sequence(ranks, chunk):
    shares = [zigzag(2 * ranks * chunk, ranks, rank) for rank in range(ranks)]
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(2 * ranks * chunk))
    assert all((share.diff() > 0).all() and len(share) == 2 * chunk for share in shares)


@settings(deadline=None)
@given(ranks=st.integers(1, 5), chunk=st.integers(1, 5))
def test_every_rank_does_the_same_work_in_every_hop(ranks, chunk):
    length = 2 * ranks * chunk
    owned = [zigzag_runs(length, ranks, rank) for rank in range(ranks)]
    for hop in range(ranks):
        scores = {
            sum(p.keys.stop - p.keys.start for p in pieces(owned[r], owned[(r - hop) % ranks], 1, length, tile=1))
            for r in range(ranks)
        }
        assert scores == {2 * chunk * chunk + (chunk if hop == 0 else 0)}


@pytest.mark.parametrize("length, ranks", [(7, 1), (12, 4), (2, 2), (8, 3)])
def test_lengths_that_cannot_be_cut_are_refused(length, ranks):
    with pytest.raises(UserError, match=f"sequence of {length} tokens .* multiple of {2 * ranks}"):
        zigzag(length, ranks, 0)


def test_what_documents_hide_from_a_rank_is_not_computed():
    """Documents of a chunk each: no rank needs another's keys."""
    owned = [zigzag_runs(16, 4, rank) for rank in range(4)]
    documents = torch.arange(0, 17, 2)
    for here, there in pairwise(owned):
        assert pieces(here, there, 1, 16, documents=documents) == []
        assert len(pieces(here, here, 1, 16, documents=documents)) == 2
