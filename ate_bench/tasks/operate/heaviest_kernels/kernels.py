"""Computes the heaviest kernels from the trace again: python kernels.py OUT."""

import gzip
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path


def own_times(events: list[dict]) -> tuple[Counter, Counter]:
    """Microseconds and calls by name: of kernels where there are any, else of operators by themselves."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    times, calls, threads = Counter(), Counter(), defaultdict(list)
    for event in kernels or [event for event in events if event.get("cat") == "cpu_op"]:
        times[event["name"]] += event["dur"]
        calls[event["name"]] += 1
        threads[event["pid"], event["tid"]].append(event)
    for thread in () if kernels else threads.values():
        around: list[dict] = []
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while around and around[-1]["ts"] + around[-1]["dur"] < event["ts"] + event["dur"] - 0.002:
                around.pop()
            if around:
                times[around[-1]["name"]] -= event["dur"]
            around.append(event)
    return times, calls


def check(events: list[dict], said: list[dict]) -> str:
    """What is wrong with a report; empty if nothing is."""
    names = [str(event.get("name", "")) for event in events]
    for part, sign in (("backward", "autograd::engine"), ("optimiser", "Optimizer.step")):
        if not any(name.startswith(sign) for name in names):
            return f"the trace has no {part}: no event begins with {sign}"
    on_host = [event for event in events if not str(event.get("cat", "")).startswith("gpu_")]  # a GPU repeats the mark
    steps = {round(event["ts"]) for event in on_host if str(event.get("name", "")).startswith("Optimizer.step")}
    if len(steps) > 1:
        return f"the trace has {len(steps)} steps of an optimiser, expected one"
    times, calls = own_times(events)
    heaviest = times.most_common(3)
    if [entry["name"] for entry in said] != [name for name, _ in heaviest]:
        return f"reported are {[entry['name'] for entry in said]}, heaviest are {[name for name, _ in heaviest]}"
    for entry, (name, time) in zip(said, heaviest):
        right = {"microseconds": (time, 0.01), "calls": (calls[name], 0), "share": (time / times.total(), 0.01)}
        for key, (value, tolerance) in right.items():
            if not abs(float(entry[key]) - value) <= tolerance * value:
                return f"{name}: {key} is reported as {entry[key]}, the trace has {value:.4g}"
    return ""


def main() -> None:
    out = Path(sys.argv[1])
    try:
        path = next(path for name in ("profile.json.gz", "profile.json") if (path := out / name).exists())
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        said = json.loads((out / "kernels.json").read_text())
        wrong = check([e for e in json.loads(data)["traceEvents"] if e.get("ph") == "X"], said)
    except StopIteration:
        wrong = "there is no profile.json or profile.json.gz"
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    print(f"FAIL {wrong}" if wrong else f"PASS {', '.join(entry['name'] for entry in said)}")


main()
