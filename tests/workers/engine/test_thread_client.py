"""The engine in a thread: every request is owed exactly one last output, whatever happens to it or to the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from storage.errors import ContextLengthError, InvalidRequestError, OverloadedError
from tests.workers.engine.small_engine import (
    Answer,
    collect,
    greedy,
    projections,
    prompt,
    random_adapter,
    run,
    small_engine,
    version,
)
from workers.engine.engine import Engine
from workers.engine.request import FinishReason, StepOutputs
from workers.engine.thread_client import MAX_FAILED_STEPS, ThreadEngineClient
from workers.models.hf import HfRunner
from workers.models.runner import StepInput

WITHIN_S = 60.0


class Inbox:
    """Collects answers from the engine's thread."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self._changed = threading.Condition()

    def __call__(self, step: StepOutputs) -> None:
        with self._changed:
            collect(self.answers, step.outputs)
            self._changed.notify_all()

    def wait(self, is_enough: Callable[[dict[str, Answer]], bool]) -> dict[str, Answer]:
        with self._changed:
            assert self._changed.wait_for(lambda: is_enough(self.answers), WITHIN_S), self.answers
            return dict(self.answers)

    def wait_for_ends(self, *names: str) -> dict[str, Answer]:
        return self.wait(
            lambda answers: all(name in answers and answers[name].is_over for name in names)
        )


def eventually(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.005)


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def engine(tiny_llama_dir: Path) -> Engine:
    shapes = projections(tiny_llama_dir)
    adapters = {version(i): random_adapter(shapes, "flora", i, seed=i) for i in (1, 2, 3)}
    return small_engine(tiny_llama_dir, adapters, bank_rows=4, max_sequences=3)


@pytest.fixture
def client(engine: Engine, inbox: Inbox) -> Iterator[ThreadEngineClient]:
    one = ThreadEngineClient(engine)
    one.start(inbox)
    yield one
    one.stop()


def test_requests_from_many_threads_are_all_answered_once(
    client: ThreadEngineClient, inbox: Inbox, engine: Engine
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
    client.stop()
    assert engine.check_integrity()
    assert engine.bank.references() == {}


def test_what_cannot_be_answered_is_refused_before_it_is_queued(client: ThreadEngineClient) -> None:
    with pytest.raises(ContextLengthError):
        client.submit(greedy("long", prompt(0, 60), max_tokens=20))
    client.submit(greedy("same", prompt(0, 4), max_tokens=50))
    with pytest.raises(InvalidRequestError, match="same is in use"):
        client.submit(greedy("same", prompt(0, 4)))


def test_a_request_id_is_free_again_once_answered(client: ThreadEngineClient, inbox: Inbox) -> None:
    client.submit(greedy("r", prompt(0, 4)))
    first = inbox.wait_for_ends("r")["r"]
    inbox.answers.clear()
    client.submit(greedy("r", prompt(0, 4)))
    assert inbox.wait_for_ends("r")["r"].tokens == first.tokens


def test_stopping_aborts_what_is_unfinished_and_takes_no_more(
    client: ThreadEngineClient, inbox: Inbox
) -> None:
    names = [f"r{i}" for i in range(6)]
    for name in names:
        client.submit(greedy(name, prompt(0, 4), version(1), max_tokens=50))
    client.stop()
    answers = inbox.wait_for_ends(*names)
    assert all(answer.reason is FinishReason.ABORT for answer in answers.values())
    assert not client.is_alive()
    with pytest.raises(OverloadedError):
        client.submit(greedy("late", prompt(0, 4)))
    client.stop()


def test_a_receiver_that_fails_stops_nobody_else(
    client: ThreadEngineClient, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = inbox.__call__
    is_first = True

    def failing(self: Inbox, step: StepOutputs) -> None:
        nonlocal is_first
        collected(step)
        if is_first:
            is_first = False
            raise RuntimeError("the receiver failed")

    monkeypatch.setattr(Inbox, "__call__", failing)
    client.submit(greedy("r", prompt(0, 4)))
    assert inbox.wait_for_ends("r")["r"].reason is FinishReason.LENGTH
    assert client.is_alive()


def test_a_stuck_step_is_noticed(
    engine: Engine, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = HfRunner.forward
    is_in_step, may_end = threading.Event(), threading.Event()

    def stuck(self: HfRunner, step: StepInput) -> torch.Tensor:
        is_in_step.set()
        assert may_end.wait(WITHIN_S)
        return forward(self, step)

    monkeypatch.setattr(HfRunner, "forward", stuck)
    now = 0.0
    client = ThreadEngineClient(engine, clock=lambda: now)
    client.start(inbox)
    try:
        client.submit(greedy("r", prompt(0, 4)))
        assert is_in_step.wait(WITHIN_S)
        now = engine.settings.step_timeout_s
        assert client.is_alive()
        now += 1
        assert not client.is_alive()
        may_end.set()
        inbox.wait_for_ends("r")
        eventually(client.is_alive)
    finally:
        may_end.set()
        client.stop()


def test_an_engine_whose_every_step_fails_is_not_alive(
    client: ThreadEngineClient, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: HfRunner, step: StepInput) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(HfRunner, "forward", failing)
    for number in range(MAX_FAILED_STEPS):
        assert client.is_alive()
        client.submit(greedy(f"r{number}", prompt(0, 4)))
        assert inbox.wait_for_ends(f"r{number}")[f"r{number}"].reason is FinishReason.ERROR
    assert not client.is_alive()
    assert client.load().step_errors == MAX_FAILED_STEPS


def test_an_engine_that_dies_owes_nobody_an_answer(
    client: ThreadEngineClient, inbox: Inbox, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.submit(greedy("running", prompt(0, 4), version(1), max_tokens=50))
    inbox.wait(lambda answers: "running" in answers)

    def broken(self: Engine) -> StepOutputs:
        raise KeyError("a bug")

    monkeypatch.setattr(Engine, "step", broken)
    answers = inbox.wait_for_ends("running")
    assert answers["running"].reason is FinishReason.ERROR
    assert "bug" not in str(answers["running"].error)
    eventually(lambda: not client.is_alive())
    with pytest.raises(OverloadedError):
        client.submit(greedy("late", prompt(0, 4)))


def test_prefetched_adapters_are_there_before_anybody_asks(
    client: ThreadEngineClient, inbox: Inbox
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


def test_a_client_answers_as_its_engine_does(
    client: ThreadEngineClient, inbox: Inbox, tiny_llama_dir: Path
) -> None:
    client.submit(greedy("r", prompt(4, 6)))
    alone = run(small_engine(tiny_llama_dir), [greedy("r", prompt(4, 6))])["r"]
    assert inbox.wait_for_ends("r")["r"].tokens == alone.tokens
