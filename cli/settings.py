"""From flags to settings: flags over the file of `--config`, over `FLORA_…` variables, over defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.bases import BUILT_IN, find_base, pull_base
from cli.console import err
from cli.home import bases_dir, flora_home
from cli.running import find_running
from deployments.settings import Settings, read_settings
from storage import base_download
from storage.config import StorageSettings
from storage.gguf_file import SUFFIX as GGUF

if TYPE_CHECKING:
    from storage.base_checkpoint import BaseFacts

Config = Annotated[
    Path | None,
    typer.Option("--config", exists=True, dir_okay=False, help="A YAML file of settings."),
]
RegistryOption = Annotated[
    str | None,
    typer.Option("--registry", help="Where adapters are kept: a directory or s3://bucket/prefix."),
]
S3Endpoint = Annotated[
    str | None,
    typer.Option("--s3-endpoint", help="Another S3 API than AWS's: http://host:port."),
]

Name = Annotated[str, typer.Argument(help="The adapter's name.")]
Tenant = Annotated[str, typer.Option(help="Whose adapters.")]


def command_settings(config: Path | None = None, **areas: Mapping[str, Any]) -> Settings:
    """Settings for this machine; flags that are None were not given.

    Raises:
        SpecificationError: names the key and the rule it breaks.
    """
    _keep_all_in_home()
    given = {
        area: {name: value for name, value in fields.items() if value is not None}
        for area, fields in areas.items()
    }
    return _absolute(read_settings(config, **given))


def storage_settings(registry: str | None, s3_endpoint: str | None) -> StorageSettings:
    """Of the registry a command works on: the one named, or the running cluster's, or this machine's."""
    running = find_running()
    if registry is None and s3_endpoint is None and running is not None:
        return Settings(**running.settings).storage
    storage = {"registry": registry, "s3_endpoint_url": s3_endpoint}
    return command_settings(storage=storage).storage


def base_directory(name: str, storage: StorageSettings) -> Path:
    """The directory of a base model (or the GGUF file it is), fetched first if it is not here."""
    if name.startswith(base_download.SCHEME):
        with err.status("looking for the base model"):
            return base_download.fetch_base(name, storage)
    directory = find_base(name)
    if directory is None:
        source = BUILT_IN if Path(name).name == BUILT_IN else name
        with err.status("looking for the base model") as progress:
            directory = pull_base(source, report=progress.update)
    return directory


def base_facts(base: str | None, storage: StorageSettings) -> BaseFacts:
    """Of the base model that adapters are for: the one named, else the running cluster's, else the built-in one."""
    from storage.base_checkpoint import read_base_facts

    running = find_running()
    served = None if running is None else str(running.settings["engine"]["base"])
    source = base or served or BUILT_IN
    directory = base_directory(source, storage)
    return read_base_facts(directory, base_name(source, directory))


def base_name(source: str, directory: Path) -> str:
    """What a base is called by default: the last part of where it is from."""
    place = source if source.startswith(base_download.SCHEME) else directory
    return Path(place).name.removesuffix(GGUF).lower()


def _absolute(settings: Settings) -> Settings:
    """Replicas and jobs run in other directories than this command: a relative place would be another one there."""
    storage, training = settings.storage, settings.training
    places: dict[str, Any] = {"cache_dir": storage.cache_dir.expanduser().absolute()}
    if "://" not in storage.registry:
        places["registry"] = str(Path(storage.registry).expanduser().absolute())
    path = training.storage_path.expanduser().absolute()
    return settings.model_copy(
        update={
            "storage": storage.model_copy(update=places),
            "training": training.model_copy(update={"storage_path": path}),
        }
    )


def _keep_all_in_home() -> None:
    """`$FLORA_HOME` moves every default at once. As variables, so that processes started here agree."""
    if "FLORA_HOME" not in os.environ:
        return
    os.environ.setdefault("FLORA_STORAGE__REGISTRY", str(flora_home() / "registry"))
    os.environ.setdefault("FLORA_STORAGE__CACHE_DIR", str(flora_home() / "cache"))
    os.environ.setdefault("FLORA_TRAINING__STORAGE_PATH", str(flora_home() / "training"))
    os.environ.setdefault("FLORA_ENGINE__BASE", str(bases_dir() / BUILT_IN))
