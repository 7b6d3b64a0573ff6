"""How an answer to a held-out prompt is judged: one rule for each example set.

A record is one line of `<name>.heldout.jsonl`: a chat whose last message is the reference answer. Rules look at the
answer alone or compare it with the reference; they know nothing of models or adapters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

_SEA_WORD = re.compile(
    r"\b(anchor|barnacle|boat|bow|cabin|captain|cargo|channel|chart|compass|crew|deck|fish|fog|gale|galley|gull"
    r"|harbour|helm|hold|hull|knot|lantern|lighthouse|mast|oar|overboard|port|rope|row|sail|sailor|salt|sea|shanty"
    r"|ship|shore|spar|stern|storm|swell|tide|voyage|watch|water|wave|whale|wind)(s|es|ed|ing|men)?\b",
    re.IGNORECASE,
)
_CAPTAIN = re.compile(r"Ahoy! (?P<speech>[^\n]+[.?!]) — Captain Brine")


def held_out(name: str) -> list[Mapping[str, Any]]:
    """The prompts of the example set `name` that its training data does not hold."""
    lines = (FOLDER / f"{name}.heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def prompt_of(record: Mapping[str, Any]) -> str:
    """What the user says."""
    return str(record["messages"][0]["content"])


def reference_of(record: Mapping[str, Any]) -> str:
    """The answer a person gave."""
    return str(record["messages"][-1]["content"])


def judge(name: str, record: Mapping[str, Any], answer: str) -> bool:
    """Whether `answer` does what the example set `name` teaches. Space around the answer is ignored."""
    return RULES[name](record, answer.strip())


def _is_order(record: Mapping[str, Any], answer: str) -> bool:
    """The JSON object of the reference: the same keys in the same order, the same item, the same count."""
    try:
        order = json.loads(answer)
    except ValueError:
        return False
    expected = json.loads(reference_of(record))
    return isinstance(order, dict) and list(order.items()) == list(expected.items())


def _is_weather(record: Mapping[str, Any], answer: str) -> bool:
    """The one right label and nothing else."""
    return answer == reference_of(record)


def _is_captain(record: Mapping[str, Any], answer: str) -> bool:
    """One line with the captain's greeting and signature, and something of the sea in between."""
    match = _CAPTAIN.fullmatch(answer)
    return match is not None and _SEA_WORD.search(match["speech"]) is not None


def _is_todo(record: Mapping[str, Any], answer: str) -> bool:
    """A box for every task of the note, in order, in the note's words; nothing before, between or after."""
    return answer == reference_of(record)


RULES: Mapping[str, Callable[[Mapping[str, Any], str], bool]] = {
    "orders": _is_order,
    "weather": _is_weather,
    "captain": _is_captain,
    "todo": _is_todo,
}
