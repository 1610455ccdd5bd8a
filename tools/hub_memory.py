"""Peak memory of `pithtrain import` and `pithtrain export` against the size of the checkpoint, on random weights.

    .venv/bin/python tools/hub_memory.py --gib 0.5 1 2 4 --json docs/benchmarks/hub-memory.json

For each family and size: a published folder in bf16 is made in a temporary folder, imported, and exported again, each
in a process of its own. The peak is resident memory, mapped files included, above what the process had before.
"""

import argparse
import filecmp
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from pithtrain.config import DecoderConfig, GptOssConfig, Qwen3MoeConfig
from pithtrain.hub import Entry, export_model, import_model, write_shard
from pithtrain.models.build import build
from pithtrain.published import table_from, views


def write_published(config: DecoderConfig, folder: Path) -> dict[str, int]:
    """A published folder of random bf16 weights: its bytes and tensors, and the bytes of our largest tensor in fp32."""
    with torch.device("meta"):
        shapes = build(config).state_dict()
    parts = [part for name, tensor in shapes.items() for part in views(config, name, tensor, {})]
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(table_from(config)))
    entries = [Entry(part.name, "BF16", part.shape) for part in parts]
    noise = (torch.randn(entry.shape, generator=generator, dtype=torch.bfloat16) for entry in entries)
    write_shard(folder / "model.safetensors", entries, noise)
    return {
        "checkpoint_bytes": (folder / "model.safetensors").stat().st_size,
        "published_tensors": len(parts),
        "largest_tensor_bytes": max(4 * tensor.numel() for tensor in shapes.values()),
    }


def status(key: str) -> int:
    """A figure of this process, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def transfer(way: str, source: Path, target: Path, small: Path, spare: Path) -> None:
    """Import or export, after a small model has loaded whatever is loaded late; print the bytes at the peak."""
    move = {"import": import_model, "export": export_model}[way]
    move(small, spare, report=str)
    before = status("VmRSS")
    move(source, target, report=str)
    print(status("VmHWM") - before)


def measure(config: DecoderConfig, here: Path) -> dict[str, object]:
    """Both ways for one model, in `here`."""
    small = Qwen3MoeConfig(layers=1, hidden=16, experts=2, expert_hidden=16)
    write_published(small, here / "small-in")
    import_model(here / "small-in", here / "small-run", report=str)
    result = {"family": config.family, "layers": config.layers, **write_published(config, here / "in")}
    for way, source, target in (("import", "in", "run"), ("export", "run", "out")):
        folders = [here / name for name in (source, target, f"small-{source}", f"small-{target}-spare")]
        command = [sys.executable, __file__, "--transfer", way, *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        result[f"{way}_peak_bytes"] = int(done.stdout)
    result["identical"] = filecmp.cmp(*(here / name / "model.safetensors" for name in ("in", "out")), shallow=False)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, nargs="+", default=[0.5], help="sizes of the checkpoints in bf16")
    parser.add_argument("--expert-hidden", type=int, default=2048, help="the largest tensor is 96 KiB times this")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--transfer", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.transfer:
        transfer(arguments.transfer[0], *map(Path, arguments.transfer[1:]))
        return
    models = []
    for family in (Qwen3MoeConfig, GptOssConfig):  # a tensor for each expert; experts stacked and transposed
        for gib in arguments.gib:
            shape = {"hidden": 256, "experts": 48, "expert_hidden": arguments.expert_hidden, "vocab_size": 1000}
            config = family(layers=max(1, round(gib * 2**30 / (48 * 3 * 2 * 256 * arguments.expert_hidden))), **shape)
            with tempfile.TemporaryDirectory() as here:
                models.append(measure(config, Path(here)))
            mib = {key: value / 2**20 for key, value in models[-1].items() if key.endswith("_bytes")}
            print(f"{config.family}: " + ", ".join(f"{key[:-6]} {value:,.0f} MiB" for key, value in mib.items()))
    versions = {package: version(package) for package in ("torch", "safetensors")}
    processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    about = {"date": date.today().isoformat(), "device": processor.split(": ")[1], "cores": os.cpu_count()}
    if arguments.json:
        result = about | {"python": platform.python_version(), **versions, "models": models}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
