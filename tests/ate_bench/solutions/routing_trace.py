"""Reference solution of operate/routing_trace for PithTrain: python routing_trace.py RUN OUT."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from pithtrain.config import load_run_config
from pithtrain.parallel.mesh import make_mesh
from pithtrain.train.batches import TrainBatches
from pithtrain.train.shards import open_shards
from pithtrain.train.step import Learner, read_microbatches
from pithtrain.train.trainer import step_record

STEPS = 20
config, out = load_run_config(Path(sys.argv[1])), Path(sys.argv[2])
mesh = make_mesh(config.mesh, 0, 1, torch.device("cpu"))
learner = Learner(config, mesh)
tokens = open_shards(Path(config.data.folder)).train
batches = TrainBatches(tokens, config.train.sequence_length, config.train.batch_size, config.run.seed)
layers = [layer for part in learner.parts.values() for layer in part.layers.values()]
seen = [[] for _ in layers]
for record, layer in zip(seen, layers, strict=True):
    layer.router.register_forward_hook(lambda module, given, routed, record=record: record.append(routed))
ids, weights = [], []
with (out / "load.jsonl").open("w") as loads:
    for step in range(1, STEPS + 1):
        own = read_microbatches(batches, step - 1, config.train.micro_batch_size, mesh)
        result = learner.step(own, 3e-3)
        print(json.dumps(step_record(step, result, 3e-3, 1, 1.0)), file=loads)
        ids.append(np.stack([torch.cat([r.expert_ids for r in record]).numpy() for record in seen]))
        weights.append(np.stack([torch.cat([r.weights.detach() for r in record]).numpy() for record in seen]))
        for record in seen:
            record.clear()
np.savez_compressed(out / "trace.npz", expert_ids=np.stack(ids), weights=np.stack(weights).astype(np.float32))
(out / "info.json").write_text(json.dumps({"experts": config.model.experts}))
