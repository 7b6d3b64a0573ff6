"""KubeRay's CRDs as JSON schemas that refuse what the API server would silently drop: unknown keys."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

HOW_TO_GET = (
    "KubeRay's CRDs are needed: take ray.io_rayjobs.yaml and ray.io_rayservices.yaml of KubeRay v1.7.0 "
    "(github.com/ray-project/kuberay, ray-operator/config/crd/bases) and set KUBERAY_CRDS to their folder"
)
_BESIDE_THE_CHECKOUT = Path(__file__).resolve().parents[3] / "shared" / "kuberay-crds"


def crd_folder() -> Path:
    """$KUBERAY_CRDS, or `shared/kuberay-crds` beside the checkout. CI must have one; a person may go without."""
    named = os.environ.get("KUBERAY_CRDS")
    folder = Path(named) if named else _BESIDE_THE_CHECKOUT
    if not folder.is_dir():
        if named or os.environ.get("CI"):
            pytest.fail(HOW_TO_GET)
        pytest.skip(HOW_TO_GET)
    return folder


def read_schema(folder: Path, kind: str, version: str) -> dict[str, Any]:
    """The schema of one kind, closed: an object with named properties allows no others."""
    crd = yaml.load(
        (folder / f"ray.io_{kind.lower()}s.yaml").read_text(),
        Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader),
    )
    served = {entry["name"]: entry for entry in crd["spec"]["versions"] if entry["served"]}
    schema: dict[str, Any] = served[version]["schema"]["openAPIV3Schema"]
    # The API server itself checks the metadata of a top-level object; the CRD leaves it open.
    schema["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string"}, "labels": {"type": "object"}},
    }
    return _closed(schema)


def errors(manifest: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """Every way a manifest breaks its schema, once nulls are pruned and defaults applied as the API server does."""
    applied = _with_defaults(_without_nulls(manifest), schema)
    return [
        f"{error.json_path}: {error.message}"
        for error in jsonschema.Draft202012Validator(schema).iter_errors(applied)
    ]


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    closed = dict(schema)
    if closed.pop("x-kubernetes-int-or-string", False):
        closed.pop("anyOf", None)
        closed["type"] = ["integer", "string"]
    if "properties" in closed:
        closed["properties"] = {name: _closed(part) for name, part in closed["properties"].items()}
        if not closed.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(closed.get(key), dict):
            closed[key] = _closed(closed[key])
    return closed


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_with_defaults(part, schema.get("items", {})) for part in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties", {})
    absent = {
        name: deepcopy(part["default"])
        for name, part in properties.items()
        if "default" in part and name not in value
    }
    return {
        name: _with_defaults(part, properties.get(name, {}))
        for name, part in (value | absent).items()
    }
