"""How many replicas there should be: a pure function of what they report, and of how long that has been so.

Each signal names a number of replicas, and the largest wins. What is a sum over the cluster (work that waits, room in
use) is divided among as many replicas as bring each under its target; what is not (misses, waiting for a first token)
asks for one more at a time. More is granted after seconds; fewer after minutes, one replica at a time, and only if
those that stay would be well below every target, all of them have reported, and what they hold lies on two of them.

Knows nothing of Serve, which is asked for the number, or of placement, which says when a replica may leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields

from cluster.config import AutoscalingSettings


@dataclass(frozen=True, slots=True)
class ReplicaSignals:
    """What one replica says of its load."""

    queue_s: float = 0.0  # seconds it would need for the rank-weighted tokens that wait
    kv_used: float = 0.0  # part of its sequences or of its KV blocks in use, whichever is more
    misses_per_s: float = 0.0  # requests that found their adapter not on the device
    first_token_p99_s: float = 0.0  # of the last minute; 0 without any

    def as_stats(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def of_stats(cls, stats: Mapping[str, float]) -> ReplicaSignals | None:
        """None unless every signal is there and a finite number."""
        values = {field.name: stats.get(field.name, math.nan) for field in fields(cls)}
        return cls(**values) if all(map(math.isfinite, values.values())) else None


@dataclass(frozen=True, slots=True)
class Scale:
    """What should be. `wants_fewer`: a replica may leave as soon as placement is prepared for it."""

    replicas: int
    wants_fewer: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Heard:
    signals: ReplicaSignals
    stamp_s: float
    at_s: float


class Autoscaler:
    """One deployment's number of replicas. Not thread-safe.

    Args:
        clock: seconds; only differences matter.
    """

    def __init__(self, settings: AutoscalingSettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        self._running: frozenset[str] = frozenset()
        self._changed_s = -math.inf  # when replicas last came or went
        self._more_since_s: float | None = None
        self._fewer_since_s: float | None = None

    def report(self, replica_id: str, signals: ReplicaSignals, stamp_s: float) -> None:
        """Take a replica's word. `stamp_s` is its own clock's: the same again is no news, however often it is told."""
        before = self._heard.get(replica_id)
        if before is None or before.stamp_s != stamp_s:
            self._heard[replica_id] = _Heard(signals, stamp_s, self._clock())

    def decide(
        self, running: Collection[str], target: int, least: int, most: int, *, is_prepared: bool
    ) -> Scale:
        """How many there should be from now on: `least` to `most`, and never more than one below `target`.

        Args:
            running: replicas that take requests.
            target: what was decided before; more than run while some are starting, fewer while some are leaving.
            is_prepared: whoever leaves, what it holds lies on another replica. A replica that is still starting after
                all that run had little to do for the whole delay is given up without it.
        """
        now_s = self._clock()
        if frozenset(running) != self._running:
            self._running, self._changed_s = frozenset(running), now_s
        self._heard = {r: heard for r, heard in self._heard.items() if r in self._running}
        settings = self._settings
        fresh = [
            heard.signals
            for heard in self._heard.values()
            if now_s - heard.at_s <= settings.stale_after_s
        ]
        wanted, why = self._wanted(fresh, now_s)
        wanted = min(wanted, most)
        self._more_since_s = _since(self._more_since_s, wanted > target, now_s)
        # Whoever is silent may be the busiest of all.
        all_known = 0 < len(fresh) == len(self._running) <= target
        is_starting = len(self._running) < target
        stay = len(self._running) if is_starting else target - 1
        has_spare = all_known and max(wanted, least) < target and self._fits(fresh, stay)
        self._fewer_since_s = _since(self._fewer_since_s, has_spare, now_s)
        if target < least or target > most:
            return Scale(min(max(target, least), most), reason="within its bounds")
        if _has_lasted(self._more_since_s, settings.up_delay_s, now_s):
            return Scale(wanted, reason=why)
        if _has_lasted(self._fewer_since_s, settings.down_delay_s, now_s):
            if not (is_prepared or is_starting):  # one that does not run yet leaves nothing behind
                return Scale(target, wants_fewer=True, reason="until placement is prepared")
            self._fewer_since_s = None  # the next one waits as long again
            return Scale(target - 1, reason="below every target")
        return Scale(target)

    def check_integrity(self) -> None:
        """Raise AssertionError if it wants more and fewer, or remembers a replica that is gone."""
        assert self._more_since_s is None or self._fewer_since_s is None
        assert self._heard.keys() <= self._running

    def _wanted(self, fresh: Collection[ReplicaSignals], now_s: float) -> tuple[int, str]:
        """The most any signal asks for, and which one that is; 0 if nobody says anything."""
        if not fresh:
            return 0, ""
        settings = self._settings
        asked = {
            "work that waits": _share(sum(each.queue_s for each in fresh), settings.queue_s),
            "room in use": _share(sum(each.kv_used for each in fresh), settings.kv_used),
        }
        # These do not fall at once when a replica comes: one more, and then a look at what it brought.
        if now_s - self._changed_s >= settings.settle_s:
            more = len(self._running) + 1
            if max(each.misses_per_s for each in fresh) > settings.misses_per_s:
                asked["adapters not on the device"] = more
            if max(each.first_token_p99_s for each in fresh) > settings.first_token_s:
                asked["time to first token"] = more
        why = max(asked, key=asked.__getitem__)
        return asked[why], why

    def _fits(self, fresh: Collection[ReplicaSignals], count: int) -> bool:
        """Whether `count` replicas would stay well below every target."""
        settings, part = self._settings, self._settings.shrink_below
        return (
            sum(each.queue_s for each in fresh) <= part * settings.queue_s * count
            and sum(each.kv_used for each in fresh) <= part * settings.kv_used * count
            and sum(each.misses_per_s for each in fresh) <= part * settings.misses_per_s * count
            and max(each.first_token_p99_s for each in fresh) <= part * settings.first_token_s
        )


def _share(total: float, target: float) -> int:
    # What is a hair above a whole number by rounding only is not worth a replica.
    return math.ceil(total / target - 1e-9)


def _since(before_s: float | None, is_so: bool, now_s: float) -> float | None:
    if not is_so:
        return None
    return now_s if before_s is None else before_s


def _has_lasted(since_s: float | None, delay_s: float, now_s: float) -> bool:
    return since_s is not None and now_s - since_s >= delay_s
