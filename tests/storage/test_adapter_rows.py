"""Rows say what they are, and refuse to be what they cannot."""

from __future__ import annotations

import pytest
import torch

from storage.adapter_rows import AdapterRows, ModuleRows


def test_rows_count_what_they_hold() -> None:
    flora = ModuleRows(mul_a_RO=torch.ones(3, 5), mul_b_RI=torch.ones(3, 4), offset=0)
    ia3 = ModuleRows(mul_a_RO=torch.ones(1, 5), offset=0)
    lora = ModuleRows(add_q_EO=torch.ones(2, 5), add_p_EI=torch.ones(2, 4))
    assert [(rows.num_mul, rows.num_add) for rows in (flora, ia3, lora, ModuleRows())] == [
        (3, 0),
        (1, 0),
        (0, 2),
        (0, 0),
    ]
    adapter = AdapterRows({"a": flora, "b": ia3, "c": lora})
    assert adapter.max_rank == 3
    assert adapter.num_bytes == 4 * (3 * 9 + 5 + 2 * 9)
    assert AdapterRows().max_rank == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_noticed_in_any_tensor(value: float) -> None:
    for field in ("mul_a_RO", "mul_b_RI", "scale_O", "bias_scale_O", "bias_shift_O"):
        tensor = torch.ones(2, 3) if field.startswith("mul") else torch.ones(3)
        assert ModuleRows(**{field: tensor}).is_finite
        tensor.view(-1)[-1] = value
        assert not ModuleRows(**{field: tensor}).is_finite


def test_contradictory_rows_cannot_be_made() -> None:
    with pytest.raises(ValueError):
        ModuleRows(offset=2)
    with pytest.raises(ValueError):
        ModuleRows(add_q_EO=torch.ones(1, 2))
    with pytest.raises(ValueError):
        ModuleRows(mul_a_RO=torch.ones(2, 5), mul_b_RI=torch.ones(3, 5))
