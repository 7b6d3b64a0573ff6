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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from storage.config import StorageSettings
from storage.errors import SpecificationError
from training.data_files import SCHEME, fetch_data
from training.examples import read_examples
from training.spec import TrainingSpec

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class _Source:
    """The file an error is about. Knows the line of every field in it."""

    name: str
    root: yaml.Node | None

    def error(self, location: Location, message: str) -> SpecificationError:
        field = ".".join(str(part) for part in location)
        line = self._line(location)
        place = self.name if line is None else f"{self.name}, line {line}"
        return SpecificationError(
            f"{place}: {field}: {message}" if field else f"{place}: {message}",
            param=field or None,
        )

    def _line(self, location: Location) -> int | None:
        """The line of the deepest part of `location` that the file has."""
        node = self.root
        line = None if node is None else node.start_mark.line + 1
        for part in location:
            if isinstance(node, yaml.MappingNode):
                found = [(key, value) for key, value in node.value if key.value == str(part)]
                if not found:
                    break
                key, node = found[0]
                line = key.start_mark.line + 1
            elif (
                isinstance(node, yaml.SequenceNode)
                and isinstance(part, int)
                and part < len(node.value)
            ):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                break
        return line


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
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SpecificationError(f"{path.name}: is not UTF-8 text") from None
    except OSError as error:
        raise SpecificationError(f"{path.name}: cannot be read: {error.strerror}") from None
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # YAML allows JSON, but no tabs between its tokens
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_duplicates(path.name, root)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise SpecificationError(f"{path.name}{line}: {error.problem}") from None
    source = _Source(path.name, root)
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
    source: _Source | None = None,
    storage: StorageSettings | None = None,
) -> TrainingSpec:
    """A specification from plain data; relative data paths, and a base path that exists, are `directory`'s.

    Raises:
        SpecificationError: names the field.
        StoreUnavailableError: data is in S3, which cannot be reached.
    """
    storage = storage or StorageSettings()
    source = source or _Source("specification", None)
    spread = list(_spread(values, source))
    fields = {key: value for key, value in values.items() if key not in ("defaults", "sweep")}
    fields["adapters"] = [
        _resolved(adapter, directory, location, source, storage) for location, adapter in spread
    ]
    if isinstance(fields.get("base"), str):
        fields["base"] = _base_path(fields["base"], directory)
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
    values: Mapping[str, Any], source: _Source
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
            try:
                name = str(fixed.get("name", "")).format_map(chosen)
            except (KeyError, IndexError, ValueError) as error:
                raise source.error(
                    (*location, "name"), f"{error} is not one of over's fields"
                ) from None
            yield location, {**defaults, **fixed, **chosen, "name": name}
    if not listed and not sweeps:
        raise source.error(("adapters",), "a job needs at least one adapter")


def _resolved(
    adapter: dict[str, Any],
    directory: Path,
    location: Location,
    source: _Source,
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
    text: str, directory: Path, location: Location, source: _Source, storage: StorageSettings
) -> Path:
    if text.startswith(SCHEME):
        try:
            return fetch_data(text, storage)
        except SpecificationError as error:
            raise source.error(location, error.message) from None
    path = directory / Path(text).expanduser()
    if not path.is_file():
        raise source.error(location, f"there is no file {text}")
    return path.resolve()


def _base_path(text: str, directory: Path) -> str:
    path = directory / Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text


def _as_written(location: Location, places: list[Location], values: Mapping[str, Any]) -> Location:
    """Where the file says what is wrong at `location` of the expanded specification."""
    if len(location) < 2 or location[0] != "adapters" or not isinstance(location[1], int):
        return location
    place, rest = places[location[1]], location[2:]
    entry: Any = values[str(place[0])][place[1]]
    if rest and rest[0] not in entry:
        if rest[0] in entry.get("over", {}):
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


def _refuse_duplicates(name: str, node: yaml.Node | None) -> None:
    """YAML's loader keeps the last of two equal keys, silently."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise SpecificationError(
                    f"{name}, line {line}: {key.value}: given twice", param=str(key.value)
                )
            seen.add(key.value)
            _refuse_duplicates(name, value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(name, item)
