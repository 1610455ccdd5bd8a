"""Record when each pass of a pipeline ran: four processes, each a rank of DualPipeV over a real model; JSON for nbs/58.

Every process computes on one thread, so the machine should have a core for each, and be otherwise idle.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pithtrain.config import Qwen3MoeConfig
from pithtrain.models.build import build
from pithtrain.models.decoder import initialise
from pithtrain.models.stages import Place
from pithtrain.parallel.pipeline.engine import Engine
from pithtrain.parallel.pipeline.fit import fit_costs, timeline_of
from pithtrain.parallel.pipeline.generate import generate
from pithtrain.parallel.pipeline.lower import lower
from pithtrain.parallel.pipeline.overlap import PartStage, overlapped
from pithtrain.parallel.pipeline.schedule import split_layers
from pithtrain.parallel.pipeline.simulate import Span, simulate
from pithtrain.train.step import head_cost

RANKS, MICROBATCHES, SEQUENCES, LENGTH, STEPS = 4, 10, 2, 128, 6
CONFIG = Qwen3MoeConfig(
    vocab_size=2048, layers=15, hidden=128, heads=4, head_dim=32, experts=8, top_k=2, expert_hidden=256,
    tie_embeddings=False,
)  # fmt: skip


class Batch(NamedTuple):
    inputs: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


def one_rank(rank, schedule, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    splits = split_layers(CONFIG.layers, schedule.stages, 0.1, head_cost(CONFIG))
    stages = {}
    for stage in schedule.held_by(rank):
        part = build(CONFIG, Place(layers=splits[stage], first=stage == 0, last=stage == schedule.stages - 1))
        initialise(part, seed=0)
        stages[stage] = PartStage(part, lambda output, routing, batch: output)
    engine = Engine(schedule, stages, torch.empty(SEQUENCES, LENGTH, CONFIG.hidden), dist.group.WORLD, overlapped)
    tokens = torch.randint(CONFIG.vocab_size, (MICROBATCHES, SEQUENCES, LENGTH + 1))
    batches = [Batch(t[:, :-1], torch.arange(LENGTH), t[:, 1:]) for t in tokens]
    steps = []
    for _ in range(STEPS):
        dist.barrier()
        steps.append([])
        engine.step(batches, record=steps[-1])
    times = [[(span.start, span.end) for span in step] for step in steps]
    Path(f"{folder}/rank{rank}.json").write_text(json.dumps(times))
    dist.destroy_process_group()


def spans_of(schedule, times):
    """Recorded spans by rank, from their times in the order of the schedule's passes."""
    passes = [[action for action in actions if action.computes] for actions in schedule.ranks]
    return [
        [Span(action, *time) for action, time in zip(mine, own, strict=True)]
        for mine, own in zip(passes, times, strict=True)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    schedule = lower(generate("dualpipev", RANKS, MICROBATCHES))
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(one_rank, (schedule, folder), nprocs=RANKS, start_method="spawn")
        by_rank = [json.loads(Path(f"{folder}/rank{rank}.json").read_text()) for rank in range(RANKS)]
    steps = list(zip(*by_rank, strict=True))
    zero = min(start for rank in steps[0] for start, _ in rank)
    rounded = [[[[round(t - zero, 6) for t in span] for span in rank] for rank in step] for step in steps]
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    result = {
        "what": "start and end of each pass, seconds, by step and rank: four processes on one thread each, over gloo",
        "device": f"{os.cpu_count()} cores of {model}",
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": importlib.metadata.version("torch")},
        "schedule": {"kind": "dualpipev", "pp": RANKS, "microbatches": MICROBATCHES},
        "steps": rounded,
    }
    arguments.json.write_text(json.dumps(result) + "\n")
    recorded = [spans_of(schedule, step) for step in rounded]
    predicted = simulate(schedule, fit_costs(schedule, recorded[2])).time  # two steps to warm up
    for number, step in enumerate(recorded[3:], 3):
        measured = timeline_of(schedule, step).time
        print(f"step {number}: {measured:.3f} s, predicted {predicted:.3f} s ({predicted / measured - 1:+.1%})")


if __name__ == "__main__":
    main()
