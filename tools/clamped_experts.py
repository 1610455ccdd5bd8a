"""GPT-OSS's clamped experts on a GPU, forward and backward of one layer: the kernels, beside PyTorch's grouped product.

python tools/clamped_experts.py FILE  writes the JSON that nbs/22a_clamped_experts.py prints.
"""

import datetime
import json
import statistics
import sys
from importlib.metadata import version
from unittest.mock import patch

import torch
import torch.nn.functional as F

from pithtrain.bench import in_turns, median_ms, shape_named
from pithtrain.layers import clamped_experts


def grouped_mm_experts(tokens, expert_ids, weights, gate_up, down, bias):
    """The experts by PyTorch's grouped product: rows sorted by expert, a row's bias by a product as well."""
    sorted_ids, order = torch.sort(expert_ids.flatten(), stable=True)
    numbers = torch.arange(len(down), device=tokens.device)
    ends = torch.searchsorted(sorted_ids, numbers, right=True).int()
    rows, chosen = order // expert_ids.shape[1], (sorted_ids.unsqueeze(1) == numbers).to(tokens.dtype)
    projected = torch.addmm(F.grouped_mm(tokens.index_select(0, rows), gate_up.mT, offs=ends), chosen, bias)
    gate, up = projected.chunk(2, dim=-1)
    gate, up = gate.clamp(max=7), up.clamp(min=-7, max=7)
    activated = gate * torch.sigmoid(1.702 * gate) * (up + 1) * weights.flatten()[order, None].to(tokens.dtype)
    outputs = F.grouped_mm(activated, down.mT, offs=ends)
    return torch.zeros_like(tokens, dtype=torch.float32).index_add(0, rows, outputs.float())


if __name__ == "__main__":
    shape = shape_named("gpt-oss-like")
    torch.manual_seed(0)
    with torch.device("cuda"):
        layer = clamped_experts.ClampedExperts(shape.hidden, shape.experts, shape.expert_hidden).bfloat16()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=shape.hidden**-0.5)
        tokens = torch.randn(shape.tokens, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
        scores, ids = torch.rand(shape.tokens, shape.experts).topk(shape.top_k)
        weights = torch.softmax(scores, dim=-1).requires_grad_()
        grad = torch.randn_like(tokens)

    def both() -> None:
        layer.zero_grad()
        tokens.grad = weights.grad = None
        layer(tokens, ids, weights).backward(grad)

    turns, peak = {"kernels": [], "grouped_mm": []}, {}
    for name in in_turns(turns, 4):
        run = clamped_experts.triton_expert_mlp if name == "kernels" else grouped_mm_experts
        with patch.object(clamped_experts, "triton_expert_mlp", run):
            turns[name].append(median_ms(both, tokens.device, 20))
            layer.zero_grad()
            tokens.grad = weights.grad = None
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            both()
            peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    result = {
        "what": "clamped experts with biases, forward and backward of one layer, kernels beside torch's grouped_mm",
        "measured": f"bf16 on {torch.cuda.get_device_name()}",
        "date": datetime.date.today().isoformat(),
        "versions": {p: version(p) for p in ("torch", "triton")},
        "shape": shape._asdict(),
        "rows": [{"name": n, "ms": statistics.median(ms), "peak_gib": peak[n]} for n, ms in turns.items()],
    }
    print(json.dumps(result, indent=2))
    with open(sys.argv[1], "w") as file:
        json.dump(result, file, indent=2)
