"""Kernels that nothing but memory holds up, AdamW and the rotation of heads, beside the same in PyTorch, on a GPU.

python tools/memory_kernels.py FILE  writes the JSON that nbs/17_rotary_kernel.py and nbs/18_adamw_kernel.py print.
"""

import datetime
import json
import statistics
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
from measuring import graph_of

from pithtrain.bench import in_turns, median_ms
from pithtrain.config import OptimizerConfig
from pithtrain.layers import rotary
from pithtrain.train.optimizer import make_optimizer


def adamw_steps():
    """A clipped step of a model of 2^28 parameters, by the kernel and by torch; the bytes that must move."""
    parameters = 1 << 28
    weight = torch.nn.Parameter(torch.randn(parameters // 2048, 2048))
    weight.grad = torch.randn_like(weight)
    kernel = make_optimizer({"weight": weight}, OptimizerConfig())
    fused = torch.optim.AdamW([weight], betas=(0.9, 0.95), fused=True)
    kernel.grad_scale = fused.grad_scale = torch.tensor(1.5)
    return kernel.step, fused.step, 28 * parameters


def rotations(heads: int, head_dim: int, neighbours: bool):
    """Queries or keys of 4 rows of 4,096 tokens turned, and their gradient back, by the kernel and by PyTorch."""
    x = torch.randn(4, 4096, heads, head_dim, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(4, heads, 4096, head_dim, dtype=torch.bfloat16).transpose(1, 2)  # as attention leaves it
    table = rotary.rotary_table(torch.arange(4096), head_dim, 10_000.0)
    rotate = partial(rotary.rotate, neighbours=neighbours)

    def both() -> None:
        x.grad = None
        rotate(x, *table).backward(grad)

    kernel = graph_of(both)
    with patch.object(rotary, "kernels_serve", lambda _: False):
        plain = graph_of(both)
    return kernel, plain, 4 * 2 * x.numel() + 2 * 4 * 2 * table[0].numel()


if __name__ == "__main__":
    rows = []
    for name, make in (
        ("AdamW, 268 million parameters, clipped", adamw_steps),
        ("rotation, 32 heads of 128, halves", lambda: rotations(32, 128, False)),
        ("rotation, 4 heads of 128, halves", lambda: rotations(4, 128, False)),
        ("rotation, 16 heads of 64, neighbours", lambda: rotations(16, 64, True)),
    ):
        torch.manual_seed(0)
        with torch.device("cuda"):
            kernel, plain, moved = make()
        entrants = {name: kernel, f"{name}, PyTorch": plain}
        times = {entrant: [] for entrant in entrants}
        for entrant in in_turns(entrants, 6):
            times[entrant].append(median_ms(entrants[entrant], torch.device("cuda"), 10))
        rows += [{"name": entrant, "bytes": moved, "ms": statistics.median(ms)} for entrant, ms in times.items()]
        torch.cuda.empty_cache()
    result = {
        "what": "kernels whose time is that of memory, beside PyTorch; bytes: the least that must move",
        "measured": f"on {torch.cuda.get_device_name()}",
        "date": datetime.date.today().isoformat(),
        "versions": {p: version(p) for p in ("torch", "triton")},
        "kernels": rows,
    }
    print(json.dumps(result, indent=2))
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")
