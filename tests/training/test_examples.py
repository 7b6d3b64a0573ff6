"""Three formats of data, told apart, and refused by line where they are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from storage.errors import SpecificationError
from training.examples import ChatExample, Message, TextExample, each_example, read_examples


def data(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}
CHAT = {"messages": [USER, ASSISTANT]}
TEXT = {"prompt": "p", "completion": "c"}


def test_each_format_is_detected(tmp_path: Path) -> None:
    assert (
        read_examples(data(tmp_path, CHAT, "", CHAT))
        == (ChatExample((Message("user", "hi"), Message("assistant", "ho"))),) * 2
    )
    assert read_examples(data(tmp_path, {**TEXT, "id": 4})) == (TextExample("p", "c"),)
    alpaca = {"instruction": "do", "input": "it", "output": "done"}
    assert read_examples(data(tmp_path, alpaca)) == (
        ChatExample((Message("user", "do\n\nit"), Message("assistant", "done"))),
    )
    without = {"instruction": "do", "output": "done"}
    assert (
        read_examples(data(tmp_path, without, {**without, "input": ""}, {**without, "input": None}))
        == (ChatExample((Message("user", "do"), Message("assistant", "done"))),) * 3
    )


def test_a_file_may_have_what_editors_leave_and_lines_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    long = {"prompt": "p" * 3_000_000, "completion": "\u2028 and \x85 end no line"}
    lines = ["", json.dumps(TEXT), "  ", json.dumps(long, ensure_ascii=False), "", ""]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_examples(path) == (
        TextExample("p", "c"),
        TextExample(long["prompt"], long["completion"]),
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "caf\xe9", "completion": "c"}', "line 2: is not UTF-8 text"),
        (b"[" * 100_000, "line 2: not JSON that can be read: nested too deep"),
        (b'{"prompt": 1' + b"0" * 5000 + b"}", "line 2: not JSON that can be read"),
        (
            b'{"prompt": "\\ud83d", "completion": "c"}',
            "line 2: prompt: has half of a character",
        ),
        (b'{"prompt": "p", "completion": null}', "line 2: completion: expected a string"),
        (b'{"prompt": "p"}', "line 2: no known format"),
    ],
)
def test_bytes_no_example_is_made_of_are_named_by_line(
    tmp_path: Path, line: bytes, says: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(TEXT).encode() + b"\n" + line + b"\n")
    with pytest.raises(SpecificationError, match=says):
        read_examples(path)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([CHAT, "{"], "line 2: not JSON"),
        ([CHAT, "", [1]], "line 3: expected a JSON object"),
        ([CHAT, TEXT], "line 2: a completion example, but line 1 is chat"),
        ([{**CHAT, **TEXT}], "line 1: fits two formats: chat and completion"),
        ([{"text": "x"}], "line 1: no known format"),
        ([], "no examples"),
        ([{"prompt": "p", "completion": ""}], "line 1: completion: is empty"),
        *(
            (
                [{"instruction": "do", "output": "done", "input": no_text}],
                "line 1: input: expected a string",
            )
            for no_text in (0, False, [], {})
        ),
        ([{"messages": [USER]}], "line 1: the last message must be the assistant's"),
        ([{"messages": []}], "line 1: messages: expected a list"),
        ([{"messages": [{"role": "pope", "content": ""}]}], r"messages\.0: expected a role"),
        ([{"messages": [USER, {"role": "assistant"}]}], r"messages\.1: content: expected a string"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, lines: list[Any], says: str) -> None:
    with pytest.raises(SpecificationError, match=says) as caught:
        read_examples(data(tmp_path, *lines))
    assert caught.value.message.startswith("data.jsonl")


def test_a_line_too_long_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsing holds every other thread up, and takes many times the line's memory."""
    path = tmp_path / "long.jsonl"
    fits = b'{"prompt": "a", "completion": "b"}'
    path.write_bytes(fits.ljust(1000) + b"\n" + b"[" * 1001)
    parsed: list[str] = []
    parse = json.loads

    def counted(text: str) -> Any:
        parsed.append(text)
        return parse(text)

    monkeypatch.setattr(json, "loads", counted)
    with pytest.raises(SpecificationError, match=r"long\.jsonl, line 2: is longer than 1000 bytes"):
        list(each_example(path, max_line_bytes=1000))
    assert len(parsed) == 1
