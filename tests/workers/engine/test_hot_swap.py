"""A new version of an adapter takes over while requests of the old one finish, and loads keep no step waiting."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from storage.identity import AdapterVersion
from tests.workers.engine.small_engine import (
    Answer,
    Fetched,
    Shelf,
    collect,
    greedy,
    projections,
    prompt,
    random_adapter,
    run,
    small_engine,
    version,
)
from workers.bank.books import BankBusyError

OLD, NEW, THIRD = version(1), version(2), version(3)


def test_a_new_version_serves_while_the_old_one_drains_and_then_makes_room(
    tiny_llama_dir: Path,
) -> None:
    shapes = projections(tiny_llama_dir)
    adapters = {one: random_adapter(shapes, "flora", 2, seed=int(one, 16)) for one in (OLD, NEW)}
    adapters[THIRD] = random_adapter(shapes, "flora", 2, seed=3)
    requests = {
        "old": greedy("old", prompt(5, 6), OLD, max_tokens=40),
        "new": greedy("new", prompt(5, 6), NEW, max_tokens=10),
    }
    alone = {
        name: run(small_engine(tiny_llama_dir, adapters), [request])[name].tokens
        for name, request in requests.items()
    }
    # Room for exactly two versions.
    engine = small_engine(tiny_llama_dir, adapters, bank_rows=4, bank_slots=2)
    answers: dict[str, Answer] = {}

    def step_until(name: str, num_tokens: int) -> None:
        while name not in answers or len(answers[name].tokens) < num_tokens:
            collect(answers, engine.step().outputs)

    engine.submit(requests["old"])
    step_until("old", 2)
    # The alias moves: from now on nobody asks for the old version, and the new one is pinned.
    engine.prefetch([NEW], frozenset([NEW]))
    engine.submit(requests["new"])
    step_until("new", 10)
    assert not answers["old"].is_over, "both were served together"
    with pytest.raises(BankBusyError):
        engine.bank.evict(OLD)
    step_until("old", 40)
    assert {name: answer.tokens for name, answer in answers.items()} == alone
    assert alone["old"][:10] != alone["new"]
    # Drained, the old version is the one to go.
    assert run(engine, [greedy("third", prompt(5, 6), THIRD)])["third"].error is None
    assert set(engine.bank.residents()) == {NEW, THIRD}
    assert engine.check_integrity()


def test_steps_go_on_while_an_adapter_loads_and_wait_for_nothing(tiny_llama_dir: Path) -> None:
    is_fetching, may_end = threading.Event(), threading.Event()

    class Slow(Shelf):
        def get(self, wanted: AdapterVersion) -> Fetched:
            is_fetching.set()
            assert may_end.wait(60)
            return super().get(wanted)

    rows = random_adapter(projections(tiny_llama_dir), "flora", 1, seed=1)
    engine = small_engine(tiny_llama_dir, Slow({OLD: rows}))
    engine.submit(greedy("cold", prompt(0, 4), OLD))
    engine.submit(greedy("base", prompt(0, 4), max_tokens=20))
    answers: dict[str, Answer] = {}
    while not answers.get("base", Answer()).is_over:
        collect(answers, engine.step().outputs)
    assert is_fetching.is_set()
    assert "cold" not in answers
    assert engine.load().load_wait_s == 0.0
    may_end.set()
    assert run(engine)["cold"].error is None
    engine.loader.stop()
