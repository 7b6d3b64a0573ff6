"""A listener hears of a request from two sides, and passes everything on once and in order."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from deployments.previews import Listener, Preview
from storage.identity import AdapterSet
from workers.engine.request import RequestOutput

OUTPUTS = tuple(RequestOutput("r", AdapterSet(), (token,)) for token in range(8))

shown = st.integers(0, len(OUTPUTS) - 1)  # the index of a preview
called = st.just(None)  # the call's next batch


async def taken(listener: Listener) -> list[RequestOutput]:
    listener.wake()
    return list(await listener.take())


@given(
    st.lists(st.tuples(shown | called, st.booleans()), max_size=24),
    st.lists(st.integers(1, 3), min_size=8, max_size=8),
)
def test_previews_may_come_late_twice_early_or_never(
    heard: list[tuple[int | None, bool]], batch_sizes: list[int]
) -> None:
    async def run() -> None:
        listener, num_from_call = Listener(), 0
        seen: list[RequestOutput] = []
        arrived: set[int] = set()
        sizes = iter(batch_sizes)
        for index, is_taken in heard:
            if index is not None:
                listener.put(Preview(index, OUTPUTS[index]))
                arrived.add(index)
            elif num_from_call < len(OUTPUTS):
                batch = OUTPUTS[num_from_call : num_from_call + next(sizes)]
                arrived.update(range(num_from_call, num_from_call + len(batch)))
                num_from_call += len(batch)
                seen += listener.take_from_call(batch)
            if is_taken:
                seen += await taken(listener)
                is_next_there = len(seen) in arrived
                assert not is_next_there, "what can be shown is not held back"
        seen += listener.take_from_call(OUTPUTS[num_from_call:])
        seen += await taken(listener)
        assert tuple(seen) == OUTPUTS

    asyncio.run(run())
