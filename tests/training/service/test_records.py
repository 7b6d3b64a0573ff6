"""Job records: pages, idempotency keys, and one leader at a time."""

from __future__ import annotations

import time
from functools import partial

import pytest

from storage.errors import InvalidRequestError, NotFoundError
from storage.object_store import ObjectStore
from storage.records import encode
from tests.storage.passing_store import InterruptingStore
from tests.training.service.desks import Clock, World
from training.service.job import FineTuningJob
from training.service.lease import LEASE_S, Lease
from training.service.records import LOST_AFTER_S, JobRecords, desk_folder


def test_jobs_come_in_pages_newest_first_and_only_ones_own(store: ObjectStore) -> None:
    world = World(store)
    jobs = [world.create(f"a{n}") for n in range(5)]
    theirs = world.create("a0", tenant="other")
    expected = [job.job_id for job in reversed(jobs)]
    first, has_more = world.records.page("default", None, 2)
    assert ([job.job_id for job in first], has_more) == (expected[:2], True)
    rest, has_more = world.records.page("default", first[-1].job_id, 3)
    assert ([job.job_id for job in rest], has_more) == (expected[2:], False)
    for unknown in (theirs.job_id, "ftjob-", "ftjob-../x", "x"):
        with pytest.raises(NotFoundError):
            world.records.get("default", unknown)


def test_a_damaged_record_is_left_out_of_a_page(store: ObjectStore) -> None:
    world = World(store)
    damaged, whole = world.create("a"), world.create("b")
    store.put(f"fine-tuning/jobs/default/{damaged.job_id}.json", b"{}")
    assert world.records.page("default", None, 20) == ([whole], False)
    assert world.records.newest(20) == [whole]


def test_a_request_sent_twice_under_one_key_is_one_job(store: ObjectStore) -> None:
    world = World(store)
    request = world.create("one", is_seed_drawn=True).request
    key = "a key of the client's"
    first = world.records.create(request, world.clock(), key)
    again = request.model_copy(update={"seed": 99})  # drawn anew when none is asked for
    assert world.records.create(again, world.clock(), key) == first
    assert world.records.create(request, world.clock(), "another") != first
    asked = request.model_copy(update={"is_seed_drawn": False})
    world.records.create(asked, world.clock(), "with a seed")
    for other in ({"seed": 99}, {"suffix": "two"}):
        with pytest.raises(InvalidRequestError, match="Idempotency-Key"):
            world.records.create(asked.model_copy(update=other), world.clock(), "with a seed")
    with pytest.raises(InvalidRequestError, match="Idempotency-Key"):
        world.records.create(request.model_copy(update={"suffix": "two"}), world.clock(), key)


def test_one_holder_at_a_time_and_the_next_when_it_is_gone(store: ObjectStore) -> None:
    clock = Clock()
    one, two = (Lease(store, "desk/lease.json", name, clock) for name in ("one", "two"))
    assert one.is_held() and not two.is_held()
    clock.now_s += LEASE_S - 1
    assert one.is_held(), "it is prolonged in time"
    clock.now_s += LEASE_S - 1
    assert not two.is_held()
    clock.now_s += 2
    assert two.is_held() and not one.is_held()
    two.give_back()
    assert one.is_held()


def mark(store: ObjectStore, name: str) -> str:
    key = f"{desk_folder('tiny')}open/{name}"
    store.put(key, b"{}")
    return key


def test_marks_whose_record_never_came_are_removed_and_no_others(local: ObjectStore) -> None:
    world = World(local)
    world.clock.now_s = time.time()
    job, damaged = world.create("a"), world.create("b")
    local.put(f"fine-tuning/jobs/default/{damaged.job_id}.json", b"{}")
    lost = [mark(local, name) for name in ("default/ftjob-0123", "default/no-job", "stray")]
    world.tick(LOST_AFTER_S / 2)
    assert all(local.exists(key) for key in lost), "their records may still come"
    world.tick(LOST_AFTER_S)
    assert not any(local.exists(key) for key in lost)
    assert world.records.open("tiny") == [world.now(job)]
    left = [one.key for one in local.list(f"{desk_folder('tiny')}open/")]
    assert len(left) == 2, "a damaged record may be mended"


def test_a_mark_that_is_removed_while_its_record_comes_is_put_again(local: ObjectStore) -> None:
    """Whatever of a creation is done when the marks are looked at."""
    world = World(local)
    request = world.create("first").request
    now_s = time.time() + 2 * LOST_AFTER_S

    def tidy() -> None:
        JobRecords(local).forget_lost_marks("tiny", now_s)

    for at in range(20):
        store = InterruptingStore(local, at, tidy)
        job = JobRecords(store).create(request, world.clock())
        assert job in world.records.open("tiny")
        if not store.has_happened:
            break
    assert at >= 3


def test_a_record_that_comes_while_its_mark_is_removed_gets_it_back(local: ObjectStore) -> None:
    """Whenever it comes: its maker saw the mark, and will not look again."""
    world = World(local)
    first = world.create("first")
    now_s = time.time() + 2 * LOST_AFTER_S
    for at in range(20):
        job = first.model_copy(update={"job_id": f"ftjob-{at:020}"})
        key = mark(local, f"default/{job.job_id}")
        came = partial(_record_comes, local, job, key)
        store = InterruptingStore(local, at, came)
        JobRecords(store).forget_lost_marks("tiny", now_s)
        has_record = local.exists(_record_key(job))
        assert (job in world.records.open("tiny")) == has_record
        if not store.has_happened:
            break
        local.delete(_record_key(job))
        local.delete(key)
    assert at >= 3


def _record_comes(store: ObjectStore, job: FineTuningJob, key: str) -> None:
    if store.exists(key):
        store.put(_record_key(job), encode(job))


def _record_key(job: FineTuningJob) -> str:
    return f"fine-tuning/jobs/default/{job.job_id}.json"
