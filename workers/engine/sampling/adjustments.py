"""Bias, penalties and forbidden tokens: everything that changes logits before greedy or drawn tokens are chosen.

Only the logits a row asks to change are touched, all rows at once: K (row, token) pairs, each at most once.

Shape legend: L rows of logits, V vocabulary, K pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.engine.sampling.row import SamplingRow


def adjust(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Change the logits in place, in the order `SamplingParams` gives; nothing for rows that ask for nothing."""
    _add_bias(logits_LV, rows)
    _punish_repetition(logits_LV, rows)
    _punish_answer(logits_LV, rows)
    _forbid(logits_LV, rows)


def _add_bias(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> None:
    pairs = [
        (index, token, bias)
        for index, row in enumerate(rows)
        for token, bias in row.params.logit_bias
    ]
    if not pairs:
        return
    index_K, token_K, bias_K = zip(*pairs, strict=True)
    place = (_on(logits_LV, index_K), _on(logits_LV, token_K))
    logits_LV[place] += torch.tensor(bias_K, dtype=logits_LV.dtype, device=logits_LV.device)


def _punish_repetition(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> None:
    asking = [i for i, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if not asking:
        return
    tokens = [[*rows[i].prompt, *rows[i].answer] for i in asking]
    index_K, token_K, _ = _distinct(asking, tokens, logits_LV.shape[1])
    penalty_K = _by_row([row.params.repetition_penalty for row in rows], index_K).to(logits_LV)
    place = (index_K.to(logits_LV.device), token_K.to(logits_LV.device))
    logit_K = logits_LV[place]
    punished_K = torch.where(logit_K > 0, logit_K / penalty_K, logit_K * penalty_K)
    # A huge logit stays finite, or there would be no probability to draw by.
    limit = torch.finfo(logits_LV.dtype).max
    logits_LV[place] = punished_K.clamp_(-limit, limit)


def _punish_answer(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> None:
    asking = [i for i, row in enumerate(rows) if row.params.counts_answer and row.answer]
    if not asking:
        return
    tokens = [rows[i].answer for i in asking]
    index_K, token_K, count_K = _distinct(asking, tokens, logits_LV.shape[1])
    frequency_K = _by_row([row.params.frequency_penalty for row in rows], index_K)
    presence_K = _by_row([row.params.presence_penalty for row in rows], index_K)
    place = (index_K.to(logits_LV.device), token_K.to(logits_LV.device))
    logits_LV[place] -= (frequency_K * count_K + presence_K).to(logits_LV)


def _forbid(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> None:
    pairs = [(index, token) for index, row in enumerate(rows) for token in sorted(row.forbidden)]
    if pairs:
        index_K, token_K = zip(*pairs, strict=True)
        logits_LV[_on(logits_LV, index_K), _on(logits_LV, token_K)] = -torch.inf


def _distinct(
    asking: Sequence[int], tokens: Sequence[Sequence[int]], vocabulary: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct (row, token) pairs and how often each occurs; on the CPU, where the tokens are."""
    flat = torch.tensor([token for each in tokens for token in each], dtype=torch.int64)
    owner = torch.tensor(asking).repeat_interleave(torch.tensor([len(each) for each in tokens]))
    pair_K, count_K = torch.unique(owner * vocabulary + flat, return_counts=True)
    return pair_K // vocabulary, pair_K % vocabulary, count_K


def _by_row(values: Sequence[float], index_K: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[index_K]


def _on(logits_LV: Tensor, values: Sequence[int]) -> Tensor:
    return torch.tensor(values, device=logits_LV.device)
