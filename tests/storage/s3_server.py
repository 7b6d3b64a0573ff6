"""A real S3 API over HTTP for tests: moto's server, on a port of this machine, that can be told to fail or to go."""

from __future__ import annotations

import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import BaseWSGIServer, make_server

_Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass(frozen=True)
class Failure:
    """An answer instead of the real one, or with `applied` after the request was carried out: a lost answer; or with
    `is_cut` only the first half of the real one.
    """

    status: str = ""  # "503 Slow Down"; empty closes the connection instead
    code: str = ""
    applied: bool = False
    is_cut: bool = False


@dataclass
class S3Server:
    """A running server. `failures` are the answers to the next requests; `requests` what was asked, by method;
    `ranges` the parts of objects that were asked for. `before` is called with method and path before a request is
    carried out. While `may_answer` is clear, requests wait.
    """

    application: _Application
    url: str = ""
    failures: deque[Failure] = field(default_factory=deque)
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    before: Callable[[str, str], None] = lambda method, path: None
    may_answer: threading.Event = field(default_factory=threading.Event)
    # S3 decides each conditional write atomically; moto looks and then writes, so its requests must take turns.
    turn: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0
    _running: tuple[BaseWSGIServer, threading.Thread] | None = None

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if not self.may_answer.wait(60):
            raise TimeoutError("this server was never allowed to answer again")
        self.before(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        with self.turn:
            self.requests.append(environ["REQUEST_METHOD"])
            if "HTTP_RANGE" in environ:
                self.ranges.append(environ["HTTP_RANGE"])
            failure = self.failures.popleft() if self.failures else None
            if failure is None:
                return list(self.application(environ, start_response))
            if failure.applied:
                list(self.application(environ, lambda *_: None))
            if failure.is_cut:
                body = b"".join(self.application(environ, start_response))
                return [body[: len(body) // 2]]
            if not failure.status:
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                return []
            start_response(failure.status, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{failure.code}</Code><Message/></Error>".encode()]

    def listen(self) -> None:
        """Begin, or begin again: on the port it had, with the objects it had."""
        server = make_server(
            "127.0.0.1", self.port, self, threaded=True, request_handler=MotoRequestHandler
        )
        self.may_answer.set()
        self.port = server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self._running = server, thread

    def stop(self) -> None:
        """From now on nobody listens there. May be repeated."""
        if self._running is not None:
            server, thread = self._running
            server.shutdown()
            thread.join()
            server.server_close()
            self._running = None


@contextmanager
def s3_server() -> Iterator[S3Server]:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it logs every request
    server = S3Server(DomainDispatcherApplication(create_backend_app))
    server.listen()
    try:
        yield server
    finally:
        server.stop()
