"""From logits to tokens: greedy or drawn, one row for each sequence, all rows at once.

Shape legend: L rows of logits, N rows drawn at random or with log-probabilities, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.engine.sampling.adjustments import adjust
from workers.engine.sampling.drawing import draw
from workers.engine.sampling.greedy import Greatest, torch_greatest
from workers.engine.sampling.logprobs import token_logprobs
from workers.engine.sampling.row import SampledToken, SamplingRow


@torch.inference_mode()
def sample(
    logits_LV: Tensor, rows: Sequence[SamplingRow], greatest: Greatest = torch_greatest
) -> list[SampledToken | None]:
    """One token for every row, as `SamplingParams` describes; None for a row with a logit that is not finite.

    Args:
        logits_LV: float32 or float64; logits that rows ask to change are overwritten.
    """
    if not rows:
        return []
    token_L = greatest(logits_LV)
    is_finite_L = token_L >= 0
    scored = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    # A copy, for the model's own logits are wanted when the token is known.
    own_NV = logits_LV[torch.tensor(scored, device=logits_LV.device)] if scored else None
    changed = [index for index, row in enumerate(rows) if row.changes_logits]
    if changed:
        adjust(logits_LV, rows)
        index_N = torch.tensor(changed, device=logits_LV.device)
        token_L[index_N] = logits_LV[index_N].argmax(dim=1)
    drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        index_N = torch.tensor(drawn, device=logits_LV.device)
        token_L[index_N] = draw(logits_LV[index_N], [rows[index] for index in drawn])
    sampled = [
        SampledToken(token) if good else None
        for token, good in zip(token_L.tolist(), is_finite_L.tolist(), strict=True)
    ]
    if own_NV is not None:
        _add_logprobs(sampled, scored, own_NV, rows)
    return sampled


def _add_logprobs(
    sampled: list[SampledToken | None],
    scored: Sequence[int],
    own_NV: Tensor,
    rows: Sequence[SamplingRow],
) -> None:
    """Replace the tokens of `scored` rows by ones with their log-probabilities."""
    tokens = [one.token if (one := sampled[index]) is not None else 0 for index in scored]
    num_top = [rows[index].params.logprobs or 0 for index in scored]
    for index, token, logprobs in zip(
        scored, tokens, token_logprobs(own_NV, tokens, num_top), strict=True
    ):
        if sampled[index] is not None:
            sampled[index] = SampledToken(token, logprobs)
