"""A step's rows the other way round: which of them use each bank page, in pieces that can be summed side by side.

How a page's rows are divided, and their order, depend on that page's rows only: sums are the same to the bit whoever
else is in the step.

Shape legend: R rows of the step, N bank pages, P parts of at most `PART_ROWS` rows of one page each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.bank.pages import NUM_RESERVED

PART_ROWS = 128


@dataclass(frozen=True, slots=True)
class PageRows:
    """Where the kernels find the rows of a page; int64. The reserved pages, which nobody trains, have none."""

    row_R: Tensor  # page by page, and of each page in the order of the step
    begin_P: Tensor  # in `row_R`; parts behind the last are empty
    end_P: Tensor
    first_part_N1: Tensor  # page n has parts first[n] to first[n + 1]

    @classmethod
    def of(cls, page_R: Tensor, num_pages: int) -> PageRows:
        """A few small operations on the rows' device, without a host sync."""
        num_rows, device = page_R.shape[0], page_R.device
        sorted_R, row_R = page_R.sort(stable=True)
        page_N1 = torch.arange(num_pages + 1, device=device).clamp_(min=NUM_RESERVED)
        first_N1 = torch.searchsorted(sorted_R, page_N1)
        first_part_N1 = torch.zeros_like(first_N1)
        first_part_N1[1:] = (first_N1.diff() + (PART_ROWS - 1)).div_(
            PART_ROWS, rounding_mode="floor"
        )
        first_part_N1 = first_part_N1.cumsum(0)
        # As many as there can be; how many there are is known on the device alone.
        part_P = torch.arange(num_rows // PART_ROWS + min(num_rows, num_pages), device=device)
        page_P = torch.searchsorted(first_part_N1, part_P, right=True).sub_(1)
        page_P.clamp_(max=num_pages - 1)
        begin_P = first_N1[page_P] + (part_P - first_part_N1[page_P]) * PART_ROWS
        end_P = torch.minimum(begin_P + PART_ROWS, first_N1[page_P + 1])
        return cls(row_R, begin_P, end_P, first_part_N1)
