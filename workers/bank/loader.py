"""Brings adapters to the bank in the background: one load per version, requests before prefetches, never on the step
thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.adapter_rows import AdapterRows
from storage.errors import BaseMismatchError, FloraError
from storage.identity import AdapterVersion
from workers.bank.bank import AdapterBank
from workers.bank.books import BankBusyError
from workers.row_form.step_plan import NotResidentError
from workers.threads import use_threads

# How long a failed load answers further requests, and a failed prefetch is not tried again.
RETRY_AFTER_S = 5.0
# How long a failed load waits for the request it failed for, which may sit behind a long step.
TELL_WITHIN_S = 60.0

_log = logging.getLogger(__name__)


class FetchedAdapter(Protocol):
    """An adapter's rows, and where they were found: host, disk or registry."""

    @property
    def rows(self) -> AdapterRows: ...

    @property
    def tier(self) -> str: ...


AdapterSource = Callable[[AdapterVersion], FetchedAdapter]
"""May take seconds and raise any of our errors; called from the loader's threads, once at a time per version."""


class AdapterTiers(Protocol):
    """A source that can tell what it keeps near: `storage.adapter_cache.AdapterCache`. Any method from any thread."""

    def get(self, version: AdapterVersion) -> FetchedAdapter:
        """As `AdapterSource`."""

    def host_versions(self) -> Collection[AdapterVersion]: ...

    def disk_versions(self) -> Collection[AdapterVersion]: ...


@dataclass(slots=True, eq=False)
class _Load:
    version: AdapterVersion
    is_requested: bool  # by a request, not only by a prefetch
    is_for_device: bool = True  # or only to be near
    fetched: FetchedAdapter | None = None
    is_busy: bool = False  # the bank had no room at the last attempt
    is_parked: bool = False  # … and nothing was freed since


@dataclass(slots=True)
class _Failure:
    error: Exception
    at_s: float
    is_told: bool = False

    def is_over(self, now: float) -> bool:
        return now - self.at_s >= (RETRY_AFTER_S if self.is_told else TELL_WITHIN_S)


class AdapterLoader:
    """See the module's docstring. Every method but `stop` may be called from any thread and returns at once.

    Args:
        source: fetches a version's rows.
        base_digest: of the model served; an adapter bound to another one is refused.
        concurrency: threads, so loads at a time.
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
        self._condition = threading.Condition()
        self._loads: dict[AdapterVersion, _Load] = {}
        self._requested: deque[_Load] = deque()
        self._prefetched: deque[_Load] = deque()
        self._kept_near: deque[_Load] = deque()
        self._retired: set[AdapterVersion] = set()
        self._failures: dict[AdapterVersion, _Failure] = {}
        self._prefetch_again_s: dict[AdapterVersion, float] = {}
        self._claims: set[AdapterVersion] = set()
        self._tiers: OrderedDict[AdapterVersion, str] = OrderedDict()
        self._num_freed = 0
        self._is_stopping = False
        self._on_change: Callable[[], None] = lambda: None
        self.num_errors = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"adapter-loader-{i}", daemon=True)
            for i in range(concurrency)
        ]
        for thread in self._threads:
            thread.start()

    def notify(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` from now on whenever a load ends, well or not."""
        self._on_change = on_change

    def request(self, version: AdapterVersion) -> Exception | None:
        """Have a version loaded that a request waits for; no effect while it is being loaded, or kept for it, already.

        Returns the error of the load that failed since the last call, or shortly before it: then nothing is started,
        and the requests that wait should be told.
        """
        with self._condition:
            self._forget_old(self._clock())
            failure = self._failures.get(version)
            if failure is not None:
                failure.is_told = True
                return failure.error
            if version in self._claims:
                return None  # it came since the request looked for it
            load = self._loads.get(version)
            if load is None:
                self._enqueue(_Load(version, is_requested=True))
            elif not load.is_requested:
                load.is_requested = load.is_for_device = True
                for queue in (self._prefetched, self._kept_near):
                    if load in queue:
                        queue.remove(load)
                        self._enqueue(load)
        return None

    def prefetch(
        self, wanted: Sequence[AdapterVersion], near: Sequence[AdapterVersion] = ()
    ) -> None:
        """Load these when nothing more urgent is to do, in this order. Replaces what was asked for before.

        Args:
            wanted: to the device.
            near: only as near as the source keeps them, after all others.
        """
        with self._condition:
            for load in (*self._prefetched, *self._kept_near):
                del self._loads[load.version]
            self._prefetched.clear()
            self._kept_near.clear()
            self._forget_old(self._clock())
            known = {*self._loads, *self._prefetch_again_s, *self._bank.residents()}
            for versions, is_for_device in ((wanted, True), (near, False)):
                for version in versions:
                    if version not in known:
                        known.add(version)
                        self._enqueue(_Load(version, False, is_for_device))

    def retire(self, versions: Collection[AdapterVersion]) -> None:
        """Free the rows of these soon, but of those that are in use. Replaces what was asked for before."""
        with self._condition:
            self._retired = set(versions).intersection(self._bank.residents())
            if self._retired:
                self._condition.notify()

    def rows_freed(self) -> None:
        """References were given back, or pins changed: try again what found no room."""
        with self._condition:
            self._num_freed += 1
            for load in self._loads.values():
                if load.is_parked:
                    load.is_parked = False
                    self._enqueue(load)

    @property
    def claims(self) -> frozenset[AdapterVersion]:
        """Adapters that were loaded for a request and are kept for it until `release_claims`, a reference each."""
        with self._condition:
            return frozenset(self._claims)

    def references_of_others(self) -> dict[AdapterVersion, int]:
        """How often each adapter is held, claims not counted. Consistent while loads end."""
        with self._condition:
            held = Counter(self._bank.references())
            held.subtract(self._claims)
        return {version: count for version, count in held.items() if count}

    def release_claims(self, claims: frozenset[AdapterVersion]) -> None:
        """Every request that waits has had its chance, since `claims` were read, to take a reference of its own."""
        with self._condition:
            mine = self._claims & claims  # `stop` may have given some back meanwhile
            self._claims -= mine
        for version in mine:
            self._bank.release(version)
        if mine:
            self.rows_freed()

    def waits_for_room(self, version: AdapterVersion) -> bool:
        """The bank had no room for it at the last attempt; there may be another attempt under way."""
        with self._condition:
            load = self._loads.get(version)
            return load is not None and load.is_busy

    def is_trying(self, version: AdapterVersion) -> bool:
        """It is being loaded, or will be without anything being freed."""
        with self._condition:
            load = self._loads.get(version)
            return load is not None and not load.is_parked

    def tier(self, version: AdapterVersion) -> str:
        """Where a version was loaded from that became resident a moment ago."""
        with self._condition:
            return self._tiers.get(version, "device")

    def stop(self) -> None:
        """End after the loads under way, wait for them up to a second, and give back all claims."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join(timeout=1.0)
        self.release_claims(self.claims)

    def _enqueue(self, load: _Load) -> None:
        self._loads[load.version] = load
        queue = self._requested if load.is_requested else self._prefetched
        (queue if load.is_for_device else self._kept_near).append(load)
        self._condition.notify()

    def _work(self) -> None:
        # Rows are copied and checked on this thread alone: the other cores are the engine's.
        use_threads(1)
        while True:
            with self._condition:
                while not self._is_stopping and not (
                    self._retired or self._requested or self._prefetched or self._kept_near
                ):
                    self._condition.wait()
                if self._is_stopping:
                    return
                retired = self._retired.pop() if self._retired else None
                queue = self._requested or self._prefetched or self._kept_near
                load = queue.popleft() if retired is None else None
                num_freed = self._num_freed
            if retired is not None:
                self._evict(retired)
            if load is not None:
                self._bring(load, num_freed)

    def _evict(self, version: AdapterVersion) -> None:
        try:
            self._bank.evict(version)
        except BankBusyError:
            return  # whoever retired it will say so again
        self.rows_freed()

    def _bring(self, load: _Load, num_freed: int) -> None:
        try:
            self._load(load)
        except BankBusyError:
            self._no_room(load, num_freed)
        except Exception as error:
            self._failed(load, error)
        else:
            self._loaded(load)
        self._on_change()

    def _load(self, load: _Load) -> None:
        if load.fetched is None:
            load.fetched = self._source(load.version)
        if not load.is_for_device:
            return
        rows, tier = load.fetched.rows, load.fetched.tier
        _check_base(rows, self._base_digest)
        with self._condition:
            self._tiers[load.version] = tier
            self._tiers.move_to_end(load.version)
            while len(self._tiers) > self._bank.num_slots:
                self._tiers.popitem(last=False)
        self._bank.load(load.version, rows)

    def _loaded(self, load: _Load) -> None:
        with self._condition:
            if load.is_requested:
                # Or another thread's load could evict it before the request it came for has seen it.
                try:
                    self._bank.acquire(load.version)
                except NotResidentError:
                    self._enqueue(load)
                    return
                self._claims.add(load.version)
            del self._loads[load.version]
            self._failures.pop(load.version, None)

    def _no_room(self, load: _Load, num_freed: int) -> None:
        with self._condition:
            if not load.is_requested:
                del self._loads[load.version]
                self._prefetch_again_s[load.version] = self._clock() + RETRY_AFTER_S
                return
            load.is_busy = True
            # Something may have been freed while the attempt was under way; parking would miss it.
            if self._num_freed != num_freed:
                self._enqueue(load)
            else:
                load.is_parked = True

    def _failed(self, load: _Load, error: Exception) -> None:
        if not isinstance(error, FloraError):
            _log.exception("loading adapter %s failed", load.version)
        with self._condition:
            now = self._clock()
            self.num_errors += 1
            del self._loads[load.version]
            if load.is_requested:
                self._failures[load.version] = _Failure(error, now)
            else:
                self._prefetch_again_s[load.version] = now + RETRY_AFTER_S

    def _forget_old(self, now: float) -> None:
        self._failures = {
            version: failure
            for version, failure in self._failures.items()
            if not failure.is_over(now)
        }
        self._prefetch_again_s = {
            version: at_s for version, at_s in self._prefetch_again_s.items() if now < at_s
        }


def _check_base(rows: AdapterRows, base_digest: str) -> None:
    """Adapters that multiply or measure W0 only mean something on the base they were made for."""
    if rows.base_digest is None or rows.base_digest == base_digest:
        return
    if rows.needs_its_base:
        raise BaseMismatchError(
            f"the adapter was made for the base model {rows.base_digest[:12]}…, this one is {base_digest[:12]}…",
            param="model",
        )
