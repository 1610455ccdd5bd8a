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

from pithtrain.bench import SHAPES, in_turns, median_ms
from pithtrain.layers import clamped_experts

if __name__ == "__main__":
    (shape,) = (s for s in SHAPES if s.name == "gpt-oss-like")
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
        with patch.object(clamped_experts, "kernels_take", lambda *_, name=name: name == "kernels"):
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
