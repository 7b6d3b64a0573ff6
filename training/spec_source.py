"""A specification's file as plain values, and where in it each field stands. Knows nothing of what fields mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from storage.errors import SpecificationError

Location = tuple[str | int, ...]
"""A field as the file spells it: `("adapters", 2, "rank")`."""


@dataclass(frozen=True)
class SpecSource:
    """The file an error is about. Knows the line of every field in it; none of plain data, which has no `root`."""

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


def read_source(path: Path) -> tuple[Any, SpecSource]:
    """What a YAML or JSON file says, and where.

    Raises:
        SpecificationError: names the file and, but for a file nested too deep, the line: not to be read, not UTF-8,
            not YAML, a field given twice, a value that holds itself.
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
        loader = _Loader(text)
        root = loader.get_single_node()
        values = None
        if root is not None:
            _Check(path.name).node(root)
            values = loader.construct_document(root)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SpecificationError(
            f"{path.name}, line {line}: has a character that YAML does not allow: U+{error.character:04X}"
        ) from None
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise SpecificationError(f"{path.name}{place}: {error.problem}") from None
    except RecursionError:
        raise SpecificationError(f"{path.name}: is nested too deep") from None
    return values, SpecSource(path.name, root)


class _Loader(yaml.SafeLoader):
    """PyYAML's, which lets errors of Python's own types out for dates and numbers that are none; here with a line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"a value that cannot be read: {error}", node.start_mark
            ) from None


class _Check:
    """Refuses what YAML's loader would let pass, or never come to an end with."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: set[int] = set()  # nodes we are inside of, by id
        self._done: set[int] = set()

    def node(self, node: yaml.Node) -> None:
        if id(node) in self._open:
            raise self._error(node, "this value holds itself")
        if id(node) in self._done:
            return  # an alias; looking again at each would take forever where aliases are nested
        self._open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._mapping(node)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.node(item)
        else:
            self._text(node)
        self._open.remove(id(node))
        self._done.add(id(node))

    def _mapping(self, node: yaml.MappingNode) -> None:
        """The loader keeps the last of two equal keys, silently."""
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "the name of a field is text, not a list or a mapping")
            self.node(key)
            if key.value in seen:
                raise self._error(key, f"{key.value}: given twice", param=key.value)
            seen.add(key.value)
            self.node(value)

    def _text(self, node: yaml.Node) -> None:
        try:
            node.value.encode("utf-8")
        except UnicodeEncodeError:
            raise self._error(
                node, "has half of a character; one beyond U+FFFF is written as itself, not escaped"
            ) from None

    def _error(self, node: yaml.Node, message: str, param: str | None = None) -> SpecificationError:
        line = node.start_mark.line + 1
        return SpecificationError(f"{self._name}, line {line}: {message}", param=param)
