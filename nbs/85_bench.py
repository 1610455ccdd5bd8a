# %% [markdown]
# # Benchmark: the MoE block against its floor and its peers
#
# > One shape, one machine, one run: our block, the bare matrix products, and every other implementation installed.
#
# A time in milliseconds says little by itself. What says something is its ratio to a *floor*: the six grouped
# matrix products that forward and backward cannot do without, fed with tokens that are already sorted. What a block
# takes beyond its floor is routing, sorting, moving, SwiGLU and its gradient, adding, and products that are slower.
#
# Everything is measured in one process, on the same random weights and tokens, alternating with a cleared
# cache, and every implementation's output is compared with ours, because a fast wrong block is no peer.

# %%
#| default_exp bench

# %%
#| export
import datetime
import importlib.metadata
import importlib.util
import platform
import statistics
import timeit
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pithtrain.config import UserError
from pithtrain.kernels.lang import HAS_TRITON, triton
from pithtrain.layers.experts import Experts
from pithtrain.layers.router import Router
from pithtrain.models.stages import AtHome, Exchange

# %% [markdown]
# ## Shapes
#
# Three published models' MoE blocks, by their sizes alone, and one for a CPU that is in a hurry.


# %%
#| export
class Shape(NamedTuple):
    """Sizes of one MoE block, and how many tokens go through it."""

    name: str
    hidden: int
    expert_hidden: int
    experts: int
    top_k: int
    tokens: int = 16384


SHAPES = (
    Shape("qwen3-30b-a3b", 2048, 768, 128, 8),
    Shape("deepseek-v2-lite", 2048, 1408, 64, 6),
    Shape("gpt-oss-like", 2880, 2880, 32, 4),
    Shape("tiny", 128, 128, 16, 2, 512),
)


def shape_named(name: str) -> Shape:
    """The shape of that name. Raises UserError with the known names."""
    for shape in SHAPES:
        if shape.name == name:
            return shape
    raise UserError(f"no shape is named {name!r}; known: {', '.join(shape.name for shape in SHAPES)}")


# %%
print(shape_named("qwen3-30b-a3b"))

# %% [markdown]
# On a CPU a full-size block would take minutes and tens of gigabytes, so all widths are divided by eight and
# 512 tokens are used; the result says so.


# %%
#| export
def cpu_name() -> str:
    """The processor's name, where the system tells."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def shape_for(shape: Shape, device: torch.device) -> tuple[Shape, str]:
    """The shape that is measured on this device, and a sentence on what is measured."""
    if device.type == "cuda":
        return shape, f"bf16 on {torch.cuda.get_device_name(device)}"
    said = f"no GPU here: fp32 on the CPU ({cpu_name()}), {torch.get_num_threads()} thread(s)"
    if shape.hidden > 512:
        small = shape._replace(hidden=shape.hidden // 8, expert_hidden=shape.expert_hidden // 8, tokens=512)
        return small, f"{said}, 512 tokens instead of {shape.tokens:,}, all widths divided by 8"
    return shape, said


# %%
print(shape_for(shape_named("gpt-oss-like"), torch.device("cpu")))

# %% [markdown]
# ## One problem for all
#
# Near-uniform routing falls out of random tokens and random router rows.


# %%
#| export
class Problem(NamedTuple):
    """Tokens, the gradient of the output, and the weights of one block; all but `grad` require gradients."""

    shape: Shape
    tokens: Tensor  #: (T, H)
    grad: Tensor  #: (T, H)
    router: Tensor  #: (E, H)
    gate_up: Tensor  #: (E, 2I, H)
    down: Tensor  #: (E, H, I)


def make_problem(shape: Shape, device: torch.device) -> Problem:
    """A random problem of this shape, bf16 on CUDA and fp32 elsewhere."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    T, H, I, E = shape.tokens, shape.hidden, shape.expert_hidden, shape.experts  # noqa: E741
    new = lambda *size: torch.randn(size, device=device, dtype=dtype)  # noqa: E731
    leaves = (new(T, H), new(E, H) / H**0.5, new(E, 2 * I, H) / H**0.5, new(E, H, I) / I**0.5)
    tokens, router, gate_up, down = (torch.nn.Parameter(t) for t in leaves)
    return Problem(shape, tokens, new(T, H), router, gate_up, down)


# %% [markdown]
# ## What is compared
#
# An entrant is a name and a function that, given a problem, returns a block: a function of the tokens.


# %%
#| export
Block = Callable[[Tensor], Tensor]


def pithtrain_block(problem: Problem, expert_ids: Tensor | None = None, exchange: Exchange = AtHome()) -> Block:
    """Our layers around the problem's weights; `expert_ids` (T, K) in place of the router's, tokens by `exchange`."""
    shape = problem.shape
    with torch.device("meta"):
        router = Router(shape.hidden, shape.experts, shape.top_k, renormalise=True)
        experts = Experts(shape.hidden, shape.experts, shape.expert_hidden)
    router.weight, router.bias = problem.router, torch.zeros(shape.experts, device=problem.router.device)
    experts.gate_up, experts.down = problem.gate_up, problem.down

    def block(tokens: Tensor) -> Tensor:
        routed = router(tokens)
        if expert_ids is not None:
            routed = routed._replace(expert_ids=expert_ids)
        arrived, journey = exchange.dispatch(tokens, routed, exchange.announce(routed))
        return exchange.combine(experts(arrived.tokens, arrived.expert_ids, arrived.weights), journey)

    return block


# %%
torch.set_num_threads(1)  # timings on a shared machine are steadier so
torch.manual_seed(0)
small = make_problem(SHAPES[-1], torch.device("cpu"))
print(pithtrain_block(small)(small.tokens).shape)

# %% [markdown]
# PyTorch alone, as one would write it today: sort, gather, two grouped products, scatter-add.


# %%
#| export
def torch_block(problem: Problem) -> Block:
    """The block in plain PyTorch around its grouped product."""
    E, K = problem.shape.experts, problem.shape.top_k

    def block(tokens: Tensor) -> Tensor:
        probs = torch.softmax(F.linear(tokens, problem.router).float(), dim=-1)
        weights, ids = probs.topk(K, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = ids.flatten().argsort(stable=True)
        ends = torch.bincount(ids.flatten(), minlength=E).cumsum(0).int()
        gate, up = F.grouped_mm(tokens[order // K], problem.gate_up.mT, offs=ends).chunk(2, dim=-1)
        outputs = F.grouped_mm(F.silu(gate) * up, problem.down.mT, offs=ends)
        weighted = (outputs * weights.flatten()[order, None]).to(tokens.dtype)
        return torch.zeros_like(tokens).index_add(0, order // K, weighted)

    return block


# %%
torch.testing.assert_close(torch_block(small)(small.tokens), pithtrain_block(small)(small.tokens))

# %% [markdown]
# Transformers, with its own grouped product.


# %%
#| export
def transformers_block(problem: Problem) -> Block:
    """transformers' Qwen3-MoE block around the problem's weights."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    shape = problem.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.expert_hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        experts_implementation="grouped_mm",
    )
    with torch.device("meta"):
        module = Qwen3MoeSparseMoeBlock(config)
    module.gate.weight = problem.router
    module.experts.gate_up_proj = problem.gate_up
    module.experts.down_proj = problem.down
    return lambda tokens: module(tokens[None])[0]


# %% [markdown]
# TorchTitan, whose experts are in bf16 wherever they run, and whose gate and up are two matrices: copies of ours.


# %%
#| export
def torchtitan_block(problem: Problem) -> Block:
    """TorchTitan's block around the problem's weights."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    H, I, E, K = problem.shape[1:5]  # noqa: E741
    gate = Linear.Config(in_features=H, out_features=E)
    router = TokenChoiceTopKRouter.Config(num_experts=E, gate=gate, top_k=K, score_func="softmax", route_norm=True)
    inner = GroupedExperts.Config(dim=H, hidden_dim=I, num_experts=E)
    routed = RoutedExperts.Config(
        inner_experts=inner, token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=K)
    )
    with problem.tokens.device:
        module = MoE.Config(num_experts=E, routed_experts=routed, router=router, load_balance_coeff=None).build()
    experts, (w1, w3) = module.routed_experts.inner_experts, problem.gate_up.detach().chunk(2, dim=1)
    module.router.gate.weight, experts.w2_EDF = problem.router, problem.down
    experts.w1_EFD, experts.w3_EFD = (torch.nn.Parameter(w.clone()) for w in (w1, w3))

    def block(tokens: Tensor) -> Tensor:
        experts.w1_EFD.grad = experts.w3_EFD.grad = None
        return module(tokens[None])[0]

    return block


# %% [markdown]
# Real routers are not uniform. The same block with a Zipf-like load, expert $r$ drawn in proportion to $r^{-s}$ and
# $s$ such that the hottest expert gets eight times the mean (or every token, if that is less), shows what uneven
# experts cost. The weights still come from the router, so that it is differentiated too.


# %%
#| export
def skewed_ids(shape: Shape, device: torch.device) -> Tensor:
    """expert_ids (T, K), distinct in each row, whose largest load is 8 times the mean, or T if that is less."""
    rank = torch.arange(1, shape.experts + 1, device=device).log()
    gumbel = -torch.rand(shape.tokens, shape.experts, device=device).clamp(min=1e-9).log().neg().log()
    mean, low, high = shape.tokens * shape.top_k / shape.experts, 0.0, 8.0
    for _ in range(20):
        s = (low + high) / 2
        ids = (gumbel - s * rank).topk(shape.top_k).indices
        low, high = (s, high) if torch.bincount(ids.flatten()).max() < 8 * mean else (low, s)
    return ids


# %%
load = torch.bincount(skewed_ids(SHAPES[-1]._replace(experts=32), torch.device("cpu")).flatten(), minlength=32)
print("loads over the mean:", [f"{n:.1f}" for n in (load / load.float().mean()).tolist()])


# %%
#| export
def entrants() -> dict[str, Callable[[Problem], Block]]:
    """How to build the block for a problem, ours first, and all others of these that can be imported here."""
    found = {"pithtrain": pithtrain_block, "torch": torch_block}
    peers = (
        ("transformers", "transformers.models.qwen3_moe", transformers_block),
        ("torchtitan", "torchtitan.models.common.moe", torchtitan_block),
    )
    for package, module, build in peers:
        with suppress(ImportError):  # not installed, or another release
            if importlib.util.find_spec(module):
                found[package] = build
    return found


# %%
for name, build in entrants().items():
    print(f"{name:14}{build(small)(small.tokens).norm():.4f}")

# %% [markdown]
# ## The floor
#
# Forward: up and gate as one product, and down. Backward: two for the inputs' gradients and two for the weights'.
# $2 \cdot 3 \cdot 3 \cdot T K H I$ operations in all.


# %%
#| export
def floor_products(problem: Problem) -> Callable[[], None]:
    """A function that does the six grouped products of a forward and a backward pass and nothing else."""
    shape = problem.shape
    with torch.no_grad():
        ids = F.linear(problem.tokens, problem.router).topk(shape.top_k).indices.flatten()
        order = ids.argsort(stable=True) // shape.top_k
        ends = torch.bincount(ids, minlength=shape.experts).cumsum(0).int()
        tokens, grad = problem.tokens[order], problem.grad[order]
        gate_up, down = problem.gate_up.detach(), problem.down.detach()
        product = partial(F.grouped_mm, offs=ends)
        projected = product(tokens, gate_up.mT)
        activated = projected[:, : shape.expert_hidden].contiguous()

    @torch.no_grad()
    def products() -> None:
        product(tokens, gate_up.mT)
        product(activated, down.mT)
        product(grad, down)
        product(projected, gate_up)
        product(projected.T, tokens)
        product(grad.T, activated)

    return products


# %% [markdown]
# ## Timing
#
# A graphics card's clock follows the power it has just drawn, so each entrant is measured in its own steady state: it
# runs for 0.3 seconds before anything counts. A card also warms up and cools down over seconds (`turns_ms` in
# the files shows it), and an entrant that follows the hottest one finds a slower card. So all take turns, as often as
# there are entrants: every other turn goes backwards, and each pair of turns begins with the next one. On a GPU the
# clock is the GPU's own events, 256 MB are overwritten before each repetition to empty the cache, and the host runs
# ahead, as it does in training. The median of the turns' medians is reported. Peak memory is what one pass holds beyond
# weights, tokens and output gradient.


# %%
#| export
def in_turns(names: Iterable[str], turns: int) -> Iterator[str]:
    """All names, as often as there are turns; whom each of them follows changes."""
    order = list(names)
    for turn in range(turns):
        yield from reversed(order) if turn % 2 else order
        if turn % 2:
            order = order[1:] + order[:1]


# %%
for turn in range(4):
    print(*list(in_turns("abc", 4))[3 * turn : 3 * turn + 3])


# %%
#| export
def median_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of `run`: over `repeats` on a CPU; on CUDA with a cold cache, for 10 ms times `repeats`."""
    if device.type == "cuda":
        return triton.testing.do_bench(run, warmup=300, rep=10 * repeats, return_mode="median")
    run()
    return 1e3 * statistics.median(timeit.repeat(run, number=1, repeat=repeats))


# %%
x = small.tokens.detach()
print(f"a small product: {median_ms(lambda: x @ x.T, torch.device('cpu'), 5):.2f} ms")


# %%
#| export
def one_pass(block: Block, problem: Problem) -> None:
    """Forward and backward; the gradients of the leaves are dropped behind it."""
    block(problem.tokens).backward(problem.grad)
    for leaf in (problem.tokens, problem.router, problem.gate_up, problem.down):
        leaf.grad = None


def peak_gib(block: Block, problem: Problem) -> float | None:
    """GiB that one pass holds beyond what was there before it; None where it cannot be known."""
    if not problem.tokens.is_cuda:
        return None
    one_pass(block, problem)
    with torch.no_grad():
        block(problem.tokens)  # an entrant with weights of its own drops their gradients here
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one_pass(block, problem)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


# %% [markdown]
# ## The benchmark


# %%
#| export
def bench_moe(shape: Shape, device: torch.device, repeats: int) -> dict:
    """Measure all entrants and the floor on `shape`, print a table, and return what was measured, ready for JSON."""
    shape, measured = shape_for(shape, device)
    problem = make_problem(shape, device)
    blocks = {name: build(problem) for name, build in entrants().items()}
    skewed = pithtrain_block(problem, skewed_ids(shape, device))
    runs = {"floor: grouped products alone": floor_products(problem)}
    for name, block in (blocks | {"pithtrain, hottest expert 8x mean": skewed}).items():
        runs[name] = partial(one_pass, block, problem)
    turns_ms = {name: [] for name in runs}
    for name in tqdm(list(in_turns(runs, len(runs))), desc="measurements", leave=False):
        turns_ms[name].append(median_ms(runs[name], device, repeats))
    medians = {name: statistics.median(times) for name, times in turns_ms.items()}
    floor = medians["floor: grouped products alone"]
    with torch.no_grad():
        outputs = {name: block(problem.tokens).double() for name, block in blocks.items()}
    ours = outputs["pithtrain"]
    tflop = 18 * shape.tokens * shape.top_k * shape.hidden * shape.expert_hidden / 1e12
    rows = []
    for name, ms in medians.items():
        row = {"name": name, "ms": ms, "turns_ms": turns_ms[name]}
        row |= {"ratio_to_floor": ms / floor, "tflops": tflop / ms * 1e3, "peak_gib": None, "difference": None}
        if name in blocks:
            row["peak_gib"] = peak_gib(blocks[name], problem)
            row["difference"] = ((outputs[name] - ours).norm() / ours.norm()).item()
        rows.append(row)
    packages = [name for name in blocks if name != "pithtrain"] + ["triton"] * HAS_TRITON
    result = {
        "what": "forward and backward of a MoE block: router, dispatch, experts, combine",
        "measured": measured,
        "repeats": repeats,
        "date": datetime.date.today().isoformat(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "shape": shape._asdict(),
        "rows": rows,
    }
    print(table(result))
    return result


def table(result: dict) -> str:
    """The result of `bench_moe` as lines of text."""
    s = result["shape"]
    lines = [
        f"{s['name']}: {s['tokens']} tokens, hidden {s['hidden']}, {s['experts']} experts of {s['expert_hidden']}, "
        f"top_k {s['top_k']}; {result['measured']}",
        f"{'forward + backward':34}{'ms':>9}{'of floor':>10}{'TFLOP/s':>9}{'peak GiB':>10}{'differs':>10}",
    ]
    for row in result["rows"]:
        peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        differs = "-" if row["difference"] is None else f"{row['difference']:.1e}"
        lines.append(
            f"{row['name']:34}{row['ms']:9.2f}{row['ratio_to_floor']:10.2f}{row['tflops']:9.3g}{peak:>10}{differs:>10}"
        )
    lines += [
        "ms: medians; floor: the experts' grouped matrix products alone, on sorted tokens; of floor: how many times",
        "as long; TFLOP/s: of those products; peak GiB: beyond tokens and weights, on a GPU; differs: the output,",
        "relatively, from ours",
    ]
    if absent := [p for p in ("transformers", "torchtitan") if p not in result["versions"]]:
        lines.append(f"cannot be imported here, so not compared: {', '.join(absent)}")
    if min(row["ratio_to_floor"] for row in result["rows"]) < 0.95:
        lines.append("Something was faster than its floor: the machine has other work; repeat, with OMP_NUM_THREADS=1.")
    return "\n".join(lines)


# %%
import json

result = bench_moe(SHAPES[-1], torch.device("cpu"), repeats=3)
assert json.loads(json.dumps(result)) == result
for row in result["rows"]:
    assert row["difference"] is None or row["difference"] < (2e-2 if row["name"] == "torchtitan" else 1e-5)

# %% [markdown]
# *differs* is the relative difference of the output from ours. In bf16, rounding in another order makes 5e-3
# (TorchTitan); torch and transformers differ by 4e-2 to 5e-2: they round the logits to bf16 before they choose, and
# where two experts are nearly tied they choose the other one.
#
# At this size little can be concluded: 8 times the mean is every token, which makes one product large and so
# efficient, and overheads decide between the rest. The GPUs' figures below are of real sizes.
#
# The same as a picture:

# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(7, 2.4))
ax.barh(
    [row["name"] for row in result["rows"]],
    [row["ms"] for row in result["rows"]],
    color=["0.7", *(f"C{i}" for i in range(len(result["rows"]) - 2)), "C0"],
)
ax.axvline(result["rows"][0]["ms"], color="0.5", lw=1)
ax.set(title=f"MoE block, {result['shape']['name']}: {result['measured']}", xlabel="milliseconds, forward + backward")
ax.invert_yaxis()
fig

# %% [markdown]
# ## On an H200 and an H100
#
# `pithtrain bench moe --shape NAME --json FILE` writes what it measured. The files `docs/benchmarks/moe-*.json` come
# from an H200 and, a day older and without TorchTitan, an H100; here they are, as multiples of each shape's floor. The
# part of a bar beyond 1 is what an implementation adds.

# %%
from pathlib import Path

home = next((p for p in [Path.cwd(), *Path.cwd().parents] if (p / "docs" / "benchmarks").is_dir()), None)
files = sorted(home.glob("docs/benchmarks/moe-*.json")) if home else []
fig, axes = plt.subplots(2, 3, figsize=(10, 4.6), layout="constrained")
for ax, file in zip(axes.T.flat, files, strict=False):
    recorded = json.loads(file.read_text())
    bars = ax.barh([r["name"] for r in recorded["rows"]], [r["ratio_to_floor"] for r in recorded["rows"]])
    ax.bar_label(bars, [f"{r['ratio_to_floor']:.2f}: {r['ms']:.1f} ms" for r in recorded["rows"]], fontsize=7)
    ax.axvline(1, color="0.5", lw=1)
    card = (recorded["measured"].partition("NVIDIA ")[2] or "CPU").split()[0]
    ax.set(title=f"{recorded['shape']['name']}, {card}", xlim=(0, 3.9))
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelleft=ax in axes[:, 0], labelsize=8)
for ax in axes[1]:
    ax.set_xlabel("time / floor")
fig

# %% [markdown]
# By NVIDIA's data sheets both cards multiply equally fast, and the H200's memory is faster, 4.8 TB/s instead of 3.35:
# torch and transformers add 13 to 18 % fewer milliseconds there. Smaller differences between files mean little: such
# products run a card into its power limit, and the figures move by several percent from one run to the next.

# %% [markdown]
# ## Dispatch
#
# What [expert parallelism](41_expert_parallel.py) adds on a rank, apart from the wire (`tools/dispatch_cost.py`
# measures it). First the [kernels](16_dispatch_kernel.py) that find and add up rows, as on one rank of eight, beside
# the time in which an H200's memory moves the bytes that they cannot avoid moving. `gather_sum` is near the memory's
# speed. `plan_rows`, two launches over 8 MB, is bound by latency in a CUDA graph, and by the host when launched alone;
# in training the host runs ahead. Then the whole block, forward and backward, at home and through an exchange
# over a group of one rank: every token is gathered, sent by the rank to itself, brought back and added up. These two
# were measured once, one after the other; a card that is still warming up favours the first by a few percent.

# %%
file = home and home / "docs" / "benchmarks" / "dispatch-h200.json"
if file and file.exists():
    measured = json.loads(file.read_text())
    shape = measured["shape"]
    print(f"{shape['tokens']} tokens, top_k {shape['top_k']} of {shape['experts']}; {measured['measured']}")
    for row in measured["kernels"]:
        graph = f"{1e3 * row['ms_graph']:6.1f} us in a graph" if row["ms_graph"] else ""
        print(f"{row['name']:22} {row['bytes'] / 4.8e6:6.1f} us of bytes {1e3 * row['ms']:7.1f} us launched {graph}")
    for row in measured["blocks"]:
        print(f"block {row['name']:24} {row['ms']:.2f} ms, {row['peak_gib']:.2f} GiB")
