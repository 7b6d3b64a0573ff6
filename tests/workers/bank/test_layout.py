"""What storage says an adapter takes in a bank is what the bank gives it."""

from __future__ import annotations

import pytest
import torch

from storage.adapter_rows import ModuleRows
from workers.bank.layout import ModuleLayout

_R, _I, _O = 3, 4, 5
_ADD = {"add_q_EO": torch.ones(_R, _O), "add_p_EI": torch.ones(_R, _I)}
_VECTOR = torch.ones(_O)


@pytest.mark.parametrize(
    ("rows", "pages"),
    [
        (ModuleRows(mul_a_RO=torch.ones(_R, _O), mul_b_RI=torch.ones(_R, _I)), _R),
        (ModuleRows(**_ADD), _R),
        (ModuleRows(**_ADD, bias_shift_O=_VECTOR), _R + 1),
        (ModuleRows(**_ADD, magnitude_O=_VECTOR), _R + 1),
        (ModuleRows(**_ADD, magnitude_O=_VECTOR, bias_O=_VECTOR), _R + 2),
        (ModuleRows(mul_b_RI=torch.ones(1, _I)), 1),
        (ModuleRows(scale_O=_VECTOR, bias_scale_O=_VECTOR), 2),
        (ModuleRows(), 0),
    ],
    ids=["flora", "lora", "lora-bias", "dora", "dora-bias", "ia3-in", "ia3-out", "nothing"],
)
def test_the_pages_of_a_module_are_counted_alike(rows: ModuleRows, pages: int) -> None:
    layout = ModuleLayout.of(rows)
    assert rows.num_pages == max(layout.num_in, layout.num_out) == pages
