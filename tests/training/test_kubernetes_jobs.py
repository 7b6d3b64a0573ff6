"""Jobs as RayJob objects: made through a Kubernetes API over real HTTP, and what KubeRay's CRD allows."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from storage.config import StorageSettings
from storage.errors import NotFoundError, SpecificationError
from tests.k8s.crds import crd_folder, errors, read_schema
from training.backend import ClusterAwayError, ClusterRefusedError, JobStatus
from training.config import TrainingSettings
from training.job_settings import JobSettings
from training.kubernetes_jobs import KubernetesJobBackend

TEMPLATE = Path(__file__).resolve().parents[2] / "k8s" / "training.yaml"
NAMESPACE = "flora"
TOKEN = "a-service-accounts-token"


@dataclass
class FakeApi:
    """The part of a Kubernetes API that is used: RayJobs of one namespace, and their submitters' logs."""

    url: str = ""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    refusal: tuple[int, Any] | None = None

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if self.refusal is not None and method == "POST":
            return self.refusal
        parts = urlsplit(path)
        wanted = parse_qs(parts.query).get("labelSelector", [""])[0].partition("=")
        match method, parts.path.strip("/").split("/"):
            case "GET", ["apis", "ray.io", "v1", "namespaces", "flora", "rayjobs"]:
                items = [
                    job
                    for job in self.jobs.values()
                    if job["metadata"]["labels"].get(wanted[0]) == wanted[2]
                ]
                return 200, {"items": items}
            case "POST", ["apis", "ray.io", "v1", "namespaces", "flora", "rayjobs"]:
                name = body["metadata"]["name"]
                if name in self.jobs:
                    return 409, {"message": "exists"}
                self.jobs[name] = body
                return 201, body
            case "PATCH", [*_, "rayjobs", name]:
                self.jobs[name]["spec"] |= body["spec"]
                return 200, self.jobs[name]
            case "GET", [*_, "pods"]:
                pods = [wanted[2]] if wanted[0] == "job-name" and wanted[2] in self.logs else []
                return 200, {"items": [{"metadata": {"name": pod}} for pod in pods]}
            case "GET", [*_, "pods", pod, "log"]:
                return 200, self.logs[pod]
        return 404, {"message": f"no {path}"}

    def says(self, name: str, deployment: str, job: str = "", **more: str) -> None:
        """What KubeRay writes into an object's status."""
        self.jobs[name]["status"] = {"jobDeploymentStatus": deployment, "jobStatus": job, **more}


@pytest.fixture
def api() -> Iterator[FakeApi]:
    fake = FakeApi()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = 401, {"message": "who are you?"}
            if self.headers.get("authorization") == f"Bearer {TOKEN}":
                status, answer = fake.answer(self.command, self.path, body)
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PATCH = answer

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "namespace").write_text(NAMESPACE)
    return tmp_path


@pytest.fixture
def backend(api: FakeApi, account: Path) -> KubernetesJobBackend:
    settings = JobSettings(
        storage=StorageSettings(registry="s3://flora/registry"),
        training=TrainingSettings(backend="kubernetes", num_workers=2),
    )
    return KubernetesJobBackend(TEMPLATE, settings, api.url, account)


def test_a_job_is_an_object_that_the_crd_allows_and_that_has_no_secret(
    api: FakeApi, backend: KubernetesJobBackend
) -> None:
    schema = read_schema(crd_folder(), "RayJob", "v1")
    assert backend.submit("jobs/one/spec/spec.json", "one").status is JobStatus.QUEUED
    (made,) = api.jobs.values()
    assert errors(made, schema) == []
    assert made["metadata"]["name"] == "one-1"
    entrypoint = "python -m training.job store:jobs/one/spec/spec.json --job-id one"
    assert made["spec"]["entrypoint"] == entrypoint
    variables = yaml.safe_load(made["spec"]["runtimeEnvYAML"])["env_vars"]
    assert variables["FLORA_STORAGE__REGISTRY"] == "s3://flora/registry"
    assert variables["FLORA_TRAINING__NUM_WORKERS"] == "2"
    assert "FLORA_STORAGE__CACHE_DIR" not in variables, (
        "a place on the ingress's disk is none there"
    )
    template = yaml.safe_load(TEMPLATE.read_text())
    assert made["spec"]["rayClusterSpec"] == template["spec"]["rayClusterSpec"]
    assert "secretRef" in json.dumps(made) and TOKEN not in json.dumps(made)
    assert not any(name.startswith("AWS") for name in variables)


def test_a_job_submitted_twice_is_one_and_a_failed_one_gets_another_attempt(
    api: FakeApi, backend: KubernetesJobBackend
) -> None:
    for _ in range(2):
        backend.submit("jobs/one/spec/spec.json", "one")
    assert list(api.jobs) == ["one-1"]
    api.says("one-1", "Running", "RUNNING")
    assert backend.submit("jobs/one/spec/spec.json", "one").status is JobStatus.RUNNING
    api.says("one-1", "Failed", "FAILED", reason="AppFailed", message="exit code 137")
    info = backend.get("one")
    assert (info.status, info.message) == (JobStatus.FAILED, "AppFailed: exit code 137")
    assert backend.submit("jobs/one/spec/spec.json", "one").status is JobStatus.QUEUED
    assert list(api.jobs) == ["one-1", "one-2"]
    api.says("one-2", "Complete", "SUCCEEDED")
    assert backend.submit("jobs/one/spec/spec.json", "one").status is JobStatus.SUCCEEDED
    assert len(api.jobs) == 2


@pytest.mark.parametrize(
    ("deployment", "job", "status"),
    [
        ("Complete", "", JobStatus.FAILED),
        ("Complete", "RUNNING", JobStatus.FAILED),
        ("Initializing", "", JobStatus.QUEUED),
        ("Running", "PENDING", JobStatus.QUEUED),
        ("Running", "RUNNING", JobStatus.RUNNING),
        ("Running", "SUCCEEDED", JobStatus.RUNNING),
        ("Complete", "SUCCEEDED", JobStatus.SUCCEEDED),
        ("Complete", "STOPPED", JobStatus.CANCELLED),
        ("Complete", "FAILED", JobStatus.FAILED),
        ("Failed", "", JobStatus.FAILED),
        ("ValidationFailed", "", JobStatus.FAILED),
    ],
)
def test_what_kuberay_says_is_understood(
    api: FakeApi, backend: KubernetesJobBackend, deployment: str, job: str, status: JobStatus
) -> None:
    backend.submit("jobs/one/spec/spec.json", "one")
    api.says("one-1", deployment, job)
    assert backend.get("one").status is status


def test_a_cancelled_job_is_suspended_and_stays_to_be_asked_for(
    api: FakeApi, backend: KubernetesJobBackend
) -> None:
    backend.submit("jobs/one/spec/spec.json", "one")
    api.says("one-1", "Running", "RUNNING")
    api.logs["one-1"] = "step 1\nstep 2\n"
    assert list(backend.logs("one")) == ["step 1", "step 2"]
    assert backend.cancel("one").status is JobStatus.CANCELLED
    assert api.jobs["one-1"]["spec"]["suspend"] is True
    api.says("one-1", "Suspended")
    assert backend.cancel("one").status is JobStatus.CANCELLED
    for ask in (backend.get, backend.cancel, lambda job_id: list(backend.logs(job_id))):
        with pytest.raises(NotFoundError, match="nobody"):
            ask("nobody")


def test_any_id_has_a_name_that_kubernetes_takes(
    api: FakeApi, backend: KubernetesJobBackend
) -> None:
    for job_id in ("demo.spec_1-20261122", "x" * 64, "1st"):
        assert backend.submit("jobs/x/spec/spec.json", job_id).job_id == job_id
        assert backend.get(job_id).job_id == job_id
    assert all(len(name) <= 47 and name[0].isalpha() for name in api.jobs)


def test_what_cannot_work_is_said(api: FakeApi, account: Path, tmp_path: Path) -> None:
    settings = JobSettings()
    with pytest.raises(ClusterAwayError, match="does not answer"):
        KubernetesJobBackend(TEMPLATE, settings, "http://127.0.0.1:9", account).get("one")
    with pytest.raises(ClusterRefusedError, match="no service account"):
        KubernetesJobBackend(TEMPLATE, settings, api.url, tmp_path / "none").get("one")
    (account / "token").write_text("somebody else's")
    with pytest.raises(ClusterRefusedError, match="who are you"):
        KubernetesJobBackend(TEMPLATE, settings, api.url, account).get("one")
    (tmp_path / "pod.yaml").write_text("apiVersion: v1\nkind: Pod\n")
    with pytest.raises(SpecificationError, match="no RayJob"):
        KubernetesJobBackend(tmp_path / "pod.yaml", settings, api.url, account)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (403, ClusterRefusedError),
        (409, ClusterRefusedError),  # and there is no such job
        (422, ClusterRefusedError),
        (404, ClusterRefusedError),
        (429, ClusterAwayError),
        (500, ClusterAwayError),
    ],
)
def test_what_another_try_may_change_is_told_from_what_it_may_not(
    api: FakeApi, backend: KubernetesJobBackend, status: int, error: type[Exception]
) -> None:
    api.refusal = (status, {"message": "the quota is used up"})
    with pytest.raises(error, match=f"{status}: the quota is used up"):
        backend.submit("jobs/one/spec/spec.json", "one")
