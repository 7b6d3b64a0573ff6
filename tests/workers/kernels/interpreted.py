"""Mixed layers computed by the kernels, in Triton's interpreter (tests/conftest.py turns it on)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tests.workers.row_form.mixed_layers import MixedLayers
from workers.kernels.product import adapted_product
from workers.kernels.step_tables import index_for_kernels
from workers.row_form.cost import CostModel


@dataclass(frozen=True)
class KernelLayers(MixedLayers):
    """The same layers, adapters and tokens; only `output` differs."""

    @classmethod
    def of(cls, mixed: MixedLayers) -> KernelLayers:
        return cls(mixed.layers, mixed.bank, mixed.adapters, mixed.segments, mixed.x)

    def output(self, path: str, cost: CostModel) -> Tensor:
        tables = index_for_kernels(self.plan, self.bank.snapshot.table_of[path], cost)
        rows = self.bank.modules[path]
        return adapted_product(
            self.x[path], self.layers[path], rows.in_rows_NI, rows.out_rows_NO, tables
        )
