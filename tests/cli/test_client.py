"""What the HTTP API answers, as the commands see it: errors keep their name, streams come in pieces."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cli.client import ApiClient
from cli.errors import CommandFailedError
from storage.errors import FloraError, OverloadedError, UnknownModelError

HELLO = [{"role": "user", "content": "hello"}]


class Api(BaseHTTPRequestHandler):
    """A server that says what the real one says in moments that are hard to bring about."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        getattr(self, f"answer_{body['model']}")()

    def answer_unknown(self) -> None:
        error = {"message": "the model 'unknown' does not exist", "param": "model"}
        self._send(404, json.dumps({"error": {**error, "type": "x", "code": "model_not_found"}}))

    def answer_overloaded(self) -> None:
        error = {"message": "try again", "param": None, "code": "overloaded"}
        self._send(503, json.dumps({"error": error}))

    def answer_proxy(self) -> None:
        self._send(502, "<html>bad gateway</html>")

    def answer_stream(self) -> None:
        pieces = [{"choices": [{"delta": {"content": text}}]} for text in ("Ahoy", "!")]
        self._send_events([*map(json.dumps, pieces), json.dumps({"choices": []}), "[DONE]"])

    def answer_broken(self) -> None:
        piece = {"choices": [{"delta": {"content": "Ah"}}]}
        error = {"error": {"message": "the replica is gone", "code": "overloaded", "param": None}}
        self._send_events([json.dumps(piece), json.dumps(error)])

    def _send_events(self, events: list[str]) -> None:
        headers = {"x-adapter-version": "ab" * 32, "x-adapter-tier": "disk", "x-replica-id": "r"}
        self._send(200, "".join(f"data: {event}\n\n" for event in events), headers)

    def _send(self, status: int, body: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def client() -> Iterator[ApiClient]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = ApiClient(f"http://127.0.0.1:{server.server_port}/v1")
    yield client
    client.close()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("unknown", UnknownModelError, "'unknown' does not exist"),
        ("overloaded", OverloadedError, "try again"),
        ("proxy", CommandFailedError, "answered 502"),
    ],
)
def test_an_error_is_the_one_the_server_named(
    client: ApiClient, model: str, kind: type[FloraError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        client.chat(model, HELLO)
    with pytest.raises(kind, match=message), client.stream_chat(model, HELLO):
        pass


def test_a_stream_comes_in_pieces_and_tells_who_answers(client: ApiClient) -> None:
    with client.stream_chat("stream", HELLO) as (served, pieces):
        assert (served.version, served.tier, served.replica) == ("ab" * 32, "disk", "r")
        assert "".join(pieces) == "Ahoy!"


def test_a_stream_that_breaks_keeps_what_came_and_raises(client: ApiClient) -> None:
    came = []
    with (
        pytest.raises(OverloadedError, match="replica is gone"),
        client.stream_chat("broken", HELLO) as (_, pieces),
    ):
        for piece in pieces:
            came.append(piece)
    assert came == ["Ah"]


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(CommandFailedError, match=r"nothing answers at http://127\.0\.0\.1:9"):
        ApiClient("http://127.0.0.1:9").get("/v1/cluster")
