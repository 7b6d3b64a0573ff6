"""One answer when things go wrong: replicas die, answer for somebody else, refuse, or run out of time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from deployments.answer_text import Delta
from deployments.errors import ReplicaLostError, RequestTimeoutError, WrongAdapterError
from deployments.gateway import ReplicaOutputs
from deployments.generation import Generation
from deployments.text import TextCodec
from storage.errors import AdapterCorruptError, EngineLostError, FloraError
from storage.identity import AdapterSet, AdapterVersion
from workers.config import EngineSettings
from workers.engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams

POET = AdapterSet.of(AdapterVersion("1" * 64))
OTHER = AdapterSet.of(AdapterVersion("2" * 64))
LOST = ReplicaLostError("gone")

Script = Sequence[RequestOutput | tuple[RequestOutput, ...] | Exception]
"""A tuple is one batch."""


@pytest.fixture(scope="module")
def codec(tiny_llama_dir: Path) -> TextCodec:
    return TextCodec.open(EngineSettings(base=str(tiny_llama_dir)))


class ScriptedGateway:
    """Replicas that do what a script says; the n-th call gets the n-th script."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.requests: list[EngineRequest] = []
        self.avoided: list[str] = []
        self.is_whole: list[bool] = []
        self.num_closed_early = 0

    async def generate(
        self, request: EngineRequest, avoided: str = "", is_whole: bool = False
    ) -> AsyncGenerator[ReplicaOutputs, None]:
        self.requests.append(request)
        self.avoided.append(avoided)
        self.is_whole.append(is_whole)
        script = self.scripts[len(self.requests) - 1]
        is_over = False
        try:
            for event in script:
                if isinstance(event, Exception):
                    is_over = True
                    raise event
                outputs = event if isinstance(event, tuple) else (event,)
                is_over = outputs[-1].finish_reason is not None
                yield ReplicaOutputs(f"replica-{len(self.requests)}", outputs)
            is_over = True
        finally:
            self.num_closed_early += not is_over

    async def is_anyone_there(self) -> bool:
        return True


def output(
    *tokens: int,
    reason: FinishReason | None = None,
    adapters: AdapterSet = POET,
    error: Exception | None = None,
) -> RequestOutput:
    return RequestOutput("any", adapters, tokens, reason, error, "disk", 0.25)


def generation(codec: TextCodec, gateway: ScriptedGateway, stops: Sequence[str] = ()) -> Generation:
    request = EngineRequest("one", (5, 6), SamplingParams(max_tokens=50), POET)
    return Generation(gateway, codec, request, list(stops))


async def streamed(one: Generation) -> list[Delta]:
    """The deltas seen until the end or an error; re-raises nothing."""
    seen = []
    await one.start()
    with suppress(FloraError):
        async for delta in one.deltas():
            seen.append(delta)
    await one.close()
    return seen


def test_an_answer_says_who_gave_it_and_how_long_it_waited(codec: TextCodec) -> None:
    gateway = ScriptedGateway([output(40), output(41, reason=FinishReason.LENGTH)])
    one = generation(codec, gateway)
    assert asyncio.run(one.text()) == Delta(codec.decode([40, 41]), "length")
    assert gateway.is_whole == [True]
    assert (one.replica_id, one.adapter_tier, one.queue_time_s) == ("replica-1", "disk", 0.25)
    assert one.num_tokens == 2


def test_a_request_without_a_token_is_sent_once_more_when_its_replica_dies(
    codec: TextCodec,
) -> None:
    gateway = ScriptedGateway([LOST], [output(40, reason=FinishReason.LENGTH)])
    one = generation(codec, gateway)
    assert asyncio.run(streamed(one)) == [Delta(codec.decode([40]), "length")]
    assert one.replica_id == "replica-2"
    first, second = gateway.requests
    assert first.request_id != second.request_id
    assert first.prompt_token_ids == second.prompt_token_ids


@pytest.mark.parametrize("is_whole", [True, False])
def test_an_engine_that_dies_in_a_living_replica_is_a_lost_one(
    codec: TextCodec, is_whole: bool
) -> None:
    last_words = output(reason=FinishReason.ERROR, error=EngineLostError("gone"))
    before = [output(40)] if is_whole else []
    gateway = ScriptedGateway([*before, last_words], [output(41, reason=FinishReason.LENGTH)])
    one = generation(codec, gateway)
    if is_whole:
        assert asyncio.run(one.text()) == Delta(codec.decode([41]), "length")
    else:
        assert asyncio.run(streamed(one)) == [Delta(codec.decode([41]), "length")]
    assert gateway.avoided == ["", "replica-1"]


@pytest.mark.parametrize("is_whole", [True, False])
def test_an_engine_that_dies_in_the_step_after_the_first_is_a_lost_one(
    codec: TextCodec, is_whole: bool
) -> None:
    last_words = output(reason=FinishReason.ERROR, error=EngineLostError("gone"))
    gateway = ScriptedGateway(
        [(output(40), last_words)], [(output(41), output(42, reason=FinishReason.LENGTH))]
    )
    one = generation(codec, gateway)
    if is_whole:
        assert asyncio.run(one.text()) == Delta(codec.decode([41, 42]), "length")
    else:
        deltas = asyncio.run(streamed(one))
        assert "".join(delta.text for delta in deltas) == codec.decode([41, 42])
    assert gateway.avoided == ["", "replica-1"]


def test_it_is_sent_once_more_and_not_for_ever(codec: TextCodec) -> None:
    gateway = ScriptedGateway([LOST], [LOST], [output(40, reason=FinishReason.LENGTH)])
    with pytest.raises(ReplicaLostError):
        asyncio.run(generation(codec, gateway).start())
    assert len(gateway.requests) == 2


def test_after_the_first_token_of_a_stream_a_lost_replica_is_an_error(codec: TextCodec) -> None:
    gateway = ScriptedGateway([output(40), LOST], [output(40, reason=FinishReason.LENGTH)])

    async def run() -> None:
        one = generation(codec, gateway)
        await one.start()
        async for _ in one.deltas():
            pass

    with pytest.raises(ReplicaLostError):
        asyncio.run(run())
    assert len(gateway.requests) == 1


def test_a_stream_whose_tokens_show_nothing_yet_is_begun_again(codec: TextCodec) -> None:
    half, other_half = codec.encode("é")
    gateway = ScriptedGateway(
        [output(half), LOST], [output(half), output(other_half, reason=FinishReason.LENGTH)]
    )
    one = generation(codec, gateway)
    assert "".join(delta.text for delta in asyncio.run(streamed(one))) == "é"
    assert one.num_tokens == 2
    assert gateway.avoided == ["", "replica-1"]


def test_a_whole_answer_is_begun_again_for_nobody_has_seen_any_of_it(codec: TextCodec) -> None:
    gateway = ScriptedGateway(
        [output(40), output(41), LOST], [output(42), output(43, reason=FinishReason.STOP)]
    )
    one = generation(codec, gateway)
    assert asyncio.run(one.text()) == Delta(codec.decode([42, 43]), "stop")
    assert one.num_tokens == 2


@pytest.mark.parametrize("good_before", [0, 1])
@pytest.mark.parametrize("adapters", [OTHER, AdapterSet()])
def test_an_output_of_other_adapters_is_never_passed_on(
    codec: TextCodec, good_before: int, adapters: AdapterSet
) -> None:
    script = [output(40)] * good_before + [output(41, adapters=adapters), output(42)]
    gateway = ScriptedGateway(script)
    with pytest.raises(WrongAdapterError):
        asyncio.run(generation(codec, gateway).text())


def test_a_refusal_is_raised_before_anything_begins(codec: TextCodec) -> None:
    error = AdapterCorruptError("the blob is damaged")
    gateway = ScriptedGateway([output(reason=FinishReason.ERROR, error=error)])
    with pytest.raises(AdapterCorruptError):
        asyncio.run(generation(codec, gateway).start())
    assert len(gateway.requests) == 1


def test_an_answer_ended_by_its_deadline_is_an_error(codec: TextCodec) -> None:
    gateway = ScriptedGateway([output(40), output(reason=FinishReason.ABORT)])
    with pytest.raises(RequestTimeoutError):
        asyncio.run(generation(codec, gateway).text())


def test_an_answer_that_no_replica_begins_is_an_error_at_its_deadline(codec: TextCodec) -> None:
    class NobodyAnswers(ScriptedGateway):
        async def generate(
            self, request: EngineRequest, avoided: str = "", is_whole: bool = False
        ) -> AsyncGenerator[ReplicaOutputs, None]:
            await asyncio.Event().wait()
            yield ReplicaOutputs("never", ())

    request = EngineRequest("one", (5, 6), SamplingParams(), POET, deadline_s=time.time() + 0.05)
    with pytest.raises(RequestTimeoutError):
        asyncio.run(Generation(NobodyAnswers(), codec, request, []).text())


def test_a_stop_string_ends_the_engines_work_too(codec: TextCodec) -> None:
    tokens = codec.encode("the quick brown fox")
    gateway = ScriptedGateway([output(token) for token in tokens])
    one = generation(codec, gateway, stops=["quick"])
    assert asyncio.run(one.text()) == Delta("the ", "stop")
    assert gateway.num_closed_early == 1
    assert gateway.is_whole == [False], "what comes late would be computed in vain"


def test_a_stream_given_up_ends_the_engines_work(codec: TextCodec) -> None:
    gateway = ScriptedGateway([output(40), output(41), output(42, reason=FinishReason.LENGTH)])

    async def run() -> None:
        one = generation(codec, gateway)
        await one.start()
        await one.close()

    asyncio.run(run())
    assert gateway.num_closed_early == 1


def test_an_answer_that_ends_without_a_reason_is_an_error(codec: TextCodec) -> None:
    for script in ([], [output(40)]):
        with pytest.raises(FloraError):
            asyncio.run(generation(codec, ScriptedGateway(script)).text())
