"""What stands behind the routes of training jobs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from deployments.training_service import _Histories
from storage.local_store import LocalObjectStore
from training.job_store import EventPage, JobStore


def test_nobody_waits_for_the_events_of_another_training_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    read = JobStore.read_events

    def slow(self: JobStore, cursor: str = "") -> EventPage:
        if "slow" in self.folder:
            begun.set()
            assert go_on.wait(20)
        return read(self, cursor)

    monkeypatch.setattr(JobStore, "read_events", slow)
    histories = _Histories(LocalObjectStore(tmp_path))
    waiting = threading.Thread(target=histories.of, args=("slow", "a"), daemon=True)
    asking = threading.Thread(target=histories.of, args=("quick", "a"), daemon=True)
    waiting.start()
    assert begun.wait(20)
    asking.start()
    asking.join(10)
    is_answered = not asking.is_alive()
    go_on.set()
    waiting.join(20)
    assert is_answered
