"""What becomes of a request: it is answered by its own adapter, or told why not, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import (
    AdapterRefusedError,
    BaseMismatchError,
    CapacityError,
    ContextLengthError,
    InvalidRequestError,
    UnknownModelError,
)
from storage.identity import AdapterSet, AdapterVersion
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
from workers.engine.engine import Engine
from workers.engine.request import EngineRequest, FinishReason, SamplingParams
from workers.models.hf import HfRunner
from workers.models.runner import StepInput

Shapes = dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def shapes(tiny_llama_dir: Path) -> Shapes:
    return projections(tiny_llama_dir)


def settle(engine: Engine) -> None:
    """Nothing is left of anybody."""
    engine.step()
    assert not engine.has_requests
    load = engine.load()
    assert (load.num_waiting, load.num_running, load.work, load.kv_slots_used) == (0, 0, 0, 0)
    assert engine.check_integrity()


# Ends of an answer.


def test_an_answer_ends_at_a_stop_token_which_is_not_part_of_it(tiny_llama_dir: Path) -> None:
    engine = small_engine(tiny_llama_dir)
    tokens = prompt(1, 5)
    whole = run(engine, [greedy("r", tokens)])["r"]
    assert whole.reason is FinishReason.LENGTH
    assert len(whole.tokens) == 12
    stop = whole.tokens[4]
    first = whole.tokens.index(stop)
    cut = run(engine, [greedy("r", tokens, stop_token_ids=frozenset({stop}))])["r"]
    assert (cut.reason, cut.tokens) == (FinishReason.STOP, whole.tokens[:first])
    late = run(engine, [greedy("r", tokens, stop_token_ids=frozenset({stop}), min_tokens=8)])["r"]
    assert len(late.tokens) >= 8
    assert stop not in late.tokens[:8]
    settle(engine)


def test_the_models_own_end_of_answer_counts_unless_ignored(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    whole = run(small_engine(tiny_llama_dir), [greedy("r", prompt(1, 5))])["r"].tokens
    directory = tmp_path / "talkative"
    shutil.copytree(tiny_llama_dir, directory)
    # As many chat models: the generation settings name more ends than the model's configuration.
    ends = json.dumps({"eos_token_id": [0, whole[5]]})
    (directory / "generation_config.json").write_text(ends)
    engine = small_engine(directory)
    ended = run(engine, [EngineRequest("r", prompt(1, 5), SamplingParams(12, temperature=0.0))])
    assert ended["r"].reason is FinishReason.STOP
    assert ended["r"].tokens == whole[: whole.index(whole[5])]
    assert run(engine, [greedy("r", prompt(1, 5))])["r"].tokens == whole


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (greedy("r", ()), InvalidRequestError, "prompt is empty"),
        (greedy("r", (5, 100_000)), InvalidRequestError, "token 100000"),
        (greedy("r", (5, -1)), InvalidRequestError, "token -1"),
        (
            greedy("r", (5,), stop_token_ids=frozenset({100_000})),
            InvalidRequestError,
            "100000 is no token",
        ),
        (greedy("r", (5,) * 60, max_tokens=5), ContextLengthError, "context is 64 tokens"),
    ],
)
def test_what_can_never_be_answered_is_refused_at_once(
    tiny_llama_dir: Path, request_: EngineRequest, error: type[Exception], message: str
) -> None:
    engine = small_engine(tiny_llama_dir)
    with pytest.raises(error, match=message):
        engine.submit(request_)
    settle(engine)


def test_prompt_and_answer_may_fill_the_context_to_the_last_token(tiny_llama_dir: Path) -> None:
    engine = small_engine(tiny_llama_dir)
    assert len(run(engine, [greedy("r", prompt(0, 59), max_tokens=5)])["r"].tokens) == 5
    settle(engine)


# Sampling.


def test_sampled_answers_are_the_same_alone_and_in_any_batch(
    tiny_llama_dir: Path, shapes: Shapes
) -> None:
    adapters = {
        version(i): random_adapter(shapes, family, 2, seed=i)
        for i, family in enumerate(("flora", "lora"))
    }
    engine = small_engine(tiny_llama_dir, adapters)
    requests = [
        EngineRequest(
            f"r{i}",
            prompt(i % 3, 4 + i),
            SamplingParams(max_tokens=10, temperature=0.9, top_p=0.95, top_k=i * 10, seed=i),
            AdapterSet.of(user),
        )
        for i, user in enumerate([None, version(0), version(1), None, version(0)])
    ]
    alone: dict[str, Answer] = {}
    for request in requests:
        alone |= run(engine, [request])
    together = run(engine, reversed(requests))
    assert {name: one.tokens for name, one in together.items()} == {
        name: one.tokens for name, one in alone.items()
    }
    other_seed = EngineRequest(
        "r0", requests[0].prompt_token_ids, SamplingParams(max_tokens=10, temperature=0.9, seed=99)
    )
    assert run(engine, [other_seed])["r0"].tokens != alone["r0"].tokens


# Adapters that come, and that do not.


def test_the_first_output_tells_where_the_adapter_came_from(
    tiny_llama_dir: Path, shapes: Shapes
) -> None:
    engine = small_engine(tiny_llama_dir, {version(1): random_adapter(shapes, "flora", 1, seed=1)})
    cold = run(engine, [greedy("r", prompt(0, 4), version(1)), greedy("base", prompt(0, 4))])
    warm = run(engine, [greedy("r", prompt(0, 4), version(1))])
    assert [one.adapter_tier for one in cold["r"].outputs] == ["host"] + [None] * 11
    assert warm["r"].outputs[0].adapter_tier == "device"
    assert cold["base"].outputs[0].adapter_tier is None
    assert cold["r"].outputs[0].queue_time_s is not None
    assert cold["r"].outputs[1].queue_time_s is None
    assert cold["r"].outputs[0].adapters == AdapterSet.of(version(1))


def test_a_cold_adapter_never_stops_those_behind_it(tiny_llama_dir: Path, shapes: Shapes) -> None:
    may_go_on = threading.Event()
    rows = random_adapter(shapes, "flora", 1, seed=1)

    class Slow(Shelf):
        def get(self, wanted: AdapterVersion) -> Fetched:
            assert may_go_on.wait(60)
            return super().get(wanted)

    engine = small_engine(tiny_llama_dir, Slow({version(1): rows}), max_sequences=1)
    engine.submit(greedy("cold", prompt(0, 4), version(1)))
    answers: dict[str, Answer] = {}
    for name in ("first", "second"):
        engine.submit(greedy(name, prompt(1, 4)))
        for _ in range(13):
            collect(answers, engine.step().outputs)
        assert answers[name].is_over
    assert "cold" not in answers
    may_go_on.set()
    assert len(run(engine)["cold"].tokens) == 12
    settle(engine)


def test_a_bank_too_small_for_all_adapters_serves_them_all(
    tiny_llama_dir: Path, shapes: Shapes
) -> None:
    adapters = {version(i): random_adapter(shapes, "flora", 1 + i % 3, seed=i) for i in range(8)}
    requests = [greedy(f"r{i}", prompt(i, 4), version(i % 8), max_tokens=4) for i in range(24)]
    roomy = run(small_engine(tiny_llama_dir, adapters), requests)
    engine = small_engine(tiny_llama_dir, adapters, bank_rows=4, bank_slots=3, max_sequences=3)
    tight = run(engine, requests)
    assert {name: one.tokens for name, one in tight.items()} == {
        name: one.tokens for name, one in roomy.items()
    }
    assert engine.load().evictions > 0
    assert engine.load().bank_rows_used <= 4
    settle(engine)


def test_an_adapter_that_cannot_be_loaded_is_an_error_and_never_the_base(
    tiny_llama_dir: Path, shapes: Shapes
) -> None:
    not_finite = random_adapter(shapes, "flora", 1, seed=1)
    path = next(iter(shapes))
    broken = ModuleRows(
        mul_a_RO=torch.full_like(not_finite.modules[path].mul_a_RO, torch.nan),  # type: ignore[arg-type]
        mul_b_RI=not_finite.modules[path].mul_b_RI,
    )
    unbound = random_adapter(shapes, "flora", 1, seed=2)
    adapters: dict[AdapterVersion, AdapterRows | Exception] = {
        version(0): random_adapter(shapes, "lora", 2, seed=0),
        version(1): AdapterRows({**not_finite.modules, path: broken}),
        version(2): UnknownModelError("the model gone does not exist", param="model"),
        version(3): random_adapter(shapes, "flora", 65, seed=3),
        version(4): AdapterRows(unbound.modules, base_digest="f" * 64),
        version(5): OSError("disk gone"),
    }
    expected = {
        1: (AdapterRefusedError, "not finite"),
        2: (UnknownModelError, "does not exist"),
        3: (CapacityError, "the bank holds 64"),
        4: (BaseMismatchError, "made for the base model ffffffffffff"),
        5: (OSError, "disk gone"),
    }
    engine = small_engine(tiny_llama_dir, adapters)
    healthy = [greedy("base", prompt(9, 4)), greedy("r0", prompt(9, 4), version(0))]
    alone = run(engine, healthy)
    bad = [greedy(f"r{i}", prompt(9, 4), version(i)) for i in expected]
    answers = run(engine, [bad[0], healthy[0], *bad[1:3], healthy[1], *bad[3:]])
    for number, (kind, message) in expected.items():
        answer = answers[f"r{number}"]
        assert answer.reason is FinishReason.ERROR
        assert answer.tokens == []
        assert isinstance(answer.error, kind)
        assert message in str(answer.error)
    for name in ("base", "r0"):
        assert answers[name].tokens == alone[name].tokens
    settle(engine)


def test_an_adapter_whose_output_is_not_finite_ends_its_own_requests_only(
    tiny_llama_dir: Path, shapes: Shapes
) -> None:
    adapters = {
        version(0): random_adapter(shapes, "flora", 2, seed=0),
        version(1): random_adapter(shapes, "flora", 2, seed=1, size=3e38),
    }
    engine = small_engine(tiny_llama_dir, adapters, dtype="float32")
    healthy = [greedy(f"r{i}", prompt(i, 4), user) for i, user in enumerate([None, version(0)])]
    alone = run(engine, healthy)
    answers = run(engine, [healthy[0], greedy("bad", prompt(7, 4), version(1)), healthy[1]])
    assert answers["bad"].reason is FinishReason.ERROR
    assert isinstance(answers["bad"].error, AdapterRefusedError)
    assert answers["bad"].tokens == []
    for name in alone:
        assert answers[name].tokens == alone[name].tokens
    # Whoever gets the broken one's KV slot next reads nothing of it.
    again = run(engine, [*healthy, greedy("third", prompt(0, 4))])
    assert again["third"].tokens == alone["r0"].tokens
    settle(engine)


def test_a_crowd_on_one_adapter_does_not_keep_others_out_for_ever(
    tiny_llama_dir: Path, shapes: Shapes
) -> None:
    """The bank holds one of the two; new requests for the first never stop coming."""
    adapters = {version(i): random_adapter(shapes, "flora", 2, seed=i) for i in (1, 2)}
    engine = small_engine(tiny_llama_dir, adapters, bank_rows=2, max_sequences=2, starvation_s=0.05)
    answers = run(engine, [greedy("crowd-0", prompt(0, 4), version(1))])
    crowd = 1
    end_s = time.monotonic() + 30
    while "rare" not in answers or not answers["rare"].is_over:
        assert time.monotonic() < end_s, "still waiting"
        while engine.load().num_waiting < 4:
            engine.submit(greedy(f"crowd-{crowd}", prompt(0, 4), version(1)))
            crowd += 1
            if crowd == 6:
                engine.submit(greedy("rare", prompt(0, 4), version(2), max_tokens=3))
        collect(answers, engine.step().outputs)
    assert len(answers["rare"].tokens) == 3
    assert all(one.error is None for one in answers.values())


def test_a_pinned_replica_still_answers_for_another_adapter(
    tiny_llama_dir: Path, shapes: Shapes
) -> None:
    adapters = {version(i): random_adapter(shapes, "flora", 2, seed=i) for i in (1, 2)}
    engine = small_engine(tiny_llama_dir, adapters, bank_rows=2, starvation_s=0.05)
    engine.prefetch([version(1)], frozenset([version(1)]))
    run(engine, [greedy("r", prompt(0, 4), version(1))])
    assert len(run(engine, [greedy("r", prompt(0, 4), version(2))])["r"].tokens) == 12
    settle(engine)


# Leaving early.


def test_an_abort_frees_kv_slot_and_adapter_within_one_step(
    tiny_llama_dir: Path, shapes: Shapes
) -> None:
    adapters = {version(1): random_adapter(shapes, "flora", 2, seed=1)}
    engine = small_engine(tiny_llama_dir, adapters, max_sequences=1)
    run(engine, [greedy("warm", prompt(0, 4), version(1))])
    engine.submit(greedy("running", prompt(0, 4), version(1)))
    engine.submit(greedy("waiting", prompt(0, 4), version(1)))
    engine.step()
    assert engine.bank.references() == {version(1): 2}
    engine.abort("running")
    outputs = engine.step().outputs
    assert [(one.request_id, one.finish_reason) for one in outputs] == [
        ("running", FinishReason.ABORT),
        ("waiting", None),  # it has the slot already
    ]
    engine.abort("waiting")
    engine.abort("nobody")
    assert [one.finish_reason for one in engine.step().outputs] == [FinishReason.ABORT]
    assert engine.bank.references() == {}
    settle(engine)


def test_a_deadline_ends_a_request_wherever_it_is(tiny_llama_dir: Path) -> None:
    parts = small_engine(tiny_llama_dir, max_sequences=1)
    now = 1000.0
    engine = Engine(
        parts.runner,
        parts.bank,
        parts.loader,
        parts.settings,
        clock=lambda: now - 900,
        wall_clock=lambda: now,
    )

    def due(name: str, deadline_s: float | None) -> EngineRequest:
        return EngineRequest(
            name, prompt(0, 4), SamplingParams(max_tokens=20), deadline_s=deadline_s
        )

    for request in (due("running", 1005.0), due("waiting", 1001.0), due("patient", None)):
        engine.submit(request)
    assert [one.request_id for one in engine.step().outputs] == ["running"]
    now = 1002.0
    ended = [one.request_id for one in engine.step().outputs if one.finish_reason]
    assert ended == ["waiting"]
    now = 1005.0
    outputs = engine.step().outputs
    assert [(one.request_id, one.finish_reason) for one in outputs] == [
        ("running", FinishReason.ABORT),
        ("patient", None),
    ]


def test_a_step_that_fails_ends_its_requests_and_no_others(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(tiny_llama_dir, max_sequences=2)
    expected = run(engine, [greedy("later", prompt(5, 4))])["later"].tokens
    forward = HfRunner.forward
    fails = True

    def stumbling(self: HfRunner, step: StepInput) -> torch.Tensor:
        logits_LV = forward(self, step)
        if fails:
            raise RuntimeError("the device stumbled")
        return logits_LV

    monkeypatch.setattr(HfRunner, "forward", stumbling)
    for name in ("a", "b", "later"):
        engine.submit(greedy(name, prompt(5, 4)))
    outputs = engine.step().outputs
    assert {(one.request_id, one.finish_reason) for one in outputs} == {
        ("a", FinishReason.ERROR),
        ("b", FinishReason.ERROR),
    }
    assert all("stumbled" not in str(one.error) for one in outputs)
    assert (engine.load().step_errors, engine.failed_steps_in_a_row) == (1, 1)
    fails = False
    assert run(engine)["later"].tokens == expected
    assert engine.failed_steps_in_a_row == 0
    settle(engine)


def test_load_counts_what_is_left_to_do(tiny_llama_dir: Path) -> None:
    engine = small_engine(tiny_llama_dir, max_sequences=1)
    for name in ("a", "b"):
        engine.submit(
            EngineRequest(name, prompt(0, 4), SamplingParams(max_tokens=6), work_per_token=3.0)
        )
    assert engine.load().work == engine.load().queued_work == 2 * (4 + 6) * 3
    assert engine.load().kv_used == 0.0 == engine.load().first_token_p99_s
    engine.step()
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.kv_slots_used) == (1, 1, 1)
    # Four prompt tokens computed and one made, which is still to be fed back.
    assert load.work == 2 * (4 + 6) * 3 - 4 * 3
    assert load.queued_work == (4 + 6) * 3
    assert 0.0 < load.kv_used <= 1.0 and load.first_token_p99_s > 0.0
    assert load.tokens_out == 1
