"""Stop strings are found wherever the pieces of text are cut, and nothing of them is ever shown."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from deployments.stop_strings import StopStrings

letters = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


def pieces(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


@given(letters, stop_lists, st.lists(st.integers(0, 100), max_size=10))
def test_the_answer_ends_before_a_stop_string_however_it_is_cut(text, stops, cuts) -> None:
    matcher, shown, read = StopStrings(stops), "", ""
    for piece in pieces(text, cuts):
        read += piece
        shown += matcher.push(piece)
        starts = [at for stop in stops if (at := read.find(stop)) >= 0]
        assert matcher.found == bool(starts)
        if matcher.found:
            assert shown == read[: min(starts)]
            return
    assert shown + matcher.flush() == text


@given(letters, stop_lists)
def test_text_is_held_back_only_while_it_may_begin_a_stop_string(text, stops) -> None:
    matcher, shown = StopStrings(stops), ""
    for letter in text:
        shown += matcher.push(letter)
        if matcher.found:
            return
    held = text[len(shown) :]
    assert not held or any(stop.startswith(held) for stop in stops)


@given(letters, stop_lists, st.lists(st.integers(0, 100), max_size=10), st.integers(0, 10))
def test_a_stop_string_counts_once_it_ends_behind_the_exempt_text(
    text, stops, cuts, num_exempt
) -> None:
    matcher, shown, read, exempt = StopStrings(stops), "", "", 0
    for number, piece in enumerate(pieces(text, cuts)):
        read += piece
        may_end = number >= num_exempt
        exempt = exempt if may_end else len(read)
        shown += matcher.push(piece, may_end=may_end)
        starts = [
            at
            for stop in stops
            for at in range(len(read))
            if read.startswith(stop, at) and at + len(stop) > exempt
        ]
        assert matcher.found == bool(starts)
        if matcher.found:
            assert shown == read[: min(starts)]
            return
    assert shown + matcher.flush() == text


def test_the_earliest_of_several_stop_strings_wins() -> None:
    matcher = StopStrings(["world", "lo"])
    assert matcher.push("hello world") == "hel"
    assert matcher.found
    assert matcher.flush() == ""
