#!/bin/bash
# Reference solution of operate/first_training for PithTrain: run.sh.
set -e
python -m pithtrain.cli train configs/tiny.toml --run.folder "$1/runs" --data.folder "$1/data" --data.corpus nbs \
    --data.pattern '2*.py' --data.held_out 0.2 --model.vocab_size 300 --model.layers 2 --model.hidden 64 --model.heads 4 \
    --model.head_dim 16 --model.experts 4 --model.expert_hidden 64 --train.steps 80 --train.sequence_length 64 \
    --optimizer.warmup 5 --optimizer.learning_rate 1e-2
python - "$1" <<'END'
import json, sys, time
rows = [json.loads(line) for line in open(f"{sys.argv[1]}/runs/tiny/metrics.jsonl")]
with open(f"{sys.argv[1]}/loss.jsonl", "w") as losses, open(f"{sys.argv[1]}/train.log", "w") as log:
    print(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(rows[0]["time"] - rows[0]["seconds"])), "start", file=log)
    for row in rows:
        print(json.dumps({"step": row["step"], "loss": row["loss"]}), file=losses)
        print(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row["time"])), "step", row["step"], file=log)
END
