"""What only the engine in a thread shows: its engine's books, and a clock of one's own."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.workers.engine.small_engine import (
    greedy,
    projections,
    prompt,
    random_adapter,
    small_engine,
    version,
)
from tests.workers.engine.transports import WITHIN_S, Inbox, eventually
from workers.engine.engine import Engine
from workers.engine.request import StepOutputs
from workers.engine.thread_client import ThreadEngineClient


@pytest.fixture
def engine(tiny_llama_dir: Path) -> Engine:
    shapes = projections(tiny_llama_dir)
    adapters = {version(i): random_adapter(shapes, "flora", i, seed=i) for i in (1, 2, 3)}
    return small_engine(tiny_llama_dir, adapters, bank_rows=4, max_sequences=3)


def test_after_a_stop_the_books_balance(engine: Engine) -> None:
    inbox = Inbox()
    client = ThreadEngineClient(engine)
    client.start(inbox)
    names = [f"r{number}" for number in range(8)]
    for number, name in enumerate(names):
        client.submit(greedy(name, prompt(number, 4), version(1 + number % 3), max_tokens=50))
    inbox.wait_for_ends(names[0])
    client.stop()
    inbox.wait_for_ends(*names)
    assert engine.check_integrity()
    assert engine.bank.references() == {}


def test_a_step_is_stuck_once_it_takes_longer_than_the_settings_say(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step
    is_in_step, may_end = threading.Event(), threading.Event()

    def stuck(self: Engine) -> StepOutputs:
        is_in_step.set()
        assert may_end.wait(WITHIN_S)
        return step(self)

    monkeypatch.setattr(Engine, "step", stuck)
    now = 0.0
    inbox = Inbox()
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
