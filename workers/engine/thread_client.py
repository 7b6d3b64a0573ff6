"""The engine in a thread of this process, behind `EngineClient`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from storage.errors import EngineLostError
from storage.identity import AdapterVersion
from workers.bank.source import AdapterTiers
from workers.engine.client import EngineLoad
from workers.engine.engine import Engine
from workers.engine.owed import OwedAnswers, engine_lost
from workers.engine.request import EngineRequest, StepOutputs
from workers.threads import use_threads

# How often requests that wait for an adapter are looked at while nothing computes: deadlines, starvation.
IDLE_PERIOD_S = 0.05
# So many failed steps on end are no bad luck of single requests; the replica is better replaced.
MAX_FAILED_STEPS = 5
STOP_WITHIN_S = 10.0

_log = logging.getLogger(__name__)


class ThreadEngineClient:
    """An `EngineClient`. Takes the engine over: nobody else may step it from now on.

    Args:
        tiers: asked for what `EngineLoad` tells of host, disk and registry; without it that stays empty.
    """

    def __init__(
        self,
        engine: Engine,
        tiers: AdapterTiers | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._tiers = tiers
        self._clock = clock
        self._changed = threading.Condition()
        self._orders: list[Callable[[], None]] = []  # for the engine's thread, before its next step
        self._owed = OwedAnswers()
        self._has_news = False
        self._is_stopping = False
        self._step_began_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, on_step: Callable[[StepOutputs], None]) -> None:
        self._owed.deliver_to(on_step)
        self._engine.loader.notify(self._wake)
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """As `EngineClient.submit`.

        Raises:
            ContextLengthError, InvalidRequestError: it can never be answered, or its id is in use.
            EngineLostError: the engine is stopping or dead.
        """
        self._engine.validate(request)
        with self._changed:
            if self._is_stopping or not self._thread.is_alive():
                raise EngineLostError("this replica is shutting down; send the request again")
            self._owed.add(request)
            self._order(lambda: self._engine.submit(request))

    def abort(self, request_id: str) -> None:
        with self._changed:
            self._order(lambda: self._engine.abort(request_id))

    def prefetch(
        self,
        wanted: Sequence[AdapterVersion],
        pinned: frozenset[AdapterVersion],
        near: Sequence[AdapterVersion] = (),
        retired: frozenset[AdapterVersion] = frozenset(),
    ) -> None:
        if self._tiers is not None and near:
            host, disk = self._tiers.host_versions(), self._tiers.disk_versions()
            near = [version for version in near if version not in host and version not in disk]
        with self._changed:
            self._order(lambda: self._engine.prefetch(wanted, pinned, near, retired))

    def load(self) -> EngineLoad:
        load = self._engine.load()
        if self._tiers is None:
            return load
        return replace(
            load,
            host=tuple(self._tiers.host_versions()),
            disk=tuple(self._tiers.disk_versions()),
            is_registry_up=self._tiers.is_registry_up(),
        )

    @property
    def is_running(self) -> bool:
        """The thread is there: it has not stopped, nor died of an error."""
        return self._thread.is_alive()

    def is_alive(self) -> bool:
        began_s = self._step_began_s
        is_stuck = (
            began_s is not None and self._clock() - began_s > self._engine.settings.step_timeout_s
        )
        is_broken = self._engine.failed_steps_in_a_row >= MAX_FAILED_STEPS
        return self._thread.is_alive() and not is_stuck and not is_broken

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(STOP_WITHIN_S)
        self._engine.loader.stop()

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        self._changed.notify()

    def _wake(self) -> None:
        with self._changed:
            self._has_news = True
            self._changed.notify()

    def _run(self) -> None:
        use_threads(self._engine.num_threads)
        try:
            is_idle = False
            while self._wait(is_idle):
                self._step_began_s = self._clock()
                outputs = self._engine.step()
                self._step_began_s = None
                is_idle = outputs.num_tokens == 0
                self._owed.hand_out(outputs)
            self._owed.hand_out(self._engine.end_all(engine_lost()))
        except Exception:
            _log.exception("the engine's thread ends")
            with self._changed:
                self._is_stopping = True
            self._owed.end_all()

    def _wait(self, is_idle: bool) -> bool:
        """Wait until there may be something to do, carry out the orders; False when it is time to end."""
        with self._changed:
            if is_idle and not self._is_stopping and not self._orders and not self._has_news:
                self._changed.wait(IDLE_PERIOD_S if self._engine.has_requests else None)
            orders, self._orders = self._orders, []
            self._has_news = False
            is_stopping = self._is_stopping
        for order in orders:
            order()
        return not is_stopping
