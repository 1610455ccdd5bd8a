"""Compares the loss that was handed in with that of the run that training.py made: python record.py OUT."""

import json
import sys
from pathlib import Path


def losses(path: Path) -> list[float]:
    return [float(json.loads(line)["loss"]) for line in path.read_text().splitlines()]


out = Path(sys.argv[1])
try:
    own, again = losses(out / "loss.jsonl"), losses(out / "check" / "loss.jsonl")
    (first, last), (other, end) = ((sum(run[:5]) / 5, sum(run[-5:]) / 5) for run in (own, again))
    if len(own) != len(again):
        print(f"FAIL {len(own)} steps were handed in, run.sh makes {len(again)}")
    elif abs(first - other) > 0.1 * other or abs(last - end) > 0.1 * end:
        print(
            f"FAIL handed in is a loss from {first:.3f} to {last:.3f}, run.sh makes one from {other:.3f} to {end:.3f}"
        )
    else:
        print(f"PASS the loss goes to {last:.3f} and, run again, to {end:.3f}")
except (OSError, ValueError, KeyError, TypeError) as error:
    print(f"FAIL loss.jsonl: {type(error).__name__}: {error}")
