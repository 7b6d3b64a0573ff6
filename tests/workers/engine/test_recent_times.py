"""A quantile of the last minute, whoever asks."""

from __future__ import annotations

import pytest

from workers.engine.recent_times import MOST, WINDOW_S, RecentTimes


def test_a_quantile_is_a_time_that_was_seen() -> None:
    times = RecentTimes()
    assert times.quantile(0.99, 0.0) == 0.0
    for number in range(200):
        times.add(200.0 - number, now=0.1 * number)
    assert times.quantile(0.99, 20.0) == 198.0
    assert times.quantile(0.5, 20.0) == 100.0
    assert (times.quantile(0.0, 20.0), times.quantile(1.0, 20.0)) == (1.0, 200.0)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_what_is_older_than_a_minute_is_forgotten(share: float) -> None:
    times = RecentTimes()
    times.add(9.0, now=0.0)
    times.add(1.0, now=1.0)
    assert times.quantile(share, WINDOW_S + 0.5) == 1.0
    assert times.quantile(share, WINDOW_S + 1.5) == 0.0


def test_a_flood_of_requests_takes_no_more_memory() -> None:
    times = RecentTimes()
    for number in range(3 * MOST):
        times.add(float(number), now=0.0)
    assert times.quantile(0.0, 0.0) == 2 * MOST
