"""Sequences that share a forward never see each other, and each begins at position 0."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.training.tiny_jobs import Recorder, adapter, padded_loss, sequences, tiny_model, trainer
from training.batches import MAX_PADDING, OwnedSequence, split
from training.tokens import TokenSequence
from training.trainer import MultiAdapterTrainer


@pytest.fixture(scope="module")
def job() -> MultiAdapterTrainer:
    made = trainer(adapter("a", rank=2), adapter("b", family="lora"), recorder=Recorder())
    made.start()
    return made


def nll(job: MultiAdapterTrainer, *owned: tuple[int, TokenSequence]) -> Tensor:
    """nll_S by adapter, of one forward."""
    with torch.no_grad():
        return job._loss.summed_nll(
            [OwnedSequence(number, job.rows.slot_of(number), one) for number, one in owned]
        )


def joined(first: TokenSequence, second: TokenSequence) -> TokenSequence:
    return TokenSequence(first.tokens + second.tokens, first.learnt + second.learnt)


def test_a_sequences_loss_is_the_same_in_any_company(job: MultiAdapterTrainer) -> None:
    mine, *others = sequences("a", 9)
    alone = nll(job, (0, mine))[0]
    base = padded_loss(tiny_model(), [mine]) * mine.num_learnt
    assert alone.item() == pytest.approx(base.item(), rel=1e-5), "fresh rows change nothing"
    for number in (0, 1):
        company = [(number, other) for other in others]
        rest = nll(job, *company)[0]
        for packed in ([(0, mine), *company], [*company, (0, mine)]):
            assert (nll(job, *packed)[0] - rest).item() == pytest.approx(alone.item(), abs=1e-5)


def test_in_one_sequence_the_second_would_see_the_first(job: MultiAdapterTrainer) -> None:
    """The twin of the test above: this model's answers do depend on what stands before, and where."""
    first, second = sequences("a", 2)
    apart = nll(job, (0, first), (0, second))[0]
    together = nll(job, (0, joined(first, second)))[0]
    assert (apart - together).abs() > 1e-2


def test_a_long_sequence_beside_a_short_one_keeps_its_positions(job: MultiAdapterTrainer) -> None:
    short = sequences("a", 1)[0]
    long = short
    for other in sequences("b", 6):
        long = joined(long, other)
    expected = padded_loss(tiny_model(), [long]) * long.num_learnt
    found = nll(job, (0, short), (1, long), (0, short))
    assert found[1].item() == pytest.approx(expected.item(), rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 100))
def test_a_step_is_split_into_parts_whose_padding_has_a_bound(
    lengths: list[int], max_tokens: int
) -> None:
    """So that what a part takes is known from its tokens, however long and short are mixed."""
    owned = [OwnedSequence(0, 0, TokenSequence((3,) * (n + 1), (True,) * (n + 1))) for n in lengths]
    parts = list(split(owned, max_tokens))
    assert [one for part in parts for one in part] == owned
    for part in parts:
        sizes = [one.num_inputs for one in part]
        assert len(part) == 1 or sum(sizes) <= max_tokens
        assert len(part) == 1 or len(part) * max(sizes) <= MAX_PADDING * max_tokens
