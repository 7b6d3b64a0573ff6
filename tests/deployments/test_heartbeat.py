"""What a heartbeat leaves out because its receiver knows it."""

from __future__ import annotations

from cluster.table import ReplicaReport
from deployments.heartbeat import brief
from storage.identity import AdapterVersion

ONE, TWO = AdapterVersion("1" * 64), AdapterVersion("2" * 64)


def report(
    *, device: tuple[AdapterVersion, ...], disk: tuple[AdapterVersion, ...]
) -> ReplicaReport:
    return ReplicaReport("a", rows=8, num_bytes=100, device=device, host=(ONE,), disk=disk)


def test_memory_and_disk_are_told_when_they_changed_and_the_device_always() -> None:
    first = report(device=(), disk=(ONE,))
    assert brief(first, None) == first
    second = brief(report(device=(ONE,), disk=(ONE,)), first)
    assert (second.device, second.host, second.disk, second.is_brief) == ((ONE,), (), (), True)
    third = report(device=(ONE,), disk=(ONE, TWO))
    assert brief(third, first) == third
