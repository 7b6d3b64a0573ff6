"""PEFT as the oracle: adapters it wrote give its logits here, mixed in one step; adapters we write give ours there.

Every adapter tensor is random, and each adapter moves the logits by far more than the tolerance: the twin tests show
that an adapter dropped, or taken for its neighbour's, is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftConfig
from torch import Tensor
from transformers import PreTrainedModel

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.formats.peft import read_peft
from storage.formats.writing import write_flora
from storage.identity import AdapterVersion
from tests.storage.peft_adapters import (
    ALL_LINEAR,
    BIAS_ALL,
    BIAS_LORA_ONLY,
    DORA,
    DORA_BIAS,
    DORA_PATTERNS,
    HIRA,
    HIRA_PATTERN,
    IA3,
    IA3_EXPRESSION,
    LORA,
    LORA_BIAS,
    RSLORA_PATTERNS,
    loaded,
    random_adapter,
    tiny_llama,
    tiny_qwen2,
)
from tests.workers.models.small_runner import RUNNERS, SmallRunner
from tests.workers.row_form.mixed_layers import random_rows

CONFIGS: dict[str, PeftConfig] = {
    "lora": LORA,
    "rslora": LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=["v_proj", "up_proj"]),
    "rslora-patterns": RSLORA_PATTERNS,
    "lora-bias": LORA_BIAS,
    "bias-lora-only": BIAS_LORA_ONLY,
    "bias-all": BIAS_ALL,
    "dora": DORA,
    "dora-patterns": DORA_PATTERNS,
    "dora-bias": DORA_BIAS,
    "ia3": IA3,
    "ia3-expression": IA3_EXPRESSION,
    "hira": HIRA,
    "hira-pattern": HIRA_PATTERN,
    "hira-all": HiraConfig(r=2, target_modules=ALL_LINEAR),
}
BASES: dict[str, Callable[[torch.dtype], PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
}


def version(number: int) -> AdapterVersion:
    return AdapterVersion(f"{number:064x}")


def prompt(seed: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 48, (length,), generator=generator)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a logit, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class Oracle:
    """A base, adapters that PEFT wrote for it, and PEFT's own logits: the i-th for the i-th prompt."""

    base: Callable[[], PreTrainedModel]
    rows: dict[str, AdapterRows]
    logits: dict[str, Tensor]
    base_logits: Tensor  # without an adapter, for the prompt after the last

    def ours(self, rows: list[AdapterRows], kind: str) -> list[Tensor]:
        """All prompts in one mixed step, the i-th with the i-th adapter, and one with none at the end."""
        runner = SmallRunner(self.base(), kind=kind, num_slots=len(rows) + 1)
        runner.load({version(i): one for i, one in enumerate(rows)})
        count = len(rows)
        users = [*(version(i) for i in range(count)), None]
        return runner.prompts([(prompt(i, 9 + i), user) for i, user in enumerate(users)])


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture(params=RUNNERS)
def kind(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module", params=BASES)
def oracle(
    request: pytest.FixtureRequest,
    dtype: torch.dtype,
    tmp_path_factory: pytest.TempPathFactory,
) -> Oracle:
    make = BASES[request.param]
    rows, logits = {}, {}
    with torch.no_grad():
        for number, (name, config) in enumerate(CONFIGS.items()):
            directory = tmp_path_factory.mktemp(name)
            model, files = random_adapter(config, directory, dtype, make)
            logits[name] = model.eval()(prompt(number, 9 + number)[None]).logits[0]
            rows[name] = read_peft(files).rows
        base_logits = make(dtype)(prompt(len(CONFIGS), 9 + len(CONFIGS))[None]).logits[0]
    return Oracle(lambda: make(dtype), rows, logits, base_logits)


def test_adapters_written_by_peft_give_its_logits_in_one_mixed_step(
    oracle: Oracle, kind: str
) -> None:
    *found, base = oracle.ours(list(oracle.rows.values()), kind)
    for (name, expected), logits in zip(oracle.logits.items(), found, strict=True):
        assert distance(logits, expected) < 1e-4, name
    assert distance(base, oracle.base_logits) < 1e-4


def test_a_dropped_or_swapped_adapter_does_not_give_its_logits(oracle: Oracle, kind: str) -> None:
    rows = list(oracle.rows.values())
    *dropped, _ = oracle.ours([AdapterRows()] * len(rows), kind)
    *swapped, _ = oracle.ours([*rows[1:], rows[0]], kind)
    for (name, expected), base, other in zip(oracle.logits.items(), dropped, swapped, strict=True):
        assert float((expected - base).std()) >= 0.1 * float(expected.std()), name
        assert distance(base, expected) > 1e-2, name
        assert distance(other, expected) > 1e-2, name


def _without(rows: AdapterRows, field: str) -> AdapterRows:
    return AdapterRows({path: replace(one, **{field: None}) for path, one in rows.modules.items()})


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("dora", "magnitude_O"),
        ("ia3", "bias_scale_O"),
        ("ia3", "scale_O"),
        ("lora-bias", "bias_shift_O"),
        ("bias-lora-only", "bias_O"),
        ("bias-all", "bias_O"),
        ("dora-bias", "bias_O"),
    ],
)
def test_one_kind_of_tensor_left_out_would_be_noticed(
    name: str, field: str, oracle: Oracle, kind: str
) -> None:
    """Each tensor beside the rows matters: without it the logits are others."""
    mutilated = {**oracle.rows, name: _without(oracle.rows[name], field)}
    found = oracle.ours(list(mutilated.values()), kind)[list(CONFIGS).index(name)]
    assert distance(found, oracle.logits[name]) > 1e-2


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
def test_an_adapter_we_write_gives_our_logits_in_peft(
    offset: int, kind: str, tmp_path: Path
) -> None:
    mine, neighbour = _flora(offset, seed=1), _flora(offset, seed=2)
    runner = SmallRunner(tiny_llama(), kind=kind)
    runner.load({version(0): mine, version(1): neighbour})
    users = (version(0), version(1), None)
    found, swapped, dropped = runner.prompts([(prompt(0, 9), user) for user in users])
    with torch.no_grad():
        model = loaded(write_flora(mine, "tiny"), tmp_path)
        expected = model(prompt(0, 9)[None]).logits[0]
    assert distance(found, expected) < 1e-4
    assert distance(swapped, expected) > 1e-2
    assert distance(dropped, expected) > 1e-2
