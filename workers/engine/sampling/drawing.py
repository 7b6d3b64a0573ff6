"""Random draws, whose random numbers depend on the request's seed and the token's position only.

Ties do not depend on a sort's whims either: tokens tied with the last one that top-k or top-p keeps are kept too, and
draws run over token ids in ascending order.

Shape legend: N rows drawn at random, M of them, V vocabulary, W most probable tokens looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.engine.sampling.row import SamplingRow

# Top-p mostly keeps a few tokens; where it keeps more, wider looks are taken, and the whole vocabulary last.
WIDTHS = (64, 1024, 8192)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return float(int.from_bytes(digest, "big") >> 11) / float(1 << 53)


def draw(logits_NV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """One token for each row, by inverting the cumulative weight over token ids. No row is greedy."""
    drawn_N1 = _column(
        [uniform(row.params.seed, row.position) for row in rows], torch.float64, logits_NV.device
    )
    cumulative_NV = weights(logits_NV, rows).cumsum(dim=1, dtype=torch.float64)
    total_N1 = cumulative_NV[:, -1:]
    # Strictly below the total, or rounding could point behind the last token.
    target_N1 = torch.minimum(drawn_N1 * total_N1, torch.nextafter(total_N1, total_N1 * 0))
    return torch.searchsorted(cumulative_NV, target_N1, right=True)[:, 0]


def weights(logits_NV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """How probable each token is, relative to the best one: temperature, then min-p, top-k and top-p, 0 if dropped."""
    device = logits_NV.device
    temperature_N1 = _column([row.params.temperature for row in rows], logits_NV.dtype, device)
    weight_NV = torch.exp((logits_NV - logits_NV.amax(dim=1, keepdim=True)) / temperature_N1)
    if any(row.params.min_p for row in rows):
        # The best token weighs 1.
        min_p_N1 = _column([row.params.min_p for row in rows], weight_NV.dtype, device)
        weight_NV = torch.where(weight_NV >= min_p_N1, weight_NV, 0)
    if any(row.params.top_k or row.params.top_p < 1 for row in rows):
        vocabulary = logits_NV.shape[1]
        top_k_N1 = _column([row.params.top_k or vocabulary for row in rows], torch.int64, device)
        top_p_N1 = _column([row.params.top_p for row in rows], torch.float64, device)
        least_N1 = _least_kept(weight_NV, top_k_N1, top_p_N1)
        weight_NV = torch.where(weight_NV >= least_N1, weight_NV, 0)
    return weight_NV


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]


def _least_kept(weight_NV: Tensor, top_k_N1: Tensor, top_p_N1: Tensor) -> Tensor:
    """The weight of the last token that top-k, and then top-p of what it left, keeps; 0 where neither limits."""
    vocabulary = weight_NV.shape[1]
    least_N1 = torch.zeros_like(weight_NV[:, :1])
    # Sorting a whole vocabulary is dear: each row is looked at no wider than it needs.
    unknown_M = ((top_k_N1 < vocabulary) | (top_p_N1 < 1))[:, 0].nonzero()[:, 0]
    for width in (*(one for one in WIDTHS if one < vocabulary), vocabulary):
        if not len(unknown_M):
            break
        found_M1, is_known_M = _least_within(
            width, weight_NV[unknown_M], top_k_N1[unknown_M], top_p_N1[unknown_M]
        )
        least_N1[unknown_M[is_known_M]] = found_M1[is_known_M]
        unknown_M = unknown_M[~is_known_M]
    return least_N1


def _least_within(
    width: int, weight_MV: Tensor, top_k_M1: Tensor, top_p_M1: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_least_kept`, looking at the `width` best tokens, and where that was enough."""
    vocabulary = weight_MV.shape[1]
    top_MW = weight_MV.topk(width, dim=1).values
    within_k_MW = torch.arange(width, device=weight_MV.device) < top_k_M1
    mass_MW = torch.where(within_k_MW, top_MW, 0).cumsum(dim=1, dtype=torch.float64)
    is_cut_M1 = top_k_M1.clamp(max=vocabulary) <= width
    all_M1 = weight_MV.sum(dim=1, keepdim=True, dtype=torch.float64)
    wanted_M1 = top_p_M1 * torch.where(is_cut_M1, mass_MW[:, -1:], all_M1)
    before_MW = mass_MW - torch.where(within_k_MW, top_MW, 0)
    last_M1 = (within_k_MW & (before_MW < wanted_M1)).sum(dim=1, keepdim=True) - 1
    # Where top-k cuts further out, what it leaves is not known yet.
    is_enough_M1 = (mass_MW[:, -1:] >= wanted_M1) & (top_k_M1 >= vocabulary)
    is_known_M = (is_cut_M1 | is_enough_M1)[:, 0]
    return top_MW.gather(1, last_M1.clamp(min=0)), is_known_M
