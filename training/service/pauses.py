"""How long to leave a batch alone that its cluster did not take: each time twice as long as before. Pure."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

_FIRST_S = 1.0
_LONGEST_S = 60.0
_LONGEST_LASTING_S = 300.0


@dataclass(frozen=True, slots=True)
class _Pause:
    seconds: float
    until_s: float


class Pauses:
    """By the name of what is left alone."""

    def __init__(self) -> None:
        self._pauses: dict[str, _Pause] = {}

    def is_due(self, name: str, now_s: float) -> bool:
        return name not in self._pauses or now_s >= self._pauses[name].until_s

    def begin(self, name: str, now_s: float, *, is_lasting: bool) -> None:
        """Args: is_lasting: somebody must do something first, so there is no hurry."""
        last = self._pauses.get(name)
        longest_s = _LONGEST_LASTING_S if is_lasting else _LONGEST_S
        seconds = _FIRST_S if last is None else min(2 * last.seconds, longest_s)
        self._pauses[name] = _Pause(seconds, now_s + seconds)

    def end(self, name: str) -> None:
        """The next pause is short again."""
        self._pauses.pop(name, None)

    def keep(self, names: Container[str]) -> None:
        """Forget all others."""
        self._pauses = {name: one for name, one in self._pauses.items() if name in names}
