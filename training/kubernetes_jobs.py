"""Training jobs as RayJob objects, made through the Kubernetes API by the pod's own service account.

Serving and training do not share a Ray cluster there: KubeRay starts one for each job and ends it with the job. An
attempt is an object of its own, so that what is known of an earlier one stays to be looked at. No object has a secret
in it: credentials come from the Secrets that the template refers to.
"""

from __future__ import annotations

import copy
import hashlib
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from storage.errors import SpecificationError
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

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
IN_CLUSTER = "https://kubernetes.default.svc"
JOB_LABEL = "flora.training/job"
ATTEMPT_LABEL = "flora.training/attempt"

_KIND = ("ray.io/v1", "RayJob")
_TIMEOUT_S = 10.0
_PASSING = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS)
_LONGEST_NAME = 40  # KubeRay allows 47, and an attempt's number follows
_STATUS = {
    "PENDING": JobStatus.QUEUED,
    "RUNNING": JobStatus.RUNNING,
    "SUCCEEDED": JobStatus.SUCCEEDED,
    "FAILED": JobStatus.FAILED,
    "STOPPED": JobStatus.CANCELLED,
}


class KubernetesJobBackend:
    """A `JobBackend`.

    Args:
        template: a RayJob that every job's is made from: cluster, image, resources, Secrets.
        settings: what the job shall work with; handed on as environment variables.
        api_url: of the Kubernetes API.
        account: the folder with the service account's token, namespace and certificate; read at every request, for
            tokens change.
    """

    def __init__(
        self,
        template: Path,
        settings: JobSettings,
        api_url: str = IN_CLUSTER,
        account: Path = SERVICE_ACCOUNT,
    ) -> None:
        self._template = _read_template(template)
        self._settings = settings
        self._api_url = api_url
        self._account = account

    def submit(self, spec_key: str, job_id: str) -> JobInfo:
        checked_name(job_id, param="job_id")
        last = self._last_attempt(job_id)
        if last is not None and last.info.status is not JobStatus.FAILED:
            return last.info
        number = 1 if last is None else last.number + 1
        made = self._request("POST", self._jobs, json=self._manifest(spec_key, job_id, number))
        if made.status_code != httpx.codes.CONFLICT:
            _checked(made)
            return self.get(job_id)
        # Somebody else began the same attempt; or something else has its name.
        begun = self._last_attempt(job_id)
        if begun is None:
            raise _refusal(made)
        return begun.info

    def get(self, job_id: str) -> JobInfo:
        return self._known(job_id).info

    def cancel(self, job_id: str) -> JobInfo:
        last = self._known(job_id)
        if last.info.status.is_final:
            return last.info
        # A suspended job has no cluster any more, and is still there to be asked for.
        _checked(
            self._request(
                "PATCH",
                f"{self._jobs}/{last.name}",
                json={"spec": {"suspend": True}},
                headers={"Content-Type": "application/merge-patch+json"},
            )
        )
        return self.get(job_id)

    def logs(self, job_id: str) -> Iterator[str]:
        last = self._known(job_id)
        pods = f"/api/v1/namespaces/{self._namespace}/pods"
        # The pod that KubeRay submits with; it prints what the driver prints.
        found = _checked(
            self._request("GET", pods, params={"labelSelector": f"job-name={last.name}"})
        )
        for pod in found.json()["items"]:
            log = self._request("GET", f"{pods}/{pod['metadata']['name']}/log")
            if log.is_success:  # a pod that did not start yet has none
                yield from log.text.splitlines()

    def _manifest(self, spec_key: str, job_id: str, number: int) -> dict[str, Any]:
        made = copy.deepcopy(self._template)
        labels = {JOB_LABEL: _name(job_id), ATTEMPT_LABEL: str(number)}
        name = f"{_name(job_id)}-{number}"
        made["metadata"] = {"name": name, "labels": made["metadata"].get("labels", {}) | labels}
        environment = {"env_vars": as_environment(self._settings, is_here=False)}
        made["spec"] |= {
            "entrypoint": entrypoint(spec_key, job_id),
            "runtimeEnvYAML": yaml.safe_dump(environment),
        }
        return made

    def _known(self, job_id: str) -> _Attempt:
        last = self._last_attempt(job_id)
        if last is None:
            raise unknown_job(job_id)
        return last

    def _last_attempt(self, job_id: str) -> _Attempt | None:
        selector = f"{JOB_LABEL}={_name(job_id)}"
        found = _checked(self._request("GET", self._jobs, params={"labelSelector": selector}))
        attempts = [_attempt(job_id, item) for item in found.json()["items"]]
        return max(attempts, key=lambda attempt: attempt.number, default=None)

    @property
    def _jobs(self) -> str:
        return f"/apis/ray.io/v1/namespaces/{self._namespace}/rayjobs"

    @property
    def _namespace(self) -> str:
        return self._read("namespace")

    def _read(self, name: str) -> str:
        try:
            return (self._account / name).read_text().strip()
        except OSError:
            raise ClusterRefusedError(
                "jobs are to run on Kubernetes, but this process has no service account there"
            ) from None

    def _request(
        self, method: str, path: str, headers: dict[str, str] | None = None, **options: Any
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._read('token')}", **(headers or {})}
        certificate = self._account / "ca.crt"
        verify = ssl.create_default_context(cafile=certificate) if certificate.exists() else True
        try:
            with httpx.Client(
                base_url=self._api_url, verify=verify, timeout=_TIMEOUT_S, trust_env=False
            ) as client:
                return client.request(method, path, headers=headers, **options)
        except httpx.HTTPError as error:
            raise ClusterAwayError(f"the Kubernetes API does not answer: {error}") from error


@dataclass(frozen=True, slots=True)
class _Attempt:
    number: int  # from 1
    name: str
    info: JobInfo


def _attempt(job_id: str, item: dict[str, Any]) -> _Attempt:
    metadata, status = item["metadata"], item.get("status") or {}
    message = ": ".join(filter(None, (status.get("reason"), status.get("message"))))
    return _Attempt(
        int(metadata["labels"][ATTEMPT_LABEL]),
        metadata["name"],
        JobInfo(job_id, _status(item["spec"], status), message),
    )


def _status(spec: dict[str, Any], status: dict[str, Any]) -> JobStatus:
    job = _STATUS.get(status.get("jobStatus", ""), JobStatus.QUEUED)
    match status.get("jobDeploymentStatus"):
        case "Complete" if job.is_final:
            return job
        # Complete, and no word of how: nothing more will come of it.
        case "Complete" | "Failed" | "ValidationFailed":
            return JobStatus.FAILED
        case _ if spec.get("suspend"):
            return JobStatus.CANCELLED
        case "Running" if job is JobStatus.RUNNING:
            return job
        # The driver may have ended; KubeRay's word is out only when it says Complete.
        case "Running" if job.is_final:
            return JobStatus.RUNNING
        case _:
            return JobStatus.QUEUED


def _name(job_id: str) -> str:
    """A job's name there: its id, or where Kubernetes would not take that, a digest of it."""
    if re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", job_id) and len(job_id) <= _LONGEST_NAME:
        return job_id
    return f"job-{hashlib.sha256(job_id.encode()).hexdigest()[:24]}"


def _read_template(path: Path) -> dict[str, Any]:
    """Raises SpecificationError: it cannot be read, or is no RayJob."""
    try:
        template: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecificationError(
            f"{path.name}: cannot be read: {error}", param="training.kubernetes_template"
        ) from None
    is_job = (
        isinstance(template, dict) and (template.get("apiVersion"), template.get("kind")) == _KIND
    )
    if not is_job or "rayClusterSpec" not in template.get("spec", {}):
        raise SpecificationError(
            f"{path.name}: is no RayJob with a rayClusterSpec", param="training.kubernetes_template"
        )
    return template


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    raise _refusal(response)


def _refusal(response: httpx.Response) -> ClusterAwayError | ClusterRefusedError:
    """Whether another try alone may change it."""
    try:
        reason = response.json()["message"]
    except (ValueError, KeyError, TypeError):
        reason = "it gave no reason"
    said = f"the Kubernetes API refused with status {response.status_code}: {reason}"
    if response.is_client_error and response.status_code not in _PASSING:
        return ClusterRefusedError(said)
    return ClusterAwayError(said)
