"""On a GPU, what a load copies is there for the next step, and nobody waits for it on the host."""

from __future__ import annotations

import pytest
import torch

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.identity import AdapterVersion
from workers.bank.bank import AdapterBank
from workers.bank.transfer import RowTransfer


def test_on_a_cpu_a_copy_is_a_copy_and_there_is_nothing_to_wait_for() -> None:
    transfer = RowTransfer(torch.device("cpu"))
    values = torch.tensor([1.5, 2.5])
    with transfer.copying():
        copied = transfer.to_device(values, torch.bfloat16)
    assert copied.dtype is torch.bfloat16
    assert copied.tolist() == [1.5, 2.5]
    assert transfer.mark() is None
    transfer.join(None, ())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_reads_the_rows_that_were_loaded_beside_it() -> None:
    device = torch.device("cuda")
    bank = AdapterBank(
        {"q": (512, 512)}, num_rows=2, num_slots=2, dtype=torch.float32, device=device
    )
    busy = torch.randn(4096, 4096, device=device)
    for number in range(50):
        rows = torch.full((2, 512), float(number))
        version = AdapterVersion(f"{number:064x}")
        for _ in range(5):
            busy @ busy  # a step under way, while the load is copied
        bank.load(version, AdapterRows({"q": ModuleRows(mul_a_RO=rows, mul_b_RI=rows)}))
        slot = bank.acquire(version)
        table = bank.snapshot.table_of["q"]
        first, count = table.mul.first_S[slot], table.mul.count_S[slot]
        pages = table.mul.in_page_F[first : first + count]
        assert bool((bank.modules["q"].in_rows_NI[pages] == number).all())
        bank.release(version)
