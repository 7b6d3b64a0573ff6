"""The bank under random use: pages never leak, rows never mix, and what is in use stays."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from contextlib import suppress
from random import Random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import AdapterRefusedError, CapacityError
from storage.identity import AdapterVersion
from workers.bank.bank import AdapterBank
from workers.bank.books import BankBusyError
from workers.row_form.step_plan import NotResidentError

SHAPES = {"q": (4, 6), "k": (4, 2), "v": (4, 2)}


class UnreadableError(Exception):
    """The base weight cannot be read, in the middle of a load."""


def unreadable(path: str) -> torch.Tensor:
    raise UnreadableError(path)


def small_bank(num_rows: int = 12, num_slots: int = 5) -> AdapterBank:
    return AdapterBank(
        SHAPES,
        num_rows=num_rows,
        num_slots=num_slots,
        dtype=torch.float32,
        device=torch.device("cpu"),
        biases={"q": torch.arange(6.0)},
        base_weight=unreadable,
    )


def adapter(fill: float, ranks: dict[str, tuple[int, int]]) -> AdapterRows:
    """ranks: module → (mul rows, add rows); every value is `fill`."""
    modules = {}
    for path, (mul, add) in ranks.items():
        num_in, num_out = SHAPES[path]
        modules[path] = ModuleRows(
            mul_a_RO=torch.full((mul, num_out), fill) if mul else None,
            mul_b_RI=torch.full((mul, num_in), fill) if mul else None,
            add_q_EO=torch.full((add, num_out), fill) if add else None,
            add_p_EI=torch.full((add, num_in), fill) if add else None,
        )
    return AdapterRows(modules)


def version(number: int) -> AdapterVersion:
    return AdapterVersion(f"{number:064x}")


ranks = st.dictionaries(
    st.sampled_from(sorted(SHAPES)), st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1
)


class BankMachine(RuleBasedStateMachine):
    """Adapters of random ranks per module come, go, are pinned and used, in any order."""

    adapters = Bundle("adapters")

    def __init__(self) -> None:
        super().__init__()
        self.bank = small_bank()
        self.rows: dict[AdapterVersion, AdapterRows] = {}
        self.held: list[AdapterVersion] = []
        self.pinned: frozenset[AdapterVersion] = frozenset()

    @rule(target=adapters, ranks=ranks)
    def publish(self, ranks: dict[str, tuple[int, int]]) -> AdapterVersion:
        name = version(len(self.rows))
        self.rows[name] = adapter(float(len(self.rows) + 1), ranks)
        return name

    @rule(name=adapters)
    def load(self, name: AdapterVersion) -> None:
        before = set(self.bank.residents())
        try:
            self.bank.load(name, self.rows[name])
        except BankBusyError:
            assert name not in before
            assert set(self.bank.residents()) == before, "a refused load must evict nobody"
            return
        after = set(self.bank.residents())
        assert name in after
        assert set(self.held) <= after
        assert (self.pinned & before) <= after

    @rule(ranks=ranks, way=st.sampled_from(["not finite", "too long", "dies half written"]))
    def fail_to_load(self, ranks: dict[str, tuple[int, int]], way: str) -> None:
        before = set(self.bank.residents())
        rows = dict(adapter(0.0, ranks).modules)
        if way == "not finite":
            rows["v"] = ModuleRows(add_q_EO=torch.full((1, 2), math.nan), add_p_EI=torch.ones(1, 4))
        elif way == "too long":
            rows["v"] = ModuleRows(scale_O=torch.ones(3))
        else:
            rows["v"] = ModuleRows(magnitude_O=torch.ones(2))
        with pytest.raises((AdapterRefusedError, UnreadableError, BankBusyError)) as failed:
            self.bank.load(version(10_000), AdapterRows(rows))
        assert self.bank.find(version(10_000)) is None
        after = set(self.bank.residents())
        assert after <= before
        assert set(self.held) | (self.pinned & before) <= after
        if not failed.errisinstance(UnreadableError):
            assert after == before, "what was refused must evict nobody"

    @rule(name=adapters)
    def acquire(self, name: AdapterVersion) -> None:
        if self.bank.find(name) is None:
            with pytest.raises(NotResidentError):
                self.bank.acquire(name)
        else:
            assert self.bank.acquire(name) in self.bank.resident_slots
            self.held.append(name)

    @rule()
    def release(self) -> None:
        if self.held:
            self.bank.release(self.held.pop())

    @rule(name=adapters)
    def pin(self, name: AdapterVersion) -> None:
        self.pinned = frozenset({name})
        self.bank.pin(self.pinned)

    @rule(name=adapters)
    def evict(self, name: AdapterVersion) -> None:
        if name in self.held:
            with pytest.raises(BankBusyError):
                self.bank.evict(name)
        else:
            self.bank.evict(name)
            assert self.bank.find(name) is None

    @invariant()
    def books_balance(self) -> None:
        assert self.bank.check_integrity()
        assert self.bank.rows_used <= self.bank.num_rows
        assert self.bank.references() == Counter(self.held)
        for table in self.bank.snapshot.table_of.values():
            assert self.bank.resident_slots <= set(table.pages), "steps know of all that is ready"

    @invariant()
    def every_resident_has_its_own_rows(self) -> None:
        for name in self.bank.residents():
            for path, place in self.bank.pages_of(name).items():
                rows = self.rows[name].modules.get(path, ModuleRows())
                module = self.bank.modules[path]
                for tensor, pages, bank_rows in (
                    (rows.mul_a_RO, place.mul_out, module.out_rows_NO),
                    (rows.mul_b_RI, place.mul_in, module.in_rows_NI),
                    (rows.add_q_EO, place.add_out, module.out_rows_NO),
                    (rows.add_p_EI, place.add_in, module.in_rows_NI),
                ):
                    assert len(pages) == (0 if tensor is None else len(tensor))
                    if tensor is not None:
                        assert torch.equal(bank_rows[list(pages)], tensor)


TestBankUnderRandomUse = BankMachine.TestCase
TestBankUnderRandomUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_ranks_are_not_padded_an_adapter_takes_its_own_rows_in_each_module() -> None:
    bank = small_bank(num_rows=12)
    bank.load(version(0), adapter(1.0, {"q": (8, 0)}))
    bank.load(version(1), adapter(2.0, {"q": (4, 0), "k": (12, 0)}))
    bank.load(version(2), adapter(3.0, {"v": (0, 12)}))
    assert len(bank.residents()) == 3
    assert bank.rows_used == 12


def test_eviction_takes_the_least_recently_used_first() -> None:
    bank = small_bank(num_rows=4)
    for number in (0, 1):
        bank.load(version(number), adapter(1.0, {"q": (2, 0)}))
    bank.acquire(version(0))
    bank.release(version(0))
    bank.load(version(2), adapter(1.0, {"q": (2, 0)}))
    assert set(bank.residents()) == {version(0), version(2)}
    assert bank.counters.evictions == 1


def test_a_large_adapter_makes_room_before_a_small_one_that_has_been_idle_a_little_longer() -> None:
    bank = small_bank(num_rows=6)
    bank.load(version(0), adapter(1.0, {"q": (1, 0)}))
    bank.load(version(1), adapter(1.0, {"q": (4, 0)}))
    bank.load(version(2), adapter(1.0, {"q": (2, 0)}))
    assert set(bank.residents()) == {version(0), version(2)}


def test_an_adapter_larger_than_the_bank_is_refused_for_good() -> None:
    with pytest.raises(CapacityError, match=r"13 rows.*12"):
        small_bank(num_rows=12).load(version(0), adapter(1.0, {"q": (13, 0)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_reach_the_device(value: float) -> None:
    bank = small_bank()
    with pytest.raises(AdapterRefusedError, match=r"q.*not finite"):
        bank.load(version(0), adapter(value, {"q": (1, 0)}))
    assert bank.residents() == ()


def test_a_wrong_shape_names_the_projection() -> None:
    wrong = AdapterRows({"k": ModuleRows(mul_a_RO=torch.ones(1, 3), mul_b_RI=torch.ones(1, 4))})
    with pytest.raises(AdapterRefusedError, match=r"k: mul_a_RO has 3 features, the model 2"):
        small_bank().load(version(0), wrong)
    with pytest.raises(AdapterRefusedError, match="no projection 'gate'"):
        small_bank().load(version(0), AdapterRows({"gate": ModuleRows()}))


def test_a_snapshot_taken_before_a_load_does_not_change() -> None:
    bank = small_bank()
    bank.load(version(0), adapter(1.0, {"q": (2, 0)}))
    before = bank.snapshot
    bank.load(version(1), adapter(2.0, {"q": (1, 1)}))
    assert set(before.table_of["q"].pages) == {0}
    assert set(bank.snapshot.table_of["q"].pages) == {0, 1}


def test_modules_that_agree_share_a_table_and_part_when_ranks_differ() -> None:
    bank = small_bank()
    bank.load(version(0), adapter(1.0, dict.fromkeys(SHAPES, (2, 0))))
    assert len(set(bank.snapshot.table_of.values())) == 1
    bank.load(version(1), adapter(1.0, {"q": (2, 0), "k": (1, 0), "v": (1, 0)}))
    assert len(set(bank.snapshot.table_of.values())) == 2
    bank.evict(version(0))
    bank.evict(version(1))
    bank.load(version(2), adapter(1.0, dict.fromkeys(SHAPES, (1, 0))))
    assert len(set(bank.snapshot.table_of.values())) == 1


def test_threads_that_load_and_use_the_same_bank_lose_nothing() -> None:
    """Each thread loads, uses, evicts and pins at random, and some loads fail half written."""
    bank = small_bank(num_rows=6, num_slots=4)
    failures: list[BaseException] = []
    used = Counter[int]()

    def use(number: int) -> None:
        slot = bank.acquire(version(number))
        try:
            table = bank.snapshot.table_of["q"]
            assert table.pages[slot] == bank.pages_of(version(number))["q"]
            first, count = int(table.mul.first_S[slot]), int(table.mul.count_S[slot])
            pages = table.mul.in_page_F[first : first + count]
            assert count == 2
            assert bool((bank.modules["q"].in_rows_NI[pages] == number).all())
            used[number] += 1
        finally:
            bank.release(version(number))

    def work(seed: int) -> None:
        random = Random(seed)
        rows = {number: adapter(float(number), {"q": (2, 0), "k": (1, 1)}) for number in range(6)}
        broken = AdapterRows({**rows[0].modules, "v": ModuleRows(magnitude_O=torch.ones(2))})
        try:
            for _ in range(200):
                number = random.randrange(6)
                action = random.choice(["use", "use", "use", "evict", "pin", "fail"])
                with suppress(BankBusyError, NotResidentError, UnreadableError):
                    if action == "use":
                        bank.load(version(number), rows[number])
                        use(number)
                    elif action == "evict":
                        bank.evict(version(number))
                    elif action == "pin":
                        bank.pin([version(number)])
                    else:
                        bank.load(version(100 + seed), broken)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert used.keys() == set(range(6))
    assert bank.check_integrity()
    assert bank.references() == {}


def test_what_a_step_waits_for_the_books_is_told() -> None:
    """And is nothing where nobody holds them: so the benchmark's zero means something."""
    bank = small_bank()
    bank.load(version(0), adapter(1.0, {"q": (1, 0)}))
    bank.acquire(version(0))
    assert bank.counters.wait_s == 0.0
    is_waiting = threading.Event()

    def step(*, is_the_engines: bool) -> None:
        if is_the_engines:
            bank.waits.step_here()
        is_waiting.set()
        bank.find(version(0))

    for is_the_engines in (False, True):
        is_waiting.clear()
        waiting = threading.Thread(target=step, kwargs={"is_the_engines": is_the_engines})
        with bank._lock:
            waiting.start()
            assert is_waiting.wait(60)
            time.sleep(0.05)
        waiting.join()
        assert (bank.counters.wait_s > 0.0) == is_the_engines
