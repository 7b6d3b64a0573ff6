"""Training jobs through a Ray cluster's job server, this machine's or another's.

The token comes from where Ray itself looks for it (`RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH`, the user's home); it is
never passed on in a job's environment or metadata.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus as RayStatus
from ray.job_submission import JobSubmissionClient

from storage.errors import InvalidRequestError, OverloadedError
from storage.identity import checked_name
from training.backend import JobInfo, JobStatus
from training.job_settings import JobSettings, as_environment
from training.stored_spec import STORED

_STATUS = {
    RayStatus.PENDING: JobStatus.QUEUED,
    RayStatus.RUNNING: JobStatus.RUNNING,
    RayStatus.SUCCEEDED: JobStatus.SUCCEEDED,
    RayStatus.FAILED: JobStatus.FAILED,
    RayStatus.STOPPED: JobStatus.CANCELLED,
}


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
        environment: dict[str, object] = {"env_vars": as_environment(self._settings)}
        if self._working_dir is not None:
            environment["working_dir"] = str(self._working_dir)
        entrypoint = shlex.join(
            ["python", "-m", "training.job", f"{STORED}{spec_key}", "--job-id", job_id]
        )
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=environment)
        except RuntimeError as error:
            # The id is taken: the job exists, which is what was asked for. Anything else is a refusal.
            known = _find(client, job_id)
            if known is None:
                raise OverloadedError(f"the cluster did not take the job: {error}") from error
            return known
        return self.get(job_id)

    def get(self, job_id: str) -> JobInfo:
        known = _find(self._client(), job_id)
        if known is None:
            raise _unknown(job_id)
        return known

    def cancel(self, job_id: str) -> JobInfo:
        client = self._client()
        known = _find(client, job_id)
        if known is None:
            raise _unknown(job_id)
        if not known.status.is_final:
            client.stop_job(job_id)
        return self.get(job_id)

    def logs(self, job_id: str) -> Iterator[str]:
        client = self._client()
        if _find(client, job_id) is None:
            raise _unknown(job_id)
        yield from client.get_job_logs(job_id).splitlines()

    def _client(self) -> JobSubmissionClient:
        try:
            return JobSubmissionClient(self._address)
        except (OSError, RuntimeError, AuthenticationError) as error:
            raise OverloadedError(
                f"the job server at {self._address or 'the default address'} cannot be used: {error}"
            ) from error


def _find(client: JobSubmissionClient, job_id: str) -> JobInfo | None:
    try:
        found = client.get_job_info(job_id)
    except OSError as error:  # what requests raises when nobody answers
        raise OverloadedError(f"the job server does not answer: {error}") from error
    except RuntimeError as error:
        if "does not exist" in str(error):
            return None
        raise OverloadedError(f"the job server refused: {error}") from error
    return JobInfo(job_id, _STATUS[found.status], found.message or "")


def _unknown(job_id: str) -> InvalidRequestError:
    return InvalidRequestError(f"there is no training job {job_id!r}", param="job_id")
