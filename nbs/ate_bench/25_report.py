# %% [markdown]
# # The report: every attempt a dot
#
# > Turns a folder of attempts into a table, a CSV, figures and one HTML page that needs nothing else.
#
# Few attempts are made of each task, for they cost; so a mean would hide the one that went astray, and a bar
# would hide how many there were. Every attempt is a dot, the median a line; hollow dots did not pass. Tables
# give the median and, behind it, the least and the greatest. The five metrics stand side by side.

# %%
#| default_exp report

# %%
#| export
import base64
import csv
import html
import json
import re
import statistics
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

from ate_bench.session import Metrics
from pithtrain.config import UserError

# %%
import tempfile

# %% [markdown]
# ## Attempts
#
# A record that still says `running` when it is read belongs to a harness that runs, or was killed; it is shown
# as it is. One that cannot be read is shown as well.

# %%
#| export
METRICS = [field.name for field in fields(Metrics)]
KEYS = ["framework", "version", "suite", "task", "variant", "agent", "model", "status", "verdict", "sandbox"]


# %%
#| export
def read_attempts(results: Path) -> list[dict[str, Any]]:
    """A flat record of every attempt below `results`, with None for what is not known. Raises UserError for none."""
    attempts = []
    paths = [path for path in results.rglob("attempt.json") if path.parent.name.isdigit()]
    paths = [path for path in paths if "out" not in path.relative_to(results).parts]  # what an agent wrote is no record
    for path in sorted(paths, key=lambda path: (path.parent.parent, int(path.parent.name))):
        try:
            facts = json.loads(path.read_text())
        except ValueError:
            facts = {"status": "unreadable"}
        row = {"attempt": str(path.parent.relative_to(results)), **{key: facts.get(key) for key in KEYS}}
        row |= {name: (facts.get("metrics") or {}).get(name) for name in METRICS}
        failed = [rule for rule in facts.get("rules") or [] if rule["outcome"] == "FAIL"]
        row["reason"] = facts.get("error") or "; ".join(f"{rule['rule']}: {rule['reason']}" for rule in failed)
        attempts.append(row)
    if not attempts:
        raise UserError(f"{results}: no attempts below it; ate-bench run makes some")
    return attempts


# %% [markdown]
# Some attempts to look at, of two frameworks that do not exist, made by a random generator:

# %%
import random

draw = random.Random(0)
holder = tempfile.TemporaryDirectory()
results = Path(holder.name)
for framework, factor in (("compact", 1.0), ("large", 1.6)):
    for task in ("seeds", "norms"):
        for number in range(1, 5):
            folder = results / framework / "qa" / task / "cpu" / "agent" / f"{number:03}"
            folder.mkdir(parents=True)
            level = factor * draw.lognormvariate(0, 0.3)
            values = [300 * level, 0, int(20 * level), 30_000 * level, int(5_000 * level)]
            facts = {"framework": framework, "version": "1", "suite": "qa", "task": task, "variant": "cpu"}
            facts |= {"agent": "agent", "model": "", "status": "finished", "sandbox": True}
            facts |= {
                "verdict": "FAIL" if draw.random() < 0.2 else "PASS",
                "metrics": dict(zip(METRICS, values, strict=True)),
            }
            (folder / "attempt.json").write_text(json.dumps(facts))
attempts = read_attempts(results)
print(len(attempts), attempts[0])


# %% [markdown]
# ## The table
#
# A row for each task, framework with its version, agent and model; commits are cut to 12 digits. Attempts at a working
# tree with changes (`-dirty`) stand together, though the changes may differ. Attempts that died have no part in the
# medians of what they did not reach; that they died stands beside the passes.


# %%
#| export
def spread(values: list[float]) -> str:
    """Median and, where the values differ, their range: `12 (9–20)`."""
    if not values:
        return "-"
    three = (min(values), statistics.median(values), max(values))
    low, middle, high = (f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in three)
    return middle if low == high else f"{middle} ({low}–{high})"


# %%
assert spread([3.0]) == "3" and spread([1, 2, 9000]) == "2 (1–9,000)" and spread([]) == "-"


# %%
#| export
def cell_of(attempt: dict[str, Any]) -> tuple[str, ...]:
    """What attempts have in common that stand in one row: suite, task, variant, framework, version, agent, model."""
    version = re.sub(r"[0-9a-f]{40}", lambda match: match[0][:12], attempt["version"] or "").rpartition("==")[2]
    names = [attempt[key] or "" for key in ("suite", "task", "variant", "framework", "agent", "model")]
    return (*names[:4], version, *names[4:])


# %%
print(cell_of(attempts[0]))


# %%
#| export
def report_rows(attempts: list[dict[str, Any]]) -> list[list[str]]:
    """The report's table: a header, and a row for each cell of the benchmark."""
    cells = defaultdict(list)
    for attempt in attempts:
        cells[cell_of(attempt)].append(attempt)
    rows = [["task", "framework", "agent", "passed", "seconds", "GPU seconds", "turns", "context", "output"]]
    for (suite, task, variant, framework, version, agent, model), group in sorted(cells.items()):
        verdicts = [attempt["verdict"] for attempt in group]
        passed = f"{verdicts.count('PASS')} of {len(group)}"
        others = {"unjudged": verdicts.count("UNJUDGED"), "without verdict": verdicts.count(None)}
        passed += "".join(f", {number} {name}" for name, number in others.items() if number)
        columns = [[a[name] for a in group if a[name] is not None] for name in METRICS]
        names = [f"{suite}/{task} ({variant})", f"{framework} {version}".strip(), f"{agent} {model}".strip(), passed]
        rows.append(names + [spread(column) for column in columns])
    return rows


# %%
#| export
def markdown_table(rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    escaped = [[" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    escaped.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


# %%
print(markdown_table(report_rows(attempts)))

# %% [markdown]
# ## The figure
#
# A figure for each suite, a panel for each metric, a row for each task and framework.


# %%
#| export
def draw_suite(attempts: list[dict[str, Any]], suite: str) -> Any:
    """A matplotlib figure of one suite: five panels, every attempt a dot, medians as lines."""
    from matplotlib.figure import Figure

    own = [attempt for attempt in attempts if attempt["suite"] == suite]
    named = [cell_of(attempt)[1:] for attempt in own]
    labels, frameworks = sorted(set(named)), sorted({name[2] for name in named})
    figure = Figure(figsize=(15, 1.2 + 0.36 * len(labels)), layout="constrained")
    for panel, (axes, name) in enumerate(zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True)):
        for row, label in enumerate(labels):
            colour = f"C{frameworks.index(label[2])}"
            known = [a for a, own_label in zip(own, named, strict=True) if own_label == label and a[name] is not None]
            for attempt in known:
                face = colour if attempt["verdict"] == "PASS" else "none"
                axes.scatter(attempt[name], row, s=26, facecolors=face, edgecolors=colour)
            if known:
                axes.vlines(statistics.median(a[name] for a in known), row - 0.3, row + 0.3, colour)
        axes.set(title=name, xlim=(0, None))
        if panel == 0:
            axes.set_yticks(range(len(labels)), [" ".join(filter(None, label)) for label in labels])
            axes.invert_yaxis()
    figure.suptitle(f"{suite}: filled dots passed, lines are medians")
    return figure


# %% [markdown]
# Read a panel by its lines first, then look how far the dots of one row lie apart: where two rows overlap, more
# attempts are needed before a difference can be claimed.

# %%
figure = draw_suite(attempts, "qa")
figure

# %% [markdown]
# ## One page
#
# Figures are within the page, and what agents wrote is escaped: a page that is mailed around must not run what a
# model made up.

# %%
#| export
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; } img { max-width: 100%; }
td, th { border-bottom: 1px solid #ccc; padding: 0.2rem 0.7rem; text-align: left; white-space: nowrap; }"""


# %%
#| export
def html_table(rows: list[list[str]]) -> str:
    """Rows as an HTML table, their text escaped."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows[1:]]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


# %%
assert "&lt;script&gt;" in html_table([["a"], ["<script>"]])


# %%
#| export
def write_report(results: Path, target: Path) -> list[Path]:
    """Write report.md, attempts.csv, a figure for each suite and report.html into `target`; return the files."""
    attempts = read_attempts(results)
    target.mkdir(parents=True, exist_ok=True)
    rows = report_rows(attempts)
    single = [["attempt", "status", "verdict", "why"]]
    single += [[a["attempt"], a["status"], a["verdict"] or "", a["reason"]] for a in attempts]
    figures = []
    for suite in sorted({attempt["suite"] for attempt in attempts if attempt["suite"]}):
        figures.append(target / f"{suite}.png")
        draw_suite(attempts, suite).savefig(figures[-1], dpi=110)
    loose = "" if all(attempt["sandbox"] for attempt in attempts) else "Some attempts ran without a sandbox.\n\n"
    pictures = "\n".join(f"![{path.stem}]({path.name})" for path in figures)
    text = f"# ATE-Bench\n\n{loose}{markdown_table(rows)}\n\n{pictures}\n\n## Attempts\n\n{markdown_table(single)}\n"
    (target / "report.md").write_text(text, encoding="utf-8")
    with (target / "attempts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(attempts[0]))
        writer.writeheader()
        writer.writerows(attempts)
    coded = [base64.b64encode(path.read_bytes()).decode() for path in figures]
    images = "".join(f'<img alt="{html.escape(p.stem)}" src="data:image/png;base64,{code}">'
                     for p, code in zip(figures, coded, strict=True))  # fmt: skip
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>ATE-Bench</title><style>{STYLE}</style>"
    page += f"<h1>ATE-Bench</h1><p>{loose}</p>{html_table(rows)}{images}<h2>Attempts</h2>{html_table(single)}</html>"
    (target / "report.html").write_text(page, encoding="utf-8")
    return [target / "report.md", target / "attempts.csv", target / "report.html", *figures]


# %%
for path in write_report(results, results / "report"):
    print(f"{path.name:14} {path.stat().st_size:7,} bytes")
holder.cleanup()

# %% [markdown]
# Next: [the command](26_cli.py).
