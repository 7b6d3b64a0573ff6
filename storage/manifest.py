"""What the registry writes about a version: content, which is hashed into the version, and provenance, which is not."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from storage.identity import AdapterVersion, canonical_json, sha256_hex

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A plain name: it becomes a path on whatever machine reads the manifest."""


class FileEntry(BaseModel):
    """One file of an adapter's directory, stored as a blob under its digest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    num_bytes: int = Field(ge=0)


class ManifestContent(BaseModel):
    """All that makes one version differ from another. The same content is the same version, whoever publishes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    files: dict[FileName, FileEntry] = Field(min_length=1)
    family: str = Field(description="flora, hira, lora, rslora, dora, ia3, …")
    ranks: dict[str, int] = Field(
        description="Rows by logical projection, see `ModuleRows.num_rows`."
    )
    dtype: str
    base_digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")

    @property
    def version(self) -> AdapterVersion:
        return AdapterVersion(sha256_hex(canonical_json(self.model_dump(mode="json"))))

    @property
    def max_rank(self) -> int:
        return max(self.ranks.values(), default=0)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.files.values())


class Provenance(BaseModel):
    """Where a version came from. Not hashed: publishing the same content again keeps the first one's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    created_s: float = Field(description="Seconds since the epoch.")
    source: str = Field(default="push", description="push, import, or training:<job id>.")
    base_name: str | None = None
    warnings: tuple[str, ...] = ()


class Manifest(BaseModel):
    """`adapters/<tenant>/<name>/versions/<version>.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    content: ManifestContent
    provenance: Provenance

    @property
    def version(self) -> AdapterVersion:
        return self.content.version


class AliasRecord(BaseModel):
    """`adapters/<tenant>/<name>/aliases/<alias>.json`. `generation` counts the moves; history is linear by CAS."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str = Field(pattern="^[0-9a-f]{64}$")
    generation: int = Field(ge=1)


class Tombstone(BaseModel):
    """`adapters/<tenant>/<name>/tombstone.json`: what a delete took away; one write, so a delete is atomic.

    A listed version is gone until it is published again; an alias is gone up to the listed generation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    versions: tuple[str, ...] = ()
    aliases: dict[str, int] = {}
    deleted_s: float = Field(description="Seconds since the epoch, of the last delete.")
