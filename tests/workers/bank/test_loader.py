"""Adapters come in the background: once each, requests first, and never lost for want of room."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import (
    AdapterCorruptError,
    AdapterRefusedError,
    BaseMismatchError,
    StoreUnavailableError,
    UnknownModelError,
)
from storage.identity import AdapterVersion
from tests.workers.engine.small_engine import Fetched, version
from workers.bank.bank import AdapterBank
from workers.bank.books import BankBusyError
from workers.bank.load_failures import (
    FETCH_AGAIN_AFTER_S,
    PASSING_RETRY_AFTER_S,
    REPAIR_AFTER_S,
    RETRY_AFTER_S,
)
from workers.bank.loader import AdapterLoader

BASE = "b" * 64


def rows(rank: int = 1, base_digest: str | None = None, *, both_sides: bool = True) -> AdapterRows:
    b_RI = torch.ones(rank, 3) if both_sides else None
    return AdapterRows({"q": ModuleRows(mul_a_RO=torch.ones(rank, 2), mul_b_RI=b_RI)}, base_digest)


class Source:
    """Adapters by version, some of them near; holds fetches of what is far up while `gate` is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.adapters: dict[AdapterVersion, AdapterRows | Exception] = {}
        self.fetched: list[AdapterVersion] = []
        self.near: set[AdapterVersion] = set()

    def find_near(self, wanted: AdapterVersion) -> Fetched | None:
        return Fetched(self._rows(wanted), "disk") if wanted in self.near else None

    def get(self, wanted: AdapterVersion) -> Fetched:
        self.fetched.append(wanted)
        assert self.gate.wait(60)
        return Fetched(self._rows(wanted), "registry", {"registry": 0.5, "parse": 0.1})

    def _rows(self, wanted: AdapterVersion) -> AdapterRows:
        found = self.adapters.get(wanted, rows())
        if isinstance(found, Exception):
            raise found
        return found


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bank() -> AdapterBank:
    return AdapterBank(
        {"q": (3, 2)},
        num_rows=4,
        num_slots=3,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@pytest.fixture
def loader(bank: AdapterBank, source: Source, clock: Clock) -> Iterator[AdapterLoader]:
    one = AdapterLoader(bank, source, base_digest=BASE, concurrency=2, clock=clock)
    yield one
    source.gate.set()
    one.stop()


def eventually(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def test_a_version_is_fetched_once_however_often_it_is_asked_for(
    loader: AdapterLoader, bank: AdapterBank, source: Source
) -> None:
    source.gate.clear()
    for _ in range(50):
        assert loader.request(version(1)) is None
    source.gate.set()
    eventually(lambda: bank.find(version(1)) is not None)
    assert source.fetched == [version(1)]
    assert loader.tier(version(1)) == "registry"


def test_what_was_loaded_for_a_request_stays_until_the_request_has_seen_it(
    loader: AdapterLoader, bank: AdapterBank, source: Source
) -> None:
    source.adapters = {version(i): rows(2) for i in range(6)}
    for number in range(6):
        loader.request(version(number))
    # Two fit. The others wait for room instead of pushing them out unseen.
    eventually(lambda: len(bank.references()) == 2)
    eventually(lambda: sum(loader.waits_for_room(version(i)) for i in range(6)) == 4)
    assert bank.counters.evictions == 0
    seen = set(bank.references())
    while len(seen) < 6:
        loader.release_claims(loader.claims)
        eventually(lambda: len(bank.references()) > 0)
        seen |= bank.references().keys()
    assert not loader.references_of_others()


def test_a_request_that_looked_too_early_gets_no_second_load(
    loader: AdapterLoader, bank: AdapterBank, source: Source
) -> None:
    """Or two references would be taken, and one given back."""
    before = loader.claims
    loader.request(version(1))
    eventually(lambda: loader.claims == {version(1)})
    loader.release_claims(before)
    loader.request(version(1))
    loader.request(version(2))
    eventually(lambda: version(2) in loader.claims)
    assert source.fetched == [version(1), version(2)]
    assert bank.references() == {version(1): 1, version(2): 1}
    loader.release_claims(loader.claims)
    assert bank.references() == {}


def test_an_adapter_without_room_is_loaded_once_room_is_made(
    loader: AdapterLoader, bank: AdapterBank, source: Source
) -> None:
    source.adapters = {version(1): rows(4), version(2): rows(4)}
    bank.load(version(1), rows(4))
    bank.acquire(version(1))
    loader.request(version(2))
    eventually(lambda: loader.waits_for_room(version(2)) and not loader.is_trying(version(2)))
    assert loader.request(version(2)) is None  # it goes on waiting; that is no error
    bank.release(version(1))
    loader.rows_freed()
    eventually(lambda: bank.find(version(2)) is not None)
    assert not loader.waits_for_room(version(2))
    assert source.fetched == [version(2)]


def test_room_made_while_a_load_is_being_refused_is_not_missed(source: Source) -> None:
    class LastMoment(AdapterBank):
        """Its adapter in use is released just after a load has found no room."""

        def load(self, wanted: AdapterVersion, rows: AdapterRows) -> int:
            try:
                return super().load(wanted, rows)
            except BankBusyError:
                self.release(version(1))
                loader.rows_freed()
                raise

    cpu = torch.device("cpu")
    bank = LastMoment({"q": (3, 2)}, num_rows=4, num_slots=3, dtype=torch.float32, device=cpu)
    bank.load(version(1), rows(4))
    bank.acquire(version(1))
    loader = AdapterLoader(bank, source, base_digest=BASE, concurrency=1)
    try:
        loader.request(version(2))
        eventually(lambda: bank.find(version(2)) is not None)
    finally:
        loader.stop()


def test_a_failed_load_is_told_once_to_all_who_wait_and_tried_again_later(
    loader: AdapterLoader, bank: AdapterBank, source: Source, clock: Clock
) -> None:
    source.adapters[version(1)] = AdapterRefusedError("a tensor is too long")
    assert loader.request(version(1)) is None
    eventually(lambda: loader.report().num_errors == 1)
    clock.now += 1000 * RETRY_AFTER_S  # behind a long step
    told = loader.take_failures()
    assert told.keys() == {version(1)} and isinstance(told[version(1)], AdapterRefusedError)
    assert not loader.take_failures()
    source.adapters[version(1)] = rows()
    assert loader.request(version(1)) is None
    eventually(lambda: bank.find(version(1)) is not None)


def test_an_error_that_nobody_waited_for_is_not_told_to_those_who_come_later(
    loader: AdapterLoader, bank: AdapterBank, source: Source, clock: Clock
) -> None:
    source.adapters[version(1)] = AdapterRefusedError("a tensor is too long")
    loader.prefetch([version(1)])
    eventually(lambda: loader.report().num_errors == 1)
    source.adapters[version(1)] = rows()
    clock.now += RETRY_AFTER_S
    assert loader.request(version(1)) is None
    eventually(lambda: bank.find(version(1)) is not None)


@pytest.mark.parametrize(
    ("error", "kept_s"),
    [
        (AdapterRefusedError("a tensor is too long"), RETRY_AFTER_S),
        (UnknownModelError("not published"), PASSING_RETRY_AFTER_S),
        (StoreUnavailableError("the registry does not answer"), PASSING_RETRY_AFTER_S),
    ],
)
def test_shortly_after_a_failure_requests_are_told_without_another_try(
    loader: AdapterLoader, source: Source, clock: Clock, error: Exception, kept_s: float
) -> None:
    source.adapters[version(1)] = error
    loader.request(version(1))
    eventually(lambda: loader.report().num_errors == 1)
    for _ in range(3):
        assert loader.request(version(1)) is error
        clock.now += 0.3 * kept_s
    assert source.fetched == [version(1)]
    clock.now += 0.2 * kept_s
    assert loader.request(version(1)) is None


def test_versions_that_cannot_be_served_are_reported_as_long_as_they_cannot(
    loader: AdapterLoader, bank: AdapterBank, source: Source, clock: Clock
) -> None:
    source.adapters = {
        version(1): AdapterCorruptError("the stored file is damaged"),
        version(2): AdapterRefusedError("a tensor is too long"),
        version(3): rows(base_digest="f" * 64),
        version(4): rows(rank=5),  # of a bank of 4
        version(5): StoreUnavailableError("the registry does not answer"),
        version(6): UnknownModelError("not published"),
    }
    for number in range(1, 7):
        loader.request(version(number))
    eventually(lambda: loader.report().num_errors == 6)
    failed = {one.version: one for one in loader.report().failed}
    assert {version: one.code for version, one in failed.items()} == {
        version(1): "adapter_corrupt",
        version(2): "adapter_refused",
        version(3): "base_mismatch",
        version(4): "capacity_exceeded",
    }
    assert failed[version(2)].message == "a tensor is too long"
    # A damaged one may have been repaired, for all anybody here knows; the others stay what they are.
    clock.now += REPAIR_AFTER_S
    assert {one.version for one in loader.report().failed} == {version(n) for n in (2, 3, 4)}
    source.adapters[version(2)] = rows()
    loader.request(version(2))
    eventually(lambda: bank.find(version(2)) is not None)
    eventually(lambda: {one.version for one in loader.report().failed} == {version(3), version(4)})


def test_a_registry_that_does_not_answer_holds_up_nobody_whose_adapter_is_near(
    loader: AdapterLoader, bank: AdapterBank, source: Source
) -> None:
    source.gate.clear()
    for number in range(10, 16):
        loader.request(version(number))
    eventually(lambda: len(source.fetched) == 2)  # as many as it has threads for what is far
    source.near = {version(1), version(2)}
    loader.request(version(1))
    loader.prefetch([version(2)])
    eventually(lambda: set(bank.residents()) == {version(1), version(2)})
    assert loader.tier(version(1)) == "disk"
    assert len(source.fetched) == 2
    source.gate.set()
    eventually(lambda: loader.request(version(15)) is None and len(source.fetched) == 6)


def test_what_is_only_to_be_near_comes_last_and_never_to_the_device(
    bank: AdapterBank, source: Source, clock: Clock
) -> None:
    loader = AdapterLoader(bank, source, base_digest=BASE, concurrency=1, clock=clock)
    try:
        source.gate.clear()
        loader.request(version(1))
        eventually(lambda: source.fetched == [version(1)])
        loader.prefetch([version(2)], near=[version(3), version(4), version(2), version(1)])
        loader.prefetch([version(2)], near=[version(4), version(5)])
        loader.request(version(6))
        source.gate.set()
        eventually(lambda: len(source.fetched) == 5)
        assert source.fetched == [version(number) for number in (1, 6, 2, 4, 5)]
        loader.release_claims(loader.claims)
        assert set(bank.residents()) == {version(1), version(6), version(2)}
        # What there was no room to keep is not fetched every half second again, but when it is wanted.
        eventually(lambda: not loader.is_trying(version(5)))
        loader.prefetch([], near=[version(4), version(5)])
        assert not loader.is_trying(version(4))
        loader.prefetch([version(4)])
        eventually(lambda: bank.find(version(4)) is not None)
        clock.now += FETCH_AGAIN_AFTER_S
        loader.prefetch([], near=[version(5)])
        eventually(lambda: source.fetched.count(version(5)) == 2)
    finally:
        source.gate.set()
        loader.stop()


def test_a_request_brings_to_the_device_what_was_only_to_be_near(
    loader: AdapterLoader, bank: AdapterBank, source: Source
) -> None:
    source.gate.clear()
    loader.prefetch([], near=[version(1)])
    eventually(lambda: source.fetched == [version(1)])
    loader.request(version(1))
    source.gate.set()
    eventually(lambda: loader.claims == {version(1)})
    assert source.fetched == [version(1)]


def test_a_retired_version_leaves_the_device_once_nobody_uses_it(
    loader: AdapterLoader, bank: AdapterBank
) -> None:
    bank.load(version(1), rows())
    bank.load(version(2), rows())
    bank.acquire(version(2))
    loader.prefetch([], retired=frozenset([version(1), version(2), version(3)]))
    eventually(lambda: bank.residents() == (version(2),))
    bank.release(version(2))
    loader.rows_freed()
    eventually(lambda: not bank.residents())
    loader.prefetch([version(1)])
    eventually(lambda: bank.residents() == (version(1),))


def test_an_eviction_that_fails_holds_up_no_load(
    loader: AdapterLoader, bank: AdapterBank, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank.load(version(1), rows())
    failures = threading.Semaphore(0)

    def fail(_: AdapterVersion) -> None:
        failures.release()
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(bank, "evict", fail)
        for _ in range(2):  # once for each thread that evicts
            loader.prefetch([], retired=frozenset([version(1)]))
            assert failures.acquire(timeout=60)
        source.near = {version(2)}
        loader.request(version(2))
        eventually(lambda: bank.find(version(2)) is not None)
    loader.rows_freed()
    eventually(lambda: bank.residents() == (version(2),))


def test_loads_tell_how_long_they_took_by_stage_and_by_tier(
    loader: AdapterLoader, bank: AdapterBank, source: Source, clock: Clock
) -> None:
    assert loader.report().load_s == 0.0
    source.gate.clear()
    source.near = {version(2)}
    loader.request(version(1))
    loader.prefetch([version(2)])
    eventually(lambda: source.fetched == [version(1)] and bank.find(version(2)) is not None)
    clock.now += 4.0
    source.gate.set()
    eventually(lambda: loader.claims == {version(1)})
    report = loader.report()
    assert report.load_s == 4.0
    told = report.figures.histograms
    by_tier = {key[1]: one.total for key, one in told.items() if key[0].endswith("load_seconds")}
    assert by_tier == {("registry",): 4.0, ("disk",): 0.0}
    by_stage = {key[1][0]: one for key, one in told.items() if key[0].endswith("stage_seconds")}
    assert by_stage.keys() == {"queue", "registry", "parse", "device"}
    assert (by_stage["registry"].total, by_stage["device"].count) == (0.5, 2)


def test_what_the_thread_that_steps_waits_for_the_loader_is_told(
    loader: AdapterLoader, bank: AdapterBank
) -> None:
    bank.waits.step_here()
    is_held = threading.Event()

    def hold() -> None:
        with loader._condition:
            is_held.set()
            time.sleep(0.05)

    holding = threading.Thread(target=hold)
    holding.start()
    assert is_held.wait(60)
    loader.request(version(1))
    holding.join()
    assert bank.counters.wait_s > 0.0


def test_requests_go_before_prefetches_and_a_new_wish_list_replaces_the_old(
    bank: AdapterBank, source: Source
) -> None:
    loader = AdapterLoader(bank, source, base_digest=BASE, concurrency=1)
    try:
        source.gate.clear()
        loader.request(version(1))
        eventually(lambda: source.fetched == [version(1)])
        loader.prefetch([version(2), version(3)])
        loader.prefetch([version(4), version(5)])
        loader.request(version(6))
        loader.request(version(5))
        source.gate.set()
        eventually(lambda: len(source.fetched) == 4)
        assert source.fetched == [version(1), version(6), version(5), version(4)]
    finally:
        source.gate.set()
        loader.stop()


def test_a_prefetch_without_room_is_given_up_for_a_while(
    loader: AdapterLoader, bank: AdapterBank, source: Source, clock: Clock
) -> None:
    bank.load(version(1), rows(4))
    bank.acquire(version(1))
    for _ in range(5):
        loader.prefetch([version(2)])
        eventually(lambda: not loader.is_trying(version(2)))
    assert source.fetched == [version(2)]
    assert not loader.waits_for_room(version(2))
    bank.release(version(1))
    clock.now += RETRY_AFTER_S
    loader.prefetch([version(2)])
    eventually(lambda: bank.find(version(2)) is not None)


def test_prefetched_adapters_hold_no_reference(loader: AdapterLoader, bank: AdapterBank) -> None:
    loader.prefetch([version(1)])
    eventually(lambda: bank.find(version(1)) is not None)
    eventually(lambda: not loader.is_trying(version(1)))
    assert bank.references() == {}


def test_an_adapter_of_another_base_is_refused_where_the_base_matters(
    loader: AdapterLoader, bank: AdapterBank, source: Source
) -> None:
    source.adapters = {
        version(1): rows(base_digest="f" * 64),
        version(2): rows(base_digest=BASE),
        version(3): rows(base_digest="f" * 64, both_sides=False),  # IA3: only shapes matter
        version(4): AdapterRows({"q": ModuleRows(magnitude_O=torch.ones(2))}, "f" * 64),  # DoRA
    }
    for number in (1, 2, 3, 4):
        loader.request(version(number))
    eventually(lambda: loader.report().num_errors == 2 and len(bank.residents()) == 2)
    for number in (1, 4):
        assert isinstance(loader.request(version(number)), BaseMismatchError)


def test_whoever_waits_is_woken_by_every_end(loader: AdapterLoader, source: Source) -> None:
    woken = threading.Semaphore(0)
    loader.notify(woken.release)
    source.adapters[version(2)] = StoreUnavailableError("gone")
    loader.request(version(1))
    assert woken.acquire(timeout=60)
    loader.request(version(2))
    assert woken.acquire(timeout=60)
