"""What one projection takes in, and what it makes of a bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from storage.adapter_rows import ModuleRows
from storage.errors import AdapterRefusedError
from workers.bank.layout import ModuleLayout, SlotPages
from workers.bank.module_bank import ModuleBank, check_finite
from workers.bank.pages import NULL_PAGE, PageAllocator

CPU = torch.device("cpu")
BIAS_O = torch.tensor([1.0, -2.0, 0.5])


def module_bank(bias_O: Tensor | None = BIAS_O, dtype: torch.dtype = torch.float32) -> ModuleBank:
    return ModuleBank.empty(8, (2, 3), bias_O, dtype, CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
@pytest.mark.parametrize(
    "field",
    [
        *("mul_a_RO", "mul_b_RI", "scale_O", "magnitude_O", "bias_scale_O", "bias_shift_O"),
        "bias_O",
    ],
)
def test_one_value_that_the_bank_cannot_hold_is_refused_in_any_tensor(
    field: str, value: float
) -> None:
    features = 2 if field.endswith("I") else 3
    shape = (2, features) if field.startswith("mul") else (features,)
    tensor = torch.ones(shape, dtype=torch.float64)
    check_finite({"q": ModuleRows(**{field: tensor})}, torch.float32)
    tensor.view(-1)[-1] = value
    with pytest.raises(AdapterRefusedError, match=f"q: {field} has a value that is not finite"):
        check_finite({"q": ModuleRows(**{field: tensor})}, torch.float32)


def write(bank: ModuleBank, rows: ModuleRows, pages: SlotPages) -> None:
    for bank_rows, where, values in bank.writes(rows, pages):
        bank_rows[list(where)] = values.to(bank_rows.dtype)


@pytest.mark.parametrize("base", [BIAS_O, None])
@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (ModuleRows(bias_O=torch.tensor([5.0, 6.0, 7.0])), lambda bias: [5.0, 6.0, 7.0]),
        (ModuleRows(bias_shift_O=torch.ones(3)), lambda bias: (bias + 1).tolist()),
        (ModuleRows(bias_scale_O=torch.full((3,), 3.0)), lambda bias: (bias * 3).tolist()),
        (
            ModuleRows(bias_scale_O=torch.full((3,), 3.0), bias_shift_O=torch.ones(3)),
            lambda bias: (bias * 3 + 1).tolist(),
        ),
    ],
)
def test_the_bias_page_leads_from_the_bases_bias_to_the_adapters(
    rows: ModuleRows, wanted: object, base: Tensor | None
) -> None:
    assert callable(wanted)
    bank = module_bank(base)
    ins, outs = PageAllocator(6), PageAllocator(6)
    pages = SlotPages.allocate(ModuleLayout.of(rows), ins, outs)
    assert pages.bias != NULL_PAGE and pages.scale == NULL_PAGE
    write(bank, rows, pages)
    usual_O = torch.zeros(3) if base is None else base
    assert (usual_O + bank.out_rows_NO[pages.bias]).tolist() == wanted(usual_O)
    assert not bank.out_rows_NO[NULL_PAGE].any()


def test_a_small_change_of_a_large_bias_survives_16_bits() -> None:
    """256 + 0.5 is 256 in bfloat16; the change alone is kept."""
    bank = module_bank(torch.full((3,), 256.0, dtype=torch.bfloat16), torch.bfloat16)
    rows = ModuleRows(bias_O=torch.full((3,), 256.5))
    pages = SlotPages.allocate(ModuleLayout.of(rows), PageAllocator(6), PageAllocator(6))
    write(bank, rows, pages)
    assert bank.out_rows_NO[pages.bias].tolist() == [0.5, 0.5, 0.5]
