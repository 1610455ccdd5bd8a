"""Time overlapped actions beside the same passes one after the other, and trace one, on one GPU; JSON for nbs/57a.

Two stages of a few layers each, as a rank in the middle of DualPipeV has them, take turns in its steady state. Tokens
go through a NCCL group of one rank, so they travel from the GPU's memory to itself. A wire is emulated by a kernel that
sleeps behind each transfer for as long as its bytes would take at --gigabytes a second; 0: no wire.
"""

import argparse
import datetime
import importlib.metadata
import json
from collections import deque
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from pithtrain.config import Qwen3MoeConfig
from pithtrain.models.build import build
from pithtrain.models.decoder import initialise
from pithtrain.models.stages import Place
from pithtrain.parallel import expert
from pithtrain.parallel.pipeline.engine import BackwardPass, ForwardPass, in_turn
from pithtrain.parallel.pipeline.overlap import PartStage, overlapped

TRAVELS = ("announce", "dispatch", "combine")


class Batch(NamedTuple):
    inputs: None
    positions: torch.Tensor
    targets: None


class Rank:
    """Two stages, and the microbatches that are on their way through them."""

    def __init__(self, config, sequences, length, device, dtype):
        exchange = expert.ExpertExchange(dist.group.WORLD)
        beside = torch.cuda.Stream(priority=-1) if device.type == "cuda" else None
        self.stages = []
        for part in range(2):
            layers = range(part * config.layers // 2, (part + 1) * config.layers // 2)
            place = Place(exchange=exchange, layers=layers, first=False, last=False, dtype=dtype)
            with device:
                made = build(config, place)
            initialise(made, seed=0)
            for parameter in made.parameters():  # as gathered for the compute
                parameter.data = parameter.data.to(dtype)
            self.stages.append(PartStage(made, lambda output, routing, batch: output, beside))
        self.x, self.grad = torch.randn(2, sequences, length, config.hidden, device=device, dtype=dtype)
        self.batch = Batch(None, torch.arange(length, device=device), None)
        self.saved = [deque([stage.forward(self.x, self.batch)[1]]) for stage in self.stages]

    def pair(self, overlap, ahead):
        """Forward through stage `ahead`, backward through the other."""
        forward = ForwardPass(self.stages[ahead], self.x, self.batch)
        backward = BackwardPass(self.stages[1 - ahead], self.saved[1 - ahead].popleft(), self.grad)
        (_, saved), _ = overlap(forward, backward)
        self.saved[ahead].append(saved)

    def forwards(self, rounds):
        for _ in range(rounds):
            self.stages[0].forward(self.x, self.batch)

    def steady(self, overlap, rounds):
        for _ in range(rounds):
            self.pair(overlap, 0)
            self.pair(overlap, 1)


def milliseconds(run, rounds, device):
    """Of one of the `rounds` that `run` does."""
    if device.type != "cuda":
        run(1)
        return None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run(rounds)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / rounds


def emulate_wire(gigabytes, device):
    """Have every transfer followed by a kernel that sleeps as long as its bytes would take."""
    plain = expert.travel
    if not gigabytes or device.type != "cuda":
        return
    torch.cuda._sleep(1000)
    cycles = 50_000_000
    per_second = cycles / (1e-3 * milliseconds(lambda rounds: torch.cuda._sleep(cycles), 1, device))

    def slow(x, received, sent, group):
        arrived = plain(x, received, sent, group)
        torch.cuda._sleep(int(arrived.nbytes / (gigabytes * 1e9) * per_second))
        return arrived

    expert.travel = slow


def trace(rank, path):
    """The pieces of one overlapped action and their kernels; the profiler's whole trace is written to `path`."""
    rank.steady(overlapped, 1)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        rank.pair(overlapped, 0)  # fills the queue, so that the second is not launched into an idle device
        with torch.profiler.record_function("traced"):
            rank.pair(overlapped, 1)
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "user_annotation"]
    whole = next(e for e in ranges if e["name"] == "traced")
    first, last = whole["ts"], whole["ts"] + whole["dur"]
    pieces = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in ranges
        if e["name"].split()[0] in ("forward", "backward") and first <= e["ts"] <= last
    )
    launches = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    kernels = []
    for e in events:
        if e.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launched = launches.get(e["args"]["correlation"], -1)
        piece = next((number for number, (start, end, _) in enumerate(pieces) if start <= launched <= end), None)
        if piece is not None:
            row = {"piece": piece, "stream": e["args"]["stream"], "start": e["ts"], "end": e["ts"] + e["dur"]}
            kernels.append({**row, "name": e["name"][:60]})
    kernels.sort(key=lambda k: k["start"])
    zero = min(k["start"] for k in kernels)
    for k in kernels:
        k["start"], k["end"] = round(k["start"] - zero, 1), round(k["end"] - zero, 1)
    return [{"name": name, "launched": round(start - zero, 1)} for start, _, name in pieces], kernels


def check(pieces, kernels):
    """What the trace must show: two streams, each in the order of launch; and how much travel lies under compute."""
    travels = [piece["name"].split()[1] in TRAVELS for piece in pieces]
    streams = {kind: {k["stream"] for k in kernels if travels[k["piece"]] == kind} for kind in (False, True)}
    in_order = all(
        [k["piece"] for k in own] == sorted(k["piece"] for k in own)
        for kind in (False, True)
        for own in [[k for k in kernels if travels[k["piece"]] == kind]]
    )
    under = total = 0.0
    for k in kernels:
        if not travels[k["piece"]]:
            continue
        way = pieces[k["piece"]]["name"].split()[0]
        total += k["end"] - k["start"]
        for other in kernels:
            if not travels[other["piece"]] and pieces[other["piece"]]["name"].split()[0] != way:
                under += max(0.0, min(k["end"], other["end"]) - max(k["start"], other["start"]))
    return {
        "streams": {"compute": sorted(streams[False]), "travel": sorted(streams[True])},
        "kernels_in_order_of_launch": in_order,
        "travel_us": round(total, 1),
        "travel_under_compute_of_the_other_us": round(under, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.0, 50.0], help="a second, on the wire")
    parser.add_argument("--layers", type=int, default=2, help="of each stage")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    sizes = (
        {"hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128, "experts": 128, "top_k": 8, "expert_hidden": 768}
        if cuda
        else {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "experts": 8, "top_k": 2, "expert_hidden": 64}
    )
    sequences, length = (4, 4096) if cuda else (2, 32)
    config = Qwen3MoeConfig(vocab_size=300, layers=2 * arguments.layers, tie_embeddings=False, **sizes)
    options = {"device_id": torch.device("cuda", 0)} if cuda else {}
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1, **options)
    rank = Rank(config, sequences, length, device, torch.bfloat16 if cuda else torch.float32)
    runs = []
    for gigabytes in arguments.gigabytes:
        plain = expert.travel
        emulate_wire(gigabytes, device)
        rounds = arguments.rounds
        rank.steady(overlapped, 2)
        rank.steady(in_turn, 2)
        times = {"in turn": [], "overlapped": []}
        for _ in range(3):
            for name, overlap in (("in turn", in_turn), ("overlapped", overlapped)):
                took = milliseconds(lambda n, overlap=overlap: rank.steady(overlap, n), rounds, device)
                times[name].append(took and took / 2)  # a round is two pairs
        run = {"wire_gigabytes_a_second": gigabytes or None, "pair_ms": times}
        if cuda:
            run["forward_ms"] = milliseconds(rank.forwards, rounds, device)
            print(run, flush=True)
            pieces, kernels = trace(rank, arguments.json.with_suffix(f".trace-{gigabytes:g}.json"))
            run |= {"check": check(pieces, kernels), "pieces": pieces, "kernels": kernels}
        runs.append(run)
        expert.travel = plain
    result = {
        "what": "overlapped forward and backward of two microbatches on one GPU, tokens sent to itself through NCCL",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "date": datetime.date.today().isoformat(),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "triton")},
        "shape": {
            **sizes,
            "tokens": sequences * length,
            "sequence_length": length,
            "layers_of_a_stage": arguments.layers,
        },
        "runs": runs,
    }
    arguments.json.write_text(json.dumps(result) + "\n")
    for run in runs:
        print({k: v for k, v in run.items() if k not in ("pieces", "kernels")})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
