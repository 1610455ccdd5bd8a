"""Each product of the expert MLP alone on a GPU: PyTorch's grouped one, ours gathering, ours on rows in order.

python tools/expert_products.py FILE  writes the JSON that nbs/12_expert_mlp.py prints.
"""

import datetime
import json
import statistics
import sys

import torch
import torch.nn.functional as F

from pithtrain.bench import SHAPES, Shape, make_problem, median_ms
from pithtrain.kernels import expert_mlp as mlp
from pithtrain.kernels.lang import triton
from pithtrain.kernels.router import triton_route
from pithtrain.kernels.sort import sort_pairs


@torch.no_grad()
def products(shape: Shape, device: torch.device) -> list[dict]:
    """Rows of product, and median ms of each way to do it; None where there is no such way."""
    p = make_problem(shape, device)
    weights, ids, *_ = triton_route(p.tokens, p.router, shape.top_k)
    order = sort_pairs(ids, shape.experts, mlp.blocks_for(p.tokens).rows)
    ends, rows, grad = order.offsets[1:], mlp.dispatch(p.tokens, order), mlp.dispatch(p.grad, order)
    projected, activated = mlp.up_projection(rows, p.gate_up, order, in_order=True)
    d_projected, scaled, _ = mlp.activation_gradient(grad, p.down, weights, projected, order, in_order=True)
    mm, activation_gradient = F.grouped_mm, mlp.activation_gradient
    ways = {
        "up": (
            lambda: mm(rows, p.gate_up.transpose(1, 2), offs=ends),
            lambda: mlp.up_projection(p.tokens, p.gate_up, order),
            lambda: mlp.up_projection(rows, p.gate_up, order, in_order=True),
        ),
        "down": (
            lambda: mm(activated, p.down.transpose(1, 2), offs=ends),
            None,
            lambda: mlp.grouped_product(activated, p.down, order, transposed=True),
        ),
        "d activated": (
            lambda: mm(grad, p.down, offs=ends),
            lambda: activation_gradient(p.grad, p.down, weights, projected, order),
            lambda: activation_gradient(grad, p.down, weights, projected, order, in_order=True),
        ),
        "d tokens": (
            lambda: mm(d_projected, p.gate_up, offs=ends),
            None,
            lambda: mlp.grouped_product(d_projected, p.gate_up, order, transposed=False),
        ),
        "d gate and up": (
            lambda: mm(d_projected.T, rows, offs=ends),
            lambda: mlp.weight_gradient(d_projected, p.tokens, order, False, rows.dtype),
            None,
        ),
        "d down": (
            lambda: mm(grad.T, scaled, offs=ends),
            lambda: mlp.weight_gradient(scaled, p.grad, order, True, rows.dtype),
            None,
        ),
        "dispatch": (None, None, lambda: mlp.dispatch(p.tokens, order)),
    }
    names = ("grouped_mm", "gathering", "in_order")
    turns = []
    for _ in range(3):
        turns.append({k: [run and median_ms(run, device, 20) for run in runs] for k, runs in ways.items()})
    middle = lambda times: statistics.median(times) if times[0] else None  # noqa: E731
    return [{"product": k} | {n: middle([turn[k][i] for turn in turns]) for i, n in enumerate(names)} for k in ways]


if __name__ == "__main__":
    device = torch.device("cuda")
    measured = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__.split("+")[0], "triton": triton.__version__},
        "date": datetime.date.today().isoformat(),
        "shapes": {shape.name: products(shape, device) for shape in SHAPES if shape.hidden > 512},
    }
    with open(sys.argv[1], "w") as file:
        json.dump(measured, file, indent=2)
        file.write("\n")
