"""Training examples as people write them: JSONL, one example a line, in one of three formats.

    chat        {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}
    completion  {"prompt": …, "completion": …}        raw text, no template
    alpaca      {"instruction": …, "input": …, "output": …}        input may be empty, null or left out

Other keys of a line are the author's own and are left alone. Knows nothing of tokens.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import SpecificationError

FORMATS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
"""The keys that make each format."""

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation that ends with the assistant; every assistant message is learnt."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class TextExample:
    """Raw text and what shall follow it."""

    prompt: str
    completion: str


Example = ChatExample | TextExample


def read_examples(path: Path) -> tuple[Example, ...]:
    """All examples of a file, in its order. Raises as `each_example`."""
    return tuple(each_example(path))


def each_example(path: Path, max_line_bytes: int | None = None) -> Iterator[Example]:
    """The examples of a file, in its order, with one line of it in memory.

    Args:
        max_line_bytes: for files of strangers. JSON is parsed in one go, in which no other thread of the process gets
            on, into many times its size; a longer line is refused before.

    Raises:
        SpecificationError: names the file and the line: not UTF-8, not JSON, too long, no known format, two formats,
            an empty file.
    """
    file_format, first_line = "", 0
    try:
        for number, line in _lines(path, max_line_bytes):
            if not line.strip():
                continue
            place = f"{path.name}, line {number}"
            values = _parsed(line, place)
            line_format = _format_of(values, place)
            if file_format and line_format != file_format:
                raise SpecificationError(
                    f"{place}: a {line_format} example, but line {first_line} is {file_format}; one format a file"
                )
            if not file_format:
                file_format, first_line = line_format, number
            yield _example(values, line_format, place)
    except OSError as error:
        raise SpecificationError(f"{path.name}: cannot be read: {error.strerror}") from None
    if not file_format:
        raise SpecificationError(f"{path.name}: no examples in it")


def _lines(path: Path, max_bytes: int | None) -> Iterator[tuple[int, bytes]]:
    """With their numbers. Only a newline ends one: JSON strings may hold the others of `str.splitlines`."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(-1 if max_bytes is None else max_bytes + 2):
            number += 1
            if max_bytes is not None and len(line.removesuffix(b"\n")) > max_bytes:
                raise SpecificationError(
                    f"{path.name}, line {number}: is longer than {max_bytes} bytes"
                )
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _parsed(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise SpecificationError(f"{place}: is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise SpecificationError(
            f"{place}: not JSON: {error.msg}; every line is one JSON object"
        ) from None
    except RecursionError:
        raise SpecificationError(f"{place}: not JSON that can be read: nested too deep") from None
    except ValueError as error:  # a number of thousands of digits
        raise SpecificationError(f"{place}: not JSON that can be read: {error}") from None


def _format_of(values: Any, place: str) -> str:
    if not isinstance(values, dict):
        raise SpecificationError(f"{place}: expected a JSON object")
    fitting = [name for name, keys in FORMATS.items() if all(key in values for key in keys)]
    if not fitting:
        known = "; ".join(f"{' and '.join(keys)} ({name})" for name, keys in FORMATS.items())
        raise SpecificationError(f"{place}: no known format; expected {known}")
    if len(fitting) > 1:
        raise SpecificationError(f"{place}: fits two formats: {' and '.join(fitting)}")
    return fitting[0]


def _example(values: dict[str, Any], line_format: str, place: str) -> Example:
    if line_format == "completion":
        return TextExample(
            _text(values["prompt"], place, "prompt", may_be_empty=True),
            _text(values["completion"], place, "completion"),
        )
    if line_format == "alpaca":
        question = _text(values["instruction"], place, "instruction")
        context = values.get("input")
        context = "" if context is None else _text(context, place, "input", may_be_empty=True)
        return ChatExample(
            (
                Message("user", f"{question}\n\n{context}" if context else question),
                Message("assistant", _text(values["output"], place, "output")),
            )
        )
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise SpecificationError(f"{place}: messages: expected a list of messages")
    parsed = tuple(
        _message(message, f"{place}: messages.{index}") for index, message in enumerate(messages)
    )
    if parsed[-1].role != "assistant":
        raise SpecificationError(f"{place}: the last message must be the assistant's")
    return ChatExample(parsed)


def _message(values: Any, place: str) -> Message:
    if not isinstance(values, dict) or values.get("role") not in ROLES:
        raise SpecificationError(f"{place}: expected a role of {', '.join(ROLES)} and content")
    role = values["role"]
    return Message(
        role, _text(values.get("content"), place, "content", may_be_empty=role != "assistant")
    )


def _text(value: Any, place: str, key: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise SpecificationError(f"{place}: {key}: expected a string")
    if not value and not may_be_empty:
        raise SpecificationError(f"{place}: {key}: is empty")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise SpecificationError(
                f"{place}: {key}: has half of a character (a lone surrogate)"
            ) from None
    return value
