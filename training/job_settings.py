"""The settings a training job reads for itself, where it runs: those of the registry and of training.

The same names as everywhere (`FLORA_STORAGE__REGISTRY`, the areas of a settings file); other areas are not looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from storage.config import StorageSettings
from storage.errors import SpecificationError
from storage.identity import checked_name
from training.config import TrainingSettings

_PLACES = ("FLORA_STORAGE__CACHE_DIR", "FLORA_TRAINING__STORAGE_PATH")


class JobAreas(Protocol):
    """What a job needs of any settings; those of the whole cluster have it too."""

    @property
    def storage(self) -> StorageSettings: ...

    @property
    def training(self) -> TrainingSettings: ...


class JobSettings(BaseSettings):
    """From the environment, unless given."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="FLORA_", env_nested_delimiter="__"
    )

    storage: StorageSettings = Field(default_factory=StorageSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)


def read_job_settings(file: Path | None = None) -> JobSettings:
    """A settings file (if any) over environment variables over defaults.

    Raises:
        SpecificationError: names the setting and the rule it breaks, or the file.
    """
    areas: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SpecificationError(f"{file.name}: cannot be read: {error}") from None
        if not isinstance(loaded, dict):
            raise SpecificationError(f"{file.name} is not a mapping of settings")
        areas = {area: loaded[area] for area in ("storage", "training") if area in loaded}
    try:
        return JobSettings(**areas)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SpecificationError(f"{place}: {first['msg']}", param=place) from None


def job_directory(settings: JobAreas, job_id: str) -> Path:
    """Where a job's events and checkpoints are. Raises InvalidRequestError for an id that is not a valid name."""
    name = checked_name(job_id, param="job_id")
    return settings.training.storage_path.expanduser().resolve() / name


def as_environment(settings: JobSettings, *, is_here: bool = True) -> dict[str, str]:
    """The variables that give another process these settings. None of them is a secret.

    Args:
        is_here: it runs on this machine. Elsewhere, the places on a machine's disk are that one's own.
    """
    values = settings.model_dump(mode="json", exclude_none=True)
    variables = {
        f"FLORA_{area.upper()}__{name.upper()}": str(value)
        for area, fields in values.items()
        for name, value in fields.items()
    }
    return {name: value for name, value in variables.items() if is_here or name not in _PLACES}
