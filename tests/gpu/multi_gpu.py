"""Several GPUs of one host, through NCCL: do they train as one does, and how fast?

    torchrun --nproc-per-node 2 tests/gpu/multi_gpu.py OUT.json

Any number of GPUs. Without a GPU it runs on the CPU through gloo, small, as a rehearsal of itself.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pithtrain.config import Config, MeshConfig, UserError, load_config
from pithtrain.parallel.mesh import Mesh, fit_axes, make_mesh
from pithtrain.parallel.pipeline.engine import in_turn
from pithtrain.train.step import Learner, read_microbatches
from pithtrain.verify import RandomBatches, compare, fit_config, reference_config, trace

ROOT = Path(__file__).parents[2]
PARTS = ["equal", "speed", "killed"]
CUDA = torch.cuda.is_available()
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast stays off


def meshes(world: int) -> dict[str, MeshConfig]:
    """Every axis alone over all GPUs, and what two axes can share."""
    found = {f"{axis}={world}": MeshConfig(**{axis: world}) for axis in ("ep", "dp", "cp", "pp")}
    if world >= 4:
        half = world // 2
        pairs = [("cp", "ep"), ("dp", "ep"), ("pp", "dp"), ("pp", "ep")]
        found |= {f"{a}=2,{b}={half}": MeshConfig(**{a: 2, b: half}) for a, b in pairs}
    return found


def equal_to_one(config: Config, rank: int, world: int, device: torch.device, found: dict[str, dict]) -> None:
    """Three steps in fp32 on each mesh against three on this GPU alone; `found` gets the worst rank's differences."""
    for name, mesh in meshes(world).items():
        fitted = fit_config(dataclasses.replace(config, mesh=mesh), world)
        reference = reference_config(fitted, fit_axes(mesh, world).batch_ranks)
        wanted = trace(reference, Mesh(fit_axes(MeshConfig(), 1), device=device), 3)
        ours = compare(trace(fitted, make_mesh(mesh, rank, world, device), 3), wanted)
        every = [None] * world
        dist.all_gather_object(every, ours)
        worst = max(every, key=lambda c: c.largest)
        found[name] = {"largest": worst.largest, **worst._asdict(), "equal": worst.largest < 1e-5}
        if rank == 0:
            print(f"{name:14} largest difference {worst.largest:.1e} ({worst.name})", flush=True)


def speed(config: Config, mesh: Mesh, rows: int, micro: int, overlap: bool = True, steps: int = 8) -> dict:
    """Tokens a second and GPU in bf16, of `rows` sequences a GPU, `micro` at a time."""
    size = mesh.axes.batch_ranks * mesh.axes.pp
    batch = rows * size
    train = dataclasses.replace(config.train, batch_size=batch, micro_batch_size=micro)
    config = dataclasses.replace(config, train=train)
    learner = Learner(config, mesh, torch.bfloat16)
    if not overlap:
        learner.engine.overlap = in_turn
    batches = RandomBatches(config.model.vocab_size, train.sequence_length, batch)
    held = [read_microbatches(batches, step, micro, mesh) for step in range(2)]
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        learner.step(held[step % 2], 1e-4)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    return {
        "tokens_per_second_per_gpu": batch * train.sequence_length / median / mesh.world_size,
        "seconds": median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
    }


def speeds(rank: int, world: int, device: torch.device, found: dict[str, dict]) -> None:
    """Each published shape on one GPU, on all by expert and by pipeline parallelism, the same work for each GPU."""
    for name, layers, rows in (("deepseek-v2-lite", 5, 4), ("qwen3-30b-a3b", 4, 4)) if CUDA else (("tiny", 4, 2),):
        config = load_config(ROOT / "configs" / f"{name}.toml", [])
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, layers=layers, tie_embeddings=False)
        )
        alone = Mesh(fit_axes(MeshConfig(), 1), device=device)
        plans = {
            "one GPU": (alone, rows, rows),
            f"ep={world}": (MeshConfig(ep=world), rows, rows),
            "one GPU, microbatches": (alone, 8, 2),
            f"pp=2,ep={world // 2}": (MeshConfig(pp=2, ep=world // 2), 8, 2),
            f"pp=2,ep={world // 2}, in turn": (MeshConfig(pp=2, ep=world // 2), 8, 2),
        }
        for label, (mesh, count, micro) in plans.items():
            gc.collect()  # what ran before is full of cycles
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if isinstance(mesh, MeshConfig):
                config = dataclasses.replace(config, mesh=mesh)
                mesh = make_mesh(mesh, rank, world, device)
            try:
                found[f"{name}, {label}"] = speed(config, mesh, count, micro, "in turn" not in label)
            except (torch.OutOfMemoryError, UserError):
                found[f"{name}, {label}"] = {"out_of_memory": True}
            dist.barrier()
            if rank == 0:
                print(name, label, json.dumps(found[f"{name}, {label}"])[:600], flush=True)


def kill_one(world: int) -> dict:
    """Seconds from the SIGKILL of a rank in the middle of training to the end of its job, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = f"{sys.executable} -m pithtrain.cli launch --nproc {world} configs/tiny.toml".split()
        command += f"--run.folder {folder} --data.folder {folder}/data --mesh.ep {world}".split()
        command += ["--train.steps", "100000", "--train.micro_batch_size", "1"]
        job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        metrics = Path(folder) / "tiny" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5) and time.monotonic() < deadline:
            time.sleep(0.2)
        ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
        if not metrics.exists():
            job.kill()
            return {"seconds": None, "said": job.communicate()[0].strip().splitlines()[-8:]}
        start = time.monotonic()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        output, _ = job.communicate(timeout=120)
        return {"seconds": time.monotonic() - start, "code": job.returncode, "said": output.strip().splitlines()[-4:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", type=Path, help="what is measured is added to this file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if CUDA else "gloo", timeout=datetime.timedelta(seconds=60))
    result = json.loads(options.json.read_text()) if options.json.exists() else {}
    about = {
        "date": datetime.date.today().isoformat(),
        "device": f"{world} x {torch.cuda.get_device_name()}" if CUDA else f"CPU, {world} processes",
        "versions": {"torch": torch.__version__},
    }
    result = about | result

    def save() -> None:
        if rank == 0:
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    # As many layers as DualPipeV has stages on all ranks.
    config = load_config(ROOT / "configs" / "tiny.toml", [("model.layers", str(2 * world))])
    try:
        if "equal" in options.parts:
            equal_to_one(config, rank, world, device, result.setdefault("equal", {}))
        if "speed" in options.parts:
            speeds(rank, world, device, result.setdefault("speed", {}))
    finally:
        save()
    dist.destroy_process_group()
    if rank == 0 and "killed" in options.parts:
        result["killed"] = about | kill_one(world)
        print(result["killed"])
        save()
    sys.exit(0 if all(r["equal"] for r in result.get("equal", {}).values()) else 1)


main()
