"""Checks trace.npz by itself: python trace.py OUT."""

import json
import sys
from pathlib import Path

import numpy as np


def check(ids: np.ndarray, weights: np.ndarray, experts: int) -> str:
    """What is wrong with a trace; empty if nothing is."""
    if ids.ndim != 4 or ids.shape != weights.shape:
        return f"shapes are {ids.shape} and {weights.shape}, expected (steps, layers, tokens, top_k) twice"
    steps, layers, tokens, top_k = ids.shape
    if steps < 20 or layers < 2 or tokens < 64 or top_k < 2:
        return f"{steps} steps, {layers} layers, {tokens} tokens, top_k {top_k}; expected at least 20, 2, 64, 2"
    if not np.issubdtype(ids.dtype, np.integer) or weights.dtype != np.float32:
        return f"types are {ids.dtype} and {weights.dtype}, expected integers and float32"
    if ids.min() < 0 or ids.max() >= experts:
        return f"ids go from {ids.min()} to {ids.max()}, there are {experts} experts"
    ordered = np.sort(ids, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        return "a token has the same expert twice"
    if not np.isfinite(weights).all() or weights.min() < 0:
        return "a weight is negative or not finite"
    worst = np.abs(weights.sum(-1) - 1).max()
    if worst > 1e-3:
        return f"the weights of a token sum to 1 within {worst:.2g}, expected 0.001"
    if weights.std() < 1e-6:
        return "all weights are the same"
    if (np.abs(weights[1:] - weights[:-1]).max(axis=(2, 3)) == 0).any():
        return "a layer's weights are the same in two steps"
    if len(np.unique(ids[:, 0])) < 2 or (ids[:, 0] == ids[:, 1]).all():
        return "the layers' ids are the same, or one"
    return ""


out = Path(sys.argv[1])
try:
    with np.load(out / "trace.npz", allow_pickle=False) as arrays:
        ids, weights = arrays["expert_ids"], arrays["weights"]
    wrong = check(ids, weights, int(json.loads((out / "info.json").read_text())["experts"]))
    print(f"FAIL {wrong}" if wrong else f"PASS {' x '.join(map(str, ids.shape))} pairs")
except Exception as error:
    print(f"FAIL {type(error).__name__}: {error}")
