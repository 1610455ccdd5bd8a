"""What expert parallelism adds on a rank, apart from the wire: its kernels beside their bytes, and the whole block.

    .venv/bin/python tools/dispatch_cost.py --json docs/benchmarks/dispatch-h200.json

The kernels find and add up rows as on one rank of eight. Then the MoE block runs, forward and backward, at home and
through an exchange over a group of one rank: every token is gathered, sent by the rank to itself, and added up.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measuring import graph_of

from pithtrain.bench import (
    Shape,
    make_problem,
    median_ms,
    one_pass,
    peak_gib,
    pithtrain_block,
    shape_for,
    shape_named,
)  # fmt: skip
from pithtrain.kernels.dispatch import gather_sum, plan_rows, reference_gather_sum, reference_plan_rows
from pithtrain.models.stages import AtHome
from pithtrain.parallel.expert import ExpertExchange


def bench_dispatch(shape: Shape, device: torch.device, ranks: int = 8, repeats: int = 20) -> dict:
    """Measure dispatch's kernels for one of `ranks` and the block through a group of one; ready for JSON.

    This process must have no process group.
    """
    shape, measured = shape_for(shape, device)
    problem, cuda = make_problem(shape, device), device.type == "cuda"
    T, H, K = shape.tokens, shape.hidden, shape.top_k
    with torch.no_grad():
        ids = F.linear(problem.tokens, problem.router).topk(K).indices
    own = shape.experts // ranks
    plan, true = plan_rows(ids, own, ranks), reference_plan_rows(ids, own, ranks)
    P, rows, slots = len(true.rows), true.rows, plan.slots
    values = torch.randn(P, H, device=device, dtype=problem.tokens.dtype)
    plan_bytes = 8 * T * K + 4 * T * ranks + 8 * P + 8 * P * K + 8 * ranks  # ids in; slots, rows, local ids, counts out
    sum_bytes = (P + T) * H * values.element_size() + 4 * T * ranks
    kernels = []
    for name, run, moved, captured in (
        ("plan_rows", lambda: plan_rows(ids, own, ranks), plan_bytes, cuda),
        ("plan_rows in PyTorch", lambda: reference_plan_rows(ids, own, ranks), plan_bytes, False),
        ("gather_sum", lambda: gather_sum(values, rows, slots), sum_bytes, cuda),
        ("gather_sum in PyTorch", lambda: reference_gather_sum(values, rows, slots), sum_bytes, False),
    ):
        row = {"name": name, "bytes": moved, "ms": median_ms(run, device, repeats)}
        kernels.append(row | {"ms_graph": median_ms(graph_of(run), device, repeats) if captured else None})
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exchanges = {"at home": AtHome(), "through a group of one": ExpertExchange(dist.group.WORLD)}
        blocks = []
        for name, exchange in exchanges.items():
            block = pithtrain_block(problem, exchange=exchange)
            row = {"name": name, "peak_gib": peak_gib(block, problem)}
            blocks.append(row | {"ms": median_ms(lambda block=block: one_pass(block, problem), device, repeats)})
    finally:
        dist.destroy_process_group()
    packages = ["torch", "triton"]
    return {
        "what": "expert-parallel dispatch: kernels for one rank of several, and the MoE block, forward and backward",
        "measured": measured,
        "date": datetime.date.today().isoformat(),
        "versions": {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)},
        "shape": shape._asdict(),
        "ranks": ranks,
        "rows": P,
        "kernels": kernels,
        "blocks": blocks,
    }


def describe_dispatch(result: dict, bytes_per_second: float = 4.8e12) -> str:
    """The result of `bench_dispatch` as lines of text, bytes beside their time at a memory's speed (an H200's)."""
    s = result["shape"]
    lines = [
        f"{s['tokens']} tokens, top_k {s['top_k']} of {s['experts']} experts, {result['ranks']} ranks, "
        f"{result['rows']} rows of {s['hidden']}; {result['measured']}",
        f"{'':24}{'MB':>8}{f'us at {bytes_per_second / 1e12} TB/s':>18}{'us, graph':>12}{'us, launched':>14}",
    ]
    for row in result["kernels"]:
        graph = "" if row["ms_graph"] is None else f"{1e3 * row['ms_graph']:.1f}"
        least = 1e6 * row["bytes"] / bytes_per_second
        lines.append(f"{row['name']:24}{row['bytes'] / 1e6:8.2f}{least:18.1f}{graph:>12}{1e3 * row['ms']:14.1f}")
    for row in result["blocks"]:
        peak = "" if row["peak_gib"] is None else f", peak {row['peak_gib']:.2f} GiB"
        lines.append(f"block {row['name']:24}{row['ms']:8.2f} ms{peak}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-30b-a3b", help="name of the shape (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = bench_dispatch(shape_named(arguments.shape), here, repeats=arguments.rounds)
    print(describe_dispatch(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
