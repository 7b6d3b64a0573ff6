"""Events survive being written down."""

from __future__ import annotations

import math

import pytest

from training.events import (
    AdapterFailed,
    AdapterPublished,
    AdapterStep,
    JobFinished,
    JobStarted,
    TrainingEvent,
    event_line,
    parse_event,
)


@pytest.mark.parametrize(
    "event",
    [
        JobStarted("job", ("a", "b"), 1, at_s=7.25),
        AdapterStep("a", 1, 2, 0.5, gradient_norm=1.0, learning_rate=8e-3, tokens_per_s=9.0),
        AdapterPublished("a", "f" * 64, "latest"),
        AdapterFailed("b", 3, "it broke\nin two lines"),
        JobFinished("job", ("a",), ("b",)),
    ],
)
def test_an_event_comes_back_as_it_was_told(event: TrainingEvent) -> None:
    line = event_line(event)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    again = parse_event(line)
    assert again == event and again.at_s == event.at_s


def test_a_number_that_is_not_finite_survives_json() -> None:
    told = AdapterStep("a", 1, 2, math.nan, math.inf, learning_rate=8e-3, tokens_per_s=9.0)
    again = parse_event(event_line(told))
    assert isinstance(again, AdapterStep)
    assert math.isnan(again.loss) and math.isnan(again.gradient_norm)


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"event": "news"}', b'{"event": "step"}'])
def test_what_is_no_event_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        parse_event(line)
