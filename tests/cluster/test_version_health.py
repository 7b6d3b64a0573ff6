"""Which versions are bad, and whose fault it is."""

from __future__ import annotations

import pytest

from cluster.version_health import VersionHealth
from tests.cluster.manager_world import corrupt, refused, version

ONE = version(1)
LIVE = ("a", "b")


@pytest.fixture
def health() -> VersionHealth:
    return VersionHealth()


def test_a_version_is_bad_while_some_replica_could_not_load_it_and_none_has_it(
    health: VersionHealth,
) -> None:
    health.report("a", [refused(1)], ())
    assert health.bad((), LIVE).keys() == {ONE}
    assert health.bad([ONE], LIVE) == {}
    assert health.unfit("a") == {ONE} and health.unfit("b") == frozenset()
    health.report("a", (), ())
    assert health.bad((), LIVE).keys() == {ONE}, "what was told once is remembered"


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_failure_is_forgotten_when_its_replica_is_gone_or_has_loaded_it(
    health: VersionHealth, is_gone: bool
) -> None:
    health.report("a", [refused(1)], ())
    if is_gone:
        health.forget("a")
    else:
        health.report("a", [refused(1)], [ONE])
    assert health.bad((), LIVE) == {} and health.failed_on() == {}


def test_only_corrupt_bytes_make_a_suspect_and_only_until_they_were_read_again(
    health: VersionHealth,
) -> None:
    health.report("a", [refused(1), corrupt(2)], ())
    assert health.suspects() == (corrupt(2),)
    health.acquit(version(2))
    health.report("a", [refused(1), corrupt(2)], ())
    assert health.suspects() == () and health.bad((), LIVE).keys() == {ONE}
    health.report("b", [corrupt(2)], ())
    assert health.suspects() == (corrupt(2),), "another replica says so too"


def test_after_a_repair_a_replica_may_go_on_telling_and_is_then_read_after_once_more(
    health: VersionHealth,
) -> None:
    health.report("a", [corrupt(1)], ())
    health.set_quarantined({ONE: "damaged"})
    assert health.bad([ONE], LIVE) == {ONE: "damaged"}, "wherever it is resident"
    assert health.suspects() == ()
    health.set_quarantined({})
    health.report("a", [corrupt(1)], ())
    assert health.suspects() == (corrupt(1),)
    health.acquit(ONE)
    assert health.bad((), LIVE) == {} and health.unfit("a") == {ONE}
    health.report("a", (), ())
    assert health.unfit("a") == frozenset(), "it may try again"


def test_a_version_found_whole_is_bad_again_once_no_replica_is_left_that_may_load_it(
    health: VersionHealth,
) -> None:
    for replica_id in LIVE:
        health.report(replica_id, [corrupt(1)], ())
    health.acquit(ONE)
    assert health.bad((), LIVE).keys() == {ONE} and health.suspects() == ()
    assert health.bad([ONE], LIVE) == {}
    assert health.bad((), [*LIVE, "c"]) == {}, "another may load it"
    health.forget("b")
    assert health.bad((), ["a"]).keys() == {ONE}
    health.report("a", (), ())
    assert health.bad((), ["a"]) == {}, "it may try again"


def test_a_refusal_is_not_excused_by_whole_bytes(health: VersionHealth) -> None:
    health.report("a", [corrupt(1)], ())
    health.acquit(ONE)
    assert health.bad((), LIVE) == {}
    health.report("a", [refused(1)], ())
    assert health.bad((), LIVE).keys() == {ONE}
