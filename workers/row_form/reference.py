"""The row form as its definition reads: float64, one adapter, its weight materialised. Slow; what all else is held to.

Shape legend: T tokens, I input features, O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from storage.adapter_rows import ModuleRows


def reference_product(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, rows: ModuleRows | None
) -> Tensor:
    """The output_TO of one linear layer with one adapter (None: the base model)."""
    x_TI, weight_OI = x_TI.double(), weight_OI.double()
    num_out = weight_OI.shape[0]
    bias_O = torch.zeros(num_out, dtype=torch.float64) if bias_O is None else bias_O.double()
    if rows is None:
        return x_TI @ weight_OI.T + bias_O
    pattern_OI = torch.full_like(weight_OI, float(rows.offset))
    for j in range(rows.num_mul):
        a_O = rows.mul_a_RO[j].double() if rows.mul_a_RO is not None else torch.ones(num_out)
        b_I = rows.mul_b_RI[j].double() if rows.mul_b_RI is not None else torch.ones(x_TI.shape[1])
        pattern_OI = pattern_OI + torch.outer(a_O.double(), b_I.double())
    y_TO = x_TI @ (weight_OI * pattern_OI).T
    if rows.scale_O is not None:
        y_TO = y_TO * rows.scale_O.double()
    delta_OI = torch.zeros_like(weight_OI)
    if rows.add_p_EI is not None and rows.add_q_EO is not None:
        delta_OI = rows.add_gate * rows.add_q_EO.double().T @ rows.add_p_EI.double()
    y_TO = y_TO + x_TI @ delta_OI.T
    if rows.magnitude_O is not None:
        y_TO = y_TO * rows.magnitude_O.double() / (weight_OI + delta_OI).norm(dim=1)
    if rows.bias_O is not None:
        bias_O = rows.bias_O.double()
    if rows.bias_scale_O is not None:
        bias_O = bias_O * rows.bias_scale_O.double()
    if rows.bias_shift_O is not None:
        bias_O = bias_O + rows.bias_shift_O.double()
    return y_TO + bias_O
