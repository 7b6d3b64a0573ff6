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
    """Counters of clients, by their requests that wait and that run. An unknown client stands at the common level.

    Args:
        sweep_beyond: so many counters are kept before those that say nothing any more are looked for.
    """

    def __init__(self, sweep_beyond: int = 64) -> None:
        self._served: dict[Client, float] = {}
        self._num_present: dict[Client, int] = {}
        self._num_waiting: dict[Client, int] = {}
        self._last: tuple[Client, ...] = ()  # who waited last, when nobody does; one or none
        self._sweep_beyond = self._least_sweep = sweep_beyond

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
        self._num_present[client] = self._num_present.get(client, 0) + 1
        self._last = ()

    def start(self, client: Client) -> None:
        """One of its requests waits no more. Raises KeyError if none does."""
        _count_down(self._num_waiting, client)
        if not self._num_waiting:
            self._last = (client,)

    def leave(self, client: Client) -> list[Client]:
        """One of its requests that do not wait is gone. Raises KeyError if there is none.

        Returns the clients that are not remembered any more: they would be lifted to the level anyway.
        """
        if self._num_present[client] == self._num_waiting.get(client, 0):
            raise KeyError(client)
        _count_down(self._num_present, client)
        if len(self._served) <= self._sweep_beyond:
            return []
        level = self.level
        forgotten = [
            one
            for one, served in self._served.items()
            if served <= level and one not in self._num_present and one not in self._last
        ]
        for one in forgotten:
            del self._served[one]
        self._sweep_beyond = 2 * len(self._served) + self._least_sweep
        return forgotten

    def charge(self, client: Client, work: float) -> None:
        """The client was served, waiting or not."""
        self._served[client] = self.served(client) + work

    def check_integrity(self) -> bool:
        """Whoever is present has a counter, and so has whoever waited last, if nobody waits."""
        return (
            self._num_present.keys() <= self._served.keys()
            and all(
                0 < count <= self._num_present.get(client, 0)
                for client, count in self._num_waiting.items()
            )
            and all(count > 0 for count in self._num_present.values())
            and set(self._last) <= self._served.keys()
            and not (self._last and self._num_waiting)
        )


def _count_down(counts: dict[Client, int], client: Client) -> None:
    counts[client] -= 1
    if not counts[client]:
        del counts[client]
