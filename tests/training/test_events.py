"""Events are readable while they are written, by anyone, from anywhere in the file."""

from __future__ import annotations

import math
from pathlib import Path

from training.events import (
    AdapterFailed,
    AdapterPublished,
    AdapterStep,
    EventWriter,
    JobFinished,
    JobStarted,
    read_events,
)

STEP = AdapterStep(
    adapter="a", step=1, steps=2, loss=0.5, gradient_norm=1.0, learning_rate=8e-3, tokens_per_s=9.0
)


def test_events_come_back_as_they_were_told(tmp_path: Path) -> None:
    told = (
        JobStarted("job", ("a", "b"), 1),
        STEP,
        AdapterPublished("a", "f" * 64, "latest"),
        AdapterFailed("b", 3, "it broke"),
        JobFinished("job", ("a",), ("b",)),
    )
    tell = EventWriter(tmp_path / "deep" / "events.jsonl")
    for event in told:
        tell(event)
    assert read_events(tmp_path / "deep" / "events.jsonl").events == told


def test_a_reader_goes_on_where_it_was_and_never_sees_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_events(path).events == ()
    tell = EventWriter(path)
    tell(STEP)
    page = read_events(path)
    assert page.events == (STEP,)
    with path.open("ab") as file:
        file.write(b'{"event": "st')
    assert read_events(path, page.next).events == ()
    with path.open("ab") as file:
        file.write(path.read_bytes()[len('{"event": "st') : page.next])
    assert read_events(path, page.next).events == (STEP,)


def test_a_number_that_is_not_finite_survives_json(tmp_path: Path) -> None:
    EventWriter(tmp_path / "e")(
        AdapterStep("a", 1, 2, math.nan, math.inf, learning_rate=8e-3, tokens_per_s=9.0)
    )
    (event,) = read_events(tmp_path / "e").events
    assert isinstance(event, AdapterStep)
    assert math.isnan(event.loss) and math.isnan(event.gradient_norm)
