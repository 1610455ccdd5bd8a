"""Compares the layer that `ate_feature.build_layer` makes with the equations: python equations.py REPO COMMON."""

import sys

sys.path.insert(0, sys.argv[2])

import torch
from compare import compare, run

HIDDEN, BATCH = 12, 2


def rotated(x):
    """x (..., S, d), position by position and pair by pair."""
    length, d = x.shape[-2:]
    angles = torch.arange(length).double()[:, None] / 10_000 ** (torch.arange(0, d, 2).double() / d)
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def check(build_layer, heads, kv_heads, head_dim, block, top_blocks, length) -> str:
    shapes = {"query.weight": (heads * head_dim, HIDDEN), "key.weight": (kv_heads * head_dim, HIDDEN)}
    shapes |= {"value.weight": (kv_heads * head_dim, HIDDEN), "output.weight": (HIDDEN, heads * head_dim)}

    def expected(p, x):
        q, k, v = (
            (x @ p[f"{name}.weight"].t()).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        q, k = rotated(q), rotated(k)
        rows = []
        for row in range(BATCH):
            for head in range(heads):
                keys, values = k[row, head * kv_heads // heads], v[row, head * kv_heads // heads]
                for t in range(length):
                    query, own = q[row, head, t], t // block
                    means = [(query @ keys[i * block : (i + 1) * block].mean(0)).item() for i in range(own)]
                    chosen = sorted(range(own), key=lambda i: -means[i])[: top_blocks - 1]
                    seen = [s for i in sorted([*chosen, own]) for s in range(i * block, (i + 1) * block) if s <= t]
                    rows.append((keys[seen] @ query / head_dim**0.5).softmax(0) @ values[seen])
        mixed = torch.stack(rows).view(BATCH, heads, length, head_dim).transpose(1, 2).flatten(2)
        return {"output": mixed @ p["output.weight"].t()}

    layer = build_layer(HIDDEN, heads, kv_heads, head_dim, block, top_blocks)
    return compare(layer, shapes, [torch.randn(BATCH, length, HIDDEN)], expected)


run(check, [(4, 2, 8, 4, 3, 23), (2, 2, 6, 5, 2, 20), (2, 1, 4, 4, 1, 11), (2, 2, 4, 4, 9, 13)])
