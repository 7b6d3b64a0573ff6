"""What /docs shows of the adapters' routes: one example of each answer and of each body."""

from __future__ import annotations

from typing import Any

_VERSION = "3f2a9c41d07be5a8" * 4
_EARLIER = "a81e0d6634c9b2f7" * 4

_SUMMARY: dict[str, Any] = {
    "version": _VERSION,
    "family": "flora",
    "rank": 4,
    "bytes": 1_204_224,
    "created": 1_760_000_000,
    "source": "upload",
}

_LISTED: dict[str, Any] = {
    "id": "captain",
    "object": "adapter",
    "tenant": "default",
    "parent": "smollm2",
    "aliases": {"latest": _VERSION},
    "serving": {"latest": _VERSION},
    "pinned_copies": 0,
    "versions": [{**_SUMMARY, "quarantined": None, "resident": ["replica-1"]}],
}


def _json(example: Any, status: int = 200) -> dict[int | str, dict[str, Any]]:
    return {status: {"content": {"application/json": {"example": example}}}}


LIST = _json(
    {
        "object": "list",
        "data": [_LISTED],
        "first_id": "captain",
        "last_id": "captain",
        "has_more": False,
    }
)
ADAPTER = _json(
    {
        **_LISTED,
        "versions": [
            {
                **_SUMMARY,
                "quarantined": None,
                "resident": ["replica-1"],
                "tiers": {"device": ["replica-1"], "disk": ["replica-1", "replica-2"]},
                "failed": None,
                "failed_on": {},
            }
        ],
        "history": {"latest": [_EARLIER]},
        "moves": {
            "latest": {
                "desired": _VERSION,
                "serving": _EARLIER,
                "reason": "warming on 1 of 2 replicas",
            }
        },
    }
)
PUBLISHED = _json(
    {
        "id": "captain",
        "object": "adapter.version",
        "tenant": "default",
        "parent": "smollm2",
        "alias": "latest",
        **_SUMMARY,
        "warnings": [],
    },
    status=201,
)
DELETED = _json({"id": "captain", "object": "adapter", "deleted": True})
DELETED_VERSION = _json(
    {"id": "captain", "object": "adapter.version", "version": _EARLIER, "deleted": True}
)
ALIAS = _json(
    {
        "id": "captain",
        "object": "adapter.alias",
        "alias": "prod",
        "version": _VERSION,
        "generation": 3,
    }
)
PIN = _json({"id": "captain", "object": "adapter.pin", "copies": 2})

PUBLISH: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "files"],
                    "properties": {
                        "name": {"type": "string", "example": "captain"},
                        "alias": {"type": "string", "default": "latest"},
                        "tenant": {"type": "string"},
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "adapter_config.json and adapter_model.safetensors.",
                        },
                    },
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["name", "source"],
                    "properties": {
                        "name": {"type": "string"},
                        "source": {"type": "string"},
                        "alias": {"type": "string", "nullable": True, "default": "latest"},
                        "tenant": {"type": "string"},
                    },
                },
                "example": {"name": "captain", "source": "s3://models/captain", "alias": "prod"},
            },
        },
    }
}
