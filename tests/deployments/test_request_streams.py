"""Each request of a replica gets its own part of what the engine's steps bring, in no more pieces than it needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from deployments.gateway import ReplicaOutputs
from deployments.request_streams import RequestStreams
from storage.errors import EngineLostError
from tests.deployments.stepped_engine import SteppedEngine
from workers.engine.request import EngineRequest, FinishReason, SamplingParams


def request(name: str) -> EngineRequest:
    return EngineRequest(name, (1, 2), SamplingParams(max_tokens=50))


def tokens(batches: list[ReplicaOutputs]) -> list[list[int]]:
    return [
        [token for output in batch.outputs for token in output.new_token_ids] for batch in batches
    ]


async def read(stream: AsyncGenerator[ReplicaOutputs, None]) -> list[ReplicaOutputs]:
    return [batch async for batch in stream]


@pytest.mark.parametrize(
    ("is_whole", "expected"), [(False, [[1], [2], [3], [4]]), (True, [[1], [2, 3, 4]])]
)
def test_a_stream_has_a_batch_for_each_step_and_a_whole_answer_two(
    is_whole: bool, expected: list[list[int]]
) -> None:
    async def run() -> list[ReplicaOutputs]:
        engine = SteppedEngine()
        streams = RequestStreams(engine, "here")
        reader = asyncio.create_task(read(streams.generate(request("r"), is_whole)))
        await asyncio.sleep(0)
        for token in (1, 2, 3):
            await engine.step(token, "r", "of somebody else")
        await engine.step(4, "r", reason=FinishReason.LENGTH)
        assert engine.aborted == []
        return await reader

    batches = asyncio.run(run())
    assert tokens(batches) == expected
    assert {batch.replica_id for batch in batches} == {"here"}


def test_what_nobody_is_shown_comes_with_the_call() -> None:
    async def run() -> tuple[list[int], list[list[int]]]:
        engine = SteppedEngine()
        streams = RequestStreams(engine, "here")
        call = asyncio.create_task(read(streams.generate(request("r"), reader="reader")))
        await asyncio.sleep(0)
        for token in (1, 2):
            await engine.step(token, "r")
        previews = streams.previews("reader")
        shown = asyncio.ensure_future(anext(previews))
        await asyncio.sleep(0)
        await engine.step(3, "r")
        indices = [preview.index for preview in shown.result()]
        await previews.aclose()  # and of what it has shown, nobody knows what has arrived
        for token in (4, 5):
            await engine.step(token, "r")
        await engine.step(6, "r", reason=FinishReason.LENGTH)
        return indices, tokens(await call)

    assert asyncio.run(run()) == ([2], [[1], [2], [3, 4], [5], [6]])


def test_a_reader_that_is_slow_gets_all_it_missed_at_once() -> None:
    async def run() -> list[list[int]]:
        engine = SteppedEngine()
        stream = RequestStreams(engine, "here").generate(request("r"))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        await engine.step(1, "r")
        for token in (2, 3):
            await engine.step(token, "r")
        second = await anext(stream)
        await stream.aclose()
        return tokens([await first, second])

    assert asyncio.run(run()) == [[1], [2, 3]]


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_reader_that_goes_away_ends_the_engines_work(is_whole: bool) -> None:
    async def run() -> list[str]:
        engine = SteppedEngine()
        streams = RequestStreams(engine, "here")
        reader = asyncio.create_task(read(streams.generate(request("r"), is_whole)))
        await asyncio.sleep(0)
        await engine.step(1, "r")
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        return engine.aborted

    assert asyncio.run(run()) == ["r"]


def test_a_refusal_is_an_output() -> None:
    engine = SteppedEngine()
    engine.is_up = False
    (batch,) = asyncio.run(read(RequestStreams(engine, "here").generate(request("r"))))
    (output,) = batch.outputs
    assert output.finish_reason is FinishReason.ERROR
    assert isinstance(output.error, EngineLostError)
