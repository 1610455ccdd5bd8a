"""A model that plays a script, behind an OpenAI-compatible endpoint on this machine."""

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
SOLUTIONS = Path(__file__).parent / "solutions"


def solution(task: str) -> str:
    """The reference solution of a feature task, as it is handed in."""
    return "".join((SOLUTIONS / f"{name}.py").read_text() for name in (task, "training"))


@dataclass(frozen=True)
class Reply:
    """What the model answers: a command, some text, after `delay` seconds; and the tokens it is said to cost."""

    command: str
    text: str = "Next."
    read: int = 1000
    wrote: int = 10
    delay: float = 0.0


@dataclass
class ScriptedModel:
    """Plays `script` to the agent, and answers every judge with `judgement`."""

    script: list[Reply]
    judgement: str = "PASS: so it is."
    judged: int = 0
    keys: set[str] = field(default_factory=set)

    def reply(self, messages: list[dict]) -> Reply:
        if any("Judge one point" in str(message["content"]) for message in messages):
            self.judged += 1
            return Reply(SUBMIT, self.judgement)
        return self.script[sum(message["role"] == "assistant" for message in messages)]

    def __enter__(self) -> "ScriptedModel":
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                model.keys.add(self.headers["Authorization"])
                reply = model.reply(body["messages"])
                time.sleep(reply.delay)
                call = {"name": "bash", "arguments": json.dumps({"command": reply.command})}
                message = {"role": "assistant", "content": reply.text}
                message["tool_calls"] = [{"id": "call", "type": "function", "function": call}]
                usage = {"prompt_tokens": reply.read, "completion_tokens": reply.wrote}
                usage["total_tokens"] = reply.read + reply.wrote
                choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
                answer = {"id": "a", "object": "chat.completion", "created": int(time.time()), "model": body["model"]}
                data = json.dumps({**answer, "choices": [choice], "usage": usage}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
