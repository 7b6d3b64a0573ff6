"""A request's answer does not depend on who else is in the batch: base and adapters of every family, in every mix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from storage.adapter_rows import AdapterRows
from storage.identity import AdapterVersion
from tests.workers.engine.small_engine import (
    greedy,
    projections,
    prompt,
    random_adapter,
    run,
    small_engine,
    version,
)
from workers.engine.request import EngineRequest
from workers.engine.sampling.greedy import Greatest
from workers.engine.sampling.row import SampledToken, SamplingRow
from workers.engine.sampling.sampler import sample

Shapes = dict[str, tuple[int, int]]


def mixed_adapters(shapes: Shapes) -> dict[AdapterVersion, AdapterRows]:
    """FLoRA of ranks 1 to 8 with offset 1 and 0, every other family, ranks and families that differ per module."""
    made = [random_adapter(shapes, "flora", rank, seed=rank) for rank in (1, 2, 4, 8)]
    made += [random_adapter(shapes, "flora0", rank, seed=10 + rank) for rank in (1, 3)]
    made.append(random_adapter(shapes, "flora", lambda i: 1 + i % 5, seed=20))
    made.append(random_adapter(shapes, lambda i: ("flora", "lora", "untouched")[i % 3], 3, seed=21))
    made += [random_adapter(shapes, "lora", rank, seed=30 + rank) for rank in (1, 8)]
    made.append(random_adapter(shapes, "dora", lambda i: 1 + i % 4, seed=40))
    made.append(random_adapter(shapes, lambda i: ("ia3_out", "ia3_in")[i % 2], 1, seed=41, size=1))
    made.append(random_adapter(shapes, lambda i: ("lora+bias", "own_bias")[i % 2], 2, seed=42))
    return {version(i): rows for i, rows in enumerate(made)}


def mixed_requests(
    adapters: dict[AdapterVersion, AdapterRows], vocabulary: int, max_tokens: int
) -> list[EngineRequest]:
    """Base and adapters in turn, prompts of all lengths; several requests share an adapter."""
    users = [None, *adapters, None, version(0), version(3)]
    return [
        greedy(f"r{i}", prompt(i, 3 + (5 * i) % 17, vocabulary), user, max_tokens)
        for i, user in enumerate(users)
    ]


@pytest.fixture(scope="module")
def shapes(tiny_llama_dir: Path) -> Shapes:
    return projections(tiny_llama_dir)


@pytest.fixture(params=["hf", "native"])
def runner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_base_answers_are_those_of_transformers_generate(tiny_llama_dir: Path, runner: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64).eval()
    requests = [greedy(f"r{i}", prompt(i, 2 + 3 * i)) for i in range(6)]
    expected = {}
    for request in requests:
        ids = torch.tensor([request.prompt_token_ids])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected[request.request_id] = made[0, ids.shape[1] :].tolist()
    answers = run(small_engine(tiny_llama_dir, runner=runner), requests)
    assert {name: answer.tokens for name, answer in answers.items()} == expected
    assert len({tuple(tokens) for tokens in expected.values()}) > 1


def test_answers_are_the_same_alone_and_in_a_mixed_batch(
    tiny_llama_dir: Path, shapes: Shapes, runner: str
) -> None:
    adapters = mixed_adapters(shapes)
    requests = mixed_requests(adapters, 300, max_tokens=12)
    engine = small_engine(tiny_llama_dir, adapters, runner=runner)
    alone = {}
    for request in requests:
        alone |= run(engine, [request])
    together = run(engine, requests)
    assert {name: one.tokens for name, one in together.items()} == {
        name: one.tokens for name, one in alone.items()
    }
    assert engine.check_integrity()


def test_the_mixed_batch_test_would_notice_a_dropped_or_a_swapped_adapter(
    tiny_llama_dir: Path, shapes: Shapes, runner: str
) -> None:
    """The twin: without its adapter, or with its neighbour's, every request is answered otherwise."""
    adapters = mixed_adapters(shapes)
    requests = [one for one in mixed_requests(adapters, 300, 12) if not one.adapters.is_base]
    right = run(small_engine(tiny_llama_dir, adapters, runner=runner), requests)
    names = list(adapters)
    swapped = {one: adapters[names[i - 1]] for i, one in enumerate(names)}
    for wrong_rows in (dict.fromkeys(names, AdapterRows()), swapped):
        wrong = run(small_engine(tiny_llama_dir, wrong_rows, runner=runner), requests)
        for name in right:
            assert wrong[name].tokens != right[name].tokens


def test_prompts_cut_into_chunks_beside_decoding_requests_change_nothing(
    tiny_llama_dir: Path, shapes: Shapes, runner: str
) -> None:
    adapters = mixed_adapters(shapes)
    requests = mixed_requests(adapters, 300, max_tokens=8)
    whole = run(
        small_engine(tiny_llama_dir, adapters, runner=runner, max_step_tokens=512), requests
    )
    cut = run(
        small_engine(tiny_llama_dir, adapters, runner=runner, max_sequences=5, max_step_tokens=7),
        requests,
    )
    assert {name: one.tokens for name, one in cut.items()} == {
        name: one.tokens for name, one in whole.items()
    }


def test_a_real_model_answers_the_same_alone_and_mixed(
    smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    """Float32: the same up to the first position where two tokens are closer than the arithmetic can tell."""
    gaps: list[float] = []

    def watched(
        logits_LV: torch.Tensor, rows: Sequence[SamplingRow], greatest: Greatest
    ) -> list[SampledToken | None]:
        best = logits_LV.topk(2, dim=1).values
        gaps.extend((best[:, 0] - best[:, 1]).tolist())
        return sample(logits_LV, rows, greatest)

    monkeypatch.setattr("workers.engine.engine.sample", watched)
    shapes = projections(smollm2_dir)
    made = [
        random_adapter(shapes, "flora", 1, seed=1, size=0.05),
        random_adapter(shapes, "flora", lambda i: 1 + i % 3, seed=2, size=0.05),
        random_adapter(shapes, "flora0", 1, seed=3, size=0.05),
        random_adapter(shapes, "lora", 2, seed=4, size=0.02),
    ]
    adapters = {version(i): rows for i, rows in enumerate(made)}
    users = [None, *adapters, None]
    requests = [
        greedy(f"r{i}", prompt(i, 6 + 5 * i, 49000), user, max_tokens=8)
        for i, user in enumerate(users)
    ]
    engine = small_engine(smollm2_dir, adapters, dtype="float32", runner=runner)
    alone = {}
    sure = {}
    for request in requests:
        gaps.clear()
        alone |= run(engine, [request])
        sure[request.request_id] = next((i for i, gap in enumerate(gaps) if gap < 1e-5), len(gaps))
    together = run(engine, requests)
    for name, length in sure.items():
        assert length >= 1
        assert together[name].tokens[:length] == alone[name].tokens[:length]
    assert len({tuple(one.tokens) for one in alone.values()}) == len(requests)
