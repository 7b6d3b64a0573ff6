"""Small typed JSON objects in an object store, changed by compare-and-swap. Knows nothing of adapters."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from storage.errors import AdapterCorruptError, OverloadedError
from storage.identity import canonical_json
from storage.object_store import ObjectNotFoundError, ObjectStore, PreconditionFailedError

Record = TypeVar("Record", bound=BaseModel)

ATTEMPTS = 64
"""How often a change by compare-and-swap is tried."""
_FIRST_DELAY_S = 0.002
_LONGEST_DELAY_S = 0.25


def encode(record: BaseModel) -> bytes:
    """The one byte form of a record."""
    return canonical_json(record.model_dump(mode="json"))


def decode(data: bytes, kind: type[Record], what: str) -> Record:
    """The record in these bytes; `what` names it in the AdapterCorruptError when they are not one."""
    try:
        return kind.model_validate_json(data)
    except ValidationError:
        raise AdapterCorruptError(f"the registry's record {what} is damaged") from None


def read(store: ObjectStore, key: str, kind: type[Record]) -> Record | None:
    """The record under a key, None when there is none. Raises AdapterCorruptError."""
    try:
        return decode(store.get(key).data, kind, key)
    except ObjectNotFoundError:
        return None


def swap(
    store: ObjectStore,
    key: str,
    kind: type[Record],
    change: Callable[[Record | None], Record | None],
) -> Record | None:
    """Replace a record by a function of it, however many others do the same; returns the record as it is then.

    Args:
        change: called anew for every state that is found, None when there is no record yet. Returns the next state,
            or None to leave this one. Its exceptions pass through and change nothing.

    Raises:
        OverloadedError: others changed the record faster than this call could; this call changed nothing.
    """
    for attempt in range(ATTEMPTS):
        try:
            current = store.get(key)
        except ObjectNotFoundError:
            current = None
        record = None if current is None else decode(current.data, kind, key)
        changed = change(record)
        if changed is None:
            return record
        try:
            if current is None:
                store.put_if_absent(key, encode(changed))
            else:
                store.compare_and_swap(key, encode(changed), current.etag)
        except PreconditionFailedError:
            wait_after_lost_race(attempt)
            continue
        return changed
    raise OverloadedError("too many changes of this adapter at once; try again")


def wait_after_lost_race(attempt: int) -> None:
    """Longer the more attempts were lost, and for everybody another time."""
    time.sleep(random.uniform(0, min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2**attempt)))
