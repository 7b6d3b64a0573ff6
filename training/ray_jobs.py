"""Training jobs through a Ray cluster's job server, this machine's or another's.

The token comes from where Ray itself looks for it (`RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH`, the user's home); it is
never passed on in a job's environment or metadata.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus as RayStatus
from ray.job_submission import JobSubmissionClient

from storage.identity import checked_name
from training.backend import (
    ClusterAwayError,
    ClusterRefusedError,
    JobInfo,
    JobStatus,
    entrypoint,
    unknown_job,
)
from training.job_settings import JobSettings, as_environment

_STATUS = {
    RayStatus.PENDING: JobStatus.QUEUED,
    RayStatus.RUNNING: JobStatus.RUNNING,
    RayStatus.SUCCEEDED: JobStatus.SUCCEEDED,
    RayStatus.FAILED: JobStatus.FAILED,
    RayStatus.STOPPED: JobStatus.CANCELLED,
}

_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_environment = threading.Lock()


class RayJobBackend:
    """A `JobBackend`. Connects when used, so that a cluster that is down now may be up later.

    Args:
        address: of the job server, e.g. http://127.0.0.1:8265; Ray's own choice (`RAY_API_SERVER_ADDRESS`) if None.
        settings: what the job shall work with; handed on as environment variables.
        working_dir: the checkout to upload; None where the cluster's machines have the code.
    """

    def __init__(
        self, address: str | None, settings: JobSettings, working_dir: Path | None = None
    ) -> None:
        self._address = address
        self._settings = settings
        self._working_dir = working_dir

    def submit(self, spec_key: str, job_id: str) -> JobInfo:
        checked_name(job_id, param="job_id")
        client = self._client()
        last = _last_attempt(client, job_id)
        if last is not None and last.info.status is not JobStatus.FAILED:
            return last.info
        attempt_id = _attempt_id(job_id, 1 if last is None else last.number + 1)
        is_here = self._working_dir is None
        variables = as_environment(self._settings, is_here=is_here)
        environment: dict[str, object] = {"env_vars": variables}
        if self._working_dir is not None:
            environment["working_dir"] = str(self._working_dir)
        try:
            client.submit_job(
                entrypoint=entrypoint(spec_key, job_id),
                submission_id=attempt_id,
                runtime_env=environment,
            )
        except RuntimeError as error:
            # The id is taken: somebody else began the same attempt. Anything else is a refusal.
            if _find(client, attempt_id) is None:
                raise ClusterAwayError(f"the cluster did not take the job: {error}") from error
        return self.get(job_id)

    def get(self, job_id: str) -> JobInfo:
        return _known_attempt(self._client(), job_id).info

    def cancel(self, job_id: str) -> JobInfo:
        client = self._client()
        last = _known_attempt(client, job_id)
        if not last.info.status.is_final:
            client.stop_job(_attempt_id(job_id, last.number))
        return self.get(job_id)

    def logs(self, job_id: str) -> Iterator[str]:
        client = self._client()
        last = _known_attempt(client, job_id)
        yield from client.get_job_logs(_attempt_id(job_id, last.number)).splitlines()

    def _client(self) -> JobSubmissionClient:
        try:
            with _alone(self._address):
                return JobSubmissionClient(self._address)
        except AuthenticationError as error:
            raise ClusterRefusedError(f"{self._server} takes no job from here: {error}") from error
        except (OSError, RuntimeError) as error:
            raise ClusterAwayError(f"{self._server} cannot be used: {error}") from error

    @property
    def _server(self) -> str:
        return f"the job server at {self._address or 'the default address'}"


@contextmanager
def _alone(address: str | None) -> Iterator[None]:
    """Ray's variables, which a pod or a shell may have for another cluster, override an address that is given."""
    if address is None:
        yield
        return
    with _environment:
        hidden = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
        try:
            yield
        finally:
            os.environ.update(hidden)


@dataclass(frozen=True, slots=True)
class _Attempt:
    number: int  # from 1
    info: JobInfo


def _attempt_id(job_id: str, number: int) -> str:
    """Ray's name of an attempt; it takes no name twice."""
    return job_id if number == 1 else f"{job_id}--{number}"


def _last_attempt(client: JobSubmissionClient, job_id: str) -> _Attempt | None:
    last = None
    for number in itertools.count(1):
        found = _find(client, _attempt_id(job_id, number))
        if found is None:
            return last
        last = _Attempt(number, replace(found, job_id=job_id))
    raise AssertionError("attempts end")


def _known_attempt(client: JobSubmissionClient, job_id: str) -> _Attempt:
    last = _last_attempt(client, job_id)
    if last is None:
        raise unknown_job(job_id)
    return last


def _find(client: JobSubmissionClient, attempt_id: str) -> JobInfo | None:
    try:
        found = client.get_job_info(attempt_id)
    except OSError as error:  # what requests raises when nobody answers
        raise ClusterAwayError(f"the job server does not answer: {error}") from error
    except RuntimeError as error:
        if "does not exist" in str(error):
            return None
        raise ClusterAwayError(f"the job server refused: {error}") from error
    return JobInfo(attempt_id, _STATUS[found.status], found.message or "")
