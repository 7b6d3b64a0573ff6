"""Times of the last minute, for a quantile of them."""

from __future__ import annotations

import math
import threading
from collections import deque

WINDOW_S = 60.0
MOST = 2000
"""So many are kept at most, the latest."""


class RecentTimes:
    """Seconds. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: deque[tuple[float, float]] = deque(maxlen=MOST)  # (when, seconds)

    def add(self, seconds: float, now: float) -> None:
        with self._lock:
            self._times.append((now, seconds))

    def quantile(self, share: float, now: float) -> float:
        """The smallest of the last minute's times that `share` (0 to 1) of them do not exceed; 0 without any."""
        with self._lock:
            while self._times and now - self._times[0][0] > WINDOW_S:
                self._times.popleft()
            times = sorted(seconds for _, seconds in self._times)
        return times[max(0, math.ceil(share * len(times)) - 1)] if times else 0.0
