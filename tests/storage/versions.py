"""Small things to publish. The registry does not look into files, so these are not real adapters."""

from __future__ import annotations

from storage.identity import AdapterName, AdapterVersion, sha256_hex
from storage.manifest import FileEntry, ManifestContent, Provenance
from storage.registry import Registry

NAME = AdapterName("team", "pirate")


def files_of(text: str) -> dict[str, bytes]:
    return {"adapter_config.json": b"{}", "adapter_model.safetensors": text.encode()}


def content_of(files: dict[str, bytes]) -> ManifestContent:
    return ManifestContent(
        files={
            path: FileEntry(sha256=sha256_hex(data), num_bytes=len(data))
            for path, data in files.items()
        },
        family="flora",
        ranks={"q_proj": 2},
        dtype="float32",
        base_digest="0" * 64,
    )


def version_of(text: str) -> AdapterVersion:
    return content_of(files_of(text)).version


def publish(
    registry: Registry,
    text: str,
    *,
    name: AdapterName = NAME,
    alias: str | None = "latest",
    created_s: float = 0.0,
) -> AdapterVersion:
    files = files_of(text)
    return registry.publish(
        name,
        files,
        content_of(files),
        provenance=Provenance(created_s=created_s),
        alias=alias,
    )


def assert_whole(registry: Registry, name: AdapterName, version: AdapterVersion) -> None:
    """Whatever the registry names can be read to the last byte."""
    content = registry.content(version)
    for entry in content.files.values():
        registry.read_file(entry)
    assert registry.manifest(name, version).content == content
