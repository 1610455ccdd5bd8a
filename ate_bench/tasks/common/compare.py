"""What the checkers of equations share: a layer with random parameters beside the equations in float64."""

import inspect
import os
import sys

import torch

TOLERANCE = 1e-3  # relative error, of outputs and gradients


def fill(layer) -> None:
    """Random values for all parameters."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))


def compare(layer, shapes, inputs, expected) -> str:
    """What is wrong with `layer`; empty if nothing is.

    `shapes` of its parameters by name; `inputs` are tensors or None, all but the first without a gradient;
    `expected(p, *inputs)` gives named outputs from parameters and inputs in float64, in the order of the layer's.
    """
    own = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    if own != shapes:
        return f"parameters are {own}, expected {shapes}"
    fill(layer)
    truth = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    inputs64 = [None if t is None else t.detach().double() for t in inputs]
    first, first64 = inputs[0].requires_grad_(), inputs64[0].requires_grad_()
    wanted = expected(truth, *inputs64)
    given = layer(*inputs)
    given = dict(zip(wanted, given if isinstance(given, tuple) else (given,)))
    if missing := wanted.keys() - given.keys():
        return f"the layer does not return {', '.join(missing)}"
    if wrong := difference({name: (given[name], wanted[name]) for name in wanted}):
        return wrong
    pairs = {}
    for name, right in wanted.items():
        if right.requires_grad:  # each by itself: a small loss must not hide behind a large output
            own = gradients(given[name], [first, *layer.parameters()])
            names = ["the input", *(known for known, _ in layer.named_parameters())]
            others = gradients(right, [first64, *(truth[known] for known in names[1:])])
            pairs |= {f"gradient of {of} by {name}": pair for of, *pair in zip(names, own, others)}
    return difference(pairs)


def gradients(value, leaves):
    """Of a weighted sum of `value`; zeros where there is none."""
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    ramp = torch.linspace(-1, 1, value.numel() + 2, dtype=value.dtype)[1:-1] + 0.3
    found = torch.autograd.grad((value.flatten() * ramp).sum(), leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found)]


def difference(pairs) -> str:
    """Which of the named (value, right) pairs differ, and by how much."""
    wrong = []
    for name, (value, right) in pairs.items():
        if value is None or tuple(value.shape) != tuple(right.shape):
            return f"{name} has shape {None if value is None else tuple(value.shape)}, expected {tuple(right.shape)}"
        error = ((value.detach().double() - right.detach().double()).norm() / right.norm().clamp_min(1e-6)).item()
        if not error < TOLERANCE:
            wrong.append(f"{name} is off by {error:.2g}")
    return ", ".join(wrong)


def verdict(check, cases) -> str:
    """PASS if `check(build_layer, *case)` finds nothing wrong with `ate_feature.build_layer` for any case."""
    sys.path.insert(0, sys.argv[1])
    from ate_feature import build_layer

    for case in cases:
        if wrong := check(build_layer, *case):
            names = ", ".join(list(inspect.signature(check).parameters)[1:])
            return f"FAIL {wrong} ({names}: {case})"
    return f"PASS {len(cases)} cases"


def run(check, cases) -> None:
    """Say the verdict on `ate_feature.build_layer` of the folder argv[1].

    The layer's code runs in a process of its own. What counts is what that says through a pipe, signed: code that
    prints PASS, writes it to whatever is open, or ends the process, has said nothing.
    """
    signature = os.urandom(16)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            torch.manual_seed(0)
            said = verdict(check, cases)
        except BaseException as error:
            said = f"FAIL {type(error).__name__}: {error}"
        os.write(writer, said.encode()[:4000] + signature)
        os._exit(0)
    os.waitpid(child, 0)
    os.write(writer, b" ")  # so that there is something to read
    said, signed, _ = os.read(reader, 65536).partition(signature)
    said = said.decode(errors="replace") if signed else "FAIL the code of the layer ended its check"
    print(said)
    sys.exit(0 if said.startswith("PASS") else 1)
