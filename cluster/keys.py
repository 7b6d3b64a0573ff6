"""API keys: who may ask this cluster, for which tenant, and whether the cluster itself may be changed.

A token is `flora-<id>-<secret>`. Kept is only a salted hash of it: the secret has 256 random bits, so one round of
SHA-256 is as good as a slow hash, and a request is checked in microseconds. Knows no HTTP and no store.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from storage.errors import InvalidRequestError
from storage.identity import checked_name

TOKEN_PREFIX = "flora-"
_TOKEN = re.compile(rf"{TOKEN_PREFIX}([0-9a-f]{{12}})-[A-Za-z0-9_-]{{43}}")
_ID_BYTES = 6
_SECRET_BYTES = 32
_SALT_BYTES = 16


class UnknownKeyError(InvalidRequestError):
    """There is no key with that id."""

    code = "key_not_found"


class ApiKey(BaseModel):
    """A key as it is kept. Whoever reads it cannot make the token from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key_id: str = Field(pattern="^[0-9a-f]{12}$")
    tenant: str
    is_admin: bool = Field(description="May change adapters and look at the whole cluster.")
    salt: str = Field(pattern="^[0-9a-f]{32}$")
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    created_s: float = Field(description="Seconds since the epoch.")
    note: str = ""

    def is_of(self, token: str) -> bool:
        """In a time that tells nothing of how much of the token is right."""
        return hmac.compare_digest(self.digest, _digest(self.salt, token))


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made. `token` is nowhere else: it is shown once."""

    token: str
    key: ApiKey


def new_key(tenant: str, *, is_admin: bool, created_s: float, note: str = "") -> NewKey:
    """Raises InvalidRequestError for a tenant that is not a valid name."""
    checked_name(tenant, param="tenant")
    key_id = secrets.token_hex(_ID_BYTES)
    token = f"{TOKEN_PREFIX}{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
    salt = secrets.token_hex(_SALT_BYTES)
    digest = _digest(salt, token)
    key = ApiKey(
        key_id=key_id,
        tenant=tenant,
        is_admin=is_admin,
        salt=salt,
        digest=digest,
        created_s=created_s,
        note=note,
    )
    return NewKey(token, key)


class KeyRing:
    """Keys at one moment, ready to be looked up."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys: Mapping[str, ApiKey] = {key.key_id: key for key in keys}

    @staticmethod
    def is_token(text: str) -> bool:
        """Whether it has the form of a token, of whatever key."""
        return bool(_TOKEN.fullmatch(text))

    def find(self, token: str) -> ApiKey | None:
        """The key a token is of; None for any text that is not the token of a key on this ring."""
        parts = _TOKEN.fullmatch(token)
        key = self._keys.get(parts[1]) if parts else None
        return key if key is not None and key.is_of(token) else None

    def __len__(self) -> int:
        return len(self._keys)


def _digest(salt: str, token: str) -> str:
    return hashlib.sha256(f"{salt}{token}".encode()).hexdigest()
