"""Large objects read in several ranges at once, into one buffer. Knows nothing of what they are.

One connection to an S3 server rarely fills the line; a few do. Parts may come from different states of an object that
was replaced meanwhile: whoever asks checks a digest of the whole.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from io import BytesIO

from storage.object_store import ObjectStore

PART_BYTES = 8 << 20
"""An object up to this size is one request; a larger one is parts of this size."""

PARTS_AT_ONCE = 8
"""Of all reads of this process together."""

_READERS = ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="object-part")


def read_object(store: ObjectStore, key: str, num_bytes: int) -> bytes:
    """An object's bytes; of a large one no more than `num_bytes`.

    An interrupted part is asked for again by the store's own rule.

    Raises:
        ObjectNotFoundError: there is no such object.
        StoreUnavailableError: the store cannot be reached, at the first part for which it could not.
    """
    if num_bytes <= PART_BYTES:
        return store.get(key).data
    whole = BytesIO()  # hands its buffer out as bytes without another copy
    whole.seek(num_bytes - 1)
    whole.write(b"\0")
    view = whole.getbuffer()

    def read(start: int) -> int:
        stop = min(start + PART_BYTES, num_bytes)
        data = store.get_range(key, start, stop)
        view[start : start + len(data)] = data
        return len(data)

    parts = [_READERS.submit(read, start) for start in range(0, num_bytes, PART_BYTES)]
    try:
        num_read = sum(part.result() for part in parts)
    finally:
        for part in parts:
            part.cancel()
        wait(parts)  # or a late part would write into what was given back
        view.release()
    whole.truncate(num_read)
    return whole.getvalue()
