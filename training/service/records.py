"""Where jobs of the API are kept, and how several desks and ingresses change them without losing each other's word.

fine-tuning/jobs/<tenant>/<job>.json            the record, changed by compare-and-swap
fine-tuning/desks/<desk>/open/<tenant>/<job>    a job that the desk of its base has not put away yet
fine-tuning/requests/<tenant>/<digest>.json     which job a request with an idempotency key made
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from pydantic import BaseModel, ConfigDict

from storage.errors import AdapterCorruptError, InvalidRequestError, NotFoundError, TooManyJobsError
from storage.identity import canonical_json, sha256_hex
from storage.index import parallel
from storage.object_store import ObjectStore, PreconditionFailedError
from storage.records import encode, read, swap
from training.service.job import FineTuningJob, FineTuningRequest, new_job_id

Change = Callable[[FineTuningJob], FineTuningJob | None]

_ROOT = "fine-tuning"
_DESK_DIGITS = 16

LOST_AFTER_S = 3600.0
"""How old a mark without a record is when no record will come."""

_log = logging.getLogger(__name__)


class _Asked(BaseModel):
    """What a request with an idempotency key made. `digest` is the request's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    digest: str


class JobRecords:
    """Every method blocks, and raises StoreUnavailableError when the store cannot be reached."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def create(
        self, request: FineTuningRequest, now_s: float, idempotency_key: str | None = None
    ) -> FineTuningJob:
        """A new job; the one there is already when the same request came under the same key.

        Raises:
            InvalidRequestError: the key is that of another request.
        """
        job_id = new_job_id(now_s)
        if idempotency_key is not None:
            job_id = self._id_under_key(request, job_id, idempotency_key)
        job = FineTuningJob.new(job_id, request, now_s)
        # First the mark: a desk passes over one that has no record yet, and would never see a record without a mark.
        self._store.put(_mark(job), b"{}")
        try:
            self._store.put_if_absent(_record(request.tenant, job_id), encode(job))
        except PreconditionFailedError:
            return self.get(request.tenant, job_id)
        if not self._store.exists(_mark(job)):  # so long ago that the mark was taken for a lost one
            self._store.put(_mark(job), b"{}")
        return job

    def has_request(self, tenant: str, idempotency_key: str) -> bool:
        """Whether a request came under this key before."""
        return self._store.exists(_request(tenant, idempotency_key))

    def get(self, tenant: str, job_id: str) -> FineTuningJob:
        """Raises NotFoundError, also for another tenant's job."""
        found = self._find(tenant, job_id)
        if found is None:
            raise NotFoundError(
                f"the fine-tuning job {job_id!r} does not exist", param="fine_tuning_job_id"
            )
        return found

    def page(self, tenant: str, after: str | None, limit: int) -> tuple[list[FineTuningJob], bool]:
        """A tenant's jobs, newest first, those older than `after`; and whether there are more.

        Jobs whose record is damaged are left out, here and wherever several are asked for.
        """
        folder = f"{_ROOT}/jobs/{tenant}/"
        ids = [
            one.key.removeprefix(folder).removesuffix(".json") for one in self._store.list(folder)
        ]
        ids = [one for one in reversed(ids) if after is None or one < after]
        found = parallel(lambda job_id: self._readable(tenant, job_id), ids[:limit])
        return [job for job in found if job is not None], len(ids) > limit

    def find(self, job_id: str) -> FineTuningJob | None:
        """A job of any tenant."""
        for tenant, found in self._all():
            if found == job_id:
                return self._find(tenant, job_id)
        return None

    def newest(self, limit: int) -> list[FineTuningJob]:
        """So many jobs of all tenants, newest first."""
        ids = sorted(self._all(), key=lambda found: found[1], reverse=True)
        jobs = parallel(lambda found: self._readable(*found), ids[:limit])
        return [job for job in jobs if job is not None]

    def change(self, job: FineTuningJob, change: Change) -> FineTuningJob:
        """The job as `change` leaves its newest state, which may be unchanged. Raises NotFoundError.

        One that has ended is returned as it is: it never changes again.
        """
        if job.status.is_final:
            return job

        def apply(current: FineTuningJob | None) -> FineTuningJob | None:
            return None if current is None else change(current)

        tenant = job.request.tenant
        changed = swap(self._store, _record(tenant, job.job_id), FineTuningJob, apply)
        return changed if changed is not None else self.get(tenant, job.job_id)

    def open(self, base_id: str) -> list[FineTuningJob]:
        """The jobs on the desk of a base, in the order they came."""
        folder = f"{desk_folder(base_id)}open/"
        marks = [one.key.removeprefix(folder) for one in self._store.list(folder)]
        found = parallel(self._marked, marks)
        return sorted((job for job in found if job is not None), key=lambda job: job.job_id)

    def forget_lost_marks(self, base_id: str, now_s: float) -> None:
        """Remove what lies on the desk for `LOST_AFTER_S` and is no job's: its maker died before the record came."""
        folder = f"{desk_folder(base_id)}open/"
        old = [one.key for one in self._store.list(folder) if now_s - one.modified_s > LOST_AFTER_S]

        def forget(key: str) -> None:
            mark = key.removeprefix(folder)
            if self._has_record(mark):
                return
            self._store.delete(key)
            # The record came at this very moment, from a maker that saw the mark there.
            if self._has_record(mark):
                self._store.put(key, b"{}")

        parallel(forget, old)

    def is_awaited(self, base_id: str, tenant: str, name: str) -> bool:
        """Whether a job of the tenant that did not end makes an adapter of this name."""
        folder = f"{desk_folder(base_id)}open/{tenant}/"
        ids = [one.key.removeprefix(folder) for one in self._store.list(folder)]
        found = parallel(lambda job_id: self._readable(tenant, job_id), ids)
        return any(job and job.name == name and not job.status.is_final for job in found)

    def check_room(self, base_id: str, tenant: str, most: int) -> None:
        """Raises TooManyJobsError: the tenant has so many jobs of this base that did not end.

        Jobs made at the same moment may together exceed that.
        """
        folder = f"{desk_folder(base_id)}open/"
        marks = [one.key.removeprefix(folder) for one in self._store.list(f"{folder}{tenant}/")]
        if len(marks) < most:
            return
        found = parallel(self._marked, marks)
        count = sum(job is not None and not job.status.is_final for job in found)
        if count >= most:
            raise TooManyJobsError(
                f"this tenant has {count} jobs that wait or run, and may have {most}; wait for one of them to end, or "
                "cancel one"
            )

    def put_away(self, job: FineTuningJob) -> None:
        """The desk needs to do no more about a job."""
        self._store.delete(_mark(job))

    def _all(self) -> Iterator[tuple[str, str]]:
        """Tenant and id of every job."""
        folder = f"{_ROOT}/jobs/"
        for one in self._store.list(folder):
            tenant, _, name = one.key.removeprefix(folder).partition("/")
            yield tenant, name.removesuffix(".json")

    def _id_under_key(self, request: FineTuningRequest, job_id: str, key: str) -> str:
        place = _request(request.tenant, key)
        # A seed that was not asked for is drawn anew each time.
        drawn = {"seed"} if request.is_seed_drawn else set()
        digest = sha256_hex(canonical_json(request.model_dump(mode="json", exclude=drawn)))
        try:
            self._store.put_if_absent(place, encode(_Asked(job_id=job_id, digest=digest)))
        except PreconditionFailedError:
            asked = read(self._store, place, _Asked)
            if asked is None or asked.digest != digest:
                raise InvalidRequestError(
                    "this Idempotency-Key was sent with another request before",
                    param="Idempotency-Key",
                ) from None
            return asked.job_id
        return job_id

    def _marked(self, mark: str) -> FineTuningJob | None:
        tenant, _, job_id = mark.partition("/")
        return self._readable(tenant, job_id)

    def _has_record(self, mark: str) -> bool:
        """Also one that is damaged."""
        tenant, _, job_id = mark.partition("/")
        return _is_id(job_id) and self._store.exists(_record(tenant, job_id))

    def _readable(self, tenant: str, job_id: str) -> FineTuningJob | None:
        try:
            return self._find(tenant, job_id)
        except AdapterCorruptError as error:
            _log.error("a job is left out: %s", error.message)
            return None

    def _find(self, tenant: str, job_id: str) -> FineTuningJob | None:
        if not _is_id(job_id):
            return None
        return read(self._store, _record(tenant, job_id), FineTuningJob)


def desk_folder(base_id: str) -> str:
    """Of the desk that sees to the jobs of one base."""
    return f"{_ROOT}/desks/{sha256_hex(base_id.encode())[:_DESK_DIGITS]}/"


def _is_id(text: str) -> bool:
    return text.startswith("ftjob-") and text[6:].isalnum() and text.isascii()


def _request(tenant: str, idempotency_key: str) -> str:
    return f"{_ROOT}/requests/{tenant}/{sha256_hex(idempotency_key.encode())}.json"


def _record(tenant: str, job_id: str) -> str:
    return f"{_ROOT}/jobs/{tenant}/{job_id}.json"


def _mark(job: FineTuningJob) -> str:
    return f"{desk_folder(job.request.base_id)}open/{job.request.tenant}/{job.job_id}"
