"""From logits to tokens: greedy or drawn, one row for each sequence, all rows at once.

The random number of a draw depends on the request's seed and the token's position only, so an answer is the same in
whatever batch it is made. Ties do not depend on a sort's whims either: tokens tied with the last one that top-k or
top-p keeps are kept too, and draws run over token ids in ascending order.

Shape legend: L rows of logits, N rows drawn at random, V vocabulary, W most probable tokens looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.request import SamplingParams

# Top-p hardly ever keeps more tokens than this; where it does, the whole vocabulary is sorted.
USUAL_WIDTH = 1024


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row's token is chosen, and the position it will have in its sequence."""

    params: SamplingParams
    position: int
    forbidden: frozenset[int] = frozenset()


@torch.inference_mode()
def sample(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """One token for every row; None for a row with a logit that is not finite.

    Args:
        logits_LV: float32 or float64; forbidden tokens are overwritten.
    """
    if not rows:
        return []
    lowest_L, highest_L = logits_LV.aminmax(dim=1)
    is_finite_L = torch.isfinite(lowest_L) & torch.isfinite(highest_L)
    for index, row in enumerate(rows):
        if row.forbidden:
            forbidden = torch.tensor(sorted(row.forbidden), device=logits_LV.device)
            logits_LV[index, forbidden] = -torch.inf
    token_L = logits_LV.argmax(dim=1)
    drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        index_N = torch.tensor(drawn, device=logits_LV.device)
        token_L[index_N] = _draw(logits_LV[index_N], [rows[index] for index in drawn])
    return [
        token if is_finite else None
        for token, is_finite in zip(token_L.tolist(), is_finite_L.tolist(), strict=True)
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return float(int.from_bytes(digest, "big") >> 11) / float(1 << 53)


def _draw(logits_NV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Draw by inverting the cumulative weight over token ids."""

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits_NV.device)[:, None]

    highest_N1 = logits_NV.amax(dim=1, keepdim=True)
    temperature_N1 = column([row.params.temperature for row in rows], logits_NV.dtype)
    weight_NV = torch.exp((logits_NV - highest_N1) / temperature_N1)
    if any(row.params.top_k or row.params.top_p < 1 for row in rows):
        vocabulary = logits_NV.shape[1]
        top_k_N1 = column([row.params.top_k or vocabulary for row in rows], torch.int64)
        top_p_N1 = column([row.params.top_p for row in rows], torch.float64)
        least_N1 = _least_kept(weight_NV, top_k_N1, top_p_N1)
        weight_NV = torch.where(weight_NV >= least_N1, weight_NV, 0)
    cumulative_NV = weight_NV.cumsum(dim=1, dtype=torch.float64)
    total_N1 = cumulative_NV[:, -1:]
    drawn_N1 = column([uniform(row.params.seed, row.position) for row in rows], torch.float64)
    # Strictly below the total, or rounding could point behind the last token.
    target_N1 = torch.minimum(drawn_N1 * total_N1, torch.nextafter(total_N1, total_N1 * 0))
    return torch.searchsorted(cumulative_NV, target_N1, right=True)[:, 0]


def _least_kept(weight_NV: Tensor, top_k_N1: Tensor, top_p_N1: Tensor) -> Tensor:
    """The weight of the last token that top-k, and then top-p of what it left, keeps; 0 where neither limits."""
    vocabulary = weight_NV.shape[1]
    is_free_N1 = (top_k_N1 >= vocabulary) & (top_p_N1 >= 1)
    all_N1 = weight_NV.sum(dim=1, keepdim=True, dtype=torch.float64)
    for width in (min(USUAL_WIDTH, vocabulary), vocabulary):
        top_NW = weight_NV.topk(width, dim=1).values
        within_k_NW = torch.arange(width, device=weight_NV.device) < top_k_N1
        mass_NW = torch.where(within_k_NW, top_NW, 0).cumsum(dim=1, dtype=torch.float64)
        is_cut_N1 = top_k_N1 <= width
        wanted_N1 = top_p_N1 * torch.where(is_cut_N1, mass_NW[:, -1:], all_N1)
        if bool((is_free_N1 | is_cut_N1 | (mass_NW[:, -1:] >= wanted_N1)).all()):
            break
    before_NW = mass_NW - torch.where(within_k_NW, top_NW, 0)
    is_kept_NW = within_k_NW & (before_NW < wanted_N1)
    last_N1 = is_kept_NW.sum(dim=1, keepdim=True) - 1
    return torch.where(is_free_N1, 0, top_NW.gather(1, last_N1.clamp(min=0)))
