"""Reference solution of operate/export_and_evaluate for PithTrain: python export_and_evaluate.py RUN OUT."""

import json
import sys
from pathlib import Path

from pithtrain.evaluate import validate
from pithtrain.hub import export_model
from pithtrain.train.batches import IGNORE, HeldOutBatches
from pithtrain.train.run import open_run
from pithtrain.train.shards import open_shards

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
run = open_run(folder)
measured = validate(run, folder)
held_out = open_shards(Path(run.config.data.folder)).held_out
rows = []
for inputs, targets in HeldOutBatches(held_out, run.config.train.sequence_length, 8):
    for given, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        known = [token for token in wanted if token != IGNORE]
        rows += [given[:1] + known] if known else []
export_model(folder, out / "model", report=lambda line: None)
(out / "held_out.json").write_text(json.dumps(rows))
(out / "evaluation.json").write_text(json.dumps({"nats_per_token": measured["loss"], "tokens": measured["tokens"]}))
