"""Compares the layer that `ate_feature.build_layer` makes with the equations: python equations.py REPO COMMON."""

import sys

sys.path.insert(0, sys.argv[2])

import torch
import torch.nn.functional as F
from compare import compare, difference, fill, run

HIDDEN, WIDTH, TOKENS = 16, 8, 40


def shapes_of(experts):
    shapes = {"gate.weight": (experts, HIDDEN), "gate.threshold": (experts,)}
    return shapes | {"experts.gate_up": (experts, 2 * WIDTH, HIDDEN), "experts.down": (experts, HIDDEN, WIDTH)}


def expected(training):
    def outputs(p, x):
        w = p["gate.weight"]
        soft = (x @ w.t() / (x.norm(dim=1, keepdim=True) * w.norm(dim=1))).sigmoid() - p["gate.threshold"].sigmoid()
        chosen = soft > 0
        if not training:
            best = F.one_hot(soft.argmax(1), len(w)).bool()
            chosen = chosen | (best & ~chosen.any(1, keepdim=True))
        gates = chosen * (1 + soft - soft.detach())
        gate, up = torch.einsum("th,efh->etf", x, p["experts.gate_up"]).chunk(2, dim=-1)
        each = torch.einsum("etf,ehf->eth", F.silu(gate) * up, p["experts.down"])
        output = torch.einsum("te,eth->th", gates / chosen.sum(1, keepdim=True).clamp_min(1), each)
        loss = (w @ w.t() - torch.eye(len(w))).norm() + w.norm(dim=1).mean()
        return {"output": output, "gates": chosen.double(), "auxiliary loss": loss}

    return outputs


def equal(layer, experts, training) -> str:
    layer.train(training)
    layer.zero_grad()
    wrong = compare(Plain(layer), shapes_of(experts), [torch.randn(TOKENS, HIDDEN)], expected(training))
    return wrong and f"{wrong} in {'training' if training else 'evaluation'}"


class Plain(torch.nn.Module):
    """The layer, with gates that carry no gradient; its parameters under their own names."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def named_parameters(self, *arguments, **options):
        return self.layer.named_parameters(*arguments, **options)

    def forward(self, x):
        output, gates, loss = self.layer(x)
        return output, gates.detach(), loss


def check(build_layer, experts, unused, orphans) -> str:
    """`unused` experts have a threshold that no token passes; `orphans`: whether some tokens choose none."""
    layer = build_layer(HIDDEN, WIDTH, experts)
    if wrong := equal(layer, experts, True) or equal(layer, experts, False):
        return wrong
    layer.train()
    layer.adapt()  # forget what came so far
    layer = build_layer(HIDDEN, WIDTH, experts)
    fill(layer)
    kept = [number for number in range(experts) if number not in unused]
    batches = [torch.randn(TOKENS, HIDDEN) for _ in range(2)]
    with torch.no_grad():
        layer.gate.threshold.fill_(0.05 if orphans else -5.0)
        layer.gate.threshold[list(unused)] = 5.0
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.eval()
    layer(torch.randn(TOKENS, HIDDEN))  # leaves no record
    layer.train()
    alone = [x[layer(x)[1].sum(1) == 0].detach() for x in batches]
    if (sum(map(len, alone)) > 0) != orphans:
        return "the gates do not follow the thresholds"
    report = layer.adapt()
    if (list(report[0]), bool(report[1])) != (kept, orphans):
        return f"adapt returned {report}, expected {(kept, orphans)}"
    after = dict(layer.named_parameters())
    own = {name: tuple(p.shape) for name, p in after.items()}
    if own != shapes_of(len(kept) + orphans):
        return f"after adapt parameters are {own}, expected {shapes_of(len(kept) + orphans)}"
    pairs = {f"{name} after adapt": (after[name][: len(kept)], before[name][kept]) for name in before}
    if orphans:
        lost = torch.cat(alone).sum(0)
        pairs["new gate vector"] = (after["gate.weight"][-1], lost / lost.norm())
        pairs["1 + new threshold"] = (1 + after["gate.threshold"][-1:], torch.ones(1))
        spread = after["experts.down"][-1].std().item()
        if not 0 < spread < 1:
            return f"the new expert's down projection has deviation {spread:.2g}"
    if wrong := difference(pairs):
        return wrong
    if (again := layer.adapt())[1] or len(again[0]) != len(kept) + orphans:
        return f"adapt without tokens in between returned {again}"
    return equal(layer, len(kept) + orphans, True)


run(check, [(4, (1,), True), (3, (), False), (5, (0, 4), False), (2, (), True)])
