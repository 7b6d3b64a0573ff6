"""A version in one line of the index: what lists, placement and routing must know without its manifest."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from storage.identity import AdapterVersion
from storage.manifest import Manifest, ManifestContent

_PAGES_BESIDE_ROWS = {"flora": 0, "hira": 0, "lora": 1, "rslora": 1, "dora": 2, "ia3": 1}
_MOST_PAGES_BESIDE_ROWS = 2


def pages_of(content: ManifestContent) -> int:
    """An upper bound of the bank pages of its largest module: its rows, a scale's page and a bias's page.

    A manifest's content says neither scale nor bias, so what the family allows is counted.
    """
    beside = _PAGES_BESIDE_ROWS.get(content.family, _MOST_PAGES_BESIDE_ROWS)
    return content.max_rank + beside


class VersionSummary(BaseModel):
    """What a manifest says, without its files. `pages` are bank pages of its largest module: exact where known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: AdapterVersion
    family: str
    rank: int = Field(ge=0, description="Most rows in any one module.")
    pages: int = Field(ge=0)
    num_bytes: int = Field(ge=0, description="Of all its files together.")
    base_digest: str | None = None
    base_name: str | None = None
    created_s: float = Field(description="Seconds since the epoch.")
    source: str

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        content, provenance = manifest.content, manifest.provenance
        return cls(
            version=manifest.version,
            family=content.family,
            rank=content.max_rank,
            pages=pages_of(content) if manifest.pages is None else manifest.pages,
            num_bytes=content.num_bytes,
            base_digest=content.base_digest,
            base_name=provenance.base_name,
            created_s=provenance.created_s,
            source=provenance.source,
        )
