"""Compares the layer that `ate_feature.build_layer` makes with the equations: python equations.py REPO COMMON."""

import sys

sys.path.insert(0, sys.argv[2])

import torch
import torch.nn.functional as F
from compare import compare, run

HIDDEN, EXPERT_HIDDEN, TOKENS = 24, 12, 50


def check(build_layer, ffn, zero, copy, constant, top_k, has_previous) -> str:
    n = ffn + zero + copy + constant
    shapes = {
        "router.weight": (n, HIDDEN),
        "residual.weight": (n, n),
        "experts.gate_up": (ffn, 2 * EXPERT_HIDDEN, HIDDEN),
        "experts.down": (ffn, HIDDEN, EXPERT_HIDDEN),
        "constant.mix": (constant, 2, HIDDEN),
        "constant.vector": (constant, HIDDEN),
    }

    def expected(p, tokens, previous):
        """The instruction's equations, expert by expert."""
        logits = tokens @ p["router.weight"].t()
        if previous is not None:
            logits = logits + previous @ p["residual.weight"].t()
        probs = logits.softmax(-1)
        outputs = []
        for i in range(ffn):
            gate, up = (tokens @ p["experts.gate_up"][i].t()).chunk(2, dim=-1)
            outputs.append((F.silu(gate) * up) @ p["experts.down"][i].t())
        outputs += [torch.zeros_like(tokens)] * zero + [tokens] * copy
        for j in range(constant):
            a = (tokens @ p["constant.mix"][j].t()).softmax(-1)
            outputs.append(a[:, :1] * tokens + a[:, 1:] * p["constant.vector"][j])
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(top_k).indices, 1.0)
        output = torch.einsum("tn,tnh->th", probs * chosen, torch.stack(outputs, 1))
        eta = torch.tensor([1.0] * ffn + [0.75] * (zero + copy + constant), dtype=probs.dtype)
        return {"output": output, "logits": logits, "balance loss": (eta * chosen.mean(0) * probs.mean(0)).sum()}

    layer = build_layer(HIDDEN, EXPERT_HIDDEN, ffn, zero, copy, constant, top_k)
    previous = torch.randn(TOKENS, n) if has_previous else None
    return compare(layer, shapes, [torch.randn(TOKENS, HIDDEN), previous], expected)


run(check, [(4, 1, 1, 1, 2, True), (4, 1, 1, 1, 2, False), (3, 0, 2, 3, 3, True), (2, 2, 0, 0, 1, True)])
