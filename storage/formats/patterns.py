"""PEFT's `rank_pattern` and `alpha_pattern`: numbers by regular expression over module paths.

The rule is `peft.utils.other.get_pattern_key`: the first key that matches the end of the path from a dot on wins.
Keys come from strangers and Python's matcher can take exponential time, so keys that could are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from storage.errors import AdapterRefusedError

_MAX_KEY_LENGTH = 256
_MAX_REPETITIONS = 3
_MAX_OPTIONS = 8
_REPEATED_GROUP = re.compile(r"\)[*+{]")


class NumberPattern:
    """The number of each module: that of the first pattern that matches its path, else the default.

    Raises AdapterRefusedError, naming `setting`, when it is not a mapping of usable expressions to finite numbers.
    """

    def __init__(self, setting: str, patterns: object, default: float) -> None:
        if patterns is None:
            patterns = {}
        if not isinstance(patterns, Mapping):
            raise AdapterRefusedError(f"the setting {setting} is not a mapping of names to numbers")
        self._default = default
        self._exact: dict[str, float] = {}
        self._matchers: list[tuple[re.Pattern[str], float]] = []
        for key, value in patterns.items():
            number = checked_number(f"{setting}[{key!r}]", value)
            self._exact[key] = number
            self._matchers.append((_compiled(setting, key), number))

    def of(self, path: str) -> float:
        for matcher, number in self._matchers:
            if matcher.match(path):
                return number
        return self._exact.get(path, self._default)


def checked_number(setting: str, value: object) -> float:
    """A finite number from a configuration. Raises AdapterRefusedError naming the setting."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterRefusedError(f"the setting {setting} is {value!r}; expected a finite number")
    return value


def _compiled(setting: str, key: str) -> re.Pattern[str]:
    is_slow = (
        len(key) > _MAX_KEY_LENGTH
        or sum(key.count(sign) for sign in "*+{") > _MAX_REPETITIONS
        or key.count("?") > _MAX_OPTIONS
        or _REPEATED_GROUP.search(key) is not None
    )
    if is_slow:
        raise AdapterRefusedError(
            f"the setting {setting} has the expression {key!r}, which could take too long to match; "
            "write out the module names"
        )
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise AdapterRefusedError(
            f"the setting {setting} has the invalid expression {key!r}: {error}"
        ) from None
