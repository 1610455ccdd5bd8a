"""Profiles one training step: python profile_step.py CONFIG OUT.json [--SECTION.KEY VALUE ...]

Two steps warm up, the third is recorded, on random tokens. Prints the ten heaviest kernels (on a CPU: operators by
their own time) with calls and share, writes the Chrome trace to OUT.json, and ends with PASS or FAIL.
"""

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pithtrain.cli import parse_overrides
from pithtrain.config import load_config
from pithtrain.parallel.mesh import make_mesh
from pithtrain.train.step import Learner, read_microbatches
from pithtrain.train.trainer import choose_compute
from pithtrain.verify import RandomBatches

config = load_config(Path(sys.argv[1]), parse_overrides(sys.argv[3:]))
device, dtype = choose_compute(config.run)
mesh = make_mesh(config.mesh, 0, 1, device)
learner, train = Learner(config, mesh, dtype), config.train
batches = RandomBatches(config.model.vocab_size, train.sequence_length, train.batch_size)
steps = [read_microbatches(batches, step, train.micro_batch_size, mesh) for step in range(3)]
for microbatches in steps[:2]:
    learner.step(microbatches, 1e-3)
activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
with profile(activities=activities) as profiler:
    learner.step(steps[2], 1e-3)
    if device.type == "cuda":
        torch.cuda.synchronize()
profiler.export_chrome_trace(sys.argv[2])
events = [event for event in profiler.key_averages() if not event.is_user_annotation]
if device.type == "cuda":
    times = {e.key: (e.self_device_time_total, e.count) for e in events if e.device_type.name == "CUDA"}
else:
    times = {e.key: (e.self_cpu_time_total, e.count) for e in events}
total = sum(time for time, _ in times.values())
ranked = sorted(times.items(), key=lambda item: -item[1][0])[:10]
print(f"{total / 1000:.1f} ms on {device}, {dtype}")
for name, (time, calls) in ranked:
    print(f"{time / 1000:9.2f} ms {time / total:6.1%} {calls:6} calls  {name[:80]}")
written = Path(sys.argv[2]).stat().st_size
print(f"PASS: trace of {written:,} bytes in {sys.argv[2]}" if total > 0 and written else "FAIL: nothing was recorded")
