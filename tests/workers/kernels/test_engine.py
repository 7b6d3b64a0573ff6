"""An engine as on a GPU, interpreted: kernels, pages, prefix cache. Its answers are the CPU engine's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.workers.engine.small_engine import (
    greedy,
    projections,
    prompt,
    random_adapter,
    run,
    small_engine,
    version,
)
from tests.workers.models.test_hf import tiny
from workers.attention import building
from workers.attention.pages import PagedAttention
from workers.models import hf
from workers.models.arithmetic import kernel_arithmetic


@pytest.mark.parametrize("runner", ["hf", "native"])
def test_requests_with_a_shared_prefix_are_answered_alike_on_pages(
    runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(LlamaConfig, torch.float32, num_hidden_layers=1).save_pretrained(tmp_path)
    shapes = projections(tmp_path)
    adapters = {
        version(1): random_adapter(shapes, "flora", 2, seed=1),
        version(2): random_adapter(shapes, "lora", 3, seed=2),
    }
    start = prompt(0, 18, 80)

    def answers() -> list[list[int]]:
        engine = small_engine(tmp_path, adapters, dtype="float32", runner=runner, kv_block_tokens=4)
        waves = [
            [("a", version(1)), ("b", version(2)), ("c", None)],
            [("d", version(1)), ("e", version(1)), ("f", version(2))],
        ]
        tokens = []
        for wave in waves:
            requests = [
                greedy(name, (*start, 3 + ord(name) % 7), adapter, 4) for name, adapter in wave
            ]
            found = run(engine, requests)
            tokens += [found[name].tokens for name, _ in wave]
        attention = engine.runner._attention  # type: ignore[attr-defined]
        assert isinstance(attention, PagedAttention) == building.uses_pages(engine.runner.device)
        return tokens

    wanted = answers()
    monkeypatch.setattr(hf, "choose_arithmetic", lambda *_, **__: kernel_arithmetic())
    monkeypatch.setattr(building, "uses_pages", lambda _: True)
    assert answers() == wanted
    assert len({tuple(one) for one in wanted}) > 3
