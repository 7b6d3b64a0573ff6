"""Which queued jobs train together, and when. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from training.service.job import FineTuningJob, FineTuningStatus


def due_batches(
    jobs: Iterable[FineTuningJob], now_s: float, *, wait_s: float, largest: int, most: int
) -> list[tuple[FineTuningJob, ...]]:
    """The batches that should start now, each of jobs that fit into one training job.

    Jobs of one tenant, base and dtype share a batch; it starts when it is full or its oldest job waited long enough.
    Jobs that make the same adapter run one after another, in the order they came, so that the last one wins.

    Only as many start as leave no more than `most` running; of those that could, one of the tenant with the fewest
    running batches goes first, then the one with the oldest job.

    Args:
        jobs: all that did not end, in any order.
        wait_s: how long a job waits for company.
        largest: adapters in one batch, at most.
        most: batches that run at once.
    """
    ordered = sorted(jobs, key=lambda job: (job.created_s, job.job_id))
    waiting: dict[tuple[str, ...], list[FineTuningJob]] = {}
    taken: set[tuple[str, str]] = set()
    running: dict[str, str] = {}  # batch → tenant
    for job in ordered:
        if job.status.is_final:
            continue
        adapter = (job.request.tenant, job.name)
        is_first = adapter not in taken
        taken.add(adapter)
        if job.batch is not None:
            running[job.batch] = job.request.tenant
        if is_first and job.status is FineTuningStatus.QUEUED and job.batch is None:
            waiting.setdefault(_company(job), []).append(job)
    due = [
        batch
        for company in waiting.values()
        for batch in _chunks(company, largest)
        if len(batch) == largest or batch[0].is_alone or _has_waited(batch, now_s, wait_s)
    ]
    of_tenant = Counter(running.values())
    begun: list[tuple[FineTuningJob, ...]] = []
    while due and len(running) + len(begun) < most:
        first = min(due, key=lambda batch: (of_tenant[batch[0].request.tenant], batch[0].created_s))
        due.remove(first)
        begun.append(first)
        of_tenant[first[0].request.tenant] += 1
    return begun


def _company(job: FineTuningJob) -> tuple[str, ...]:
    """Jobs with the same answer may share a batch."""
    asked = job.request
    return (asked.tenant, asked.base, asked.dtype, job.job_id if job.is_alone else "")


def _chunks(jobs: Sequence[FineTuningJob], size: int) -> list[tuple[FineTuningJob, ...]]:
    return [tuple(jobs[start : start + size]) for start in range(0, len(jobs), size)]


def _has_waited(batch: Sequence[FineTuningJob], now_s: float, wait_s: float) -> bool:
    return any(now_s - (job.queued_s or job.created_s) >= wait_s for job in batch)
