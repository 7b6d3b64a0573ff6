"""Log-probabilities of tokens under the model's own distribution: of chosen tokens, and of a prompt's.

Shape legend: N rows that ask for log-probabilities, V vocabulary, W most probable tokens looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.engine.request import TokenLogprobs

# A whole prompt's logits are large; what is computed from them is not made as large at once.
BLOCK_ROWS = 64


@torch.inference_mode()
def token_logprobs(
    logits_NV: Tensor, tokens: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs | None]:
    """The log-probability of one token of each row, and of the row's `num_top` most probable ones.

    Of equally probable tokens those with lower ids come first. None for a row with a logit that is not finite.

    Args:
        logits_NV: float32 or float64, as the model gave them.
    """
    scores: list[TokenLogprobs | None] = []
    for start in range(0, len(tokens), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        scores += _block_logprobs(logits_NV[block], tokens[block], num_top[block])
    return scores


def _block_logprobs(
    logits_NV: Tensor, tokens: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs | None]:
    token_N1 = torch.tensor(tokens, device=logits_NV.device)[:, None]
    chosen = logits_NV.gather(1, token_N1)[:, 0].tolist()
    totals = logits_NV.logsumexp(dim=1).tolist()
    return [
        TokenLogprobs(logit - total, tuple((each, best - total) for each, best in top))
        if math.isfinite(logit - total)
        else None
        for logit, total, top in zip(chosen, totals, _best(logits_NV, num_top), strict=True)
    ]


def _best(logits_NV: Tensor, num_top: Sequence[int]) -> list[list[tuple[int, float]]]:
    """Each row's `num_top` best tokens with their logits."""
    width = max(num_top)
    if not width:
        return [[] for _ in num_top]
    best_NW = logits_NV.topk(width, dim=1)
    last_N1 = torch.tensor(num_top, device=logits_NV.device).clamp(min=1)[:, None] - 1
    least_N1 = best_NW.values.gather(1, last_N1)
    num_tied = (logits_NV == least_N1).sum(dim=1).tolist()
    ids, logits = best_NW.indices.tolist(), best_NW.values.tolist()
    found = []
    for row, count in enumerate(num_top):
        top = list(zip(ids[row], logits[row], strict=True))[:count]
        if num_tied[row] > 1 and top:
            # Which of the tokens tied with the last one are among the best must not depend on a sort's whims.
            least = top[-1][1]
            top = [one for one in top if one[1] > least]
            tied = (logits_NV[row] == least_N1[row]).nonzero()[: count - len(top), 0]
            top += [(token, least) for token in tied.tolist()]
        found.append(sorted(top, key=lambda one: (-one[1], one[0])))
    return found
