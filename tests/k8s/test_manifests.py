"""The manifests are what KubeRay, Serve and our own settings accept, to the last key."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from pydantic import ValidationError

from deployments.app import grace_s
from deployments.settings import Settings
from tests.k8s.crds import crd_folder, errors, read_schema

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "k8s"

Document = dict[str, Any]


def documents() -> list[Document]:
    return [
        document
        for file in sorted(FOLDER.glob("*.yaml"))
        for document in yaml.safe_load_all(file.read_text())
    ]


def only(kind: str) -> Document:
    (found,) = (document for document in documents() if document["kind"] == kind)
    return found


def serve_config() -> Document:
    return yaml.safe_load(only("RayService")["spec"]["serveConfigV2"])


def pod_templates(document: Document) -> list[Document]:
    spec = document["spec"]
    cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    return [group["template"] for group in groups]


@pytest.fixture(scope="module")
def schemas() -> dict[str, Document]:
    folder = crd_folder()
    return {kind: read_schema(folder, kind, "v1") for kind in ("RayService", "RayJob")}


@pytest.mark.parametrize("kind", ["RayService", "RayJob"])
def test_a_manifest_is_what_the_crd_allows(kind: str, schemas: dict[str, Document]) -> None:
    assert only(kind)["apiVersion"] == "ray.io/v1"
    assert errors(only(kind), schemas[kind]) == []


@pytest.mark.parametrize(
    ("kind", "path", "misspelt"),
    [
        ("RayService", ("spec",), "serveConfig"),
        ("RayService", ("spec", "rayClusterConfig", "authOptions"), "secret"),
        ("RayService", ("spec", "rayClusterConfig", "workerGroupSpecs", 0), "replica"),
        (
            "RayService",
            ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec"),
            "container",
        ),
        ("RayJob", ("spec",), "entryPoint"),
        ("RayJob", ("spec", "rayClusterSpec", "headGroupSpec"), "rayStartParam"),
    ],
)
def test_a_misspelt_key_is_refused(
    kind: str, path: tuple[str | int, ...], misspelt: str, schemas: dict[str, Document]
) -> None:
    manifest = deepcopy(only(kind))
    at: Any = manifest
    for part in path:
        at = at[part]
    at[misspelt] = "x"
    assert any(misspelt in error for error in errors(manifest, schemas[kind]))


def test_a_wrong_type_or_a_missing_part_is_refused(schemas: dict[str, Document]) -> None:
    manifest = deepcopy(only("RayService"))
    cluster = manifest["spec"]["rayClusterConfig"]
    cluster["workerGroupSpecs"][0]["replicas"] = "two"
    del cluster["headGroupSpec"]
    assert len(errors(manifest, schemas["RayService"])) == 2


def read_by_serve(config: Document) -> ServeDeploySchema:
    """Serve ignores keys it does not know, so what it read must say all that was written."""
    from ray.serve.schema import ServeDeploySchema

    deploy = ServeDeploySchema.model_validate(config)
    assert deploy.model_dump(exclude_unset=True, mode="json") == config, "Serve dropped a key"
    return deploy


def test_serve_accepts_the_config_and_we_accept_its_args() -> None:
    (application,) = read_by_serve(serve_config()).applications
    assert application.import_path == "deployments.app:build_app"
    settings = Settings(**application.args)
    assert settings.storage.registry.startswith("s3://"), "a directory is one machine's only"
    assert settings.engine.base_id == Path(settings.engine.base).name


def test_misspelt_serve_config_and_settings_are_refused() -> None:
    config = serve_config()
    (application,) = config["applications"]
    for wrong in (
        {**config, "aplications": []},
        {**config, "http_options": {"hots": "0.0.0.0"}},
        {**config, "applications": [{**application, "import_pth": "deployments.app"}]},
    ):
        with pytest.raises(AssertionError, match="dropped a key"):
            read_by_serve(wrong)
    args = application["args"]
    with pytest.raises(ValidationError, match="bank_row"):
        Settings(**{**args, "engine": {**args["engine"], "bank_row": 1}})


def test_the_application_that_serves_can_be_imported() -> None:
    import importlib

    module, _, name = serve_config()["applications"][0]["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("kind", ["RayService", "RayJob"])
def test_ray_lets_nobody_in_without_the_token(kind: str) -> None:
    spec = only(kind)["spec"]
    cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["authOptions"]["secretName"]
    assert "gcsFaultToleranceOptions" not in cluster


def test_the_budget_and_the_policy_select_the_pods_they_are_for() -> None:
    head, worker = (
        template["metadata"]["labels"] for template in pod_templates(only("RayService"))
    )
    budget = only("PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items()
    policy = only("NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items()
    assert budget <= worker.items() and not budget <= head.items()
    assert policy <= worker.items() and policy <= head.items()


def test_the_ingress_may_make_training_jobs_and_nothing_else() -> None:
    _, worker = pod_templates(only("RayService"))
    account, role, binding = only("ServiceAccount"), only("Role"), only("RoleBinding")
    assert worker["spec"]["serviceAccountName"] == account["metadata"]["name"]
    (subject,) = binding["subjects"]
    assert (subject["kind"], subject["name"]) == ("ServiceAccount", account["metadata"]["name"])
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == (
        "Role",
        role["metadata"]["name"],
    )
    rights = {
        (group, resource): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    # What training/kubernetes_jobs.py asks for.
    assert rights == {
        ("ray.io", "rayjobs"): {"create", "get", "list", "patch"},
        ("", "pods"): {"list"},
        ("", "pods/log"): {"get"},
    }
    training = Settings(**serve_config()["applications"][0]["args"]).training
    assert training.backend == "kubernetes"
    assert (ROOT / training.kubernetes_template).is_file()


def test_there_are_workers_for_as_many_replicas_as_there_may_be() -> None:
    serve = Settings(**serve_config()["applications"][0]["args"]).serve
    (group,) = only("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    cpus = float(group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    assert group["minReplicas"] == group["replicas"] == serve.min_replicas
    assert group["maxReplicas"] == serve.max_replicas > serve.min_replicas
    assert serve.cpus_per_replica < cpus < 2 * serve.cpus_per_replica, (
        "one replica a worker, and a share for the ingress"
    )


def test_workers_come_and_go_with_replicas_and_none_is_taken_from_under_its_answers() -> None:
    settings = Settings(**serve_config()["applications"][0]["args"])
    cluster = only("RayService")["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    assert cluster["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False
    (group,) = cluster["workerGroupSpecs"]
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= grace_s(settings)


@pytest.mark.parametrize("kind", ["RayService", "RayJob"])
def test_no_pod_runs_as_root_or_gains_rights(kind: str) -> None:
    for template in pod_templates(only(kind)):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["image"] == f"flora-cluster:{_release()}"


def test_the_image_and_the_manifests_have_the_tested_ray() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for kind, key in (("RayService", "rayClusterConfig"), ("RayJob", "rayClusterSpec")):
        assert only(kind)["spec"][key]["rayVersion"] == pins["ray"]
    dockerfile = (FOLDER / "Dockerfile").read_text()
    assert "bash wget" in dockerfile, "KubeRay probes its workers with them"
    assert "--constraint constraints.txt" in dockerfile


def _release() -> str:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
