"""A real chat endpoint on this machine that behaves as a test tells it to, and counts what it is asked."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Act:
    """What the server does with a request.

    text: a good answer. die: close in the middle of the answer. chunked: send it in pieces of unknown number.
    """

    text: str | None = None
    status: int = 200
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    die: bool = False
    chunked: bool = False
    finish: str = "stop"


@dataclass(frozen=True)
class Question:
    """A request as it came. attempt: how often this body came before."""

    body: dict[str, Any]
    headers: dict[str, str]
    path: str
    attempt: int
    time: float

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()

    @property
    def text(self) -> str:
        """The instruction."""
        content = self.body["messages"][0]["content"]
        return content if isinstance(content, str) else content[-1]["text"]


def answer_of(question: Question) -> str:
    """A caption that tells which request it answers."""
    return f"a caption of {question.name[:12]}"


Plan = Callable[[Question], Act]


def good(question: Question) -> Act:
    return Act(answer_of(question))


class ChatServer:
    """Listens from `start` to `stop`, again after each `start`, at one address.

    asked: every request in order. answered: how often a body got a whole good answer. peak: most requests
    under way at a time. knocks: how often anything but an answer was asked for, which gets list_of_models.
    """

    def __init__(self, plan: Plan = good) -> None:
        self.plan = plan
        self.asked: list[Question] = []
        self.answered: Counter[str] = Counter()
        self.peak = self._now = 0
        self.knocks, self.list_of_models = 0, (200, b'{"data": []}')
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if outer._server is None:  # a connection from before the stop
                    self.close_connection = True
                    return
                outer.knocks += 1
                status, content = outer.list_of_models
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, *_: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: Any) -> None: ...

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Take no more connections; whoever is being answered is cut off."""
        server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if self._server is None:  # a connection from before the stop
            handler.close_connection = True
            return
        with self._lock:
            self._now += 1
            self.peak = max(self.peak, self._now)
            question = Question(body, dict(handler.headers), handler.path, 0, time.monotonic())
            before = sum(old.name == question.name for old in self.asked)
            question = Question(body, question.headers, handler.path, before, question.time)
            self.asked.append(question)
        try:
            self._act(handler, question, self.plan(question))
        except OSError:
            pass  # the client has gone
        finally:
            with self._lock:
                self._now -= 1

    def _act(self, handler: BaseHTTPRequestHandler, question: Question, act: Act) -> None:
        time.sleep(act.delay)
        choice = {"message": {"role": "assistant", "content": act.text}, "finish_reason": act.finish}
        content = act.raw if act.raw is not None else json.dumps({"choices": [choice]}).encode()
        if self._server is None:
            handler.close_connection = True
            return
        handler.send_response(act.status)
        for name, value in act.headers.items():
            handler.send_header(name, value)
        length = ("Transfer-Encoding", "chunked") if act.chunked else ("Content-Length", str(len(content)))
        handler.send_header(*length)
        handler.end_headers()
        if act.chunked:
            cut = len(content) // 2
            pieces = [content[:cut]] if act.die else [content[:cut], content[cut:], b""]
            content = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        if act.die:
            handler.wfile.write(content if act.chunked else content[: len(content) // 2])
            handler.close_connection = True
            return
        if act.status == 200 and act.raw is None and act.finish != "content_filter" and act.text:
            with self._lock:
                self.answered[question.name] += 1
        handler.wfile.write(content)


@contextmanager
def serving(plan: Plan = good) -> Iterator[ChatServer]:
    server = ChatServer(plan)
    server.start()
    try:
        yield server
    finally:
        server.stop()
