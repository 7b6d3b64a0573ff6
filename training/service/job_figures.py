"""How many jobs lie on a desk, how they ended, and how many tokens they trained on: for whoever runs the cluster.

Knows nothing of tenants and names, so it stays as small however many jobs there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from storage.figures import FigureBook, FigureKey, Figures
from training.service.job import FineTuningJob, FineTuningStatus


class JobFigures:
    """One thread sees jobs; any may read."""

    def __init__(self) -> None:
        self._book = FigureBook()
        self._counted: frozenset[str] = frozenset()  # jobs that ended, and lie on the desk still
        self._open: Counter[FineTuningStatus] = Counter()
        for status in FineTuningStatus:
            if status.is_final:
                self._book.count("flora_training_jobs_ended_total", status, by=0)
        self._book.count("flora_training_tokens_total", by=0)

    def see(self, jobs: Iterable[FineTuningJob]) -> None:
        """All jobs on the desk, as they are now. One that has ended lies there once more, and is counted once.

        A desk that takes over from another may count again what ended just then.
        """
        jobs = list(jobs)
        self._open = Counter(job.status for job in jobs if not job.status.is_final)
        ended = {job.job_id: job for job in jobs if job.status.is_final}
        for job_id in ended.keys() - self._counted:
            self._book.count("flora_training_jobs_ended_total", ended[job_id].status)
            self._book.count("flora_training_tokens_total", by=ended[job_id].tokens or 0)
        self._counted = frozenset(ended)

    def leave(self) -> None:
        """Somebody else works at the desk: what lies there is theirs to tell."""
        self._open = Counter()

    def read(self) -> Figures:
        counts = self._open
        gauges: dict[FigureKey, float] = {
            ("flora_training_jobs", (status.value,)): float(counts[status])
            for status in FineTuningStatus
            if not status.is_final
        }
        return self._book.read().merged(Figures(gauges=gauges))
