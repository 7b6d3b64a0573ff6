"""A job's learning curves: told twice counts once, and a picture shows what happened."""

from __future__ import annotations

import math
import struct

import pytest

from training.events import (
    AdapterEvaluated,
    AdapterFailed,
    AdapterStarted,
    AdapterStep,
    JobStarted,
    TrainingEvent,
)
from training.learning_curve import PICTURE_PIXELS, Curve, _label, curves_of, plot, sparkline


def started(adapter: str, step: int = 0) -> AdapterStarted:
    return AdapterStarted(adapter, "flora", 1, step, steps=9, sequences=4, truncated=0, dropped=0)


def step(adapter: str, number: int, loss: float) -> AdapterStep:
    return AdapterStep(adapter, number, 9, loss, 1.0, 1e-3, 100.0)


def falling(adapter: str, steps: int, height: float = 2.0) -> Curve:
    return Curve(adapter, tuple((n, height * 0.9**n) for n in range(1, steps + 1)))


def test_curves_have_every_adapter_with_its_own_losses() -> None:
    events: list[TrainingEvent] = [
        JobStarted("job", ("red", "blue"), 1),
        started("red"),
        step("red", 1, 3.0),
        step("red", 2, 2.0),
        AdapterEvaluated("red", 2, 2.5),
        AdapterFailed("red", 2, "it broke"),
    ]
    assert curves_of(events) == (
        Curve("red", ((1, 3.0), (2, 2.0)), ((2, 2.5),), is_failed=True),
        Curve("blue"),
    )


def test_steps_told_again_after_a_resume_count_once_and_later_ones_are_forgotten() -> None:
    first = [started("red"), *(step("red", n, 9.0) for n in (1, 2, 3))]
    first += [AdapterEvaluated("red", 3, 9.0)]
    again = [started("red", step=1), step("red", 2, 2.0)]
    (curve,) = curves_of([*first, *again])
    assert curve.training == ((1, 9.0), (2, 2.0))
    assert curve.held_out == ()


def test_a_loss_that_is_not_finite_is_no_point() -> None:
    (curve,) = curves_of([step("red", 1, 1.0), step("red", 2, math.nan), step("red", 3, math.inf)])
    assert curve.training == ((1, 1.0),)


def test_a_smoothed_loss_is_the_mean_around_its_step() -> None:
    curve = Curve("red", tuple((n, float(n % 2)) for n in range(1, 81)))
    smoothed = [loss for _, loss in curve.smoothed]
    assert [n for n, _ in curve.smoothed] == list(range(1, 81))
    assert smoothed[0] == pytest.approx(2 / 3)  # of 1, 0, 1
    assert all(abs(loss - 0.5) < 0.2 for loss in smoothed)


def test_one_lucky_batch_at_the_end_does_not_decide_how_an_adapter_came_out() -> None:
    steady = [(n, 1.0) for n in range(1, 101)]
    lucky = Curve("lucky", (*steady[:-1], (100, 0.1)))
    assert lucky.smoothed[-1][1] > 0.6


@pytest.mark.parametrize(
    ("losses", "width", "line"),
    [
        ((), 8, ""),
        ((1.0,), 8, "▁"),
        ((8.0, 1.0), 8, "█▁"),
        ((2.0, 2.0, 2.0), 8, "▁▁▁"),
        ((8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0), 8, "█▇▆▅▄▃▂▁"),
        ((8.0, 8.0, 1.0, 1.0, 8.0, 8.0), 3, "█▁█"),
    ],
)
def test_a_sparkline_is_high_where_the_loss_is(
    losses: tuple[float, ...], width: int, line: str
) -> None:
    assert sparkline(Curve("red", tuple(enumerate(losses, 1))), width) == line


@pytest.mark.parametrize("count", [0, 1, 12, 100])
def test_any_number_of_adapters_gives_a_picture(count: int) -> None:
    curves = [falling(f"adapter $_{n}", 30, 1.0 + n) for n in range(count)]
    picture = plot([*curves, Curve("never began")], "job")
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == PICTURE_PIXELS


def test_long_names_leave_the_picture_its_room() -> None:
    short, long = falling("red", 30), falling("red-as-a-rose-" * 4 + "r16-lr0.008", 30)
    assert _label(long) == "red-as-a-ro…-r16-lr0.008"
    assert _label(short) == "red"


def test_a_picture_shows_the_losses() -> None:
    one, other = falling("red", 30), falling("red", 30, 3.0)
    assert plot([one]) == plot([one])
    assert plot([one]) != plot([other])
