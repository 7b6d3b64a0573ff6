"""The gateway and a replica's streams, with messages between them that a test can count, delay and lose. No Ray."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from cluster.failing_replicas import Outcome
from deployments import previews
from deployments.gateway import PreviewsOf, ReplicaOutputs, ServeGateway
from deployments.outcomes import Heard, shared_outcomes
from deployments.request_streams import RequestStreams
from storage.errors import (
    AdapterCorruptError,
    EngineLostError,
    FloraError,
    InvalidRequestError,
    OverloadedError,
    StoreUnavailableError,
)
from tests.deployments.stepped_engine import SteppedEngine
from workers.engine.request import EngineRequest, FinishReason, SamplingParams


class Call:
    """Like Serve's response to a streaming call: runs ahead of its reader."""

    def __init__(self, items: AsyncGenerator[Any, None], is_lost: Callable[[], bool]) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._run(items, is_lost))

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        item = await self._queue.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self._task.cancel()

    async def _run(self, items: AsyncGenerator[Any, None], is_lost: Callable[[], bool]) -> None:
        try:
            async for item in items:
                if not is_lost():
                    self._queue.put_nowait(item)
        except (OverloadedError, RayTaskError) as error:
            self._queue.put_nowait(error)
        self._queue.put_nowait(None)


@dataclass
class Link:
    """A handle to the one replica there is."""

    engine: SteppedEngine = field(default_factory=SteppedEngine)
    num_messages: Counter[str] = field(default_factory=Counter)
    is_read: bool = False
    is_full: bool = False  # for calls for previews: until there is `room` for them
    refuses: bool = False  # rather than have them wait
    raises: Exception | None = None  # instead of an answer
    loses: Callable[[int], bool] = lambda number: False  # which preview messages

    def __post_init__(self) -> None:
        self.streams = RequestStreams(self.engine, "here")
        self.room = asyncio.Event()
        if not self.is_full:
            self.room.set()

    def options(self, *, method_name: str, stream: bool = False) -> Any:
        return _Method(self, method_name)

    async def generate(
        self, request: EngineRequest, avoided: str, is_whole: bool, reader: str
    ) -> AsyncGenerator[ReplicaOutputs, None]:
        if self.raises is not None:
            raise self.raises
        async for batch in self.streams.generate(request, is_whole, reader):
            self.num_messages["generate"] += 1
            yield batch

    async def previews(self, wanted: PreviewsOf) -> previews.PreviewStream:
        if self.refuses and not self.room.is_set():
            raise OverloadedError("full")
        await self.room.wait()
        self.is_read = True
        async for batch in self.streams.previews(wanted.reader):
            self.num_messages["previews"] += 1
            yield batch
        self.is_read = False


@dataclass
class _Method:
    link: Link
    name: str

    def remote(self, *args: Any) -> Call:
        def is_lost() -> bool:
            return self.name == "previews" and self.link.loses(self.link.num_messages["previews"])

        return Call(getattr(self.link, self.name)(*args), is_lost)


def request(name: str) -> EngineRequest:
    return EngineRequest(name, (1, 2), SamplingParams(max_tokens=50))


class Reader:
    """Reads one request in a task."""

    def __init__(self, gateway: ServeGateway, name: str, is_whole: bool = False) -> None:
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self.task = asyncio.ensure_future(self._run(gateway.generate(request(name), "", is_whole)))

    async def _run(self, batches: AsyncGenerator[ReplicaOutputs, None]) -> None:
        async for batch in batches:
            assert batch.replica_id == "here" and self.reason is None
            for output in batch.outputs:
                self.tokens.extend(output.new_token_ids)
                self.reason = output.finish_reason


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_a_step_is_one_message_for_all_who_read_along() -> None:
    async def test() -> None:
        link = Link()
        gateway = ServeGateway(link)
        names = [f"r{number}" for number in range(8)]
        readers = [Reader(gateway, name) for name in names]
        await asyncio.sleep(0.01)
        for token in range(1, 21):
            await link.engine.step(token, *names)
            assert all(reader.tokens == list(range(1, token + 1)) for reader in readers)
        await link.engine.step(21, *names, reason=FinishReason.LENGTH)
        await asyncio.gather(*(reader.task for reader in readers))
        assert all(reader.tokens == list(range(1, 22)) for reader in readers)
        assert link.num_messages["previews"] <= 20
        assert link.num_messages["generate"] == 2 * len(names)

    run(test())


def test_a_whole_answer_needs_two_messages_and_no_previews() -> None:
    async def test() -> None:
        link = Link()
        reader = Reader(ServeGateway(link), "r", is_whole=True)
        await asyncio.sleep(0.01)
        for token in range(1, 20):
            await link.engine.step(token, "r")
        await link.engine.step(20, "r", reason=FinishReason.STOP)
        await reader.task
        assert reader.tokens == list(range(1, 21)) and reader.reason is FinishReason.STOP
        assert link.num_messages == {"generate": 2}

    run(test())


@pytest.mark.parametrize(
    "loses", [lambda number: True, lambda number: number == 3, lambda number: number % 2 == 0]
)
def test_what_previews_lose_comes_with_the_call_in_order_and_once(
    loses: Callable[[int], bool],
) -> None:
    async def test() -> None:
        link = Link(loses=loses)
        gateway = ServeGateway(link)
        readers = [Reader(gateway, name) for name in ("a", "b")]
        await asyncio.sleep(0.01)
        for token in range(1, 12):
            await link.engine.step(token, "a", "b")
        await link.engine.step(12, "a", "b", reason=FinishReason.LENGTH)
        await asyncio.gather(*(reader.task for reader in readers))
        assert all(reader.tokens == list(range(1, 13)) for reader in readers)

    run(test())


@pytest.mark.parametrize("refuses", [False, True])
def test_while_a_full_replica_has_no_room_for_previews_each_step_comes_with_the_call(
    monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    monkeypatch.setattr(previews, "AGAIN_S", 0.01)

    async def test() -> None:
        link = Link(is_full=True, refuses=refuses)
        reader = Reader(ServeGateway(link), "r")
        await asyncio.sleep(0.01)
        for token in (1, 2, 3):
            await link.engine.step(token, "r")
            assert reader.tokens[-1:] == [token]
        assert link.num_messages == {"generate": 3}
        link.room.set()
        while not link.is_read:
            await asyncio.sleep(0.01)
        for token in (4, 5):
            await link.engine.step(token, "r")
            assert reader.tokens[-1:] == [token]
        assert link.num_messages == {"generate": 3, "previews": 2}
        await link.engine.step(6, "r", reason=FinishReason.LENGTH)
        await reader.task
        assert reader.tokens == [1, 2, 3, 4, 5, 6]
        assert link.num_messages["generate"] == 4

    run(test())


def test_what_comes_before_a_request_is_read_on_is_seen_when_it_is() -> None:
    async def test() -> None:
        link = Link()
        gateway = ServeGateway(link)
        other = Reader(gateway, "other")
        await asyncio.sleep(0.01)
        for token in (1, 2):
            await link.engine.step(token, "other")
        assert link.is_read
        batches = gateway.generate(request("r"))
        first = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0.01)
        await link.engine.step(1, "r", "other")
        seen = list((await first).outputs)
        for token in (2, 3):  # while its other choices begin
            await link.engine.step(token, "r", "other")
        rest = asyncio.ensure_future(anext(batches))
        await link.engine.step(4, "r", "other")
        assert rest.done(), "it is silent until its end"
        seen += rest.result().outputs
        assert [output.new_token_ids for output in seen][:3] == [(1,), (2,), (3,)]
        await batches.aclose()
        other.task.cancel()
        await asyncio.gather(other.task, return_exceptions=True)

    run(test())


def test_who_goes_away_ends_the_engines_work_and_nobody_elses() -> None:
    async def test() -> None:
        link = Link()
        gateway = ServeGateway(link)
        gone, stays = Reader(gateway, "gone"), Reader(gateway, "stays")
        await asyncio.sleep(0.01)
        for token in (1, 2):
            await link.engine.step(token, "gone", "stays")
        gone.task.cancel()
        await asyncio.gather(gone.task, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert link.engine.aborted == ["gone"]
        await link.engine.step(3, "stays")
        assert stays.tokens == [1, 2, 3]
        await link.engine.step(4, "stays", reason=FinishReason.LENGTH)
        await stays.task
        assert link.engine.aborted == ["gone"]

    run(test())


def test_a_stream_without_requests_ends_and_a_later_request_opens_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(previews, "IDLE_S", 0.02)

    async def answer(link: Link, gateway: ServeGateway, name: str) -> None:
        reader = Reader(gateway, name)
        await asyncio.sleep(0.01)
        for token in (1, 2, 3):
            await link.engine.step(token, name)
        assert reader.tokens == [1, 2, 3] and link.is_read
        await asyncio.sleep(0.05)  # a long step is no reason to end
        await link.engine.step(4, name)
        assert reader.tokens == [1, 2, 3, 4]
        await link.engine.step(5, name, reason=FinishReason.LENGTH)
        await reader.task

    async def test() -> None:
        link = Link()
        gateway = ServeGateway(link)
        await answer(link, gateway, "first")
        await asyncio.sleep(0.1)
        assert not link.is_read
        await answer(link, gateway, "second")

    run(test())


def heard_of(name: str) -> Heard:
    """As the router does when a replica has accepted."""
    heard = Heard()
    shared_outcomes().expect(name, "here", heard)
    return heard


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_router_hears_that_an_answer_began_and_that_it_ended_well(is_whole: bool) -> None:
    async def test() -> None:
        link, heard = Link(), heard_of("r")
        reader = Reader(ServeGateway(link), "r", is_whole)
        await asyncio.sleep(0.01)
        for token in (1, 2, 3):
            await link.engine.step(token, "r")
        assert heard.take() == [("here", Outcome.BEGUN)]
        await link.engine.step(4, "r", reason=FinishReason.LENGTH)
        await reader.task
        assert heard.take() == [("here", Outcome.ANSWERED)]

    run(test())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FloraError("the model failed"), [("here", Outcome.FAILED)]),
        (EngineLostError("gone"), [("here", Outcome.FAILED)]),
        (OSError("no space left on device"), [("here", Outcome.FAILED)]),
        (InvalidRequestError("no"), []),
        (AdapterCorruptError("no"), []),
        (StoreUnavailableError("away"), []),
    ],
)
def test_the_router_hears_of_failures_that_are_the_replicas_fault_and_of_no_others(
    error: Exception, expected: list[tuple[str, Outcome]]
) -> None:
    async def test() -> None:
        link, heard = Link(), heard_of("r")
        reader = Reader(ServeGateway(link), "r")
        await asyncio.sleep(0.01)
        await link.engine.fail(error, "r")
        await reader.task
        assert heard.take() == expected

    run(test())


@pytest.mark.parametrize(
    ("cause", "expected"),
    [(RuntimeError("a bug"), [("here", Outcome.FAILED)]), (InvalidRequestError("no"), [])],
)
def test_the_router_hears_of_what_a_replicas_own_code_raises(
    cause: Exception, expected: list[tuple[str, Outcome]]
) -> None:
    async def test() -> None:
        heard = heard_of("r")
        raised = RayTaskError("generate", "its traceback", cause)
        reader = Reader(ServeGateway(Link(raises=raised)), "r")
        with pytest.raises(FloraError):
            await reader.task
        assert heard.take() == expected

    run(test())


def test_the_router_hears_nothing_of_an_answer_nobody_waited_for() -> None:
    async def test() -> None:
        link, heard = Link(), heard_of("gone")
        gone = Reader(ServeGateway(link), "gone")
        await asyncio.sleep(0.01)
        gone.task.cancel()
        await asyncio.gather(gone.task, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert link.engine.aborted == ["gone"] and heard.take() == []

    run(test())
