"""A real replica that lives, passes every health check, and fails each request at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.serve._private.constants import SERVE_NAMESPACE


@contextmanager
def broken_replica(replica_id: str) -> Iterator[None]:
    """Its engine client raises what a full disk raises, until the block ends."""

    def full(request: Any) -> None:
        raise OSError(28, "No space left on device")

    def break_it(client: Any) -> None:
        client.submit = full

    def mend_it(client: Any) -> None:
        del client.submit

    _call(replica_id, break_it)
    try:
        yield
    finally:
        _call(replica_id, mend_it)


def _call(replica_id: str, change: Callable[[Any], None]) -> None:
    def run(actor: Any) -> None:
        change(actor._replica_impl._user_callable_wrapper._callable._client)

    named = ray.util.list_named_actors(all_namespaces=True)
    (name,) = (each["name"] for each in named if each["name"].endswith(f"#{replica_id}"))
    actor: Any = ray.get_actor(name, namespace=SERVE_NAMESPACE)
    ray.get(actor.__ray_call__.remote(run))
