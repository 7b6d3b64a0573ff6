"""Names: who an adapter is, and what a user may call it.

version   sha256 (hex) of the canonical JSON of a manifest's content: the only name a cache may use
alias     a movable name of a version: `latest`, `prod`, …
name      what a tenant calls an adapter
model id  what a request sends: `base`, `name`, `base:name`, each with an optional `@alias-or-version`
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NewType

from storage.errors import AmbiguousModelError, InvalidRequestError, UnknownModelError

AdapterVersion = NewType("AdapterVersion", str)
"""64 hexadecimal digits."""

DEFAULT_ALIAS = "latest"
DEFAULT_TENANT = "default"
SHARED_TENANT = "shared"
"""Every tenant may use its adapters; one of the tenant's own with the same name comes first."""
VERSION_PREFIX = "sha256:"

NAME_PATTERN = "[a-z0-9][a-z0-9._-]{0,63}"
"""What adapters, aliases and tenants may be called."""

VERSION_START = re.compile(r"[0-9a-f]{8,64}")
"""So much of a version selects it."""

_NAME = re.compile(NAME_PATTERN)
_VERSION = re.compile(r"[0-9a-f]{64}")


def canonical_json(value: object) -> bytes:
    """The one byte form that is hashed: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def checked_name(text: str, *, param: str = "name") -> str:
    """An adapter, alias or tenant name, unchanged. Raises InvalidRequestError with the rule it breaks."""
    if not is_name(text):
        raise InvalidRequestError(
            f"{text!r} is not a valid name: 1 to 64 of a-z 0-9 . _ -, starting with a letter or digit",
            param=param,
        )
    return text


def is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text))


def checked_version(text: str, *, param: str = "version") -> AdapterVersion:
    """A version from `sha256:<64 hex>` or bare hex. Raises InvalidRequestError."""
    digits = text.removeprefix(VERSION_PREFIX)
    if not _VERSION.fullmatch(digits):
        raise InvalidRequestError(f"{text!r} is not a version: 64 hexadecimal digits", param=param)
    return AdapterVersion(digits)


def is_version(text: str) -> bool:
    return bool(_VERSION.fullmatch(text.removeprefix(VERSION_PREFIX)))


@dataclass(frozen=True, slots=True, order=True)
class AdapterName:
    """An adapter as its owner knows it; it may have many versions and aliases."""

    tenant: str
    name: str

    def __post_init__(self) -> None:
        checked_name(self.tenant, param="tenant")
        checked_name(self.name, param="name")

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True)
class AdapterSet:
    """The adapters of one request with their weights: what keys the KV cache, the prefix cache and routing.

    Empty means the base model. Today a set holds at most one adapter, with weight 1.
    """

    members: tuple[tuple[AdapterVersion, float], ...] = ()

    def __post_init__(self) -> None:
        if len(self.members) > 1 or any(weight != 1.0 for _, weight in self.members):
            raise InvalidRequestError(
                "a request may use one adapter, with weight 1; sets of several are not supported yet"
            )

    @classmethod
    def of(cls, version: AdapterVersion | None) -> AdapterSet:
        return cls(((version, 1.0),) if version is not None else ())

    @property
    def is_base(self) -> bool:
        return not self.members

    @property
    def version(self) -> AdapterVersion | None:
        """The one adapter's version, or None for the base model."""
        return self.members[0][0] if self.members else None

    @cached_property
    def digest(self) -> str:
        return sha256_hex(canonical_json([[version, weight] for version, weight in self.members]))


@dataclass(frozen=True, slots=True)
class ModelName:
    """A parsed model id: the base model (`adapter` None) or one adapter and what selects its version."""

    adapter: str | None
    selector: str = DEFAULT_ALIAS


def parse_model_id(model: str, base_id: str, is_adapter: Callable[[str], bool]) -> ModelName:
    """Read a request's `model` field. An exact full-name match wins; there is no fall-back to the base.

    Args:
        model: `base`, `name`, `base:name`, each with an optional `@alias-or-version`.
        base_id: the served base's id; it may itself contain `:` or `/`.
        is_adapter: whether the tenant may use an adapter of that name.

    Raises:
        UnknownModelError: names neither the base nor an adapter.
        AmbiguousModelError: names both the base and an adapter.
        InvalidRequestError: a selector on the base model, or an empty one.
    """
    if model == base_id and is_adapter(model):
        raise AmbiguousModelError(
            f"model {model!r} is both the base model and an adapter; write {base_id}:{model}",
            param="model",
        )
    if model == base_id:
        return ModelName(None)
    full, at, selector = model.partition("@")
    if at and not selector:
        raise InvalidRequestError(f"model {model!r} ends in an empty version", param="model")
    if full == base_id:
        raise InvalidRequestError(
            f"model {model!r} asks for a version of the base model, which has none", param="model"
        )
    name = full.removeprefix(f"{base_id}:")
    if not is_adapter(name):
        raise UnknownModelError(f"the model {model!r} does not exist", param="model")
    return ModelName(name, selector or DEFAULT_ALIAS)
