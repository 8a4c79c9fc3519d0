"""A chat endpoint on 127.0.0.1 that answers as the real API does, failures included."""

import contextlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from llava.eval.judging import Case

MODEL = "stub-judge"
SNAPSHOT = "stub-judge-2026-01-02"
KEY = "sk-test-0123456789abcdef"
CASES = [Case(str(index), f"what is number {index}?", "cat", "a cat" if index % 3 else "a dog") for index in range(9)]
RIGHT = {case.id for case in CASES if case.prediction == "a cat"}


def completion(text, **other):
    """A body as the real endpoint sends it."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": SNAPSHOT,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    } | other


def error(message, code=None, kind="invalid_request_error"):
    """An error body as the real endpoint sends it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def opinion(body):
    """Right if the reply holds the reference."""
    said = body["messages"][-1]["content"]
    reference = re.search(r"^Reference answer: (.*)$", said, re.MULTILINE)[1]
    reply = re.search(r"^Model's reply: (.*)$", said, re.MULTILINE)[1]
    right = reference in reply
    return json.dumps({"pred": "yes" if right else "no", "score": 5 if right else 1})


class Status:
    """An answer with this status, headers and body (text, or JSON if it is none)."""

    def __init__(self, status, body="", **headers):
        self.status, self.headers = status, {key.replace("_", "-"): str(value) for key, value in headers.items()}
        self.body = body if isinstance(body, str) else json.dumps(body)


class CutOff:
    """A body that ends before the announced length."""


class Silence:
    """No answer for some seconds."""

    def __init__(self, seconds):
        self.seconds = seconds


class StubJudge:
    """The server. `plan` holds what to do with the next requests, in order; afterwards it judges by `opinion`.

    A plan's entry is a text (the reply), or a Status, CutOff or Silence. `meanwhile` is called during every request.
    """

    def __init__(self):
        self.plan, self.requests, self.meanwhile = [], [], lambda body: None
        self.always = None
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                stub.serve(self)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append((time.monotonic(), handler.path, dict(handler.headers), body))
            step = self.plan.pop(0) if self.plan else self.always
        self.meanwhile(body)
        if callable(step):
            step = step(body)
        try:
            self._answer(handler, opinion(body) if step is None else step)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True

    def _answer(self, handler, step):
        if isinstance(step, Silence):
            time.sleep(step.seconds)
            step = "too late"
        if isinstance(step, str):
            step = Status(200, completion(step))
        content = json.dumps(completion("x" * 500)) if isinstance(step, CutOff) else step.body
        handler.send_response(200 if isinstance(step, CutOff) else step.status)
        for name, value in ({} if isinstance(step, CutOff) else step.headers).items():
            handler.send_header(name, value)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content.encode())))
        handler.end_headers()
        handler.wfile.write(content.encode()[: 200 if isinstance(step, CutOff) else None])
        handler.close_connection = True

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def serve_judge(monkeypatch):
    """A running server that the environment names as the endpoint."""
    server = StubJudge()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "OPENAI_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_BASE", server.base)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield server
    server.close()
