# ruff: noqa: F821
# What the reference solutions share: it stands at the end of each as it is handed in.
import json
import sys
import time
from pathlib import Path

import torch


def train(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make_model()
    text = torch.tensor(list((Path(__file__).parent / "README.md").read_bytes()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    with (folder / "loss.jsonl").open("w") as losses, (folder / "train.log").open("w") as log:
        for step in range(1, 41):
            print(time.strftime("%Y-%m-%d %H:%M:%S"), "step", step, file=log, flush=True)
            starts = torch.arange(2) * 128 + 16 * step
            rows = torch.stack([text[start : start + 129] for start in starts])
            loss, _ = model(rows[:, :-1], torch.arange(128), targets=rows[:, 1:])
            loss = loss / rows[:, 1:].numel()
            optimizer.zero_grad()
            (loss + 0.01 * auxiliary(model)).backward()
            optimizer.step()
            print(json.dumps({"step": step, "loss": loss.item(), **report(model)}), file=losses)
            if step % 10 == 0 and adapt(model):  # other parameters than before
                optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
