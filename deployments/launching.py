"""Puts the application on the Ray this process is connected to, and takes it off again."""

from __future__ import annotations

import socket
import time

import httpx
from ray import serve

from cluster.actor import stop_managers
from deployments.app import build_app
from deployments.settings import ServeSettings, Settings
from storage.errors import OverloadedError

_HEALTH_TIMEOUT_S = 30.0
_ASK_AGAIN_S = 0.5


def deploy(settings: Settings) -> str:
    """Serve `settings` and return the base URL once requests are answered. Blocks while models load.

    Raises:
        SpecificationError: a setting is wrong.
        OverloadedError: the application did not come up; Serve's log has the cause.
    """
    app = build_app(settings)
    port = settings.serve.port or _free_port(settings.serve.host)
    serve.start(http_options={"host": settings.serve.host, "port": port})
    try:
        serve.run(app, name=settings.serve.app_name, route_prefix="/")
    except RuntimeError as error:  # Serve's only word for it
        raise OverloadedError(f"the application did not start: {error}") from error
    url = _url(settings.serve, port)
    _check_answers(url)
    return url


def undeploy(app_name: str | None = None) -> None:
    """End an application and its placement manager; with None every application, and Serve itself. May be repeated."""
    if app_name is None:
        names = list(serve.status().applications)
        serve.shutdown()
    else:
        names = [app_name]
        serve.delete(app_name)
    for name in names:
        stop_managers(name)


def _url(settings: ServeSettings, port: int) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{port}"


def _check_answers(url: str) -> None:
    """Serve keeps its first HTTP port for good: another one asked for later would answer nothing."""
    deadline_s = time.monotonic() + _HEALTH_TIMEOUT_S
    try:
        response = httpx.get(f"{url}/health", timeout=_HEALTH_TIMEOUT_S)
        # On a busy machine the first heartbeat takes a while.
        while response.status_code == 503 and time.monotonic() < deadline_s:
            time.sleep(_ASK_AGAIN_S)
            response = httpx.get(f"{url}/health", timeout=_HEALTH_TIMEOUT_S)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise OverloadedError(
            f"the application runs but does not answer at {url} ({error}); if Serve was running before, "
            "end it first: its HTTP address cannot change"
        ) from error


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as free:
        free.bind((host, 0))
        port: int = free.getsockname()[1]
        return port
