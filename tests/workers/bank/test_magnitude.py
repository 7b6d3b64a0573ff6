"""DoRA's magnitude becomes a scale when an adapter is loaded, as exactly as float64 would have it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import AdapterRefusedError
from storage.identity import AdapterVersion
from workers.bank import magnitude
from workers.bank.bank import AdapterBank
from workers.bank.books import BankBusyError
from workers.bank.magnitude import with_scale
from workers.row_form.reference import reference_product

VERSION = AdapterVersion("d" * 64)


def dora(num_in: int, num_out: int, rank: int, seed: int = 0) -> ModuleRows:
    generator = torch.Generator().manual_seed(seed)
    return ModuleRows(
        add_p_EI=torch.randn(rank, num_in, generator=generator),
        add_q_EO=torch.randn(rank, num_out, generator=generator),
        add_gate=0.5,
        magnitude_O=torch.rand(num_out, generator=generator) + 0.5,
    )


def cancellation(weight_OI: torch.Tensor, rows: ModuleRows) -> float:
    """How much shorter a row becomes when the adapter is added, at most: what rounding of its parts grows by."""
    assert rows.add_q_EO is not None and rows.add_p_EI is not None
    change_OI = rows.add_gate * rows.add_q_EO.double().T @ rows.add_p_EI.double()
    parts_O = weight_OI.double().norm(dim=1) + change_OI.norm(dim=1)
    return float((parts_O / (weight_OI.double() + change_OI).norm(dim=1)).max())


@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 40)),
    rank=st.integers(1, 8),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    block=st.integers(1, 2000),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_the_scale_is_what_float64_says_whatever_the_weights_type_and_the_blocks(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, block: int, seed: int
) -> None:
    num_in, num_out = shape
    weight_OI = torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed))
    weight_OI = weight_OI.to(dtype)
    rows = dora(num_in, num_out, rank, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magnitude, "_BLOCK_ELEMENTS", block)
        measured = with_scale("q", rows, weight_OI)
    assert measured.magnitude_O is None
    x_TI = torch.randn(5, num_in, generator=torch.Generator().manual_seed(seed + 1))
    wanted = reference_product(x_TI, weight_OI, None, rows)
    found = reference_product(x_TI, weight_OI, None, measured)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6 * cancellation(weight_OI, rows)
    # The twins: the magnitude left out, and another's.
    for wrong in (ModuleRows(), dora(num_in, num_out, rank, seed + 1)):
        other = reference_product(x_TI, weight_OI, None, wrong)
        assert float((other - wanted).norm() / wanted.norm()) > 1e-4


@pytest.mark.parametrize("row", [0, 3])
def test_an_output_whose_weight_has_no_length_is_refused_by_name(row: int) -> None:
    rows = dora(4, 6, 1)
    weight_OI = torch.randn(6, 4)
    assert rows.add_q_EO is not None
    rows.add_q_EO[:, row] = 0
    for value in (0.0, float("inf")):
        weight_OI[row] = value
        with pytest.raises(AdapterRefusedError, match=rf"^q: output {row} has .* length {value}"):
            with_scale("q", rows, weight_OI)


class Weights:
    """Base weights, and how often they were measured."""

    def __init__(self) -> None:
        self.weight_OI = torch.randn(6, 4, generator=torch.Generator().manual_seed(7))
        self.num_measured = 0

    def __call__(self, path: str) -> Tensor:
        assert path == "q"
        self.num_measured += 1
        return self.weight_OI


def small_bank(weights: Weights | None, dtype: torch.dtype = torch.float32) -> AdapterBank:
    return AdapterBank(
        {"q": (4, 6)},
        num_rows=4,
        num_slots=2,
        dtype=dtype,
        device=torch.device("cpu"),
        base_weight=weights,
    )


def test_a_bank_without_base_weights_refuses_a_magnitude_by_name() -> None:
    bank = small_bank(None)
    with pytest.raises(AdapterRefusedError, match=r"q has a magnitude \(DoRA\)"):
        bank.load(VERSION, AdapterRows({"q": dora(4, 6, 1)}))
    assert bank.residents() == () and bank.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_holds_what_the_scale_adds_so_that_a_small_change_survives(
    dtype: torch.dtype,
) -> None:
    weights = Weights()
    bank = small_bank(weights, dtype)
    rows = dora(4, 6, 2)
    wanted_O = with_scale("q", rows, weights.weight_OI).scale_O
    assert wanted_O is not None
    # A young adapter: the magnitude is a thousandth off the norm.
    young = ModuleRows(
        add_p_EI=rows.add_p_EI,
        add_q_EO=rows.add_q_EO,
        add_gate=0.5,
        magnitude_O=rows.magnitude_O.double() / wanted_O * 1.001,  # type: ignore[union-attr]
    )
    bank.load(VERSION, AdapterRows({"q": young}))
    held_O = bank.modules["q"].out_rows_NO[bank.pages_of(VERSION)["q"].scale]
    torch.testing.assert_close(held_O.double(), torch.full((6,), 1e-3).double(), rtol=5e-3, atol=0)


def test_a_reload_gives_the_same_bits() -> None:
    bank = small_bank(Weights())
    adapter = AdapterRows({"q": dora(4, 6, 3)})
    held = []
    for _ in range(2):
        bank.load(VERSION, adapter)
        pages = bank.pages_of(VERSION)["q"]
        held.append(bank.modules["q"].out_rows_NO[list(pages.out_pages)].clone())
        bank.evict(VERSION)
        bank.modules["q"].out_rows_NO[2:] = 0
    assert torch.equal(*held) and bool(held[0].any())


def test_nothing_is_measured_for_an_adapter_that_finds_no_room() -> None:
    weights = Weights()
    bank = small_bank(weights)
    bank.load(AdapterVersion("a" * 64), AdapterRows({"q": dora(4, 6, 3)}))
    bank.acquire(AdapterVersion("a" * 64))
    for _ in range(3):
        with pytest.raises(BankBusyError):
            bank.load(VERSION, AdapterRows({"q": dora(4, 6, 3)}))
    assert weights.num_measured == 1


def test_a_magnitude_that_cannot_be_measured_takes_no_room() -> None:
    weights = Weights()
    weights.weight_OI[2] = 0
    rows = dora(4, 6, 1)
    assert rows.add_q_EO is not None
    rows.add_q_EO[:, 2] = 0
    bank = small_bank(weights)
    with pytest.raises(AdapterRefusedError, match="q: output 2"):
        bank.load(VERSION, AdapterRows({"q": rows}))
    assert bank.residents() == () and bank.rows_used == 0 and bank.check_integrity()


def test_a_scale_too_large_for_the_banks_type_is_refused() -> None:
    weights = Weights()
    weights.weight_OI[1] = 1e-20
    rows = dora(4, 6, 1)
    assert rows.add_q_EO is not None and rows.magnitude_O is not None
    rows.add_q_EO[:, 1], rows.magnitude_O[1] = 0, 3e38
    with pytest.raises(AdapterRefusedError, match=r"q.*not finite"):
        small_bank(weights).load(VERSION, AdapterRows({"q": rows}))
