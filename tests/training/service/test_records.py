"""Job records: pages, idempotency keys, and one leader at a time."""

from __future__ import annotations

import pytest

from storage.errors import InvalidRequestError, NotFoundError
from storage.object_store import ObjectStore
from tests.training.service.desks import Clock, World
from training.service.lease import LEASE_S, Lease


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
