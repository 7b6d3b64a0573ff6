"""Fine-tuning jobs as the API shows them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest

from deployments.fine_tuning_views import checkpoints_view, event_us, events_view
from storage.errors import InvalidRequestError
from training.events import AdapterEvaluated, AdapterStep, TrainingEvent
from training.service.job import FineTuningJob, FineTuningRequest

REQUEST = FineTuningRequest(tenant="us", base="/b", base_id="b", training_file="file-1", seed=1)
STEPS = 1_000_000


def job(**fields: object) -> FineTuningJob:
    return FineTuningJob.new("ftjob-1", REQUEST, 5.0).model_copy(update=fields)


def step(number: int, at_s: float) -> AdapterStep:
    return AdapterStep("a", number, STEPS, 0.5, 1.0, 1e-3, 9.0, at_s=at_s)


class Told(Iterator[TrainingEvent]):
    """A million steps, newest first."""

    def __init__(self) -> None:
        self.taken = 0

    def __next__(self) -> TrainingEvent:
        self.taken += 1
        number = STEPS + 1 - self.taken
        return step(number, 10.0 + number)


def test_a_page_of_events_makes_no_others() -> None:
    told = Told()
    shown = list(islice(events_view(job(), told), 20))
    assert [one["data"]["step"] for one in shown] == list(range(STEPS, STEPS - 20, -1))
    assert told.taken < 25


def test_events_of_one_moment_are_all_told_wherever_a_page_ends() -> None:
    told = [step(9, 7.0), step(8, 6.0), step(7, 6.0), step(6, 6.0), step(5, 3.0)]
    whole = list(events_view(job(), told))
    assert len(whole) == 6 and len({one["id"] for one in whole}) == 6
    for after, rest in zip(whole, range(1, 7), strict=True):
        until_us = event_us(after["id"])
        older = [event for event in told if round(event.at_s * 1e6) <= until_us]
        assert list(events_view(job(), older, after["id"])) == whole[rest:]
    assert "created" in whole[4]["message"], "what happened outside of the training is in its place"


@pytest.mark.parametrize("event_id", ["", "ftevent-", "ftevent-5a81", "ftjob-1", "x" * 128])
def test_what_is_no_events_id_is_refused(event_id: str) -> None:
    with pytest.raises(InvalidRequestError, match="not an event's id"):
        event_us(event_id)


def test_a_checkpoint_is_made_of_the_last_losses_and_looks_no_further() -> None:
    told = Told()
    (shown,) = checkpoints_view(job(version="f" * 64), told)
    assert (shown["step_number"], told.taken) == (STEPS, 1)
    assert shown["metrics"]["full_valid_loss"] is None
    asked = REQUEST.model_copy(update={"validation_file": "file-2"})
    held_out = [step(2, 9.0), AdapterEvaluated("a", 2, 0.25, at_s=8.0), step(1, 7.0)]
    (shown,) = checkpoints_view(job(version="f" * 64, request=asked), held_out)
    assert shown["metrics"] == {"step": 2, "train_loss": 0.5, "full_valid_loss": 0.25}
    assert checkpoints_view(job(), Told()) == []
