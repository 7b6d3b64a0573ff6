"""What the registry writes about a version: content, which is hashed into the version, and provenance, which is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from storage.identity import AdapterVersion, canonical_json, sha256_hex

HISTORY_LENGTH = 16
"""How many earlier moves an alias remembers."""

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
    pages: int | None = Field(
        default=None, description="Bank pages of its largest module, where the publisher knew."
    )

    @property
    def version(self) -> AdapterVersion:
        return self.content.version


class AliasMove(BaseModel):
    """What an alias meant from one move to the next."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str = Field(pattern="^[0-9a-f]{64}$")
    generation: int = Field(ge=1)
    moved_s: float = Field(default=0.0, description="Seconds since the epoch; 0 where unknown.")


class AliasRecord(AliasMove):
    """`adapters/<tenant>/<name>/aliases/<alias>.json`. `generation` counts the moves; history is linear by CAS."""

    earlier: tuple[AliasMove, ...] = Field(
        default=(), description="What it meant before, newest first; the last few."
    )

    @property
    def moves(self) -> tuple[AliasMove, ...]:
        """This move and those before it, newest first."""
        head = AliasMove(version=self.version, generation=self.generation, moved_s=self.moved_s)
        return (head, *self.earlier)

    @classmethod
    def of(cls, moves: Sequence[AliasMove]) -> Self:
        """A record from its moves, newest first; at least one."""
        head, *earlier = moves
        return cls(**head.model_dump(), earlier=tuple(earlier[:HISTORY_LENGTH]))

    def moved(self, version: AdapterVersion, now_s: float) -> Self:
        """The record after the next move."""
        head = AliasMove(version=version, generation=self.generation + 1, moved_s=now_s)
        return self.of((head, *self.moves))


class Tombstone(BaseModel):
    """`adapters/<tenant>/<name>/tombstone.json`: what a delete took away; one write, so a delete is atomic.

    A listed version is gone until it is published again; an alias is gone up to the listed generation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    versions: tuple[str, ...] = ()
    aliases: dict[str, int] = {}
    deleted_s: float = Field(description="Seconds since the epoch, of the last delete.")
    times_s: dict[str, float] = Field(
        default={}, description="When each version was deleted; as the last where it is missing."
    )

    def deleted_at(self, version: str) -> float:
        """When a listed version was deleted."""
        return self.times_s.get(version, self.deleted_s)

    def with_deleted(
        self, versions: Iterable[str], aliases: Mapping[str, int], now_s: float
    ) -> Self:
        """These versions are gone too, and these aliases up to their generations."""
        times_s = dict.fromkeys(versions, now_s)
        return self.model_copy(
            update={
                "versions": tuple(sorted({*self.versions, *times_s})),
                "aliases": {**self.aliases, **aliases},
                "deleted_s": now_s,
                "times_s": {old: self.deleted_at(old) for old in self.versions} | times_s,
            }
        )

    def without(self, version: str) -> Self:
        """A version that is there again, or whose manifest is gone for good."""
        return self.model_copy(
            update={
                "versions": tuple(old for old in self.versions if old != version),
                "times_s": {old: at_s for old, at_s in self.times_s.items() if old != version},
            }
        )


class Pin(BaseModel):
    """`adapters/<tenant>/<name>/pin.json`: on how many replicas an administrator wants the adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    copies: int = Field(ge=1)


class Quarantine(BaseModel):
    """`quarantine/<version>.json`: a version whose stored bytes are damaged, under whatever name it is known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str
    since_s: float = Field(description="Seconds since the epoch.")
