"""PEFT as the oracle: adapters it wrote give its logits here, mixed in one step; adapters we write give ours there.

Every adapter tensor is random, and each adapter moves the logits by far more than the tolerance: the twin tests show
that an adapter dropped, or taken for its neighbour's, is noticed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftConfig
from torch import Tensor

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.formats.peft import read_peft
from storage.formats.writing import write_flora
from storage.identity import AdapterVersion
from tests.storage.peft_adapters import (
    ALL_LINEAR,
    HIRA,
    HIRA_PATTERN,
    LORA,
    RSLORA_PATTERNS,
    loaded,
    random_adapter,
    tiny_llama,
)
from tests.workers.models.small_runner import SmallRunner
from tests.workers.row_form.mixed_layers import random_rows

CONFIGS: dict[str, PeftConfig] = {
    "lora": LORA,
    "rslora": LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=["v_proj", "up_proj"]),
    "rslora-patterns": RSLORA_PATTERNS,
    "hira": HIRA,
    "hira-pattern": HIRA_PATTERN,
    "hira-all": HiraConfig(r=2, target_modules=ALL_LINEAR),
}


def version(number: int) -> AdapterVersion:
    return AdapterVersion(f"{number:064x}")


def prompt(seed: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 48, (length,), generator=generator)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a logit, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[AdapterRows, Tensor]]:
    """By configuration: the rows we read, and PEFT's own logits for the prompt of its number."""
    made = {}
    for number, (name, config) in enumerate(CONFIGS.items()):
        model, files = random_adapter(config, tmp_path_factory.mktemp(name))
        with torch.no_grad():
            logits_TV = model.eval()(prompt(number, 9 + number)[None]).logits[0]
        made[name] = (read_peft(files).rows, logits_TV)
    return made


def ours(rows: list[AdapterRows]) -> list[Tensor]:
    """All prompts in one mixed step, the i-th with the i-th adapter."""
    runner = SmallRunner(tiny_llama())
    runner.load({version(i): one for i, one in enumerate(rows)})
    return runner.prompts([(prompt(i, 9 + i), version(i)) for i in range(len(rows))])


def test_adapters_written_by_peft_give_its_logits_in_one_mixed_step(
    oracle: dict[str, tuple[AdapterRows, Tensor]],
) -> None:
    found = ours([rows for rows, _ in oracle.values()])
    for (name, (_, expected)), logits in zip(oracle.items(), found, strict=True):
        assert distance(logits, expected) < 1e-4, name


def test_a_dropped_or_swapped_adapter_does_not_give_its_logits(
    oracle: dict[str, tuple[AdapterRows, Tensor]],
) -> None:
    rows = [rows for rows, _ in oracle.values()]
    dropped = ours([AdapterRows()] * len(rows))
    swapped = ours([*rows[1:], rows[0]])
    for (name, (_, expected)), base, other in zip(oracle.items(), dropped, swapped, strict=True):
        spread = float(expected.std())
        assert float((expected - base).std()) >= 0.1 * spread, name
        assert distance(base, expected) > 1e-2, name
        assert distance(other, expected) > 1e-2, name


def _flora(offset: int, seed: int) -> AdapterRows:
    """Random FLoRA rows of ranks that differ from module to module."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SmallRunner(tiny_llama()).runner.shape.projections
    modules: dict[str, ModuleRows] = {}
    for number, (path, (num_in, num_out)) in enumerate(shapes.items()):
        family = "flora" if offset else "flora0"
        rows = random_rows(family, 1 + number % 4, num_in, num_out, 0.3, generator)
        assert rows is not None
        modules[path] = rows
    return AdapterRows(modules)


@pytest.mark.parametrize("offset", [0, 1])
def test_an_adapter_we_write_gives_our_logits_in_peft(offset: int, tmp_path: Path) -> None:
    mine, neighbour = _flora(offset, seed=1), _flora(offset, seed=2)
    (found,) = ours([mine])
    with torch.no_grad():
        model = loaded(write_flora(mine, "tiny"), tmp_path)
        expected = model(prompt(0, 9)[None]).logits[0]
    assert distance(found, expected) < 1e-4
    runner = SmallRunner(tiny_llama())
    runner.load({version(0): neighbour})
    swapped, dropped = runner.prompts([(prompt(0, 9), version(0)), (prompt(0, 9), None)])
    assert distance(swapped, expected) > 1e-2
    assert distance(dropped, expected) > 1e-2
