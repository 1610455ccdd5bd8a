"""Compares the layer that `ate_feature.build_layer` makes with the equations: python equations.py REPO."""

import sys

import torch
import torch.nn.functional as F

CASES = [  # ffn, zero, copy, constant, top_k, with logits of a layer before
    (4, 1, 1, 1, 2, True),
    (4, 1, 1, 1, 2, False),
    (3, 0, 2, 3, 3, True),
    (2, 2, 0, 0, 1, True),
]
HIDDEN, EXPERT_HIDDEN, TOKENS = 24, 12, 50


def expected(tokens, previous, p, counts, top_k):
    """The instruction's equations, expert by expert."""
    ffn, zero, copy, constant = counts
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
    return output, logits, (eta * chosen.mean(0) * probs.mean(0)).sum()


def check(build_layer, case) -> str:
    """What is wrong in one case; empty if nothing is."""
    *counts, top_k, has_previous = case
    n = sum(counts)
    layer = build_layer(HIDDEN, EXPERT_HIDDEN, *counts, top_k)
    shapes = {
        "router.weight": (n, HIDDEN),
        "residual.weight": (n, n),
        "experts.gate_up": (counts[0], 2 * EXPERT_HIDDEN, HIDDEN),
        "experts.down": (counts[0], HIDDEN, EXPERT_HIDDEN),
        "constant.mix": (counts[3], 2, HIDDEN),
        "constant.vector": (counts[3], HIDDEN),
    }
    own = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    if own != shapes:
        return f"parameters are {own}, expected {shapes}"
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    tokens = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    previous = torch.randn(TOKENS, n) if has_previous else None
    truth = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    tokens64 = tokens.detach().double().requires_grad_()
    wanted = expected(tokens64, previous.double() if has_previous else None, truth, counts, top_k)
    given = layer(tokens, previous)
    named = dict(zip(("output", "logits", "balance loss"), zip(given, wanted)))
    results = {"logits": named.pop("logits"), **named}  # where those are off, so is the rest
    for number, (output, logits, balance) in enumerate((given, wanted)):
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        ((output * weights).sum() + 0.1 * logits.square().mean() + 3 * balance).backward()
    results["gradient of the tokens"] = (tokens.grad, tokens64.grad)
    for name, parameter in layer.named_parameters():
        zero = torch.zeros_like(parameter)
        other = truth[name].grad if truth[name].grad is not None else zero.double()
        results[f"gradient of {name}"] = (parameter.grad if parameter.grad is not None else zero, other)
    for name, (value, right) in results.items():
        if tuple(value.shape) != tuple(right.shape):
            return f"{name} has shape {tuple(value.shape)}, expected {tuple(right.shape)}"
        error = ((value.detach().double() - right.detach()).norm() / right.detach().norm().clamp_min(1e-6)).item()
        if not error < 1e-3:
            return f"{name} is off by {error:.2g}"
    return ""


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    torch.manual_seed(0)
    try:
        from ate_feature import build_layer

        for case in CASES:
            if wrong := check(build_layer, case):
                print(f"FAIL {wrong} (ffn, zero, copy, constant, top_k, previous: {case})")
                sys.exit(1)
    except Exception as error:
        print(f"FAIL {type(error).__name__}: {error}")
        sys.exit(1)
    print(f"PASS {len(CASES)} cases")


main()
