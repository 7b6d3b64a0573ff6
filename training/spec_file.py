"""From a file to a `TrainingSpec`: defaults laid under, sweeps expanded, data files found and checked.

Every error names the field as the file spells it (`adapters.2.rank`) and its line.

    defaults: {batch_size: 4, steps: 60}          # under every adapter
    adapters: [{name: captain, rank: 1, data: captain.jsonl}]
    sweep:                                        # one adapter for each combination
      - {name: "orders-r{rank}", data: orders.jsonl, over: {rank: [1, 2, 4]}}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from storage.config import StorageSettings
from storage.errors import SpecificationError
from training.data_files import SCHEME, fetch_data
from training.examples import read_examples
from training.spec import TrainingSpec
from training.spec_source import Location, SpecSource, read_source


def read_spec(
    path: Path,
    overrides: Mapping[str, Any] | None = None,
    storage: StorageSettings | None = None,
) -> TrainingSpec:
    """A checked specification: every data file exists, and is of one known format. Data in S3 is fetched.

    Args:
        overrides: top-level fields that replace the file's (`{"base": …}`); dotted keys reach inside
            (`defaults.steps`).
        storage: how data in S3 is reached, and where it is kept; by default AWS's own.

    Raises:
        SpecificationError: names the file, the line and the field, or the data file and its line.
        StoreUnavailableError: S3 cannot be reached.
    """
    values, source = read_source(path)
    if not isinstance(values, dict):
        raise source.error((), "a specification is a mapping with base and adapters")
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    spec = parse_spec(values, path.parent, source=source, storage=storage)
    for adapter in spec.adapters:
        read_examples(adapter.data)
        if adapter.evaluation is not None and adapter.evaluation.data is not None:
            read_examples(adapter.evaluation.data)
    return spec


def parse_spec(
    values: Mapping[str, Any],
    directory: Path,
    *,
    source: SpecSource | None = None,
    storage: StorageSettings | None = None,
) -> TrainingSpec:
    """A specification from plain data; relative data paths, and a base path that exists, are `directory`'s.

    Raises:
        SpecificationError: names the field.
        StoreUnavailableError: data is in S3, which cannot be reached.
    """
    storage = storage or StorageSettings()
    source = source or SpecSource("specification", None)
    spread = list(_spread(values, source))
    fields = {key: value for key, value in values.items() if key not in ("defaults", "sweep")}
    fields["adapters"] = [
        _resolved(adapter, directory, location, source, storage) for location, adapter in spread
    ]
    if isinstance(fields.get("base"), str):
        fields["base"] = _base_path(fields["base"], directory, source)
    try:
        spec = TrainingSpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        location = _as_written(tuple(first["loc"]), [place for place, _ in spread], values)
        raise source.error(location, first["msg"]) from None
    seen: set[str] = set()
    for (location, _), adapter in zip(spread, spec.adapters, strict=True):
        if adapter.name in seen:
            raise source.error(
                (*location, "name"), f"another adapter of this job is called {adapter.name!r}"
            )
        seen.add(adapter.name)
    return spec


def _spread(
    values: Mapping[str, Any], source: SpecSource
) -> Iterator[tuple[Location, dict[str, Any]]]:
    """Each adapter's fields, with the place that says them."""
    defaults = values.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise source.error(("defaults",), "expected fields of adapters")
    listed = values.get("adapters") or []
    if not isinstance(listed, list):
        raise source.error(("adapters",), "expected a list of adapters")
    for index, entry in enumerate(listed):
        if not isinstance(entry, dict):
            raise source.error(("adapters", index), "expected a mapping with name, rank and data")
        yield ("adapters", index), {**defaults, **entry}
    sweeps = values.get("sweep") or []
    if not isinstance(sweeps, list):
        raise source.error(("sweep",), "expected a list of adapters, each with over")
    for index, entry in enumerate(sweeps):
        location: Location = ("sweep", index)
        over = entry.get("over") if isinstance(entry, dict) else None
        if not isinstance(over, dict) or not all(
            isinstance(choices, list) and choices for choices in over.values()
        ):
            raise source.error((*location, "over"), "expected fields, each with a list of values")
        fixed = {key: value for key, value in entry.items() if key != "over"}
        for choice in itertools.product(*over.values()):
            chosen = dict(zip(over, choice, strict=True))
            name = _filled_in(fixed.get("name", ""), chosen, (*location, "name"), source)
            yield location, {**defaults, **fixed, **chosen, "name": name}
    if not listed and not sweeps:
        raise source.error(("adapters",), "a job needs at least one adapter")


def _filled_in(
    name: object, chosen: Mapping[str, Any], location: Location, source: SpecSource
) -> str:
    try:
        return str(name).format_map(chosen)
    except KeyError as error:
        raise source.error(location, f"{error} is not one of over's fields") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise source.error(location, f"cannot be filled in: {error}") from None


def _resolved(
    adapter: dict[str, Any],
    directory: Path,
    location: Location,
    source: SpecSource,
    storage: StorageSettings,
) -> dict[str, Any]:
    fields = dict(adapter)
    if isinstance(fields.get("data"), str):
        fields["data"] = _data_path(fields["data"], directory, (*location, "data"), source, storage)
    evaluation = fields.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("data"), str):
        place = (*location, "evaluation", "data")
        fields["evaluation"] = {
            **evaluation,
            "data": _data_path(evaluation["data"], directory, place, source, storage),
        }
    return fields


def _data_path(
    text: str, directory: Path, location: Location, source: SpecSource, storage: StorageSettings
) -> Path:
    if text.startswith(SCHEME):
        try:
            return fetch_data(text, storage)
        except SpecificationError as error:
            raise source.error(location, error.message) from None
    with _usable_path(location, source):
        path = directory / Path(text).expanduser()
        if path.is_file():
            return path.resolve()
    raise source.error(location, f"there is no file {text}")


def _base_path(text: str, directory: Path, source: SpecSource) -> str:
    with _usable_path(("base",), source):
        path = directory / Path(text).expanduser()
        return str(path.resolve()) if path.exists() else text


@contextmanager
def _usable_path(location: Location, source: SpecSource) -> Iterator[None]:
    """A name too long, a folder that may not be entered, the home of nobody: not just a file that is not there."""
    try:
        yield
    except OSError as error:
        raise source.error(location, f"cannot be used as a path: {error.strerror}") from None
    except RuntimeError as error:
        raise source.error(location, f"cannot be used as a path: {error}") from None


def _as_written(location: Location, places: list[Location], values: Mapping[str, Any]) -> Location:
    """Where the file says what is wrong at `location` of the expanded specification."""
    if len(location) < 2 or location[0] != "adapters" or not isinstance(location[1], int):
        return location
    place, rest = places[location[1]], location[2:]
    entry: Any = values[str(place[0])][place[1]]
    if rest and rest[0] not in entry:
        if place[0] == "sweep" and rest[0] in entry["over"]:
            return (*place, "over", *rest)
        if rest[0] in (values.get("defaults") or {}):
            return ("defaults", *rest)
    return (*place, *rest)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    at: Any = values
    try:
        for part in outer:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        at[int(last) if isinstance(at, list) else last] = value
    except (AttributeError, IndexError, TypeError, ValueError):
        raise SpecificationError(f"{key}: the file has no such field to set", param=key) from None
