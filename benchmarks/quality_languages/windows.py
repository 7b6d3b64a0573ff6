"""From source files to windows of tokens that leak nothing from one part to another.

A file is in one part only. No text counts twice, and no window shares a run of `SHARED_RUN` tokens with a window of
another file. What says whose the code is, and not what it does, is cut off.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.quality_languages.languages import Language

SHARED_RUN = 32
WINDOWS_PER_FILE = 4
_LEGAL = re.compile(r"copyright|licen[cs]e|all rights reserved|SPDX|@author", re.IGNORECASE)

Window = tuple[int, ...]
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Counts:
    """Windows of each part; `validation` is what learning rates are chosen by."""

    training: int = 256
    validation: int = 16
    held_out: int = 32


@dataclass(frozen=True, slots=True)
class Parts:
    """Windows of one language."""

    training: tuple[Window, ...]
    validation: tuple[Window, ...]
    held_out: tuple[Window, ...]

    @property
    def digest(self) -> str:
        text = repr((self.training, self.validation, self.held_out))
        return hashlib.sha256(text.encode()).hexdigest()


class TooLittleSourceError(Exception):
    """The packages have fewer windows than were asked for."""


def cleaned(text: str, language: Language) -> str:
    """Source without the comments it begins with, without legal lines, and without what follows its end."""
    lines = [line.rstrip() for line in text.splitlines()]
    end = next((i for i, line in enumerate(lines) if line in language.ends), len(lines))
    lines = lines[_header(lines[:end], language) : end]
    kept = [line for line in lines if not (_is_comment(line, language) and _LEGAL.search(line))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept).strip("\n")) + "\n"


def split(
    files: Iterable[tuple[str, str]],
    language: Language,
    encode: Encode,
    *,
    window: int,
    counts: Counts,
) -> Parts:
    """The first files that it takes for all windows: held-out ones, then those of validation, then training.

    Args:
        files: (path, text) in an order of no meaning.
        window: tokens of each.

    Raises:
        TooLittleSourceError: there are too few.
    """
    taken = _distinct_windows(_distinct_texts(files, language), encode, window)
    parts: list[tuple[Window, ...]] = []
    for count in (counts.held_out, counts.validation, counts.training):
        part: list[Window] = []
        while len(part) < count:
            of_file = next(taken, None)
            if of_file is None:
                raise TooLittleSourceError(
                    f"{language.name}: its packages have too few windows of {window} tokens for {counts}"
                )
            part += of_file
        parts.append(tuple(part[:count]))
    held_out, validation, training = parts
    return Parts(training, validation, held_out)


def _header(lines: Sequence[str], language: Language) -> int:
    """How many lines the comments and blank lines at the beginning take."""
    at = 0
    while at < len(lines):
        line = lines[at].lstrip()
        closing = next(
            (end for begin, end in language.block_comments if line.startswith(begin)), ""
        )
        if closing:
            inside = line[2:]
            while closing not in inside:
                at += 1
                if at == len(lines):
                    return at
                inside = lines[at]
        elif line and not line.startswith(("#!", *language.line_comments)):
            return at
        at += 1
    return at


def _is_comment(line: str, language: Language) -> bool:
    begins = (*language.line_comments, *(begin for begin, _ in language.block_comments))
    return line.lstrip().startswith((*begins, "*"))


def _distinct_texts(files: Iterable[tuple[str, str]], language: Language) -> Iterator[str]:
    """Cleaned; the second of two that differ in white space only is left out."""
    seen: set[str] = set()
    for _, text in files:
        clean = cleaned(text, language)
        key = " ".join(clean.split())
        if key not in seen:
            seen.add(key)
            yield clean


def _distinct_windows(texts: Iterable[str], encode: Encode, length: int) -> Iterator[list[Window]]:
    """By file, at most `WINDOWS_PER_FILE`, spread over it; none that shares a run with an earlier file's."""
    run = min(SHARED_RUN, length)
    known: set[Window] = set()
    for text in texts:
        tokens = tuple(encode(text))
        every = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
        spread = every[:: max(1, -(-len(every) // WINDOWS_PER_FILE))]
        runs = {one: _runs(one, run) for one in spread}
        fresh = [one for one in runs if known.isdisjoint(runs[one])]
        known.update(*(runs[one] for one in fresh))
        yield fresh


def _runs(window: Window, length: int) -> set[Window]:
    return {window[at : at + length] for at in range(len(window) - length + 1)}
