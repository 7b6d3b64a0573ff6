"""A small client of the HTTP API: what the commands ask a cluster, with its errors as ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import httpx
import typer

from cli.errors import CommandFailedError
from cli.running import require_running
from storage import errors
from storage.errors import FloraError

Url = Annotated[
    str | None,
    typer.Option(
        "--url", envvar="FLORA_URL", help="Another cluster than the one `flora up` started."
    ),
]

Message = dict[str, str]
"""A chat message: role and content."""

_ERRORS = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FloraError)
}


@dataclass(frozen=True, slots=True)
class Served:
    """Who answered a request, as the response's headers tell."""

    version: str
    tier: str
    replica: str
    request_id: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished chat answer."""

    text: str
    finish_reason: str
    completion_tokens: int
    served: Served


class ApiClient:
    """Every method raises the error the server names, or CommandFailedError when nothing answers."""

    def __init__(self, url: str | None = None, timeout_s: float = 300.0) -> None:
        """`url` without `/v1`; None: the cluster `flora up` started here."""
        self.url = (url or require_running().url or "").rstrip("/").removesuffix("/v1")
        key = os.environ.get("FLORA_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=self.url, timeout=timeout_s, headers=headers)

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with _named_errors(self.url):
            return _checked(self._http.get(path)).json()

    def chat(self, model: str, messages: list[Message], **options: Any) -> Answer:
        """A whole answer."""
        with _named_errors(self.url):
            response = _checked(
                self._http.post("/v1/chat/completions", json=_body(model, messages, options))
            )
        choice = response.json()["choices"][0]
        return Answer(
            text=choice["message"]["content"],
            finish_reason=choice["finish_reason"],
            completion_tokens=response.json()["usage"]["completion_tokens"],
            served=_served(response.headers),
        )

    @contextmanager
    def stream_chat(
        self, model: str, messages: list[Message], **options: Any
    ) -> Iterator[tuple[Served, Iterator[str]]]:
        """An answer as it is made: who answers, and pieces of text. Leaving the block ends the request."""
        body = _body(model, messages, options) | {"stream": True}
        with (
            _named_errors(self.url),
            self._http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.is_error:
                response.read()
            _checked(response)
            yield _served(response.headers), _deltas(response)

    def close(self) -> None:
        self._http.close()


def _body(model: str, messages: list[Message], options: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": model, "messages": messages, **options}


def _deltas(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if not line.startswith("data: ") or data == "[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise _error(chunk)
        for choice in chunk["choices"]:
            yield choice["delta"].get("content") or ""


def _served(headers: Mapping[str, str]) -> Served:
    return Served(
        version=headers.get("x-adapter-version", ""),
        tier=headers.get("x-adapter-tier", ""),
        replica=headers.get("x-replica-id", ""),
        request_id=headers.get("x-request-id", ""),
    )


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        body = response.json()
    except ValueError:
        body = {}
    if "error" not in body:
        raise CommandFailedError(f"{response.url} answered {response.status_code}")
    raise _error(body)


def _error(body: Mapping[str, Any]) -> FloraError:
    error = body["error"]
    kind = _ERRORS.get(error.get("code"), CommandFailedError)
    return kind(error["message"], param=error.get("param"))


@contextmanager
def _named_errors(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException:
        raise CommandFailedError(f"{url} did not answer in time") from None
    except httpx.TransportError as error:
        raise CommandFailedError(
            f"nothing answers at {url} ({error}); see: flora status"
        ) from error
