# %% [markdown]
# # Sessions: five figures out of what an agent left behind
#
# > Reads the sessions of three agents into one form, and takes five metrics from it, whole or broken off.
#
# What did it cost an agent to do a task? Five answers, which stand side by side and are never blended into a
# score, because whoever pays weighs them for himself:
#
# | metric | is |
# |---|---|
# | session duration | time from first to last event; a gap over ten minutes in which no tool ran counts as ten |
# | active GPU time | time covered by the training runs' logs, from first to last stamp of each |
# | turns | replies of the model |
# | context per turn | median of input tokens over turns, cached ones included |
# | output tokens | all that the model wrote |
#
# A gap without a tool is the agent's service or its user being away; a gap with one is the framework at work.

# %%
#| default_exp session

# %%
#| export
import contextlib
import json
import re
import statistics
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from pithtrain.config import UserError

# %% [markdown]
# ## The common form


# %%
#| export
@dataclass(frozen=True)
class Turn:
    """One reply of the model: the tokens it read, cached ones included, and those it wrote."""

    input_tokens: int
    output_tokens: int


# %%
#| export
@dataclass
class Session:
    """What a session file tells. Times are seconds since 1970."""

    turns: list[Turn] = field(default_factory=list)
    events: list[tuple[float, int]] = field(default_factory=list)  #: (time, tools running from then on)
    answer: str = ""  #: the last text that the agent wrote
    malformed: int = 0  #: lines that are not what they should be, such as a last one cut off
    output_tokens: int | None = None  #: the agent's own total, where it gives one


# %% [markdown]
# ## Lines
#
# Claude Code and Codex write one JSON object a line. What they print carries no time, so the harness keeps
# each line with the moment of its arrival, `{"at": seconds, "line": text}`; transcripts that the agents
# keep themselves have a `timestamp`. A session that was cut off ends within a line, which is then counted
# and passed over. What a service sends is not in our hands: a count that is no count is taken as 0, a text that is
# no text as none, a time that is none as missing. An attempt is not lost for it.


# %%
#| export
def number(value: object) -> int:
    """`value` where a count should be; 0 in place of anything else."""
    return value if type(value) is int and 0 <= value < 2**53 else 0


# %%
assert [number(value) for value in (7, -7, "7", True, None, 10**400)] == [7, 0, 0, 0, 0, 0]


# %%
#| export
def words(value: object, before: str) -> str:
    """`value` where it is a text that says something, in characters that can be written; else `before`."""
    return value.encode(errors="replace").decode() if isinstance(value, str) and value else before


# %%
assert words("a", "b") == "a" and words({}, "b") == words("", "b") == "b"


# %%
#| export
def moment(value: object) -> float | None:
    """`value` where a time should be; None in place of anything else."""
    return float(value) if type(value) in (int, float) and 0 <= value < 1e11 else None


# %%
import math

assert moment(5) == 5.0 and moment("5") is moment(math.nan) is moment(10**400) is None


# %%
#| export
def read_lines(text: str) -> tuple[list[tuple[float | None, dict[str, Any]]], int]:
    """The objects of a session file with their times, and the number of malformed lines."""
    entries, malformed = [], 0
    for line in filter(str.strip, text.split("\n")):  # U+2028 and its like may stand within
        try:
            entry = json.loads(line)
            at = entry.get("at")
            entry = json.loads(entry["line"]) if "line" in entry and "at" in entry else entry
            if "timestamp" in entry:
                at = datetime.fromisoformat(entry["timestamp"]).timestamp()
            entry.get("type")  # is it an object?
        except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
            malformed += 1
            continue
        entries.append((moment(at), entry))
    return entries, malformed


# %%
lines = '{"at": 5, "line": "{\\"type\\": \\"a\\"}"}\n{"type": "b", "timestamp": "1970-01-01T00:00:09Z"}\n{"typ'
print(read_lines(lines))
assert [at for at, _ in read_lines(lines)[0]] == [5, 9] and read_lines(lines)[1] == 1


# %%
#| export
def table(value: object) -> dict[str, Any]:
    """`value` where a JSON object should be; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


# %% [markdown]
# ## Claude Code
#
# A reply comes in several lines, one for each block, all with the `id` of the message and its `usage` as far
# as it was known then: the largest counts. Input tokens are in three parts: new, read from the cache, and
# written to it. The closing `result` gives the output tokens of the whole session.

# %%
#| export
INPUT_PARTS = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


# %%
#| export
def read_claude(text: str) -> Session:
    """A session of Claude Code: `--output-format stream-json`, or the transcript it keeps."""
    entries, malformed = read_lines(text)
    session, turns, running = Session(malformed=malformed), {}, set()
    for at, entry in entries:
        message = table(entry.get("message"))
        content = message.get("content")
        blocks = [table(block) for block in content] if isinstance(content, list) else []
        usage = table(message.get("usage"))
        if entry.get("type") == "assistant" and message.get("model") != "<synthetic>":
            name = str(message.get("id") or entry.get("uuid") or len(turns))
            before = turns.get(name, Turn(0, 0))
            read = sum(number(usage.get(part)) for part in INPUT_PARTS)
            wrote = number(usage.get("output_tokens"))
            turns[name] = Turn(max(before.input_tokens, read), max(before.output_tokens, wrote))
            running |= {str(block.get("id")) for block in blocks if block.get("type") == "tool_use"}
            said = next((block.get("text") for block in blocks if block.get("type") == "text"), None)
            session.answer = words(said, session.answer)
        elif entry.get("type") == "user":
            running -= {str(block.get("tool_use_id")) for block in blocks}
        elif entry.get("type") == "result":
            session.answer = words(entry.get("result"), session.answer)
            session.output_tokens = number(table(entry.get("usage")).get("output_tokens")) or None
        if at is not None:
            session.events.append((at, len(running)))
    session.turns = list(turns.values())
    return session


# %%
def reply(time: int, name: str, block: dict, read: int, wrote: int) -> str:
    usage = {"input_tokens": 4, "cache_read_input_tokens": read - 4, "output_tokens": wrote}
    message = {"id": name, "content": [block], "usage": usage}
    return json.dumps({"at": time, "line": json.dumps({"type": "assistant", "message": message})})


result = {"type": "user", "message": {"content": [{"type": "tool_result", "tool_use_id": "t1"}]}}
claude_lines = [
    reply(0, "m1", {"type": "text", "text": "Let me train it."}, 900, 1),
    reply(2, "m1", {"type": "tool_use", "id": "t1", "name": "Bash"}, 900, 40),
    json.dumps({"at": 1502, "line": json.dumps(result)}),
    reply(1510, "m2", {"type": "text", "text": "Done."}, 1300, 10),
]
session = read_claude("\n".join(claude_lines))
print(session)
assert session.turns == [Turn(900, 40), Turn(1300, 10)]

# %% [markdown]
# ## Codex
#
# Codex keeps a transcript with a `token_count` event after each reply: `last_token_usage` is the reply's,
# with cached tokens among the input. The event is written again when only the rate limits changed; then the
# total stays as it was, and no reply took place. What `codex exec --json` prints has only sums, in
# `turn.completed`; with that alone, output is known, turns and context are not.


# %%
#| export
def read_codex(text: str) -> Session:
    """A session of Codex: its transcript, or what `codex exec --json` prints."""
    entries, malformed = read_lines(text)
    session, running, total = Session(malformed=malformed), set(), None
    for at, entry in entries:
        payload = table(entry.get("payload"))
        kind, info = str(payload.get("type")), table(payload.get("info"))
        if kind == "token_count" and info and info.get("total_token_usage") != total:
            total, last = info.get("total_token_usage"), table(info.get("last_token_usage"))
            session.turns.append(Turn(number(last.get("input_tokens")), number(last.get("output_tokens"))))
        elif kind == "agent_message":
            session.answer = words(payload.get("message"), session.answer)
        elif kind.endswith("_call"):
            running.add(str(payload.get("call_id")))
        elif kind.endswith("_call_output"):
            running.discard(str(payload.get("call_id")))
        item, kind = table(entry.get("item")), entry.get("type")
        if kind == "item.started":
            running.add(str(item.get("id")))
        elif kind == "item.completed":
            running.discard(str(item.get("id")))
            if item.get("type") == "agent_message":
                session.answer = words(item.get("text"), session.answer)
        elif kind == "turn.completed" and not session.turns:
            wrote = number(table(entry.get("usage")).get("output_tokens"))
            session.output_tokens = (session.output_tokens or 0) + wrote
        if at is not None:
            session.events.append((at, len(running)))
    return session


# %%
def counted(second: int, total: int, read: int, wrote: int) -> str:
    last = {"input_tokens": read, "cached_input_tokens": read // 2, "output_tokens": wrote}
    info = {"total_token_usage": {"total_tokens": total}, "last_token_usage": last}
    stamp = f"2026-01-01T00:00:{second:02}Z"
    return json.dumps({"timestamp": stamp, "type": "event_msg", "payload": {"type": "token_count", "info": info}})


codex = read_codex("\n".join([counted(1, 110, 100, 10), counted(2, 110, 100, 10), counted(9, 330, 200, 20)]))
print(codex.turns)
assert codex.turns == [Turn(100, 10), Turn(200, 20)]

# %% [markdown]
# ## mini-swe-agent
#
# One JSON document, written anew after every step. Replies carry the endpoint's answer with its `usage`;
# one that could not be used is kept as well, under the complaint about it, and was paid for all the same.


# %%
#| export
def read_mini(text: str) -> Session:
    """A session of mini-swe-agent: its trajectory. One that was cut off cannot be read: no turns, one malformed."""
    session = Session()
    try:
        messages = table(json.loads(text)).get("messages")
    except (ValueError, RecursionError):
        return Session(malformed=1)
    for message in map(table, messages if isinstance(messages, list) else []):
        extra = table(message.get("extra"))
        response = table(extra.get("response"))
        usage = table(response.get("usage"))
        if response:
            session.turns.append(Turn(number(usage.get("prompt_tokens")), number(usage.get("completion_tokens"))))
        if message.get("role") == "assistant":
            session.answer = words(message.get("content"), session.answer)
        if (at := moment(extra.get("timestamp"))) is not None:
            actions = extra.get("actions")
            session.events.append((at, len(actions) if isinstance(actions, list) else 0))
    return session


# %%
said = {"response": {"usage": {"prompt_tokens": 50, "completion_tokens": 5}}, "timestamp": 3, "actions": [{}]}
mini = read_mini(json.dumps({"messages": [{"role": "user"}, {"role": "assistant", "content": "ls", "extra": said}]}))
assert mini == Session([Turn(50, 5)], [(3, 1)], "ls") and read_mini('{"mess').malformed == 1


# %%
#| export
FORMATS = ("claude", "codex", "mini")


# %%
#| export
def read_session(form: str, text: str) -> Session:
    """A session in one of FORMATS. Raises UserError for another."""
    if form == "claude":
        return read_claude(text)
    if form == "codex":
        return read_codex(text)
    if form == "mini":
        return read_mini(text)
    raise UserError(f"format {form!r}: not a known form of session; use {', '.join(FORMATS)}")


# %% [markdown]
# ## Time

# %%
#| export
LONGEST_GAP = 600.0  # seconds


# %%
#| export
def duration(events: list[tuple[float, int]]) -> float:
    """Seconds from the first to the last of `events`, gaps without a running tool cut at LONGEST_GAP."""
    ordered = sorted(events, key=lambda event: event[0])
    gaps = ((later - now, running) for (now, running), (later, _) in pairwise(ordered))
    return sum(gap if running else min(gap, LONGEST_GAP) for gap, running in gaps)


# %% [markdown]
# The run of 1,500 seconds counts whole, because the tool was running; a coffee break of as long would not:

# %%
assert duration(session.events) == 1510 and duration([(0, 0), (1500, 0)]) == 600

# %% [markdown]
# ## Time on the GPU
#
# Training logs are stamped, and the time from the first stamp to the last is the time that the run held its
# device. (In a task's CPU variant that device is the CPU.) Runs side by side count once. A log of JSON
# objects, as PithTrain's `metrics.jsonl`, says in each row when its step ended (`time`, seconds since 1970) and
# how long it took (`seconds`). What only looks like a time, `2026-13-01 00:00:00` or `1e-`, is passed over.

# %%
#| export
STAMP = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:\d\d)?")
ROW = re.compile(r'"seconds": ([\d.e+-]+).*"time": ([\d.e+-]+)')


# %%
#| export
def log_interval(path: Path) -> tuple[float, float] | None:
    """First and last second of a training log, or None if it does not say."""
    text = path.read_text(encoding="utf-8", errors="replace")
    times: list[float | None] = []
    for said in STAMP.findall(text):
        with contextlib.suppress(ValueError):
            stamp = datetime.fromisoformat(said)
            times.append(moment((stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()))
    for seconds, end in ROW.findall(text):
        with contextlib.suppress(ValueError):
            times += [moment(float(end) - float(seconds)), moment(float(end))]
    known = [time for time in times if time is not None]
    return (min(known), max(known)) if known else None


# %%
#| export
def gpu_seconds(logs: list[Path]) -> float:
    """Seconds covered by at least one of the training logs."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(filter(None, map(log_interval, logs))):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    one, two, three = (Path(folder) / name for name in "abc")
    one.write_text("2026-01-01 10:00:00 start\n2026-01-01 10:05:00 end\n")
    two.write_text("[2026-01-01T10:04:00Z] start\n[2026-01-01T10:06:00Z] end\n")
    three.write_text('{"step": 1, "seconds": 2.5, "time": 998.5}\n{"step": 2, "seconds": 1.5, "time": 1000}\n')
    assert log_interval(three) == (996, 1000)
    assert gpu_seconds([one, two, three]) == 360 + 4


# %% [markdown]
# ## The five


# %%
#| export
@dataclass(frozen=True)
class Metrics:
    """The five metrics of one attempt; None for what its session does not tell."""

    duration_s: float | None
    gpu_s: float
    turns: int | None
    context_tokens: float | None
    output_tokens: int | None


# %%
#| export
def take_metrics(session: Session, gpu_s: float, span: tuple[float, float] | None = None) -> Metrics:
    """The five metrics; `span` is when the agent was started and had ended, where that is known."""
    events = session.events + [(time, 0) for time in span or ()]
    told = session.output_tokens
    output = sum(turn.output_tokens for turn in session.turns) if told is None and session.turns else told
    return Metrics(
        duration_s=duration(events) if events else None,
        gpu_s=gpu_s,
        turns=len(session.turns) or None,
        context_tokens=statistics.median(turn.input_tokens for turn in session.turns) if session.turns else None,
        output_tokens=output,
    )


# %%
metrics = take_metrics(session, 1500.0)
print(metrics)
assert metrics == Metrics(1510, 1500, 2, 1100, 50)

# %% [markdown]
# A session as it looks: what each turn read, over its time, and the tool that ran in between. Context only grows;
# what an agent opened once, it pays for at each later turn.

# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(6, 2.6), layout="constrained")
times = [2, 1510]
ax.stem(times, [turn.input_tokens for turn in session.turns])
for (start, running), (end, _) in pairwise(session.events):
    if running:
        ax.axvspan(start, end, color="C1", alpha=0.3, label="a tool runs")
ax.set(title="A session of two turns", xlabel="seconds", ylabel="tokens read")
ax.legend()
fig

# %% [markdown]
# Next: [tasks, frameworks and agents as files](21_task.py).
