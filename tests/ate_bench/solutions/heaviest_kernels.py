"""Reference solution of operate/heaviest_kernels for PithTrain: python heaviest_kernels.py RUN OUT."""

import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pithtrain.config import load_run_config
from pithtrain.parallel.mesh import make_mesh
from pithtrain.train.batches import TrainBatches
from pithtrain.train.shards import open_shards
from pithtrain.train.step import Learner, read_microbatches

config, out = load_run_config(Path(sys.argv[1])), Path(sys.argv[2])
mesh = make_mesh(config.mesh, 0, 1, torch.device("cpu"))
learner = Learner(config, mesh)
tokens = open_shards(Path(config.data.folder)).train
batches = TrainBatches(tokens, config.train.sequence_length, config.train.batch_size, config.run.seed)
own = [read_microbatches(batches, step, config.train.micro_batch_size, mesh) for step in range(3)]
for microbatches in own[:2]:
    learner.step(microbatches, 3e-3)
with profile(activities=[ProfilerActivity.CPU]) as profiler:
    learner.step(own[2], 3e-3)
profiler.export_chrome_trace(str(out / "profile.json"))
operators = [event for event in profiler.key_averages() if not event.is_user_annotation]
total = sum(event.self_cpu_time_total for event in operators)
heaviest = sorted(operators, key=lambda event: -event.self_cpu_time_total)[:3]
report = [
    {"name": e.key, "microseconds": e.self_cpu_time_total, "calls": e.count, "share": e.self_cpu_time_total / total}
    for e in heaviest
]
(out / "kernels.json").write_text(json.dumps(report))
