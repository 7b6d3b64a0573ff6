"""What becomes of jobs, whatever dies on the way."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from storage import layout
from storage.identity import AdapterName
from storage.manifest import AliasRecord
from storage.object_store import ObjectStore
from storage.records import encode
from tests.training.service.desks import VERSION, World
from training.backend import JobInfo
from training.job_store import JobStore
from training.service import desk as desk_module
from training.service.files import UploadedFile, UploadedFiles
from training.service.job import FineTuningJob, FineTuningStatus
from training.stored_spec import spec_key, stored_adapters

VALIDATING, QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = FineTuningStatus


@pytest.fixture
def world(local: ObjectStore) -> World:
    return World(local)


def statuses(world: World, *jobs: FineTuningJob) -> list[FineTuningStatus]:
    return [world.now(job).status for job in jobs]


def batch_of(world: World, *jobs: FineTuningJob) -> str:
    """The one batch they are in."""
    (batch,) = {world.now(job).batch for job in jobs}
    assert batch is not None
    return batch


def cancel(world: World, job: FineTuningJob) -> None:
    world.records.change(job, lambda current: current.cancelled(world.clock()))


def test_jobs_that_come_within_a_moment_train_together(store: ObjectStore) -> None:
    world = World(store)
    one = world.create("one")
    world.tick()
    assert statuses(world, one) == [QUEUED]
    two = world.create("two")
    world.tick(4)
    assert world.cluster.submitted == [], "somebody else may come"
    world.tick(1)
    batch = batch_of(world, one, two)
    assert world.cluster.submitted == [batch]

    world.cluster.begin(batch)
    world.tick()
    assert statuses(world, one, two) == [RUNNING, RUNNING]
    world.cluster.train(batch, "one")
    world.tick()
    assert statuses(world, one, two) == [SUCCEEDED, RUNNING]
    world.cluster.train(batch, "two", fails="the loss of step 3 is not finite")
    world.cluster.finish(batch)
    world.tick()
    done, failed = world.now(one), world.now(two)
    assert (done.version, done.tokens, done.model) == (VERSION, 20, "one")
    assert failed.fault is not None and failed.fault.message == "the loss of step 3 is not finite"
    world.tick()
    assert world.records.open("tiny") == [], "nothing is left to see to"
    assert world.cluster.submitted == [batch]


def test_a_broken_line_is_told_with_its_file_and_number_and_holds_nobody_up(world: World) -> None:
    text = '{"prompt": "a", "completion": "b"}\n' * 36 + '{"prompt": "a"'
    bad = world.create("bad", training_file=world.upload(lines=text, name="mine.jsonl"))
    wrong = world.create("wrong", adapter={"rank": 1, "target_modules": ["k_proj"]})
    good = world.create("good")
    held_out = world.create("held-out", validation_file="file-0000")
    world.tick()
    assert statuses(world, bad, wrong, good, held_out) == [FAILED, FAILED, QUEUED, FAILED]
    faults = [world.now(job).fault for job in (bad, wrong, held_out)]
    assert [fault and fault.param for fault in faults] == [
        "training_file",
        "adapter.target_modules",
        "validation_file",
    ]
    assert faults[0] is not None and "mine.jsonl, line 37" in faults[0].message
    assert faults[1] is not None and "q_proj, v_proj" in faults[1].message


def test_what_is_wrong_with_one_job_holds_up_no_other(world: World) -> None:
    damaged = world.create("damaged", training_file=world.upload(lines="x" * 50))
    world.store.put(f"files/default/{damaged.request.training_file}/00000", b"y" * 50)
    wide = world.create(
        "wide", training_file=world.upload(lines="[" * (2 << 20), name="wide.jsonl")
    )
    deep = world.create("deep", training_file=world.upload(lines="[" * 100_000))
    lost = world.create("lost")
    world.store.put(f"fine-tuning/jobs/default/{lost.job_id}.json", b"not a record")
    good = world.create("good")
    world.tick(0, 5)
    assert statuses(world, damaged, deep, wide) == [FAILED] * 3
    fault = world.now(wide).fault
    assert fault is not None and "longer than" in fault.message
    assert world.cluster.submitted == [world.now(good).batch]


def test_one_job_of_a_batch_is_cancelled_and_the_other_goes_on(world: World) -> None:
    one, two = world.create("one"), world.create("two")
    world.tick(0, 5)
    batch = batch_of(world, one, two)
    world.cluster.begin(batch)
    cancel(world, one)
    world.tick()
    assert JobStore(world.store, batch).stopped() == {"one"}
    world.cluster.train(batch, "one", fails="it was cancelled")
    world.cluster.train(batch, "two")
    world.cluster.finish(batch)
    world.tick()
    assert statuses(world, one, two) == [CANCELLED, SUCCEEDED]


def test_one_that_is_cancelled_when_the_others_are_done_is_stopped_too(world: World) -> None:
    one, two = world.create("one"), world.create("two")
    world.tick(0, 5)
    batch = batch_of(world, one, two)
    world.cluster.begin(batch)
    world.cluster.train(batch, "one")
    world.tick()
    cancel(world, two)
    world.tick(0, 0)
    assert JobStore(world.store, batch).stopped() == {"two"}
    assert not world.cluster.get(batch).status.is_final, "it ends by itself, and tidies up"


def test_when_all_are_cancelled_the_training_job_is(world: World) -> None:
    one, two = world.create("one"), world.create("two")
    world.tick(0, 5)
    batch = batch_of(world, one, two)
    cancel(world, one)
    cancel(world, two)
    world.tick()
    assert world.cluster.get(batch).status.is_final
    assert world.records.open("tiny") == []


def test_a_job_cancelled_before_it_has_a_batch_never_gets_one(world: World) -> None:
    one, two = world.create("one"), world.create("two")
    world.tick()
    cancel(world, one)
    world.tick(5)
    assert (world.now(one).batch, world.now(two).status) == (None, QUEUED)
    assert len(world.cluster.submitted) == 1


def test_a_training_job_that_dies_begins_again_and_at_last_fails(world: World) -> None:
    job = world.create("one")
    world.tick(0, 5)
    batch = batch_of(world, job)
    for attempt in (1, 2):
        world.cluster.begin(batch)
        world.cluster.die(batch)
        world.tick()
        assert world.cluster.submitted == [batch] * (attempt + 1)
        assert world.now(job).attempts == attempt + 1
    world.cluster.die(batch)
    world.tick()
    fault = world.now(job).fault
    assert fault is not None and "killed" not in fault.message, "a driver's words are the log's"
    assert fault is not None and "without saying why" in fault.message
    assert len(world.cluster.submitted) == world.settings.max_attempts


def test_a_cluster_that_forgot_the_job_gets_it_again(world: World) -> None:
    job = world.create("one")
    world.tick(0, 5)
    world.cluster.infos.clear()
    world.tick()
    assert world.cluster.submitted == [batch_of(world, job)] * 2


def test_a_batch_that_is_refused_is_tried_one_by_one(world: World) -> None:
    one, two = world.create("one"), world.create("two")
    world.tick(0, 5)
    batch = batch_of(world, one, two)
    world.cluster.refuse(batch, "one: none of the 4 sequences fits")
    world.tick(0, 0)
    assert batch_of(world, one) != batch_of(world, two)
    world.cluster.refuse(batch_of(world, one), "one: none of the 4 sequences fits")
    world.cluster.begin(batch_of(world, two))
    world.cluster.train(batch_of(world, two), "two")
    world.tick()
    assert statuses(world, one, two) == [FAILED, SUCCEEDED]
    fault = world.now(one).fault
    assert fault is not None and fault.message == "one: none of the 4 sequences fits"
    assert len(world.cluster.submitted) == 3, "what is refused is not tried again"


def test_jobs_of_two_tenants_or_types_never_share_a_batch(local: ObjectStore) -> None:
    world = World(local, max_running_batches=3)
    ours, theirs = world.create("one"), world.create("one", tenant="other")
    wide = world.create("wide", dtype="float32")
    world.tick(0, 5)
    assert len({world.now(job).batch for job in (ours, theirs, wide)}) == 3


def test_jobs_that_make_one_adapter_take_turns(world: World) -> None:
    first, second = world.create("same"), world.create("same")
    world.tick(0, 5)
    assert world.now(second).batch is None
    batch = batch_of(world, first)
    world.cluster.begin(batch)
    world.cluster.train(batch, "same")
    world.cluster.finish(batch)
    world.tick(0, 0)
    assert world.now(second).batch not in (None, batch)


def test_a_full_batch_does_not_wait(local: ObjectStore) -> None:
    world = World(local, max_batch_adapters=2)
    jobs = [world.create(f"a{n}") for n in range(3)]
    world.tick()
    assert [world.now(job).batch is not None for job in jobs] == [True, True, False]


def test_a_cluster_that_is_away_for_a_while_costs_nothing_and_is_asked_ever_more_rarely(
    world: World,
) -> None:
    job = world.create("one")
    world.tick()
    world.cluster.is_up = False
    world.tick(5, *[1.0] * 600)
    assert statuses(world, job) == [QUEUED]
    assert 8 < world.cluster.asked < 20
    (told,) = [note.message for note in world.now(job).notes if note.level == "warn"]
    assert "cannot be reached" in told and "10.0.0.1" not in told
    world.cluster.is_up = True
    # Whether it was begun is not known: the cluster is asked.
    world.tick(60)
    assert len(world.cluster.submitted) == 1
    world.cluster.is_up = False
    world.tick(1)
    world.cluster.is_up = True
    world.cluster.begin(batch_of(world, job))
    world.tick(1)
    assert statuses(world, job) == [RUNNING], "what went well makes the next pause short"


def test_a_job_that_the_cluster_refuses_says_so_and_begins_when_it_no_longer_does(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = world.create("one"), world.create("two", tenant="other")
    world.cluster.refusal = 'rayjobs is forbidden: User "system:serviceaccount:flora"'
    world.tick(0, 5, *[60.0] * 30)
    for job in (one, other):
        assert (world.now(job).status, world.now(job).attempts) == (QUEUED, 0)
        told = [note.message for note in world.now(job).notes if note.level == "warn"]
        assert len(told) == 1 and "the cluster refused to begin the job" in told[0]
        assert "forbidden" not in str(world.now(job)), "that is for whoever runs the cluster"
    assert "system:serviceaccount:flora" in caplog.text
    assert world.cluster.asked < 40
    world.cluster.refusal = ""
    world.tick(300)
    assert world.cluster.submitted == [batch_of(world, one), batch_of(world, other)]


def test_a_job_that_the_cluster_refuses_can_be_cancelled(world: World) -> None:
    job = world.create("one")
    world.cluster.refusal = "no"
    world.tick(0, 5)
    cancel(world, job)
    world.tick(300)
    assert world.records.open("tiny") == []


def test_a_job_that_is_cancelled_while_its_batch_is_made_is_not_begun(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = world.create("one")
    world.tick()
    start = world.desk._batches._start

    def late(batch_id: str, members: Iterable[FineTuningJob], attempt: int) -> JobInfo:
        cancel(world, job)
        return start(batch_id, members, attempt)

    monkeypatch.setattr(world.desk._batches, "_start", late)
    world.tick(5, 1)
    assert world.cluster.submitted == [] and world.records.open("tiny") == []


def test_ones_fault_in_the_middle_of_the_training_is_not_the_others(world: World) -> None:
    one, two = world.create("one"), world.create("two")
    world.tick(0, 5)
    batch = batch_of(world, one, two)
    world.cluster.begin(batch)
    world.tick()
    world.cluster.refuse(batch, "no memory is left")
    world.tick(0, 0)
    assert statuses(world, one, two) == [QUEUED, QUEUED]
    assert batch_of(world, one) != batch_of(world, two)


def test_only_so_many_batches_run_at_once_and_tenants_take_turns(local: ObjectStore) -> None:
    world = World(local, max_running_batches=2)
    many = [world.create(f"a{n}") for n in range(6)]
    world.tick(0, 5)
    world.cluster.refuse(batch_of(world, *many), "one is too big")
    world.tick()
    other = world.create("theirs", tenant="other")
    world.tick(0, 5, 5)
    assert len(world.cluster.submitted) == 3, "the first, and two of them alone"
    begun = next(job for job in many if world.now(job).batch is not None)
    world.cluster.finish(world.now(begun).batch or "")
    world.tick(1, 1)
    assert world.now(other).batch == world.cluster.submitted[-1]


def test_a_users_job_never_takes_the_place_of_an_adapter_made_since(world: World) -> None:
    user, admin = world.create("mine", may_replace=False), world.create("ours")
    world.tick()
    for name in ("mine", "ours"):
        record = AliasRecord(version=VERSION, generation=1, moved_s=0.0)
        world.store.put(layout.alias(AdapterName("default", name), "latest"), encode(record))
    world.tick(5)
    assert statuses(world, user, admin) == [FAILED, QUEUED]
    fault = world.now(user).fault
    assert fault is not None and fault.param == "suffix"
    assert stored_adapters(world.store, batch_of(world, admin)) == {"ours"}


def test_what_a_job_may_replace_is_asked_again_when_it_publishes(world: World) -> None:
    user, admin = world.create("mine", may_replace=False), world.create("ours")
    nameless = world.create(may_replace=False)
    world.tick(0, 5)
    stored = world.store.get(spec_key(batch_of(world, user, admin, nameless))).data
    may_replace = {one["name"]: one["may_replace"] for one in json.loads(stored)["adapters"]}
    assert may_replace == {"mine": False, "ours": True, nameless.name: True}


def test_running_batches_are_seen_to_before_files_are_looked_at(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_module, "_LOOKING_S", 0.0)
    running = world.create("one")
    world.tick(0, 5)
    batch = batch_of(world, running)
    world.cluster.begin(batch)
    more = [world.create(f"a{n}", tenant="other") for n in range(3)]

    def full(*_: object) -> None:
        assert statuses(world, running) == [RUNNING]
        raise OSError("no space is left")

    with monkeypatch.context() as patch:
        patch.setattr(UploadedFiles, "fetch", full)
        world.tick()
    assert statuses(world, *more) == [VALIDATING] * 3, "a full disk is no fault of theirs"
    world.tick()
    assert statuses(world, *more) == [QUEUED, VALIDATING, VALIDATING]


def test_a_file_is_read_once_for_all_jobs_that_name_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    fetch = UploadedFiles.fetch

    def counted(self: UploadedFiles, file: UploadedFile, directory: Path) -> Path:
        fetched.append(file.filename)
        return fetch(self, file, directory)

    monkeypatch.setattr(UploadedFiles, "fetch", counted)
    bad = world.upload(lines="{", name="bad.jsonl")
    good = [world.create(f"a{n}") for n in range(3)]
    broken = [world.create(f"b{n}", training_file=bad) for n in range(2)]
    world.tick()
    assert statuses(world, *good, *broken) == [QUEUED] * 3 + [FAILED] * 2
    assert sorted(fetched) == ["bad.jsonl", "d.jsonl"]


class Killed(BaseException):
    """The process is gone: nothing catches it."""


class Dying:
    """A store that goes with its process at the n-th write."""

    def __init__(self, store: ObjectStore, writes: int) -> None:
        self._store = store
        self._writes = writes

    def __getattr__(self, name: str) -> object:
        if name in ("put", "put_if_absent", "compare_and_swap", "delete"):
            self._writes -= 1
            if self._writes < 0:
                raise Killed
        return getattr(self._store, name)


@pytest.mark.parametrize("two_at_once", [False, True])
def test_a_desk_that_dies_at_any_write_loses_and_doubles_no_job(
    local: ObjectStore, two_at_once: bool
) -> None:
    """It is killed at its first write, the next one at its second, and so on until one lives."""
    world = World(local)
    jobs = [world.create("one"), world.create("two")]
    other = world.new_desk()
    for writes in range(1000):
        mortal = World(Dying(local, writes))  # type: ignore[arg-type]
        mortal.cluster, mortal.clock = world.cluster, world.clock
        desk = mortal.new_desk()
        try:
            for _ in range(6):
                desk.tick()
                if two_at_once:
                    other.tick()
                world.clock.now_s += 5
                for batch in set(world.cluster.submitted):
                    if not world.cluster.get(batch).status.is_final:
                        names = sorted(job.name for job in jobs if world.now(job).batch == batch)
                        world.cluster.begin(batch)
                        world.cluster.train(batch, *names)
                        world.cluster.finish(batch)
        except Killed:
            continue
        break
    assert writes > 3, "it died somewhere"
    assert statuses(world, *jobs) == [SUCCEEDED, SUCCEEDED]
    batches = world.cluster.submitted
    assert sorted(name for batch in batches for name in stored_adapters(local, batch)) == [
        "one",
        "two",
    ], "each was trained, and once"
    world.tick()
    assert world.records.open("tiny") == []
