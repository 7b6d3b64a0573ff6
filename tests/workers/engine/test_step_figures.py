"""What an engine tells of its steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.workers.engine.small_engine import (
    Shelf,
    greedy,
    projections,
    prompt,
    random_adapter,
    run,
    small_engine,
    version,
)

NO_LABELS: tuple[str, ...] = ()


def test_steps_requests_tokens_and_adapters_add_up(tiny_llama_dir: Path) -> None:
    shapes = projections(tiny_llama_dir)
    shelf = Shelf({version(n): random_adapter(shapes, "flora", 2, seed=n) for n in (1, 2)})
    engine = small_engine(tiny_llama_dir, shelf)
    assert not engine.load().figures.histograms
    answers = run(
        engine,
        [
            greedy("base", prompt(1, 9)),
            replace(greedy("one", prompt(2, 9), version(1)), work_per_token=3.0),
            replace(greedy("two", prompt(3, 9), version(2)), work_per_token=3.0),
        ],
    )
    figures = engine.load().figures
    told = {name: histogram for (name, _), histogram in figures.histograms.items()}
    steps = told["flora_step_seconds"].count
    assert steps == told["flora_step_sequences"].count == told["flora_step_adapters"].count > 0
    assert 0 < told["flora_step_seconds"].total < 600
    assert told["flora_engine_first_token_seconds"].count == 3
    # Every token is computed once, but the last one of an answer, and an adapter's costs three times the base's.
    computed = {name: 9 + len(answer.tokens) - 1 for name, answer in answers.items()}
    work = computed["base"] + 3.0 * (computed["one"] + computed["two"])
    assert told["flora_step_rank_rows"].total == pytest.approx(work)
    assert figures.counters["flora_prefill_tokens_total", NO_LABELS] == 27
