"""Sessions of three agents, whole, cut off at every byte, and malformed."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from ate_bench.session import (
    Metrics,
    Session,
    Turn,
    duration,
    gpu_seconds,
    log_interval,
    read_claude,
    read_codex,
    read_mini,
    read_session,
    take_metrics,
)
from pithtrain.config import UserError


def stamp(second: float, entry: dict) -> str:
    return json.dumps({"at": second, "line": json.dumps(entry)})


def claude(name: str, blocks: list[dict], new: int, created: int, cached: int, wrote: int) -> dict:
    usage = {"input_tokens": new, "cache_creation_input_tokens": created, "cache_read_input_tokens": cached}
    usage |= {"output_tokens": wrote, "service_tier": "standard"}
    message = {"id": name, "type": "message", "role": "assistant", "model": "claude-x", "content": blocks}
    return {"type": "assistant", "message": {**message, "usage": usage}, "parent_tool_use_id": None, "session_id": "s"}


def tool(name: str) -> dict:
    return {"type": "tool_use", "id": name, "name": "Bash", "input": {"command": "ls"}}


def back(name: str) -> dict:
    content = [{"type": "tool_result", "tool_use_id": name, "content": "README.md", "is_error": False}]
    return {"type": "user", "message": {"role": "user", "content": content}, "session_id": "s"}


CLAUDE = [
    stamp(100.0, {"type": "system", "subtype": "init", "session_id": "s", "tools": ["Bash"], "model": "claude-x"}),
    stamp(104.0, claude("m1", [{"type": "text", "text": "I look."}], 3, 9000, 0, 2)),
    stamp(105.0, claude("m1", [tool("t1"), tool("t2")], 3, 9000, 0, 80)),
    stamp(2105.0, back("t1")),  # 2,000 s in a tool, with the other still running
    stamp(2106.0, back("t2")),
    stamp(2110.0, claude("m2", [{"type": "thinking", "thinking": "..."}], 10, 500, 9000, 5)),
    stamp(3110.0, claude("m2", [{"type": "text", "text": "Found."}], 10, 500, 9000, 40)),  # 1,000 s without a tool
    stamp(3111.0, {"type": "result", "subtype": "success", "result": "The answer.", "usage": {"output_tokens": 123}}),
]


def test_claude_code():
    session = read_claude("\n".join(CLAUDE))
    assert session.turns == [Turn(9003, 80), Turn(9510, 40)]
    assert session.answer == "The answer." and session.malformed == 0
    metrics = take_metrics(session, 7.0)
    assert metrics == Metrics(3111.0 - 100.0 - (1000 - 600), 7.0, 2, (9003 + 9510) / 2, 123)


def test_claude_code_without_its_result_sums_its_turns():
    session = read_claude("\n".join(CLAUDE[:-1]))
    assert take_metrics(session, 0.0).output_tokens == 120 and session.answer == "Found."


def test_a_transcript_of_claude_code_has_its_own_times_and_no_turn_for_its_own_messages():
    entries = [
        {"type": "user", "message": {"role": "user", "content": "Do it."}, "timestamp": "2026-01-01T00:00:00.000Z"},
        {**claude("m1", [tool("t1")], 1, 2, 3, 4), "timestamp": "2026-01-01T00:00:10.500Z"},
        {"type": "assistant", "message": {"model": "<synthetic>", "id": "x", "content": []}},
    ]
    session = read_claude("\n".join(map(json.dumps, entries)))
    assert session.turns == [Turn(6, 4)]
    assert duration(session.events) == 10.5


def token_count(at: str, total: int, last: dict | None) -> str:
    info = {"total_token_usage": {"total_tokens": total}, "last_token_usage": last} if last else None
    payload = {"type": "token_count", "info": info, "rate_limits": {"primary": {"used_percent": 1.0}}}
    return json.dumps({"timestamp": at, "type": "event_msg", "payload": payload})


def event(at: str, kind: str, **payload: str) -> str:
    return json.dumps({"timestamp": at, "type": "response_item", "payload": {"type": kind, **payload}})


CODEX = [
    json.dumps({"timestamp": "2026-01-01T00:00:00Z", "type": "session_meta", "payload": {"id": "s"}}),
    token_count("2026-01-01T00:00:01Z", 0, None),
    event("2026-01-01T00:00:05Z", "function_call", name="shell", call_id="c1", arguments="{}"),
    token_count(
        "2026-01-01T00:00:06Z", 5100, {"input_tokens": 5000, "cached_input_tokens": 4000, "output_tokens": 100}
    ),
    event("2026-01-01T00:20:06Z", "function_call_output", call_id="c1", output="ok"),
    token_count(
        "2026-01-01T00:20:07Z", 5100, {"input_tokens": 5000, "cached_input_tokens": 4000, "output_tokens": 100}
    ),
    event("2026-01-01T00:40:07Z", "reasoning"),
    token_count(
        "2026-01-01T00:40:08Z", 11300, {"input_tokens": 6000, "cached_input_tokens": 5000, "output_tokens": 200}
    ),
    json.dumps({"timestamp": "2026-01-01T00:40:09Z", "payload": {"type": "agent_message", "message": "Done."}}),
]


def test_codex():
    session = read_codex("\n".join(CODEX))
    assert session.turns == [Turn(5000, 100), Turn(6000, 200)]
    assert session.answer == "Done."
    # Twenty minutes in a tool count whole, twenty without one as ten.
    assert take_metrics(session, 0.0) == Metrics(2409.0 - 600, 0.0, 2, 5500, 300)


def test_what_codex_prints_has_output_but_no_turns():
    lines = [
        stamp(0, {"type": "thread.started", "thread_id": "t"}),
        stamp(1, {"type": "item.started", "item": {"id": "item_0", "type": "command_execution", "command": "ls"}}),
        stamp(1201, {"type": "item.completed", "item": {"id": "item_0", "type": "command_execution", "exit_code": 0}}),
        stamp(1202, {"type": "item.completed", "item": {"id": "item_1", "type": "agent_message", "text": "Done."}}),
        stamp(
            1203, {"type": "turn.completed", "usage": {"input_tokens": 9, "cached_input_tokens": 0, "output_tokens": 7}}
        ),
    ]
    session = read_codex("\n".join(lines))
    assert session.answer == "Done."
    assert take_metrics(session, 0.0) == Metrics(1203, 0.0, None, None, 7)


MINI = {
    "messages": [
        {"role": "system", "content": "You are ..."},
        {"role": "user", "content": "Solve"},
        {
            "role": "assistant",
            "content": "I look.",
            "extra": {
                "actions": [{"command": "ls"}],
                "timestamp": 10.0,
                "response": {"usage": {"prompt_tokens": 100, "completion_tokens": 5}},
            },
        },
        {"role": "tool", "content": "README.md", "extra": {"timestamp": 1010.0, "returncode": 0}},
        {
            "role": "user",
            "content": "Tool call error",
            "extra": {"response": {"usage": {"prompt_tokens": 200, "completion_tokens": 6}}},
        },
        {"role": "exit", "content": "", "extra": {"exit_status": "Submitted"}},
    ],
    "trajectory_format": "mini-swe-agent-1.1",
}


def test_mini_swe_agent_counts_replies_that_could_not_be_used():
    session = read_mini(json.dumps(MINI))
    assert session.turns == [Turn(100, 5), Turn(200, 6)]
    assert session.answer == "I look."
    assert take_metrics(session, 0.0, (0.0, 1020.0)) == Metrics(1020.0, 0.0, 2, 150, 11)


@pytest.mark.parametrize("form", ["claude", "codex", "mini"])
def test_a_session_cut_off_anywhere_is_read_as_far_as_it_goes(form: str):
    text = {"claude": "\n".join(CLAUDE), "codex": "\n".join(CODEX), "mini": json.dumps(MINI)}[form]
    whole = read_session(form, text)
    for end in range(0, len(text), 7):
        part = read_session(form, text[:end])
        assert part.malformed <= 1
        assert len(part.turns) <= len(whole.turns)
        assert [turn.input_tokens for turn in part.turns] == [turn.input_tokens for turn in whole.turns][
            : len(part.turns)
        ]
    assert whole.malformed == 0


@pytest.mark.parametrize("reader", [read_claude, read_codex])
def test_malformed_lines_are_counted_and_passed_over(reader):
    lines = CLAUDE if reader is read_claude else CODEX
    junk = [
        "{",
        "[1, 2]",
        '"text"',
        "null",
        "\x00",
        '{"timestamp": 3}',
        '{"timestamp": "soon"}',
        '{"at": {}, "line": 3}',
    ]
    mixed = [line for pair in zip(lines, junk * 2, strict=False) for line in pair]
    session, clean = reader("\n".join(mixed)), reader("\n".join(lines))
    assert session.malformed == len(lines)
    assert (session.turns, session.answer, session.events) == (clean.turns, clean.answer, clean.events)


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "assistant"},
        {"type": "assistant", "message": "text"},
        {"type": "assistant", "message": {"content": [3, None], "usage": []}},
        {"type": "user", "message": {"content": None}},
        {"type": "result", "usage": None},
        {"type": "event_msg", "payload": []},
        {"type": "event_msg", "payload": {"type": "token_count", "info": {"last_token_usage": 3}}},
        {"type": "item.completed", "item": None},
        {"type": None},
        {},
        {"type": "assistant", "message": {"id": ["a"], "usage": {"input_tokens": "9", "output_tokens": 10**400}}},
        {"type": "assistant", "message": {"content": [{"type": "tool_use", "id": ["t"]}]}},
        {"type": "assistant", "message": {"content": [{"type": "text", "text": 3}]}},
        {"type": "user", "message": {"content": [{"tool_use_id": {}}]}},
        {"type": "result", "result": {"a": 1}, "usage": {"output_tokens": "9"}},
        {"payload": {"type": 3}},
        {"payload": {"type": "function_call", "call_id": []}},
        {"payload": {"type": "agent_message", "message": ["a"]}},
        {"payload": {"type": "token_count", "info": {"last_token_usage": {"input_tokens": "9", "output_tokens": 1e9}}}},
        {"type": "item.started", "item": {"id": []}},
        {"type": "turn.completed", "usage": {"output_tokens": []}},
        {"role": "assistant", "content": [1], "extra": {"timestamp": 10**400, "actions": 3}},
        {"extra": {"timestamp": math.nan, "response": {"usage": {"prompt_tokens": 10**400}}}},
        {"at": 10**400, "line": "{}"},
        {"at": math.inf, "line": '{"type": "user"}'},
        {"at": 1, "line": "[1]"},
        {"at": 1, "line": '"timestamp"'},
        {"at": [], "line": "{}"},
        {"timestamp": "0001-01-01T00:00:00"},
        {"messages": None},
        {"messages": {}},
        {"messages": [None]},
    ],
)
def test_objects_of_an_unknown_shape_do_no_harm(entry: dict):
    texts = [
        json.dumps(entry),
        json.dumps({"at": 5.0, "line": json.dumps(entry)}),
        json.dumps({"messages": [entry, 3]}),
    ]
    for form in ("claude", "codex", "mini"):
        for text in texts:
            session = read_session(form, text)
            metrics = take_metrics(session, 0.0, (0, 10))
            assert metrics.duration_s == 10 and max(metrics.context_tokens or 0, metrics.output_tokens or 0) == 0
            assert isinstance(session.answer, str) and json.loads(json.dumps(asdict(metrics), allow_nan=False))


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"at": 1, "line": "' + "[" * 100_000 + '"}']
)
def test_a_line_that_no_parser_takes_is_passed_over(line: str):
    session = read_claude(line + "\n" + CLAUDE[1])
    assert session.malformed == 1 and len(session.turns) == 1
    assert read_mini(line).turns == read_codex(line).turns == []


def test_half_a_character_can_be_written():
    assert read_claude('{"type": "result", "result": "a\\ud800"}').answer == "a?"


def test_a_line_ends_with_a_newline_and_nothing_else():
    said = json.dumps({"type": "result", "result": "one\u2028two\x85three"}, ensure_ascii=False)
    session = read_claude(CLAUDE[1] + "\n" + said)
    assert (session.malformed, session.answer, len(session.turns)) == (0, "one\u2028two\x85three", 1)


def test_an_empty_session_has_no_metrics_but_the_gpus():
    for form in ("claude", "codex"):
        assert take_metrics(read_session(form, ""), 3.0) == Metrics(None, 3.0, None, None, None)
    with pytest.raises(UserError, match="not a known form"):
        read_session("other", "")


def test_gaps():
    assert duration([]) == 0 and duration([(5, 0)]) == 0
    assert duration([(0, 0), (600, 0), (1201, 0)]) == 1200
    assert duration([(0, 1), (5000, 0), (10000, 0)]) == 5600
    assert duration([(10, 0), (0, 1)]) == 10  # in the order of time


def test_the_span_of_the_process_counts_as_well():
    assert take_metrics(Session(events=[(50, 0)]), 0.0, (0, 100)).duration_s == 100


def test_time_on_the_gpu(tmp_path: Path):
    def log(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    utc = log("a", "2026-01-01 10:00:00,250 step 1\nnothing\n2026-01-01 10:00:10,750 step 2")
    zone = log("b", "2026-01-01T12:00:05+02:00 a\n2026-01-01T12:00:20+02:00 b")
    silent, single = log("c", "no time at all"), log("d", "2026-01-01 09:00:00")
    seconds = log("e", '{"seconds": 1.5, "time": 2e9}\n{"seconds": 5e-1, "x": 1, "time": 2000000000.5}\n{"sec')
    assert log_interval(silent) is None
    wrong = ["2026-13-01 00:00:00", "0000-00-00 00:00:00", "2026-01-01 00:00:60", "2026-01-01T00:00:00+99:00"]
    wrong += ['"seconds": 1e-, "time": 5', '"seconds": 1, "time": 1e999', '"seconds": 1, "time": .']
    for number, text in enumerate(wrong):
        assert log_interval(log(f"wrong{number}", f"{text}\n")) is None
        assert log_interval(log(f"half{number}", f"2026-01-01T00:00:00Z\n{text}\n1970-01-01T00:00:00Z"))[0] == 0
    assert gpu_seconds([utc]) == 10.5
    assert gpu_seconds([utc, zone]) == pytest.approx(19.75)  # side by side: once
    assert gpu_seconds([zone, utc, silent, single, seconds]) == pytest.approx(21.75)
    assert gpu_seconds([]) == 0
