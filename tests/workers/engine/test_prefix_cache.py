"""What was computed for one request serves the next of the same tenant and adapter version, and nobody else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storage.adapter_rows import AdapterRows
from storage.identity import AdapterSet, AdapterVersion
from tests.workers.engine.small_engine import (
    greedy,
    projections,
    prompt,
    random_adapter,
    run,
    small_engine,
    version,
)
from workers.engine import prefix_keys
from workers.engine.engine import Engine
from workers.engine.request import EngineRequest
from workers.models.hf import HfRunner
from workers.models.runner import StepInput

Shapes = dict[str, tuple[int, int]]
BLOCK = 4
PROMPT = prompt(3, 18)


@pytest.fixture(scope="module")
def adapters(tiny_llama_dir: Path) -> dict[AdapterVersion, AdapterRows]:
    shapes = projections(tiny_llama_dir)
    return {version(i): random_adapter(shapes, "flora", 2, seed=i, size=0.5) for i in (1, 2)}


def cached(engine: Engine, request: EngineRequest) -> tuple[int | None, list[int]]:
    """How many tokens of the prompt were not computed, and the answer."""
    answer = run(engine, [request])[request.request_id]
    assert engine.check_integrity()
    return answer.outputs[0].num_cached_tokens, answer.tokens


def engine_with(
    directory: Path, adapters: dict[AdapterVersion, AdapterRows], **changes: object
) -> Engine:
    return small_engine(directory, adapters, kv_block_tokens=BLOCK, **changes)


@pytest.mark.parametrize("runner", ["hf", "native"])
@pytest.mark.parametrize("user", [None, version(1)])
def test_a_prompt_seen_before_is_answered_alike_and_not_computed_again(
    tiny_llama_dir: Path,
    adapters: dict[AdapterVersion, AdapterRows],
    user: AdapterVersion | None,
    runner: str,
) -> None:
    plain = engine_with(tiny_llama_dir, adapters, runner=runner, prefix_cache=False)
    engine = engine_with(tiny_llama_dir, adapters, runner=runner)
    for length, expected in ((18, 0), (18, 16), (17, 16), (16, 12), (7, 4), (4, 0), (3, 0)):
        request = greedy("r", PROMPT[:length], user)
        assert cached(plain, request)[0] == 0
        assert cached(engine, request) == (expected, cached(plain, request)[1])
    longer = greedy("r", PROMPT + prompt(8, 9), user)
    assert cached(engine, longer) == (16, cached(plain, longer)[1])
    assert engine.load().prefix_tokens_reused == 16 + 16 + 12 + 4 + 16
    assert plain.load().prefix_tokens_reused == 0


def test_the_next_turn_of_a_conversation_reuses_the_answer(
    tiny_llama_dir: Path, adapters: dict[AdapterVersion, AdapterRows]
) -> None:
    engine = engine_with(tiny_llama_dir, adapters)
    first = cached(engine, greedy("r", PROMPT))[1]
    turn = greedy("r", (*PROMPT, *first, *prompt(5, 3)))
    # 18 + 12 tokens, of which the last was never computed.
    assert cached(engine, turn) == (28, cached(engine_with(tiny_llama_dir, adapters), turn)[1])


def strangers() -> list[EngineRequest]:
    """The same prompt by everybody who must not meet: two versions, the base, another tenant."""
    ours = greedy("ours", PROMPT, version(1))
    return [
        ours,
        replace(ours, request_id="other version", adapters=AdapterSet.of(version(2))),
        replace(ours, request_id="base", adapters=AdapterSet()),
        replace(ours, request_id="other tenant", tenant="other"),
    ]


def test_nothing_is_shared_between_adapters_versions_or_tenants(
    tiny_llama_dir: Path, adapters: dict[AdapterVersion, AdapterRows]
) -> None:
    engine = engine_with(tiny_llama_dir, adapters)
    answers = {}
    for request in strangers():
        reused, answers[request.request_id] = cached(engine, request)
        assert reused == 0, request.request_id
        alone = cached(engine_with(tiny_llama_dir, adapters), request)
        assert alone == (0, answers[request.request_id])
    assert len({tuple(tokens) for tokens in answers.values()}) == 3  # tenants share the adapter
    for request in strangers():
        assert cached(engine, request) == (16, answers[request.request_id])


def test_that_test_would_notice_a_key_without_the_adapter(
    tiny_llama_dir: Path,
    adapters: dict[AdapterVersion, AdapterRows],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = [cached(engine_with(tiny_llama_dir, adapters), one)[1] for one in strangers()]
    monkeypatch.setattr(prefix_keys, "canonical_json", lambda _: b"everybody")
    engine = engine_with(tiny_llama_dir, adapters)
    shared = [cached(engine, one) for one in strangers()]
    assert [reused for reused, _ in shared] == [0, 16, 16, 16]
    assert [tokens == wanted for (_, tokens), wanted in zip(shared, right, strict=True)] == [
        *(True, False, False, True)
    ]


def test_requests_that_run_together_share_what_one_of_them_has_computed(
    tiny_llama_dir: Path, adapters: dict[AdapterVersion, AdapterRows]
) -> None:
    """And each goes its own way behind it, in room for one and a half of them."""
    requests = [greedy(f"r{i}", (*PROMPT, i + 5), version(1), max_tokens=6) for i in range(6)]
    alone = [cached(engine_with(tiny_llama_dir, adapters), one)[1] for one in requests]
    engine = engine_with(tiny_llama_dir, adapters, kv_tokens=64)
    run(engine, requests[:1])
    together = run(engine, requests[1:])
    assert [together[one.request_id].tokens for one in requests[1:]] == alone[1:]
    assert all(one.outputs[0].num_cached_tokens == 16 for one in together.values())
    assert engine.load().preemptions == 0
    assert engine.check_integrity()


def test_a_prompt_whose_every_logit_is_wanted_is_computed_whole(
    tiny_llama_dir: Path, adapters: dict[AdapterVersion, AdapterRows]
) -> None:
    engine = engine_with(tiny_llama_dir, adapters)
    cached(engine, greedy("r", PROMPT))
    scored = greedy("r", PROMPT, logprobs=0, prompt_logprobs=0)
    answer = run(engine, [scored])["r"]
    assert answer.outputs[0].num_cached_tokens == 0
    assert len(answer.outputs[0].prompt_logprobs or ()) == len(PROMPT) - 1


def test_what_a_failed_step_half_wrote_is_never_found(
    tiny_llama_dir: Path,
    adapters: dict[AdapterVersion, AdapterRows],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = cached(engine_with(tiny_llama_dir, adapters), greedy("r", PROMPT))[1]
    engine = engine_with(tiny_llama_dir, adapters, max_step_tokens=20)
    forward, steps = HfRunner.forward, 0

    def stumbling(self: HfRunner, step: StepInput) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 2:  # which would have saved the first step's blocks
            raise RuntimeError("the device stumbled")
        return forward(self, step)

    monkeypatch.setattr(HfRunner, "forward", stumbling)
    answers = run(engine, [greedy("r", PROMPT), greedy("late", PROMPT)])
    assert [answers[name].error is not None for name in ("r", "late")] == [True, True]
    assert cached(engine, greedy("r", PROMPT)) == (0, expected)


def test_blocks_are_forgotten_least_recently_used_first(
    tiny_llama_dir: Path, adapters: dict[AdapterVersion, AdapterRows]
) -> None:
    engine = engine_with(tiny_llama_dir, adapters, kv_tokens=64, max_sequences=2)
    for seed in (1, 2):
        cached(engine, greedy("r", prompt(seed, 21), max_tokens=4))
    assert cached(engine, greedy("r", prompt(1, 21), max_tokens=4))[0] == 20
    cached(engine, greedy("r", prompt(3, 21), max_tokens=4))
    assert cached(engine, greedy("r", prompt(1, 21), max_tokens=4))[0] == 20
    assert cached(engine, greedy("r", prompt(2, 21), max_tokens=4))[0] == 16
