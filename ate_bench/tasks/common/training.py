"""Runs a training and reads its loss: python training.py REPO OUT [COMMAND...], without one `ate_feature.py`."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

STEPS, FALL = 40, 0.8
STAMP = r"\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d"


def main() -> None:
    repo, folder = Path(sys.argv[1]), Path(sys.argv[2]) / "check"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loss.jsonl").unlink(missing_ok=True)
    command = sys.argv[3:] or [sys.executable, "ate_feature.py"]
    variables = {**os.environ, "PYTHONPATH": str(repo)}
    variables.pop("PYTHONNOUSERSITE", None)
    done = subprocess.run([*command, folder], cwd=repo, env=variables, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no error"])[-1]
        return print(f"FAIL {Path(command[-1]).name} left with {done.returncode}: {last}")
    try:
        losses = [float(json.loads(line)["loss"]) for line in (folder / "loss.jsonl").read_text().splitlines()]
        log = (folder / "train.log").read_text().splitlines() or [""]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return print(f"FAIL {type(error).__name__}: {error}")
    if not re.match(STAMP, log[0]) or not re.match(STAMP, log[-1]):
        return print("FAIL the first and last line of train.log do not begin with the time")
    if len(losses) < STEPS:
        return print(f"FAIL {len(losses)} steps, expected {STEPS}")
    if not all(map(math.isfinite, losses)):
        return print("FAIL the loss is not finite")
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    word = "PASS" if last < FALL * first else "FAIL"
    print(f"{word} the loss went from {first:.3f} to {last:.3f} in {len(losses)} steps")


main()
