"""The cluster `flora up` left running on this machine, as its state file tells it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from cli.errors import CommandFailedError
from cli.home import state_file
from cli.local_cluster import LocalCluster


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A private Ray and what is served on it. `url` is None while it is not ready yet."""

    ray: LocalCluster
    settings: dict[str, Any]
    url: str | None = None

    def ready_at(self, url: str) -> RunningCluster:
        return replace(self, url=url)

    def save(self) -> None:
        """Written whole or not at all; holds no secret, only where the token file is."""
        file = state_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self), indent=2, default=str))
        fresh.replace(file)

    def stop(self) -> None:
        """End every process of it and forget it."""
        self.ray.stop()
        state_file().unlink(missing_ok=True)


def find_running() -> RunningCluster | None:
    """The cluster of the state file, if its processes are there. What a crash left behind is cleared away."""
    try:
        values = json.loads(state_file().read_text())
    except FileNotFoundError:
        return None
    running = RunningCluster(LocalCluster(**values["ray"]), values["settings"], values["url"])
    if not running.ray.is_alive():
        running.stop()
        return None
    return running


def require_running() -> RunningCluster:
    """Raises CommandFailedError when no cluster is ready on this machine."""
    running = find_running()
    if running is None:
        raise CommandFailedError("no cluster is running here; start one with: flora up")
    if running.url is None:
        raise CommandFailedError(
            "the cluster is still starting; wait for `flora up`, or end it with: flora down"
        )
    return running
