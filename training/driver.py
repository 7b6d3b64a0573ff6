"""One job as its driver sees it, from its first word to its last. Knows nothing of Ray: running workers is a `Fit`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from storage.errors import FloraError, OverloadedError, StoreUnavailableError
from storage.object_store import ObjectStore
from training.checkpoints import Checkpoints
from training.events import EventSink, JobFailed, JobFinished, JobStarted
from training.job_end import JobResult, job_result, keep_picture, telling_line
from training.job_store import ALIVE_EVERY_S, DRIVER, JobStore
from training.patience import patiently
from training.rounds import Work

POLL_S = 1.0

Fit = Callable[[int, int], str | None]
"""Runs workers of the driver of this number, at most so many, to the job's end; returns why they did not get there."""

logger = logging.getLogger("flora.training")


def drive(
    store: ObjectStore,
    job_id: str,
    adapters: Sequence[str],
    work: Work,
    num_workers: int,
    fit: Fit,
    on_event: EventSink,
) -> JobResult:
    """Go on with a job from its last commit, and tell how it ends, whatever ends it.

    A store that cannot be reached for a moment ends nothing.

    Args:
        on_event: told every event as it happens, from a thread of its own.

    Raises:
        InvalidRequestError: the job of this id trains something else.
        OverloadedError: another driver has taken the job over.
        Whatever `fit`, the store and `on_event` raise.
    """
    job, checkpoints = JobStore(store, job_id), Checkpoints(store, job_id)
    commit = checkpoints.read(work.digest)
    left = work.left(commit) if commit is not None else work.costs
    workers = min(num_workers, len(left))

    def ended() -> JobResult:
        error = None
        if workers:
            driver = patiently(lambda: checkpoints.take_over(work.digest))
            error = fit(driver, workers)
            if error is not None and patiently(lambda: checkpoints.is_taken_over(work.digest)):
                raise OverloadedError(f"another driver of the job {job_id!r} has taken over")
        events = patiently(job.read_events).events
        keep_picture(job, job_id, events)
        return job_result(events, error)

    with followed(job, on_event), _seen_alive(job):
        with job.writer(DRIVER) as tell:
            tell(JobStarted(job_id, tuple(adapters), workers))
            try:
                result = ended()
            except BaseException as error:
                is_taken_over = isinstance(error, OverloadedError)
                tell(JobFailed(job_id, _reason(error), is_taken_over))
                raise
            if result.error is None:
                tell(JobFinished(job_id, tuple(result.published), tuple(result.failed)))
            else:
                tell(JobFailed(job_id, result.error))
        if result.error is None:
            _forget_finished(checkpoints)
    return result


@contextmanager
def followed(job: JobStore, on_event: EventSink) -> Iterator[None]:
    """Tell `on_event` what is told while the block runs, to the last event the store can be asked for.

    An error of `on_event` ends the telling, not the block; it is raised at the end.
    """
    done = threading.Event()

    def follow(cursor: str) -> None:
        while not done.wait(POLL_S):
            try:
                page = job.read_events(cursor)
            except StoreUnavailableError:
                continue
            cursor = page.next
            for event in page.events:
                on_event(event)
        try:
            page = patiently(lambda: job.read_events(cursor))
        except StoreUnavailableError as error:
            logger.warning("the job's last events are not shown here: %s", error.message)
            return
        for event in page.events:
            on_event(event)

    with ThreadPoolExecutor(1, thread_name_prefix="training-events") as thread:
        followed = thread.submit(follow, job.read_events().next)
        try:
            yield
        finally:
            done.set()
        followed.result()


@contextmanager
def _seen_alive(job: JobStore) -> Iterator[None]:
    """While the block runs, whoever reads of the job can tell it from one whose driver was killed."""
    done = threading.Event()

    def beat() -> None:
        while True:
            try:
                job.sign_of_life()
            except StoreUnavailableError as error:
                logger.warning("nobody can see that the job is alive: %s", error.message)
            if done.wait(ALIVE_EVERY_S):
                return

    thread = threading.Thread(target=beat, name="training-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _forget_finished(checkpoints: Checkpoints) -> None:
    try:
        patiently(checkpoints.finished.forget_all)
    except StoreUnavailableError as error:
        logger.warning("files of published adapters stay with the job: %s", error.message)


def _reason(error: BaseException) -> str:
    if isinstance(error, FloraError):
        return error.message
    return f"{type(error).__name__}: {telling_line(str(error))}"
