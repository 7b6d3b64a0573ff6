"""Settings of the registry and its caches."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_MAX_ADAPTER_BYTES = 2 << 30


class StorageSettings(BaseModel):
    """Where adapters are kept, and how much of them a replica keeps near."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    registry: str = Field(
        default="~/.flora/registry",
        description="The registry: a directory (one machine only) or s3://bucket/prefix.",
    )
    s3_endpoint_url: str | None = Field(
        default=None, description="Another S3 API than AWS's, e.g. http://127.0.0.1:9000."
    )
    s3_region: str = Field(default="us-east-1")
    s3_addressing: Literal["path", "virtual", "auto"] = "path"
    s3_timeout_s: float = Field(default=10.0, gt=0, le=300)
    cache_dir: Path = Field(
        default=Path("~/.flora/cache"),
        description="Disk cache of adapters and bases, by content; replicas of one machine share it.",
    )
    cache_bytes: int = Field(
        default=4 << 30,
        ge=1 << 20,
        description="Adapters on disk, for all replicas that share it; what was used longest ago goes first.",
    )
    host_bytes: int = Field(
        default=512 << 20,
        ge=0,
        description="Parsed adapters in a replica's memory; what was used longest ago goes first.",
    )
    max_adapter_bytes: int = Field(
        default=DEFAULT_MAX_ADAPTER_BYTES,
        ge=1,
        description="Larger adapters are refused at publish.",
    )
