# %% [markdown]
# # Figures
#
# > The pictures of a run, drawn from its metrics file.

# %%
#| default_exp train.figures

# %%
#| export
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# %% [markdown]
# Four pictures answer the four questions one has about a run of a Mixture-of-Experts. Does it learn? At
# what rate? Are the experts equally busy? How decided are the routers?
#
# They are drawn from what `metrics.jsonl` holds and nothing else, so they can be drawn again at any time.
# Here is a made-up run to draw; `docs` and the README show real ones.

# %%
import random

random.seed(0)
records = [
    {
        "step": step,
        "loss": 4 + 4.3 * math.exp(-step / 40) + random.gauss(0, 0.03),
        "learning_rate": 2e-3 * min(1, step / 20),
        "load": [[(1 + random.gauss(0, 0.1)) / 8 for _ in range(8)] for _ in range(2)],
        "entropy": [2.05 - step / 400, 2.05 - step / 900],
    }
    for step in range(1, 201)
]


# %%
#| export
def draw_loss(records: list[dict[str, Any]], baselines: dict[str, float]) -> Figure:
    """Training loss over steps, with a horizontal line for each of `baselines` (nats per token)."""
    axes = Figure(figsize=(7, 3.8), layout="constrained").subplots()
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], lw=1, label="training loss")
    validated = [r for r in records if "validation_loss" in r]
    axes.plot([r["step"] for r in validated], [r["validation_loss"] for r in validated], "o", label="held-out loss")
    for i, (name, loss) in enumerate(baselines.items()):
        axes.axhline(loss, color=f"C{i + 2}", ls="--", lw=1, label=f"{name}, held-out: {loss:.2f}")
    axes.set(title="Loss", xlabel="step", ylabel="nats per token")
    axes.legend()
    return axes.figure


# %%
draw_loss(records, {"unigram": 6.5, "bigram": 4.8})


# %%
#| export
def draw_learning_rate(records: list[dict[str, Any]]) -> Figure:
    """The learning rate over steps."""
    axes = Figure(figsize=(7, 2.4), layout="constrained").subplots()
    axes.plot([r["step"] for r in records], [r["learning_rate"] for r in records])
    axes.set(title="Learning rate", xlabel="step", ylim=(0, None))
    return axes.figure


# %%
draw_learning_rate(records)

# %% [markdown]
# Load is drawn as a band for each layer: a row for each expert, a column for each step, and a colour that
# is white at the balanced load, red above it and blue below.


# %%
#| export
def draw_load(records: list[dict[str, Any]]) -> Figure:
    """Each expert's share of the load, relative to balance, over steps: one band per layer."""
    layers, experts = len(records[0]["load"]), len(records[0]["load"][0])
    figure = Figure(figsize=(7, 0.6 + 1.2 * layers), layout="constrained")
    bands = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    extent = (records[0]["step"] - 0.5, records[-1]["step"] + 0.5, experts - 0.5, -0.5)
    for layer, axes in enumerate(bands):
        relative = [[experts * r["load"][layer][expert] for r in records] for expert in range(experts)]
        image = axes.imshow(relative, aspect="auto", cmap="bwr", vmin=0, vmax=2, extent=extent, interpolation="none")
        axes.set(ylabel=f"layer {layer}")
    bands[0].set_title("Load of each expert")
    bands[-1].set_xlabel("step")
    figure.colorbar(image, ax=list(bands), label="load / balanced load")
    return figure


# %%
draw_load(records)


# %%
#| export
def draw_entropy(records: list[dict[str, Any]]) -> Figure:
    """Mean entropy of each layer's router over steps, below the entropy of an undecided one."""
    layers, experts = len(records[0]["load"]), len(records[0]["load"][0])
    axes = Figure(figsize=(7, 3), layout="constrained").subplots()
    for layer in range(layers):
        axes.plot([r["step"] for r in records], [r["entropy"][layer] for r in records], label=f"layer {layer}")
    axes.axhline(math.log(experts), color="black", ls="--", lw=0.8, label="undecided")
    axes.set(title="Routing entropy", xlabel="step", ylabel="nats", ylim=(0, None))
    axes.legend(ncols=3, fontsize="small")
    return axes.figure


# %%
draw_entropy(records)


# %%
#| export
def save_figures(folder: Path, records: list[dict[str, Any]], baselines: dict[str, float]) -> list[Path]:
    """Draw all figures of a run into `folder`; return their paths."""
    figures = {"loss": draw_loss(records, baselines), "learning_rate": draw_learning_rate(records)}
    figures |= {"expert_load": draw_load(records), "entropy": draw_entropy(records)}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    return [folder / f"{name}.png" for name in figures]


# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    for path in save_figures(Path(folder), records, {"unigram": 6.5}):
        print(path.name, f"{path.stat().st_size:,} bytes")

# %% [markdown]
# Next: where all this is kept: the [run folder](69_run.py).
