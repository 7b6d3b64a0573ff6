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


def test_rows_say_whether_they_depend_on_the_bases_values() -> None:
    one, other = torch.ones(1, 5), torch.ones(1, 4)
    flora = ModuleRows(mul_a_RO=one, mul_b_RI=other)
    dora = ModuleRows(add_q_EO=one, add_p_EI=other, magnitude_O=torch.ones(5))
    assert flora.needs_its_base and dora.needs_its_base
    for rows in (
        ModuleRows(mul_b_RI=other),  # IA3
        ModuleRows(scale_O=torch.ones(5), bias_scale_O=torch.ones(5)),
        ModuleRows(add_q_EO=one, add_p_EI=other, bias_shift_O=torch.ones(5)),
        ModuleRows(bias_O=torch.ones(5)),
    ):
        assert not rows.needs_its_base
        assert not AdapterRows({"a": rows}).needs_its_base
        assert AdapterRows({"a": rows, "b": dora}).needs_its_base


def test_a_scale_or_a_bias_alone_counts_as_a_row() -> None:
    assert ModuleRows().num_rows == 0
    assert ModuleRows(scale_O=torch.ones(5)).num_rows == 1
    assert ModuleRows(bias_O=torch.ones(5)).num_rows == 1
    assert AdapterRows({"a": ModuleRows(bias_O=torch.ones(5))}).max_rank == 1


def test_contradictory_rows_cannot_be_made() -> None:
    with pytest.raises(ValueError):
        ModuleRows(offset=2)
    with pytest.raises(ValueError):
        ModuleRows(add_q_EO=torch.ones(1, 2))
    with pytest.raises(ValueError):
        ModuleRows(mul_a_RO=torch.ones(2, 5), mul_b_RI=torch.ones(3, 5))
    with pytest.raises(ValueError):
        ModuleRows(bias_O=torch.ones(5), bias_shift_O=torch.ones(5))
    with pytest.raises(ValueError):
        ModuleRows(bias_O=torch.ones(5), bias_scale_O=torch.ones(5))
    for beside in ({"mul_a_RO": torch.ones(1, 5)}, {"scale_O": torch.ones(5)}, {"offset": 0}):
        with pytest.raises(ValueError):
            ModuleRows(magnitude_O=torch.ones(5), **beside)  # type: ignore[arg-type]
