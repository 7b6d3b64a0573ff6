"""Whatever stops an attempt, at whichever write, the next one goes on from a whole round and ends the same."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

from storage.errors import AdapterCorruptError, InvalidRequestError, OverloadedError
from storage.local_store import LocalObjectStore
from storage.object_store import ObjectStore, StoredObject
from storage.stores import open_store
from tests.storage.passing_store import InterruptingStore, PassingStore
from tests.training.round_parts import (
    JOB,
    SHORT_WORK,
    STEPS,
    WORK,
    KilledError,
    KillingStore,
    SumPublisher,
    published,
    run_attempt,
)
from training import job_store
from training.checkpoints import Checkpoints
from training.commit import Commit
from training.events import AdapterPublished, AdapterStep, RoundFinished, WorkerStarted
from training.job_store import JobStore
from training.rounds import Work


@pytest.fixture(autouse=True)
def only_told_to_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the writes of an attempt are always the same ones."""
    monkeypatch.setattr(job_store, "FLUSH_EVERY_S", 1000.0)


@pytest.fixture
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    store = LocalObjectStore(tmp_path_factory.mktemp("undisturbed"))
    run_attempt(store)
    return published(store)


def states(store: ObjectStore) -> list[str]:
    return [info.key for info in store.list(f"jobs/{JOB}/checkpoints/0")]


def commit_of(store: ObjectStore) -> Commit:
    commit = Checkpoints(store, JOB).read(WORK.digest)
    assert commit is not None
    return commit


@pytest.mark.usefixtures("undurable")
@pytest.mark.parametrize(
    ("kind", "workers", "work"), [("local", 1, WORK), ("local", 2, WORK), ("s3", 2, SHORT_WORK)]
)
def test_an_attempt_killed_before_any_write_changes_nothing_in_the_end(
    request: pytest.FixtureRequest,
    undisturbed: dict[str, list[bytes]],
    kind: str,
    workers: int,
    work: Work,
) -> None:
    """Every write in turn is the first that does not happen; the next attempt has other workers and last bits."""
    store = open_store(request.getfixturevalue(f"{kind}_settings"))
    expected = {name: undisturbed[name] for name in work.costs}
    writes = 0
    while True:
        for info in [*store.list("jobs/"), *store.list("published/")]:
            store.delete(info.key)
        dying = KillingStore(store, writes)
        try:
            run_attempt(dying, workers, work=work)
        except KilledError:
            pass
        else:
            break
        if (commit := Checkpoints(store, JOB).read(work.digest)) is not None:
            for saved in commit.adapters.values():
                Checkpoints(store, JOB).load(saved)
        had_published = published(store)
        run_attempt(store, 1 + writes % 3, noise=1, work=work)
        after = published(store)
        assert {name: len(contents) for name, contents in after.items()} == dict.fromkeys(
            expected, 1
        )
        for name, (content,) in after.items():
            assert without_noise(content) == without_noise(*expected[name])
            assert [content] == had_published.get(name, [content])
        commit = commit_of(store)
        assert sorted(states(store)) == sorted(saved.key for saved in commit.adapters.values())
        writes += 1
    assert writes >= 15
    assert published(store) == expected


def without_noise(content: bytes) -> list[bytes]:
    return content.split()[:2]


def test_a_step_told_again_after_a_loss_is_the_later_word(store: ObjectStore) -> None:
    with pytest.raises(KilledError):
        run_attempt(KillingStore(store, 12))
    before = commit_of(store)
    run_attempt(store)
    events = JobStore(store, JOB).read_events().events
    told = [
        event.step for event in events if isinstance(event, AdapterStep) and event.adapter == "c"
    ]
    assert sorted(set(told)) == list(range(1, 13)), "no step of a committed round is lost"
    resumed = before.adapters["c"].step
    assert 0 < resumed < 12
    again = told[told.index(resumed) + 1 :]
    assert again[-(12 - resumed) :] == list(range(resumed + 1, 13))
    last = {event.adapter for event in events if isinstance(event, AdapterPublished)}
    assert last == set(STEPS)


def test_a_job_that_is_over_begins_no_round(store: ObjectStore) -> None:
    run_attempt(store)
    rounds = commit_of(store).round
    before = published(store)
    run_attempt(store, noise=5)
    assert published(store) == before
    assert commit_of(store).round == rounds


def test_who_runs_dry_takes_over_from_the_others_and_cheaper_steps_are_more(
    local: ObjectStore, undisturbed: dict[str, list[bytes]]
) -> None:
    work = Work("d" * 64, {"a": 100.0, "b": 1.0, "c": 1.0}, STEPS, 2)
    JobStore(local, JOB).stop("a")
    run_attempt(local, workers=2, work=work)
    events = JobStore(local, JOB).read_events().events
    shares: dict[int, list[tuple[str, ...]]] = {0: [], 1: []}
    for event in events:
        if isinstance(event, WorkerStarted):
            shares[event.worker].append(event.adapters)
    assert shares == {0: [("a",), ("c",)], 1: [("b", "c"), ("b",)]}
    assert published(local) == {name: undisturbed[name] for name in ("b", "c")}
    rounds = [event for event in events if isinstance(event, RoundFinished)]
    # Of b two steps a round; of c first two, then three for each two of b.
    assert [event.round for event in rounds] == [1, 2, 3, 4, 5]
    assert all(len(event.busy_s) == 2 for event in rounds)
    assert all(max(event.busy_s) <= event.seconds for event in rounds)


def test_a_cancelled_adapter_stops_at_the_next_round_and_the_others_go_on(
    local: ObjectStore,
) -> None:
    JobStore(local, JOB).stop("b")
    run_attempt(local)
    assert set(published(local)) == {"a", "c"}
    assert commit_of(local).is_over("b")


# Checkpoints alone.


def saved_round(checkpoints: Checkpoints, commit: Commit, **values: int) -> Commit:
    saved = {
        name: checkpoints.save(commit, name, {"value": value}, step=value, is_over=False)
        for name, value in values.items()
    }
    return replace(commit, round=commit.round + 1, shares=(("a", "b"),), adapters=saved)


def test_what_was_committed_comes_back_and_the_same_is_not_written_twice(
    store: ObjectStore,
) -> None:
    checkpoints = Checkpoints(store, JOB)
    assert checkpoints.read("d") is None
    first = saved_round(checkpoints, checkpoints.begin("d"), a=1, b=1)
    checkpoints.commit(first)
    second = saved_round(checkpoints, first, a=2, b=1)
    checkpoints.commit(second)
    checkpoints.clean(second)
    again = Checkpoints(store, JOB)
    assert again.read("d") == second
    values = {name: again.load(saved)["value"] for name, saved in second.adapters.items()}
    assert values == {"a": 2, "b": 1}
    assert states(store) == [first.adapters["b"].key, second.adapters["a"].key]


def test_an_attempt_that_was_taken_over_can_neither_commit_nor_remove_anything(
    store: ObjectStore,
) -> None:
    old = Checkpoints(store, JOB)
    first = saved_round(old, old.begin("d"), a=1)
    old.commit(first)
    late = saved_round(old, first, a=2)
    new = Checkpoints(store, JOB)
    taken = new.begin("d")
    assert (taken.attempt, taken.round) == (2, 1)
    assert states(store) == [first.adapters["a"].key], "what was left uncommitted is gone"
    mine = saved_round(new, taken, a=3)
    saved_round(old, first, a=2)
    with pytest.raises(OverloadedError, match="another attempt of the job 'job'"):
        old.commit(late)
    old.clean(first)
    new.commit(mine)
    new.clean(mine)
    assert new.load(mine.adapters["a"]) == {"value": 3}
    assert states(store) == [mine.adapters["a"].key]


def test_workers_of_a_driver_that_was_succeeded_begin_no_attempt_again(
    store: ObjectStore,
) -> None:
    first, second = Checkpoints(store, JOB), Checkpoints(store, JOB)
    early = first.take_over("d")
    assert Checkpoints(store, JOB, early).begin("d").attempt == 1
    assert not first.is_taken_over("d")
    late = second.take_over("d")
    assert first.is_taken_over("d") and not second.is_taken_over("d")
    with pytest.raises(OverloadedError, match="another attempt of the job 'job'"):
        Checkpoints(store, JOB, early).begin("d")
    assert Checkpoints(store, JOB, late).begin("d").attempt == 2
    assert Checkpoints(store, JOB, late).begin("d").attempt == 3


def test_a_checkpoint_that_is_damaged_or_gone_is_named(store: ObjectStore) -> None:
    checkpoints = Checkpoints(store, JOB)
    first = saved_round(checkpoints, checkpoints.begin("d"), a=1)
    checkpoints.commit(first)
    saved = first.adapters["a"]
    data = bytearray(store.get(saved.key).data)
    data[len(data) // 2] ^= 1
    store.put(saved.key, bytes(data))
    with pytest.raises(AdapterCorruptError, match=r"000001-000001/a\.pt"):
        checkpoints.load(saved)
    store.delete(saved.key)
    with pytest.raises(AdapterCorruptError, match=r"000001-000001/a\.pt"):
        checkpoints.load(saved)
    commit_key = f"jobs/{JOB}/checkpoints/commit.json"
    store.put(commit_key, b"{}")
    with pytest.raises(AdapterCorruptError, match=r"commit\.json"):
        checkpoints.read("d")


def test_a_checkpoint_of_another_build_is_refused_by_name(local: ObjectStore) -> None:
    Checkpoints(local, JOB).begin("d")
    commit_key = f"jobs/{JOB}/checkpoints/commit.json"
    values = json.loads(local.get(commit_key).data)
    assert values["format"] == 1

    def stored(values: dict[str, object]) -> Checkpoints:
        local.put(commit_key, json.dumps(values).encode())
        return Checkpoints(local, JOB)

    unnumbered = {name: value for name, value in values.items() if name != "format"}
    assert stored(unnumbered).begin("d").attempt == 2, "the first builds wrote no number"
    older = {name: value for name, value in unnumbered.items() if name != "driver"}
    for written, reason in ((values | {"format": 2}, "format 2"), (older, "it lacks driver")):
        with pytest.raises(InvalidRequestError, match=f"{JOB}.*{reason}.*build that wrote it"):
            stored(written).begin("d")


def test_a_job_does_not_go_on_with_what_another_one_trained(local: ObjectStore) -> None:
    Checkpoints(local, JOB).begin("d")
    for ask in (Checkpoints(local, JOB).read, Checkpoints(local, JOB).begin):
        with pytest.raises(InvalidRequestError, match="give this one an id of its own"):
            ask("e")


def joined(store: ObjectStore) -> Checkpoints:
    """Of a worker of a new attempt."""
    checkpoints = Checkpoints(store, JOB)
    checkpoints.join(checkpoints.begin(WORK.digest))
    return checkpoints


def test_what_was_to_be_published_is_decided_once(store: ObjectStore) -> None:
    first = joined(store)
    assert first.finished.get("a") is None
    assert first.keep_finished("a", {"x": b"1", "y": b"2"}) == {"x": b"1", "y": b"2"}
    again = joined(store)
    assert again.keep_finished("a", {"x": b"3"}) == {"x": b"1", "y": b"2"}
    assert again.finished.names() == {"a"}
    store.put(f"jobs/{JOB}/checkpoints/finished/b.zip", b"PK")
    with pytest.raises(AdapterCorruptError, match=r"b\.zip"):
        again.finished.get("b")
    again.finished.forget_all()
    assert again.finished.get("a") is None


@pytest.mark.usefixtures("undurable")
def test_a_worker_that_wakes_when_a_later_attempt_has_ended_the_job_publishes_nothing(
    local: ObjectStore,
) -> None:
    asleep = joined(local)
    run_attempt(local, noise=1)
    asleep.finished.forget_all()
    with pytest.raises(OverloadedError, match="another attempt of the job 'job'"):
        asleep.keep_finished("a", {"content": b"another last bit"})
    assert not asleep.finished.names(), "and leaves nothing behind"


@pytest.mark.usefixtures("undurable")
def test_whenever_a_later_attempt_runs_both_publish_the_same(local: ObjectStore) -> None:
    """It runs, from beginning to end, before each operation of the earlier one's publishing in turn."""
    operations, has_happened = 0, True
    while has_happened:
        for info in [*local.list("jobs/"), *local.list("published/")]:
            local.delete(info.key)
        early = Checkpoints(local, JOB)
        commit = early.begin(WORK.digest)

        def later() -> None:
            run_attempt(local, noise=1)
            Checkpoints(local, JOB).finished.forget_all()

        slow = InterruptingStore(local, operations, later)
        worker = Checkpoints(slow, JOB)
        worker.join(commit)
        try:
            SumPublisher(slow, worker)("a", b"a 32 0")
        except OverloadedError:
            assert slow.has_happened
        has_happened = slow.has_happened
        assert len(published(local)["a"]) == 1
        if has_happened:
            assert not worker.finished.names()
        operations += 1
    assert operations >= 4


@pytest.mark.usefixtures("undurable")
def test_a_rounds_objects_are_written_and_read_many_at_a_time(local: ObjectStore) -> None:
    """Or many adapters on a store far away would cost seconds at each."""

    class MeetingStore(PassingStore):
        """Each passes only together with another one."""

        meeting = threading.Barrier(2, timeout=30)

        def put(self, key: str, data: bytes) -> None:
            if "-000001/" in key:
                self.meeting.wait()
            super().put(key, data)

        def get(self, key: str) -> StoredObject:
            if "-000001/" in key:
                self.meeting.wait()
            return super().get(key)

    work = replace(SHORT_WORK, steps_of_round=2)
    dying = KillingStore(MeetingStore(local), 6)
    with pytest.raises(KilledError):
        run_attempt(dying, work=work)
    commit = commit_of(local)
    assert commit.round == 1 and {one.step for one in commit.adapters.values()} == {2}
    run_attempt(MeetingStore(local), work=work)
    assert set(published(local)) == {"a", "b"}
