"""What the pipeline engine itself costs an action, in CPU time: empty stages, a transport that delivers at once.

Rank 1 of 4, 16 microbatches, one thread. JSON for nbs/57.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pithtrain.parallel.pipeline.engine import Engine
from pithtrain.parallel.pipeline.generate import KINDS, generate
from pithtrain.parallel.pipeline.lower import lower


class Empty:
    """A stage that does nothing."""

    def __init__(self):
        self.tensor = torch.zeros(1)

    def forward(self, x, batch):
        return self.tensor, None

    def backward(self, saved, grad):
        return self.tensor

    def backward_input(self, saved, grad):
        return self.tensor, None

    def backward_weight(self, saved):
        pass

    def unshard(self):
        pass

    reshard = reduce = unshard


def microseconds(kind, steps):
    """Of each step, for one action of rank 1."""
    schedule = lower(generate(kind, 4, 16))
    engine = Engine(schedule, {s: Empty() for s in schedule.held_by(1)}, torch.zeros(1), dist.group.WORLD)
    times = []
    for _ in range(steps + 3):
        start = time.process_time()
        engine.step([None] * 16)
        times.append(1e6 * (time.process_time() - start) / len(schedule.ranks[1]))
    return times[3:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    times = {kind: [round(t, 2) for t in microseconds(kind, 51)] for kind in KINDS}
    dist.destroy_process_group()
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    result = {
        "what": "microseconds of CPU time for one action, by kind and step: rank 1 of 4, 16 microbatches",
        "device": f"{os.cpu_count()} cores of {model}",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
        "microseconds": times,
    }
    arguments.json.write_text(json.dumps(result) + "\n")
    for kind, taken in times.items():
        print(f"{kind:12} {median(taken):5.1f} microseconds an action, at most {max(taken):.1f}")


if __name__ == "__main__":
    main()
