"""Where the registry keeps what, as keys of the object store."""

from __future__ import annotations

import re

from storage.identity import NAME_PATTERN, AdapterName, AdapterVersion, sha256_hex

GENERATION = "index/generation"
INDEX = "index/"
SHARDS = "index/adapters/"
INDEX_IS_WHOLE = "index/whole.json"
COMPARED = "index/compared.json"
QUARANTINE = "quarantine/"
SWEEP = "collection/sweep.json"
BLOBS = "blobs/sha256/"
PROBES = "probes/"
ADAPTERS = "adapters/"

_ADAPTER = f"adapters/(?P<tenant>{NAME_PATTERN})/(?P<name>{NAME_PATTERN})"
_MANIFEST = re.compile(rf"{_ADAPTER}/versions/(?P<stem>[0-9a-f]{{64}})\.json")
_QUARANTINE = re.compile(r"quarantine/(?P<stem>[0-9a-f]{64})\.json")
_TOMBSTONE = re.compile(rf"{_ADAPTER}/tombstone\.json")
_PIN = re.compile(rf"{_ADAPTER}/pin\.json")
_BLOB = re.compile(rf"{BLOBS}(?P<stem>[0-9a-f]{{64}})")
_PROBE = re.compile(rf"{PROBES}[0-9a-f]{{32}}")
_SHARD = re.compile(r"index/adapters/[0-9a-f]{2}\.json")
_ALIAS = re.compile(rf"{_ADAPTER}/aliases/(?P<stem>{NAME_PATTERN})\.json")


def blob(sha256: str) -> str:
    """Blobs belong to adapter versions alone: what no version names is garbage."""
    return f"{BLOBS}{sha256}"


def tenant_folder(tenant: str | None) -> str:
    """All adapters of one tenant, or with None of every tenant."""
    return ADAPTERS if tenant is None else f"adapters/{tenant}/"


def adapter_folder(name: AdapterName) -> str:
    return f"adapters/{name.tenant}/{name.name}/"


def versions_folder(name: AdapterName) -> str:
    return f"{adapter_folder(name)}versions/"


def aliases_folder(name: AdapterName) -> str:
    return f"{adapter_folder(name)}aliases/"


def manifest(name: AdapterName, version: AdapterVersion) -> str:
    return f"{versions_folder(name)}{version}.json"


def alias(name: AdapterName, alias_name: str) -> str:
    return f"{aliases_folder(name)}{alias_name}.json"


def tombstone(name: AdapterName) -> str:
    return f"{adapter_folder(name)}tombstone.json"


def shard(name: AdapterName) -> str:
    """The part of the index that has the adapter's entry."""
    return f"{SHARDS}{sha256_hex(str(name).encode())[:2]}.json"


def is_shard(key: str) -> bool:
    return bool(_SHARD.fullmatch(key))


def pin(name: AdapterName) -> str:
    return f"{adapter_folder(name)}pin.json"


def quarantine(version: AdapterVersion) -> str:
    return f"{QUARANTINE}{version}.json"


def parse_manifest(key: str) -> tuple[AdapterName, AdapterVersion] | None:
    """Whose manifest a key below `adapters/` is; None for any other object, such as one put there by hand."""
    found = _MANIFEST.fullmatch(key)
    if found is None:
        return None
    return AdapterName(found["tenant"], found["name"]), AdapterVersion(found["stem"])


def parse_tombstone(key: str) -> AdapterName | None:
    """Whose tombstone a key below `adapters/` is; None for any other object."""
    found = _TOMBSTONE.fullmatch(key)
    return None if found is None else AdapterName(found["tenant"], found["name"])


def parse_record(key: str) -> AdapterName | None:
    """Whose alias, tombstone or pin a key below `adapters/` is; None for any other object, and for manifests."""
    found = _ALIAS.fullmatch(key) or _TOMBSTONE.fullmatch(key) or _PIN.fullmatch(key)
    return None if found is None else AdapterName(found["tenant"], found["name"])


def parse_blob(key: str) -> str | None:
    """The digest of the blob that a key below `blobs/` is; None for any other object."""
    found = _BLOB.fullmatch(key)
    return None if found is None else found["stem"]


def is_probe(key: str) -> bool:
    return bool(_PROBE.fullmatch(key))


def parse_quarantine(key: str) -> AdapterVersion | None:
    """Whose quarantine a key below `quarantine/` is; None for any other object."""
    found = _QUARANTINE.fullmatch(key)
    return None if found is None else AdapterVersion(found["stem"])


def parse_alias(key: str) -> str | None:
    """The alias a key under `aliases/` is the record of; None for any other object."""
    found = _ALIAS.fullmatch(key)
    return None if found is None else found["stem"]
