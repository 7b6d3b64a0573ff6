"""Real requests beside a broken adapter: its own fail by name, and not one bit of the others' answers changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import AdapterRefusedError
from storage.identity import AdapterVersion
from tests.workers.engine.small_engine import (
    Answer,
    greedy,
    projections,
    prompt,
    random_adapter,
    run,
    small_engine,
    version,
)
from workers.engine.request import EngineRequest, FinishReason, TokenLogprobs

FAMILIES = ("flora", "flora0", "lora", "dora", "ia3_in", "ia3_out", "lora+bias")
BROKEN = version(99)


@pytest.fixture(scope="module")
def shapes(tiny_llama_dir: Path) -> dict[str, tuple[int, int]]:
    return projections(tiny_llama_dir)


@pytest.fixture(params=["hf", "native"])
def kind(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def healthy_adapters(shapes: dict[str, tuple[int, int]]) -> dict[AdapterVersion, AdapterRows]:
    return {
        version(i): random_adapter(shapes, family, 1 + i, seed=i)
        for i, family in enumerate(FAMILIES)
    }


def healthy_requests() -> list[EngineRequest]:
    users = [None, *(version(i) for i in range(len(FAMILIES)))]
    return [
        greedy(f"r{i}", prompt(i, 4 + i), user, max_tokens=6, logprobs=3)
        for i, user in enumerate(users)
    ]


def said(answer: Answer) -> tuple[list[int], list[TokenLogprobs]]:
    """Tokens, and their log-probabilities to the last bit."""
    assert answer.error is None
    return answer.tokens, [one for output in answer.outputs for one in output.new_logprobs]


def test_a_nan_is_refused_by_name_and_others_answers_are_the_same_to_the_bit(
    tiny_llama_dir: Path, shapes: dict[str, tuple[int, int]], kind: str
) -> None:
    sound = random_adapter(shapes, "flora", 2, seed=50)
    path = sorted(shapes)[3]
    b_RI = sound.modules[path].mul_b_RI
    assert b_RI is not None
    b_RI[1, 2] = float("nan")
    adapters = {**healthy_adapters(shapes), BROKEN: sound}
    engine = small_engine(tiny_llama_dir, adapters, dtype="float32", runner=kind)
    run(engine, healthy_requests())  # every adapter is resident from here on
    alone = run(engine, healthy_requests())
    bad = greedy("bad", prompt(7, 4), BROKEN)
    together = run(engine, [bad, *healthy_requests()])
    assert together["bad"].reason is FinishReason.ERROR
    assert together["bad"].tokens == []
    assert isinstance(together["bad"].error, AdapterRefusedError)
    assert path in str(together["bad"].error) and "not finite" in str(together["bad"].error)
    assert {name: said(together[name]) for name in alone} == {
        name: said(answer) for name, answer in alone.items()
    }
    assert engine.check_integrity()


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"dora"}))  # its length overflows
def test_weights_of_3e38_end_their_own_request_and_no_bit_of_others_changes(
    family: str, tiny_llama_dir: Path, shapes: dict[str, tuple[int, int]], kind: str
) -> None:
    """The twin run has a sound adapter of the same layout in the broken one's place, and ends after as many steps."""

    def answers(rows: AdapterRows) -> dict[str, Answer]:
        adapters = {**healthy_adapters(shapes), BROKEN: rows}
        # Without a prefix cache, the second run computes what the first did.
        engine = small_engine(
            tiny_llama_dir, adapters, dtype="float32", runner=kind, prefix_cache=False
        )
        one = greedy("one", prompt(7, 4), BROKEN, max_tokens=1)
        run(engine, [one, *healthy_requests()])
        found = run(engine, [one, *healthy_requests()])
        assert engine.check_integrity()
        return found

    sound = answers(random_adapter(shapes, family, 3, seed=50))
    broken = answers(spoilt(random_adapter(shapes, family, 3, seed=50)))
    assert sound.pop("one").error is None
    bad = broken.pop("one")
    assert isinstance(bad.error, AdapterRefusedError) and bad.tokens == []
    assert {name: said(answer) for name, answer in broken.items()} == {
        name: said(answer) for name, answer in sound.items()
    }


def spoilt(adapter: AdapterRows) -> AdapterRows:
    """The same layout with 3e38 everywhere, which publishing refuses and a bank's type can hold."""
    return AdapterRows(
        {
            path: ModuleRows(
                **{name: torch.full_like(one, 3e38) for name, one in rows.tensors().items()},  # type: ignore[arg-type]
                offset=rows.offset,
                add_gate=rows.add_gate,
            )
            for path, rows in adapter.modules.items()
        }
    )
