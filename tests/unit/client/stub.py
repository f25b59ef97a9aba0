"""A small HTTP server that speaks enough of the REST contract to watch the client behave, and to misbehave at it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    port: int = 0  # the client's end of the connection

    @property
    def json(self) -> dict[str, object]:
        return json.loads(self.body)


@dataclass
class Reply:
    """What to answer. `chunks` streams without a length; `cut` closes the connection without an answer."""

    status: int = 200
    body: object = None
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] | None = None
    cut: bool = False


Answer = Callable[[Seen], Reply]


class StubServer:
    """Answers are registered by method and path; several for one path are given one after the other, the last stays."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self._answers: dict[tuple[str, str], list[Answer]] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def on(self, method: str, path: str, *replies: Reply | Answer) -> None:
        answers = [_answer(reply) for reply in replies]
        self._answers[method, path if path.startswith("/s3") else f"/api/v1{path}"] = answers

    def calls(self, method: str, path: str) -> list[Seen]:
        return [seen for seen in self.seen if (seen.method, seen.path) == (method, f"/api/v1{path}")]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply_to(self, seen: Seen) -> Reply:
        with self._lock:
            self.seen.append(seen)
            answers = self._answers.get((seen.method, seen.path))
            if not answers:
                problem = {"title": "Not found", "status": 404, "detail": f"no {seen.path}", "code": "not_found"}
                return Reply(404, problem)
            answer = answers[0] if len(answers) == 1 else answers.pop(0)
        return answer(seen)

    def _handler(stub) -> type[BaseHTTPRequestHandler]:  # noqa: N805  (self is the request's)
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                self._write(stub.reply_to(Seen(self.command, url.path, query, headers, body, self.client_address[1])))

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

            def _write(self, reply: Reply) -> None:
                if reply.cut:
                    self.close_connection = True
                    return
                data = b"" if reply.body is None else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if reply.chunks is not None:
                    self._stream(reply.chunks)
                    return
                kind = "application/problem+json" if reply.status >= 400 else "application/json"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, chunks: list[bytes]) -> None:
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                for chunk in chunks:
                    self.wfile.write(chunk)
                    self.wfile.flush()
                self.close_connection = True

        return Handler


def _answer(reply: Reply | Answer) -> Answer:
    return (lambda seen: reply) if isinstance(reply, Reply) else reply


def sse(event: str, data: object, id: int | None = None) -> bytes:
    head = f"id: {id}\n" if id is not None else ""
    return f"{head}event: {event}\ndata: {json.dumps(data)}\n\n".encode()


def line(sequence: int, text: str, stream: str = "stdout") -> bytes:
    return sse("line", {"sequence": sequence, "text": text, "stream": stream}, sequence)


def running() -> Iterator[StubServer]:
    server = StubServer()
    yield server
    server.close()


JOB = {
    "id": "js1", "state": "running", "project_id": "pj1", "created_at": "2026-01-01T00:00:00Z",
    "template": {"name": "train", "command": ["python", "train.py"]},
}  # fmt: skip


def serve_run(server: StubServer, *stream: bytes, state: str = "succeeded", **ended: object) -> None:
    fileset = {"id": "fs1", "state": "sealed"}
    server.on("POST", "/projects", Reply(201, {"id": "pj1", "name": "my-digits", "state": "active"}))
    server.on("GET", "/projects/pj1", Reply(200, {"id": "pj1", "name": "my-digits", "state": "active"}))
    server.on("POST", "/filesets", Reply(201, {"fileset": fileset, "uploads": []}))
    server.on("POST", "/experiments", lambda seen: Reply(201, {"id": "ex1", "jobs": [{**JOB, "state": "submitted"}]}))
    end = sse("end", {**JOB, "state": state, **ended})
    server.on("GET", "/jobs/js1/logs/stream", Reply(chunks=[*stream, end]))
