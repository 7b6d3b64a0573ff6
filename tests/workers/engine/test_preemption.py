"""When KV blocks run out, requests wait for one another; what they answer stays the same, and all are answered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from storage.adapter_rows import AdapterRows
from storage.errors import ContextLengthError
from storage.identity import AdapterSet, AdapterVersion
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
from workers.engine.request import EngineRequest, FinishReason, SamplingParams

BLOCK = 4


@pytest.fixture(scope="module")
def adapters(tiny_llama_dir: Path) -> dict[AdapterVersion, AdapterRows]:
    shapes = projections(tiny_llama_dir)
    return {
        version(i): random_adapter(shapes, family, 2, seed=i)
        for i, family in enumerate(("flora", "lora"))
    }


def requests() -> list[EngineRequest]:
    """Sampled, not greedy: a draw that depended on when a token was computed would show."""
    users = [None, version(0), version(1)]
    return [
        EngineRequest(
            f"r{i}",
            prompt(i, 5 + 3 * (i % 4)),
            SamplingParams(max_tokens=20, temperature=0.9, seed=i, ignore_eos=True),
            AdapterSet.of(users[i % 3]),
        )
        for i in range(9)
    ]


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_answers_are_the_same_with_room_for_one_and_a_half(
    tiny_llama_dir: Path, adapters: dict[AdapterVersion, AdapterRows], prefix_cache: bool
) -> None:
    roomy = run(small_engine(tiny_llama_dir, adapters), requests())
    engine = small_engine(
        tiny_llama_dir, adapters, kv_block_tokens=BLOCK, kv_tokens=48, prefix_cache=prefix_cache
    )
    tight = run(engine, requests())
    assert {name: one.tokens for name, one in tight.items()} == {
        name: one.tokens for name, one in roomy.items()
    }
    load = engine.load()
    assert load.preemptions > 3
    assert (load.kv_blocks, load.kv_blocks_used) == (12, 0)
    assert engine.check_integrity()


def test_what_can_never_fit_is_refused_at_once(tiny_llama_dir: Path) -> None:
    engine = small_engine(tiny_llama_dir, kv_block_tokens=BLOCK, kv_tokens=20)
    with pytest.raises(ContextLengthError, match="context is 20 tokens"):
        engine.submit(greedy("r", prompt(0, 9), max_tokens=12))
    assert len(run(engine, [greedy("r", prompt(0, 9), max_tokens=11)])["r"].tokens) == 11
    assert engine.check_integrity()


def preempt_one(engine: Engine, **changes: float) -> dict[str, Answer]:
    """Two requests of which the second has answered a little and gave its blocks back."""
    answers: dict[str, Answer] = {}
    for name in ("early", "late"):
        request = greedy(name, prompt(0, 6), max_tokens=14)
        engine.submit(replace(request, **changes) if name == "late" else request)
    while not engine.load().preemptions:
        collect(answers, engine.step().outputs)
    assert 0 < len(answers["late"].tokens) < 14
    assert not answers["late"].is_over
    return answers


def test_a_preempted_request_can_be_aborted(tiny_llama_dir: Path) -> None:
    engine = small_engine(tiny_llama_dir, kv_block_tokens=BLOCK, kv_tokens=24, prefix_cache=False)
    answers = preempt_one(engine)
    engine.abort("late")
    collect(answers, engine.step().outputs)
    assert answers["late"].reason is FinishReason.ABORT
    assert engine.check_integrity()
    for name, one in run(engine).items():
        answers[name].outputs += one.outputs
    assert len(answers["early"].tokens) == 14
    assert engine.check_integrity()


def test_a_preempted_request_ends_at_its_deadline(tiny_llama_dir: Path) -> None:
    parts = small_engine(tiny_llama_dir, kv_block_tokens=BLOCK, kv_tokens=24, prefix_cache=False)
    now = 100.0
    engine = Engine(
        parts.runner,
        parts.bank,
        parts.loader,
        parts.settings,
        clock=lambda: now,
        wall_clock=lambda: now,
    )
    answers = preempt_one(engine, deadline_s=101.0)
    now = 101.0
    collect(answers, engine.step().outputs)
    assert answers["late"].reason is FinishReason.ABORT
    assert not answers["early"].is_over
    assert engine.check_integrity()
