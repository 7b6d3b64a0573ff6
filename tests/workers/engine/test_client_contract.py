"""Every transport: a request is owed exactly one last output, whatever happens to it or to the engine."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.errors import (
    AdapterRefusedError,
    ContextLengthError,
    EngineLostError,
    FailedVersion,
    FloraError,
    InvalidRequestError,
    OverloadedError,
)
from tests.workers.engine.small_engine import greedy, prompt, run, small_engine, version
from tests.workers.engine.transports import (
    BROKEN,
    FAR,
    REFUSED,
    Faults,
    Inbox,
    Tiers,
    eventually,
    install,
    open_client,
)
from workers.engine.client import EngineClient
from workers.engine.request import FinishReason, StepOutputs
from workers.engine.thread_client import MAX_FAILED_STEPS


@dataclass
class Started:
    """A client, and where its outputs go."""

    client: EngineClient
    receive: Callable[[StepOutputs], None]
    faults: Faults

    def on_step(self, outputs: StepOutputs) -> None:
        self.receive(outputs)


@pytest.fixture(scope="module", params=["thread", "process"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@contextmanager
def started(transport: str, directory: Path, faults: Path) -> Iterator[Started]:
    with pytest.MonkeyPatch.context() as patch:
        install(faults, patch.setattr)
        one = Started(open_client(transport, directory, faults), Inbox(), Faults(faults))
        one.client.start(one.on_step)
        yield one
        one.faults.end_all()
        one.client.stop()


@pytest.fixture(scope="module")
def lasting(
    transport: str, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Started]:
    """One client for all tests that leave it whole."""
    with started(transport, tiny_llama_dir, tmp_path_factory.mktemp("faults")) as one:
        yield one


@pytest.fixture
def fragile(transport: str, tiny_llama_dir: Path, tmp_path: Path) -> Iterator[Started]:
    """A client of the test's own, to be broken."""
    with started(transport, tiny_llama_dir, tmp_path) as one:
        yield one


@pytest.fixture
def inbox(lasting: Started) -> Inbox:
    lasting.receive = inbox = Inbox()
    return inbox


@pytest.fixture
def client(lasting: Started, inbox: Inbox) -> EngineClient:
    return lasting.client


def test_requests_from_many_threads_are_all_answered_once(
    client: EngineClient, inbox: Inbox
) -> None:
    def submit(sender: int) -> None:
        for number in range(6):
            name = f"{sender}-{number}"
            user = version(1 + number % 3) if number % 2 else None
            client.submit(greedy(name, prompt(number, 4), user))
            if number == 3:
                client.abort(name)

    senders = [threading.Thread(target=submit, args=(i,)) for i in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    names = [f"{sender}-{number}" for sender in range(4) for number in range(6)]
    answers = inbox.wait_for_ends(*names)
    assert answers.keys() == set(names)
    for name, answer in answers.items():
        if not name.endswith("-3"):
            assert answer.reason is FinishReason.LENGTH
            assert answer.tokens == answers[f"0-{name[-1]}"].tokens


def test_answers_are_those_of_the_engine_alone(
    client: EngineClient, inbox: Inbox, tiny_llama_dir: Path
) -> None:
    """Token for token, so the transports also equal each other."""
    adapters = Tiers(tiny_llama_dir).adapters
    requests = [
        greedy("base", prompt(4, 6)),
        greedy("one", prompt(4, 6), version(1)),
        greedy("three", prompt(4, 6), version(3)),
    ]
    alone = run(small_engine(tiny_llama_dir, adapters), requests)
    for request in requests:
        client.submit(request)
    answers = inbox.wait_for_ends("base", "one", "three")
    assert {name: one.tokens for name, one in answers.items()} == {
        name: one.tokens for name, one in alone.items()
    }
    assert len({tuple(one.tokens) for one in answers.values()}) == 3


def test_what_cannot_be_answered_is_refused_before_it_is_queued(
    client: EngineClient, inbox: Inbox
) -> None:
    with pytest.raises(ContextLengthError) as refused:
        client.submit(greedy("long", prompt(0, 60), max_tokens=20))
    assert refused.value.param == "max_tokens"
    with pytest.raises(InvalidRequestError, match="empty"):
        client.submit(greedy("nothing", ()))
    with pytest.raises(InvalidRequestError, match="token 300000"):
        client.submit(greedy("unknown", (300_000,)))


def test_a_request_id_that_is_in_use_is_refused(client: EngineClient, inbox: Inbox) -> None:
    def is_refused(name: str) -> bool:
        client.submit(greedy(name, prompt(0, 4), max_tokens=50))
        try:
            client.submit(greedy(name, prompt(0, 4)))
        except InvalidRequestError as error:
            assert f"{name} is in use" in error.message
            return True
        return False

    # The engine may have answered the first before this thread has its turn again.
    names = [f"same-{number}" for number in range(5)]
    assert any([is_refused(name) for name in names])
    assert inbox.wait_for_ends(*names).keys() == set(names)


def test_a_request_id_is_free_again_once_answered(client: EngineClient, inbox: Inbox) -> None:
    client.submit(greedy("r", prompt(0, 4)))
    first = inbox.wait_for_ends("r")["r"]
    inbox.answers.clear()
    client.submit(greedy("r", prompt(0, 4)))
    assert inbox.wait_for_ends("r")["r"].tokens == first.tokens


def test_an_adapters_error_reaches_its_request_with_type_message_and_field(
    client: EngineClient, inbox: Inbox
) -> None:
    client.submit(greedy("refused", prompt(0, 4), REFUSED))
    client.submit(greedy("broken", prompt(0, 4), BROKEN))
    answers = inbox.wait_for_ends("refused", "broken")
    error = answers["refused"].error
    assert isinstance(error, AdapterRefusedError)
    assert (error.message, error.param) == ("a tensor is too long", "q_proj")
    assert answers["broken"].reason is FinishReason.ERROR
    assert answers["broken"].error is not None


def test_an_aborted_request_ends_within_a_step(client: EngineClient, inbox: Inbox) -> None:
    client.submit(greedy("r", prompt(0, 4), max_tokens=60))
    client.abort("r")
    client.abort("never heard of")
    assert inbox.wait_for_ends("r")["r"].reason is FinishReason.ABORT


def test_a_receiver_that_fails_stops_nobody_else(
    lasting: Started, client: EngineClient, inbox: Inbox
) -> None:
    failures = 0

    def failing(step: StepOutputs) -> None:
        nonlocal failures
        inbox(step)
        failures += 1
        raise RuntimeError("the receiver failed")

    lasting.receive = failing
    client.submit(greedy("r", prompt(0, 4)))
    assert inbox.wait_for_ends("r")["r"].reason is FinishReason.LENGTH
    assert failures > 1
    assert client.is_alive()


def test_prefetched_adapters_are_there_before_anybody_asks(
    client: EngineClient, inbox: Inbox
) -> None:
    client.prefetch([version(3), version(9), version(1)], frozenset([version(3)]))
    eventually(lambda: set(client.load().device) == {version(3), version(1)})
    client.submit(greedy("r", prompt(0, 4), version(3)))
    assert inbox.wait_for_ends("r")["r"].outputs[0].adapter_tier == "device"
    # Pinned, it is not evicted for the next one wanted; unpinned it is.
    client.submit(greedy("other", prompt(0, 4), version(1)))
    inbox.wait_for_ends("other")
    client.prefetch([version(2)], frozenset([version(2)]))
    eventually(lambda: version(2) in client.load().device)
    assert version(3) not in client.load().device
    client.prefetch([], frozenset())


def test_the_load_tells_where_adapters_are_and_what_is_done(
    client: EngineClient, inbox: Inbox
) -> None:
    client.submit(greedy("r", prompt(0, 4), version(1), max_tokens=5))
    inbox.wait_for_ends("r")
    eventually(lambda: client.load().num_running == 0 and client.load().tokens_out >= 5)
    eventually(lambda: version(1) in client.load().host)
    load = client.load()
    assert set(load.disk) == {version(1), version(2), version(3)}
    assert version(1) in load.device
    assert load.bank_rows == 4


def test_a_retired_adapters_rows_are_freed_once_no_request_uses_them(
    client: EngineClient, inbox: Inbox
) -> None:
    old = version(2)

    def retire() -> bool:
        client.prefetch((), frozenset(), (), frozenset({old}))
        return old not in client.load().device

    client.submit(greedy("long", prompt(0, 4), old, max_tokens=60))
    eventually(lambda: client.load().tokens_out > 0 and old in client.load().device)
    retire()
    assert len(inbox.wait_for_ends("long")["long"].tokens) == 60
    eventually(retire)
    client.submit(greedy("again", prompt(0, 4), old, max_tokens=2))
    assert inbox.wait_for_ends("again")["again"].reason is FinishReason.LENGTH


def test_the_load_tells_what_routing_and_placement_go_by(
    lasting: Started, client: EngineClient, inbox: Inbox
) -> None:
    before = client.load()
    client.submit(greedy("refused", prompt(0, 4), REFUSED))
    client.submit(greedy("base", prompt(0, 4), max_tokens=5))
    for number in (3, 2, 1, 3):  # of rank 3, 2, 1: not all of them fit at a time
        client.submit(greedy(f"r{number}", prompt(0, 4), version(number), max_tokens=5))
        inbox.wait_for_ends(f"r{number}")
        inbox.answers.pop(f"r{number}")
    inbox.wait_for_ends("refused", "base")
    eventually(lambda: client.load().misses >= before.misses + 3)
    load = client.load()
    assert load.kv_slots == 3 and load.kv_used == 0.0 == load.queued_work
    assert load.first_token_p99_s > 0.0 and load.load_s > 0.0
    assert load.load_errors > 0
    assert FailedVersion(REFUSED, "adapter_refused", "a tensor is too long") in load.failed
    assert BROKEN not in {one.version for one in load.failed}, "no fault of the version"
    stages = {labels for name, labels in load.figures.histograms if name.endswith("stage_seconds")}
    assert {("queue",), ("device",)} <= stages
    assert load.is_registry_up
    lasting.faults.begin("registry away")
    eventually(lambda: not client.load().is_registry_up)
    lasting.faults.end("registry away")
    eventually(lambda: client.load().is_registry_up)


def test_what_is_to_be_near_is_fetched_and_stays_off_the_device(client: EngineClient) -> None:
    assert FAR not in client.load().host
    client.prefetch([], frozenset(), [version(1), FAR, REFUSED])
    eventually(lambda: FAR in client.load().host)
    client.prefetch([], frozenset())
    assert FAR not in client.load().device


def test_stopping_ends_what_is_unfinished_as_lost_and_takes_no_more(fragile: Started) -> None:
    fragile.receive = inbox = Inbox()
    names = [f"r{i}" for i in range(6)]
    for name in names:
        fragile.client.submit(greedy(name, prompt(0, 4), version(1), max_tokens=50))
    fragile.client.stop()
    answers = inbox.wait_for_ends(*names)
    for answer in answers.values():
        assert answer.reason is FinishReason.ERROR
        assert isinstance(answer.error, EngineLostError)
    assert not fragile.client.is_alive()
    with pytest.raises(OverloadedError):
        fragile.client.submit(greedy("late", prompt(0, 4)))
    fragile.client.stop()


def test_a_stuck_step_is_noticed_and_its_end_as_well(fragile: Started) -> None:
    fragile.receive = inbox = Inbox()
    fragile.client.submit(greedy("before", prompt(0, 4)))
    inbox.wait_for_ends("before")
    fragile.faults.begin("stuck")
    fragile.client.submit(greedy("r", prompt(0, 4)))
    eventually(lambda: not fragile.client.is_alive())
    fragile.faults.end("stuck")
    assert inbox.wait_for_ends("r")["r"].reason is FinishReason.LENGTH
    eventually(fragile.client.is_alive)


def test_an_engine_whose_every_step_fails_is_not_alive(fragile: Started) -> None:
    fragile.receive = inbox = Inbox()
    fragile.faults.begin("failing")
    for number in range(MAX_FAILED_STEPS):
        assert fragile.client.is_alive()
        fragile.client.submit(greedy(f"r{number}", prompt(0, 4)))
        ended = inbox.wait_for_ends(f"r{number}")[f"r{number}"]
        assert ended.reason is FinishReason.ERROR
        assert isinstance(ended.error, FloraError)
    eventually(lambda: not fragile.client.is_alive())
    assert fragile.client.load().step_errors == MAX_FAILED_STEPS


def test_an_engine_that_dies_owes_nobody_an_answer(fragile: Started) -> None:
    fragile.receive = inbox = Inbox()
    fragile.client.submit(greedy("running", prompt(0, 4), version(1), max_tokens=60))
    fragile.faults.begin("broken")
    answers = inbox.wait_for_ends("running")
    assert answers["running"].reason is FinishReason.ERROR
    assert "bug" not in str(answers["running"].error)
    eventually(lambda: not fragile.client.is_alive())

    names = (f"late-{number}" for number in itertools.count())

    def is_refused() -> bool:
        name = next(names)
        try:
            fragile.client.submit(greedy(name, prompt(0, 4)))
        except OverloadedError:
            return True
        assert inbox.wait_for_ends(name)[name].reason is FinishReason.ERROR
        return False

    eventually(is_refused)
