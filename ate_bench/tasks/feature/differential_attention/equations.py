"""Compares the layer that `ate_feature.build_layer` makes with the equations: python equations.py REPO COMMON."""

import math
import sys

sys.path.insert(0, sys.argv[2])

import torch
from compare import compare, run

HIDDEN, BATCH, LENGTH = 12, 2, 9


def rotated(x):
    """x (..., S, d), position by position and pair by pair."""
    length, d = x.shape[-2:]
    angles = torch.arange(length).double()[:, None] / 10_000 ** (torch.arange(0, d, 2).double() / d)
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def check(build_layer, heads, head_dim, number) -> str:
    width = heads * 2 * head_dim
    start = 0.8 - 0.6 * math.exp(-0.3 * (number - 1))
    shapes = {f"{name}.weight": (width, HIDDEN) for name in ("query", "key", "value")}
    shapes |= {"output.weight": (HIDDEN, width), "norm.weight": (2 * head_dim,)}
    shapes |= {f"lambda_{name}": (head_dim,) for name in ("q1", "k1", "q2", "k2")}

    def expected(p, x):
        def heads_of(name):
            return (x @ p[f"{name}.weight"].t()).unflatten(-1, (heads, 2 * head_dim)).transpose(1, 2)

        q, k, v = (heads_of(name) for name in ("query", "key", "value"))
        future = torch.ones(LENGTH, LENGTH).triu(1).bool()
        maps = []
        for half in (slice(0, head_dim), slice(head_dim, None)):
            scores = rotated(q[..., half]) @ rotated(k[..., half]).transpose(-1, -2) / math.sqrt(head_dim)
            maps.append(scores.masked_fill(future, -torch.inf).softmax(-1))
        first, second = (torch.exp(p[f"lambda_q{i}"] @ p[f"lambda_k{i}"]) for i in (1, 2))
        mixed = (maps[0] - (first - second + start) * maps[1]) @ v
        mixed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"] * (1 - start)
        return {"output": mixed.transpose(1, 2).flatten(2) @ p["output.weight"].t()}

    layer = build_layer(HIDDEN, heads, head_dim, number)
    return compare(layer, shapes, [torch.randn(BATCH, LENGTH, HIDDEN)], expected)


run(check, [(2, 8, 1), (3, 4, 2), (1, 6, 9)])
