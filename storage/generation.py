"""`index/generation`: one number that every change moves, so that readers need to ask for nothing else."""

from __future__ import annotations

from storage import layout
from storage.object_store import ObjectNotFoundError, ObjectStore, PreconditionFailedError


def read_generation(store: ObjectStore) -> int:
    """Another number after every change; 0 when there was none or what is stored is no number."""
    try:
        return _number(store.get(layout.GENERATION).data)
    except ObjectNotFoundError:
        return 0


def bump_generation(store: ObjectStore) -> None:
    """A lost race needs no second try: whoever won it wrote after our change, and so announces it as well."""
    try:
        current = store.get(layout.GENERATION)
    except ObjectNotFoundError:
        current = None
    try:
        if current is None:
            store.put_if_absent(layout.GENERATION, b"1")
        else:
            number = _number(current.data) + 1
            store.compare_and_swap(layout.GENERATION, b"%d" % number, current.etag)
    except PreconditionFailedError:
        pass


def _number(data: bytes) -> int:
    try:
        return int(data)
    except ValueError:
        return 0
