"""DoRA's magnitudes become output scales, measured on the base weight when an adapter is loaded.

Readers know no base model and the step knows no magnitudes: in between, c = m / ‖W0 + g Σ q pᵀ‖ (norms of rows) is
worked out where W0 lies. Source: DoRA, arXiv 2402.09353, eq. 5; `peft.tuners.lora.dora`.

Shape legend: I input features, O output features, E add rows, B rows of one block of the weight, C parts of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from storage.adapter_rows import ModuleRows
from storage.errors import AdapterRefusedError

_BLOCK_ELEMENTS = 1 << 22
"""Of the weight at a time, so that a load needs little memory beside the adapter."""
_PART = 64


def with_scale(path: str, rows: ModuleRows, weight_OI: Tensor) -> ModuleRows:
    """The same rows with a scale instead of a magnitude, and add rows scaled by it.

    Exact to about 1e-7 of c; where the adapter all but cancels a row of the weight, so many times less exact as the row
    has become shorter.

    Args:
        path: of the projection, for the error.
        weight_OI: the base weight, in any type, on any device; only read.

    Raises:
        AdapterRefusedError: a row of the weight is zero, or not finite, under the adapter, so no scale gives it a
            magnitude.
    """
    assert rows.magnitude_O is not None
    norm_O = _row_norms(rows, weight_OI)
    has_length_O = (norm_O > 0) & torch.isfinite(norm_O)
    if not bool(has_length_O.all()):
        row = int(has_length_O.logical_not().nonzero()[0])
        raise AdapterRefusedError(
            f"{path}: output {row} has a magnitude, but its weight has the length {float(norm_O[row])} with the "
            "adapter's rows added",
            param=path,
        )
    scale_O = rows.magnitude_O.cpu().double() / norm_O
    q_EO = None if rows.add_q_EO is None else rows.add_q_EO.cpu() * scale_O
    return replace(rows, magnitude_O=None, scale_O=scale_O, add_q_EO=q_EO)


def _row_norms(rows: ModuleRows, weight_OI: Tensor) -> Tensor:
    """‖W0 + g Σ q pᵀ‖_O in float64."""
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    block = max(1, _BLOCK_ELEMENTS // max(1, weight_OI.shape[1]))
    norms = []
    for start in range(0, weight_OI.shape[0], block):
        some = slice(start, start + block)
        adapted_BI = weight_OI[some].detach().to(dtype)
        if rows.add_q_EO is not None and rows.add_p_EI is not None:
            q_EB = rows.add_q_EO[:, some].to(adapted_BI)
            p_EI = rows.add_p_EI.to(adapted_BI)
            adapted_BI = torch.addmm(adapted_BI, q_EB.T, p_EI, alpha=rows.add_gate)
        norms.append(_lengths(adapted_BI))
    return torch.cat(norms).cpu()


def _lengths(rows_BI: Tensor) -> Tensor:
    """Norms in float64, but for short parts of a row: a tenth of the time, and as exact as c needs."""
    num_parts = rows_BI.shape[1] // _PART
    whole = num_parts * _PART
    parts = rows_BI[:, :whole].reshape(rows_BI.shape[0], num_parts, _PART)
    parts_BC = torch.cat([torch.linalg.vector_norm(parts, dim=2), rows_BI[:, whole:]], dim=1)
    length_B: Tensor = torch.linalg.vector_norm(parts_BC, dim=1, dtype=torch.float64)
    return length_B
