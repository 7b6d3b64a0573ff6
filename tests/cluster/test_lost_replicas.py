"""What a router found dead is tried last, and not for ever."""

from __future__ import annotations

from cluster.lost_replicas import REMEMBERED_S, LostReplicas
from tests.cluster.clocks import ManualClock


def test_lost_and_avoided_replicas_go_last_and_nobody_goes_missing() -> None:
    lost = LostReplicas(ManualClock())
    assert lost.put_last(["a", "b", "c"]) == ["a", "b", "c"]
    lost.add("a")
    assert lost.put_last(["a", "b", "c"]) == ["b", "c", "a"]
    assert lost.put_last(["a", "b", "c"], avoided="b") == ["c", "a", "b"]
    assert lost.put_last(["a"]) == ["a"], "the only one is better than none"


def test_a_replica_is_forgiven_after_a_while() -> None:
    clock = ManualClock()
    lost = LostReplicas(clock)
    lost.add("a")
    clock.advance(REMEMBERED_S - 1)
    assert lost.put_last(["a", "b"]) == ["b", "a"]
    clock.advance(1)
    assert lost.put_last(["a", "b"]) == ["a", "b"]
