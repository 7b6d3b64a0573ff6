from __future__ import annotations

from workers.large_pages import with_large_pages


def test_large_pages_are_asked_for_unless_the_user_has_tunables_of_their_own() -> None:
    assert with_large_pages({"A": "1"}) == {"A": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert with_large_pages({"GLIBC_TUNABLES": "mine"}) == {"GLIBC_TUNABLES": "mine"}
