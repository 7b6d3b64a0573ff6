"""Brings adapters to the bank in the background: one load per version, requests before wishes, never on the step
thread, and what is near never behind what is far.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from storage.adapter_rows import AdapterRows
from storage.errors import BaseMismatchError, FloraError
from storage.identity import AdapterVersion
from storage.load_stages import Stage, StageClock
from workers.bank.bank import AdapterBank
from workers.bank.books import BankBusyError
from workers.bank.load_failures import LoadFailures
from workers.bank.load_queue import Lane, Load, LoadQueue, Urgency
from workers.bank.load_times import LoadReport, LoadTimes
from workers.bank.source import AdapterSource
from workers.row_form.step_plan import NotResidentError
from workers.threads import use_threads

_log = logging.getLogger(__name__)


class AdapterLoader:
    """See the module's docstring. Every method but `stop` may be called from any thread and returns at once.

    Args:
        source: fetches a version's rows.
        base_digest: of the model served; an adapter bound to another one is refused.
        concurrency: threads, so loads at a time: so many for what is near, and as many to fetch what is far.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        bank: AdapterBank,
        source: AdapterSource,
        *,
        base_digest: str,
        concurrency: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bank = bank
        self._source = source
        self._base_digest = base_digest
        self._clock = clock
        self._condition = threading.Condition(threading.Lock())
        self._queue = LoadQueue()
        self._failures = LoadFailures()
        self._times = LoadTimes()
        self._retired: frozenset[AdapterVersion] = frozenset()
        self._may_evict = False
        self._claims: set[AdapterVersion] = set()
        self._tiers: OrderedDict[AdapterVersion, str] = OrderedDict()
        self._num_freed = 0
        self._is_stopping = False
        self._on_change: Callable[[], None] = lambda: None
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(lane,),
                name=f"adapter-loader-{lane.name.lower()}-{i}",
                daemon=True,
            )
            for lane in Lane
            for i in range(concurrency)
        ]
        for thread in self._threads:
            thread.start()

    def notify(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` from now on whenever a load ends, well or not."""
        self._on_change = on_change

    def request(self, version: AdapterVersion) -> Exception | None:
        """Have a version loaded that a request waits for; no effect while it is being loaded, or kept for it, already.

        Returns an error while its last load failed so lately that another try is not worth it: then nothing is
        started, and the requests that wait should be told.
        """
        with self._locked():
            now = self._clock()
            if version in self._claims:
                return None  # it came since the request looked for it
            load = self._queue.find(version)
            if load is not None:
                self._queue.hurry(load, now)
                return None
            error = self._failures.error(version, now)
            if error is None:
                self._enqueue(Load(version, Urgency.REQUESTED, now))
            return error

    def take_failures(self) -> dict[AdapterVersion, Exception]:
        """The loads that failed since the last call. Every request that waits for one of these should be told."""
        with self._locked():
            return self._failures.take_untold()

    def prefetch(
        self,
        wanted: Sequence[AdapterVersion],
        near: Sequence[AdapterVersion] = (),
        retired: frozenset[AdapterVersion] = frozenset(),
    ) -> None:
        """Load these when nothing more urgent is to do, in this order. Replaces what was asked for before.

        Args:
            wanted: to the device.
            near: only as near as the source keeps them, after all others.
            retired: to be evicted from the device as soon as nobody uses them.
        """
        residents = frozenset(self._bank.residents())
        with self._locked():
            now = self._clock()
            self._queue.drop_wishes()
            for versions, urgency in ((wanted, Urgency.WANTED), (near, Urgency.KEPT)):
                for version in versions:
                    is_here = version in residents or version in self._queue
                    if not is_here and not self._failures.is_resting(version, urgency, now):
                        self._enqueue(Load(version, urgency, now))
            self._retired = retired & residents
            self._evict_soon()

    def rows_freed(self) -> None:
        """References were given back, or pins changed: try again what found no room."""
        with self._locked():
            self._num_freed += 1
            self._queue.unpark(self._clock())
            self._condition.notify_all()
            self._evict_soon()

    @property
    def claims(self) -> frozenset[AdapterVersion]:
        """Adapters that were loaded for a request and are kept for it until `release_claims`, a reference each."""
        with self._locked():
            return frozenset(self._claims)

    def references_of_others(self) -> dict[AdapterVersion, int]:
        """How often each adapter is held, claims not counted. Consistent while loads end."""
        with self._condition:
            held = Counter(self._bank.references())
            held.subtract(self._claims)
        return {version: count for version, count in held.items() if count}

    def release_claims(self, claims: frozenset[AdapterVersion]) -> None:
        """Every request that waits has had its chance, since `claims` were read, to take a reference of its own."""
        with self._locked():
            mine = self._claims & claims  # `stop` may have given some back meanwhile
            self._claims -= mine
        for version in mine:
            self._bank.release(version)
        if mine:
            self.rows_freed()

    def waits_for_room(self, version: AdapterVersion) -> bool:
        """The bank had no room for it at the last attempt; there may be another attempt under way."""
        with self._locked():
            load = self._queue.find(version)
            return load is not None and load.is_busy

    def is_trying(self, version: AdapterVersion) -> bool:
        """It is being loaded, or will be without anything being freed."""
        with self._locked():
            load = self._queue.find(version)
            return load is not None and not load.is_parked

    def tier(self, version: AdapterVersion) -> str:
        """Where a version was loaded from that became resident a moment ago."""
        with self._locked():
            return self._tiers.get(version, "device")

    def report(self) -> LoadReport:
        """What became of loads, since start."""
        with self._condition:
            return LoadReport(
                self._failures.num_errors,
                self._failures.failed(self._clock()),
                self._times.average_s,
                self._times.read(),
            )

    def stop(self) -> None:
        """End after the loads under way, wait for them up to a second, and give back all claims."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()
        end_s = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(timeout=max(0.0, end_s - time.monotonic()))
        self.release_claims(self.claims)

    def _locked(self) -> AbstractContextManager[None]:
        """The lock, in methods that the thread that steps calls."""
        return self._bank.waits.holding(self._condition)

    def _enqueue(self, load: Load) -> None:
        self._queue.add(load, self._clock())
        self._condition.notify_all()

    def _evict_soon(self) -> None:
        if self._retired:
            self._may_evict = True
            self._condition.notify_all()

    def _work(self, lane: Lane) -> None:
        # Rows are copied and checked on this thread alone: the other cores are the engine's.
        use_threads(1)
        while True:
            with self._condition:
                while not self._is_stopping and not self._has_work(lane):
                    self._condition.wait()
                if self._is_stopping:
                    return
                retired = self._take_retired(lane)
                load = self._queue.pop(lane, self._clock())
                num_freed = self._num_freed
            for version in retired:
                self._retire(version)
            if load is not None:
                self._carry_out(load, num_freed)

    def _has_work(self, lane: Lane) -> bool:
        return self._queue.has_waiting(lane) or (lane is Lane.NEAR and self._may_evict)

    def _take_retired(self, lane: Lane) -> frozenset[AdapterVersion]:
        if lane is not Lane.NEAR or not self._may_evict:
            return frozenset()
        self._may_evict = False
        return self._retired

    def _retire(self, version: AdapterVersion) -> None:
        try:
            self._bank.evict(version)
        except BankBusyError:
            return  # whoever uses it will free it
        except Exception:
            # This thread must outlive it: the adapters of everybody come on it.
            _log.exception("the version %s cannot be evicted", version)
            return
        with self._condition:
            self._retired -= {version}
        self.rows_freed()

    def _carry_out(self, load: Load, num_freed: int) -> None:
        stages = StageClock()
        try:
            if load.fetched is None:
                self._fetch(load)
            if self._moves_on(load):
                return
            if load.urgency is not Urgency.KEPT:
                with stages.stage("device"):
                    self._bring(load)
        except BankBusyError:
            self._no_room(load, num_freed)
        except Exception as error:
            self._failed(load, error)
        else:
            self._loaded(load, stages.stage_s)
        self._on_change()

    def _fetch(self, load: Load) -> None:
        if load.lane is Lane.FAR:
            load.fetched = self._source.get(load.version)
        else:
            load.fetched = self._source.find_near(load.version)
        if load.fetched is not None:
            _check_base(load.fetched.rows, self._base_digest)

    def _moves_on(self, load: Load) -> bool:
        """Whether the other lane does what is left: fetch what is not near, or bring to the device what now is."""
        with self._condition:
            if load.lane is Lane.NEAR and load.fetched is None:
                load.lane = Lane.FAR
            elif load.lane is Lane.FAR and load.urgency is not Urgency.KEPT:
                load.lane = Lane.NEAR
            else:
                return False
            self._enqueue(load)
            return True

    def _bring(self, load: Load) -> None:
        assert load.fetched is not None
        with self._condition:
            self._tiers[load.version] = load.fetched.tier
            self._tiers.move_to_end(load.version)
            while len(self._tiers) > self._bank.num_slots:
                self._tiers.popitem(last=False)
        self._bank.load(load.version, load.fetched.rows)

    def _loaded(self, load: Load, stage_s: dict[Stage, float]) -> None:
        assert load.fetched is not None
        with self._condition:
            is_requested = load.urgency is Urgency.REQUESTED
            if is_requested:
                # Or another thread's load could evict it before the request it came for has seen it.
                try:
                    self._bank.acquire(load.version)
                except NotResidentError:
                    self._enqueue(load)
                    return
                self._claims.add(load.version)
            self._queue.remove(load)
            self._failures.loaded(load.version)
            if load.urgency is Urgency.KEPT:
                self._failures.fetched(load.version, self._clock())
            self._times.went_through({"queue": load.queue_s, **load.fetched.stage_s, **stage_s})
            if load.urgency is not Urgency.KEPT:
                seconds = self._clock() - load.asked_s
                self._times.loaded(load.fetched.tier, seconds, is_requested=is_requested)

    def _no_room(self, load: Load, num_freed: int) -> None:
        with self._condition:
            if load.urgency is not Urgency.REQUESTED:
                self._queue.remove(load)
                self._failures.no_room(load.version, self._clock())
                return
            load.is_busy = True
            # Something may have been freed while the attempt was under way; parking would miss it.
            if self._num_freed != num_freed:
                self._enqueue(load)
            else:
                load.is_parked = True

    def _failed(self, load: Load, error: Exception) -> None:
        if not isinstance(error, FloraError):
            _log.exception("loading adapter %s failed", load.version)
        with self._condition:
            self._queue.remove(load)
            self._failures.failed_now(load.version, error, self._clock())


def _check_base(rows: AdapterRows, base_digest: str) -> None:
    """Adapters that multiply or measure W0 only mean something on the base they were made for."""
    if rows.base_digest is None or rows.base_digest == base_digest:
        return
    if rows.needs_its_base:
        raise BaseMismatchError(
            f"the adapter was made for the base model {rows.base_digest[:12]}…, this one is {base_digest[:12]}…",
            param="model",
        )
