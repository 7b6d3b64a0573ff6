"""A step is no loop over adapters: it takes as many operations for eight of them as for two.

Of adapters that are alike. In weight mode runs of another length or rank are a product of their own, and so are more
runs than the scratch of one product holds (`workers/row_form/weight_product.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.tiny_jobs import Recorder, adapter, trainer
from training.optimizer import RowAdamW, RowBlock, StepSettings


class Arithmetic(TorchDispatchMode):
    """Counts operations by name; those that only make indices, which attention needs of each sequence, are none."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if not isinstance(made, Tensor) or made.is_floating_point():
            self.counts[str(func)] += 1
        return made


@contextmanager
def counted() -> Iterator[Counter[str]]:
    with Arithmetic() as mode:
        yield mode.counts


def operations_of_a_step(adapters: int, **fields: Any) -> Counter[str]:
    specs = [adapter(f"a{number}", steps=9, **fields) for number in range(adapters)]
    job = trainer(*specs, recorder=Recorder())
    job.step()  # the first has places to give out
    with counted() as counts:
        job.step()
    return counts


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 2},
        {"rank": 16, "batch_size": 12},  # long enough for weight mode
        {"rank": 2, "offset": 0},
        {"rank": 2, "family": "lora"},
        {"rank": 2, "family": "dora"},
        {"family": "ia3"},
    ],
    ids=["rows", "weights", "paper", "lora", "dora", "ia3"],
)
def test_a_step_of_eight_adapters_is_as_many_operations_as_one_of_two(
    fields: dict[str, Any],
) -> None:
    two, eight = (operations_of_a_step(count, **fields) for count in (2, 8))
    assert eight == two
    assert two["aten.mm.default"] + two["aten.bmm.default"] > 20, "it saw the products"


def test_one_update_serves_all_adapters() -> None:
    def operations(adapters: int) -> Counter[str]:
        owner_K = torch.arange(adapters).repeat_interleave(3)
        block = RowBlock(torch.randn(len(owner_K), 5), owner_K)
        block.gradient_KW.normal_()
        ones_S = torch.ones(adapters, dtype=torch.float64)
        settings = StepSettings(ones_S, ones_S, ones_S, ones_S, ones_S.bool())
        optimizer = RowAdamW((block,), adapters)
        with counted() as counts:
            optimizer.step(optimizer.gradient_norms(), settings)
        return counts

    assert operations(100) == operations(1)
