"""Compares trace.npz with the framework's own report of the load: python load.py OUT."""

import json
import sys
from pathlib import Path

import numpy as np

out = Path(sys.argv[1])
try:
    with np.load(out / "trace.npz", allow_pickle=False) as arrays:
        ids = arrays["expert_ids"]
    experts = int(json.loads((out / "info.json").read_text())["experts"])
    report = [np.array(json.loads(line)["load"]) for line in (out / "load.jsonl").read_text().splitlines()]
    counted = [[np.bincount(layer.ravel(), minlength=experts) / layer.size for layer in step] for step in ids]
    if len(report) != len(counted):
        print(f"FAIL load.jsonl has {len(report)} steps, the trace {len(counted)}")
    else:
        worst, step = max((float(np.abs(a - b).max()), n) for n, (a, b) in enumerate(zip(report, np.array(counted)), 1))
        off = f"step {step} differs from the reported load by {worst:.2g} of the pairs"
        print(f"PASS at most, {off}" if worst < 1e-4 else f"FAIL {off}")
except Exception as error:
    print(f"FAIL {type(error).__name__}: {error}")
