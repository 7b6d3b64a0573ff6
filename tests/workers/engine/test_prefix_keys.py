"""A key stands for one tenant, one adapter set and one run of tokens from the first on."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from storage.identity import AdapterSet
from tests.workers.engine.small_engine import version
from workers.engine.prefix_keys import PrefixKeys

BLOCK = 3
Sequences = st.tuples(
    st.sampled_from(["a", "b"]),
    st.sampled_from([None, 1, 2]),
    st.lists(st.integers(0, 1), max_size=9),
)


def keys(tenant: str, adapter: int | None, tokens: list[int]) -> PrefixKeys:
    one = PrefixKeys(tenant, AdapterSet.of(None if adapter is None else version(adapter)), BLOCK)
    one.extend(tokens)
    return one


@given(st.lists(Sequences, max_size=6))
def test_two_blocks_share_a_key_exactly_if_all_that_made_them_is_the_same(
    sequences: list[tuple[str, int | None, list[int]]],
) -> None:
    named = [
        (chain[number], (tenant, adapter, tokens[: (number + 1) * BLOCK]))
        for tenant, adapter, tokens in sequences
        for chain in [keys(tenant, adapter, tokens)]
        for number in range(len(chain))
    ]
    for (one_key, one), (other_key, other) in combinations(named, 2):
        assert (one_key == other_key) == (one == other)


@given(st.lists(st.integers(0, 9), max_size=20), st.lists(st.integers(0, 20), max_size=5))
def test_keys_are_the_same_however_the_tokens_became_known(
    tokens: list[int], known: list[int]
) -> None:
    grown = PrefixKeys("a", AdapterSet(), BLOCK)
    for count in sorted(known):
        grown.extend(tokens[:count])
    grown.extend(tokens)
    whole = keys("a", None, tokens)
    assert len(grown) == len(whole) == len(tokens) // BLOCK
    assert [grown[n] for n in range(len(grown))] == [whole[n] for n in range(len(whole))]
