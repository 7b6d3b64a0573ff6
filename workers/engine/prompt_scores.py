"""How probable the model finds the tokens of a prompt, chunk by chunk.

Shape legend: S tokens whose logits score a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from torch import Tensor

from workers.engine.request import TokenLogprobs
from workers.engine.sampling.logprobs import token_logprobs
from workers.engine.sequence import Sequence
from workers.engine.step_budget import ScheduledSpan


def score_prompts(
    spans: Ordered[ScheduledSpan], logits_SV: Tensor
) -> list[tuple[Sequence, list[TokenLogprobs | None]]]:
    """What this step adds to `Sequence.prompt_logprobs`; to be called before the spans are advanced.

    Args:
        logits_SV: of the spans' `scoring_positions`, in order.
    """
    targets: list[int] = []
    num_top: list[int] = []
    parts: list[tuple[Sequence, int]] = []
    for span in spans:
        request = span.sequence.request
        positions = span.sequence.scoring_positions(span.num_new)
        if positions:
            targets += request.prompt_token_ids[positions.start + 1 : positions.stop + 1]
            num_top += [request.sampling.prompt_logprobs or 0] * len(positions)
            parts.append((span.sequence, len(positions)))
    scores = iter(token_logprobs(logits_SV, targets, num_top))
    return [(sequence, [next(scores) for _ in range(count)]) for sequence, count in parts]
