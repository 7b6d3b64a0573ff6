"""Every setting of a FLoRA cluster, in one model.

The same model is the Serve application's `args`, a YAML file, and `FLORA_…` environment variables
(`FLORA_ENGINE__BANK_ROWS=64`). Unknown keys are errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cluster.config import AutoscalingSettings, ClusterSettings
from storage.config import StorageSettings
from storage.errors import SpecificationError
from training.config import TrainingSettings
from workers.config import EngineSettings


class ServeSettings(BaseModel):
    """The HTTP side: where it listens, how many replicas answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    app_name: str = Field(default="flora", pattern="^[a-z0-9][a-z0-9-]{0,39}$")
    host: str = Field(default="127.0.0.1")
    port: int = Field(default=8000, ge=0, le=65535, description="0: a free one.")
    allow_anonymous: bool = Field(
        default=False, description="Serve requests without a key. Only for a loopback address."
    )
    adapter_sources: tuple[str, ...] = Field(
        default=(),
        description="Directories and s3://bucket/prefix below which adapters may be registered from; none: nowhere.",
    )
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(
        default=1, ge=1, description="More than min_replicas: their number follows the load."
    )
    cpus_per_replica: float = Field(default=1.0, gt=0)
    gpus_per_replica: float = Field(default=0.0, ge=0)
    max_ongoing_requests: int = Field(default=256, ge=1, description="Per replica.")
    request_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="The longest a request may take; a replica that leaves is given as long to finish.",
    )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas is less than min_replicas")
        return self


class Settings(BaseSettings):
    """All areas together."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="FLORA_", env_nested_delimiter="__"
    )

    storage: StorageSettings = Field(default_factory=StorageSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    autoscaling: AutoscalingSettings = Field(default_factory=AutoscalingSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    serve: ServeSettings = Field(default_factory=ServeSettings)


def read_settings(file: Path | None = None, **overrides: Any) -> Settings:
    """Settings from a YAML file (if any), then `overrides`, over environment variables and defaults.

    Raises:
        SpecificationError: names the key and the rule it breaks.
    """
    values: dict[str, Any] = {}
    if file is not None:
        loaded = yaml.safe_load(file.read_text()) or {}
        if not isinstance(loaded, dict):
            raise SpecificationError(f"{file.name} is not a mapping of settings")
        values.update(loaded)
    for area, fields in overrides.items():
        if not isinstance(fields, Mapping):
            raise SpecificationError(f"{area} is not a mapping of settings", param=area)
        values[area] = {**values.get(area, {}), **fields}
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SpecificationError(f"{place}: {first['msg']}", param=place) from None
