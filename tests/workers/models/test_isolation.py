"""One adapter's broken numbers reach nobody else: not one bit of a neighbour's logits changes, prompts and decodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from storage.adapter_rows import AdapterRows
from tests.storage.peft_adapters import tiny_llama
from tests.workers.engine.small_engine import random_adapter, version
from tests.workers.models.small_runner import RUNNERS, SmallRunner
from workers.models.runner import SequenceSpan

HEALTHY = ("flora", "flora0", "lora", "dora", "ia3_in", "ia3_out", "lora+bias", "own_bias")
BROKEN = version(99)
PROMPT = torch.arange(20) % 48


def mixed_runner(kind: str, dtype: torch.dtype, family: str) -> SmallRunner:
    """A runner with one healthy adapter of every family, and one of `family` whose pages will be spoilt."""
    runner = SmallRunner(tiny_llama(dtype), kind=kind)
    shapes = runner.runner.shape.projections
    adapters: dict[object, AdapterRows] = {
        version(i): random_adapter(shapes, one, lambda n: 1 + n % 3, seed=i)
        for i, one in enumerate(HEALTHY)
    }
    runner.load({**adapters, BROKEN: random_adapter(shapes, family, 3, seed=50)})  # type: ignore[dict-item]
    return runner


def prompts_and_decodes(runner: SmallRunner) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of two steps: the broken adapter's, once among short runs and once in a long one, and all others'."""
    users = [BROKEN, *(version(i) for i in range(len(HEALTHY))), None, BROKEN]
    lengths = [3, *(4 + i for i in range(len(HEALTHY))), 5, 20]
    first = [
        (SequenceSpan(slot, 0, length), PROMPT[:length], user)
        for slot, (length, user) in enumerate(zip(lengths, users, strict=True))
    ]
    second = [
        (SequenceSpan(slot, length, 1), PROMPT[:1], user)
        for slot, (length, user) in enumerate(zip(lengths, users, strict=True))
    ]
    logits = [*runner.step(first), *runner.step(second)]
    is_broken = [user == BROKEN for user in users] * 2
    return (
        [one for one, broken in zip(logits, is_broken, strict=True) if broken],
        [one for one, broken in zip(logits, is_broken, strict=True) if not broken],
    )


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [3e38, float("nan"), float("-inf")])
@pytest.mark.parametrize("family", HEALTHY)
def test_a_broken_adapter_changes_no_bit_of_its_neighbours_logits(
    family: str, value: float, dtype: torch.dtype, kind: str
) -> None:
    runner = mixed_runner(kind, dtype, family)
    own_before, others_before = prompts_and_decodes(runner)
    for path, place in runner.bank.pages_of(BROKEN).items():
        module = runner.bank.modules[path]
        module.in_rows_NI[list(place.in_pages)] = value
        module.out_rows_NO[list(place.out_pages)] = value
    own_after, others_after = prompts_and_decodes(runner)
    for before, after in zip(own_before, own_after, strict=True):
        assert not torch.equal(before, after), "the broken adapter must have been in the batch"
    for before, after in zip(others_before, others_after, strict=True):
        assert bool(torch.isfinite(before).all())
        assert torch.equal(before, after)


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("family", ["flora", "lora", "ia3_out"])
def test_weights_of_3e38_are_taken_by_the_bank_and_harm_only_their_own_tokens(
    family: str, kind: str
) -> None:
    runner = mixed_runner(kind, torch.float32, family)
    _, before = prompts_and_decodes(runner)
    shapes = runner.runner.shape.projections
    runner.bank.evict(BROKEN)
    huge = random_adapter(shapes, family, 3, seed=50, size=3e37)
    runner.load({BROKEN: huge})
    own, after = prompts_and_decodes(runner)
    assert not all(bool(torch.isfinite(one).all()) for one in own)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
