"""Virtual token counters: who has had how much service, so that whoever had least goes first.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Service is in rank-weighted tokens. Of two
clients that wait all the time neither gets more than a bounded amount ahead, however much either asks for; one that
did not wait saves nothing up: when it comes back it is lifted to the least served of those that wait.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Client = TypeVar("Client", bound=Hashable)


class VirtualCounters(Generic[Client]):
    """Counters of clients, of which some wait. A client that is not known stands at the common level."""

    def __init__(self) -> None:
        self._served: dict[Client, float] = {}
        self._num_waiting: dict[Client, int] = {}
        self._last: tuple[Client, ...] = ()  # who waited last, when nobody does; one or none

    @property
    def level(self) -> float:
        """The least service of those that wait; with nobody waiting, that of the last that did. Never sinks."""
        if self._num_waiting:
            return min(self._served[client] for client in self._num_waiting)
        return sum(self._served[client] for client in self._last)

    def served(self, client: Client) -> float:
        """Rank-weighted tokens, comparable between clients."""
        served = self._served.get(client)
        return served if served is not None else self.level

    def join(self, client: Client) -> None:
        """One more request of the client waits."""
        if client not in self._num_waiting:
            self._served[client] = max(self.served(client), self.level)
        self._num_waiting[client] = self._num_waiting.get(client, 0) + 1
        self._last = ()

    def quit(self, client: Client) -> list[Client]:
        """One fewer waits. Raises KeyError if none does.

        Returns the clients that are not remembered any more: they would be lifted to the level anyway.
        """
        self._num_waiting[client] -= 1
        if self._num_waiting[client]:
            return []
        del self._num_waiting[client]
        if not self._num_waiting:
            self._last = (client,)
        level = self.level
        forgotten = [
            one
            for one, served in self._served.items()
            if served <= level and one not in self._num_waiting and one not in self._last
        ]
        for one in forgotten:
            del self._served[one]
        return forgotten

    def charge(self, client: Client, work: float) -> None:
        """The client was served, waiting or not."""
        self._served[client] = self.served(client) + work

    def check_integrity(self) -> bool:
        """Whoever waits has a counter, and so has whoever waited last, if nobody waits."""
        return (
            self._num_waiting.keys() <= self._served.keys()
            and all(count > 0 for count in self._num_waiting.values())
            and set(self._last) <= self._served.keys()
            and not (self._last and self._num_waiting)
        )
