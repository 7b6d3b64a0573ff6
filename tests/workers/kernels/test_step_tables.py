"""What the kernels are told of a step: every token once, room to spare that changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.row_form.mixed_layers import MixedLayers, mixed_layers
from workers.kernels.product import adapted_product
from workers.kernels.step_tables import (
    TILE_COLUMNS,
    HostTables,
    StepTables,
    index_for_kernels,
    look_up,
)
from workers.row_form.cost import KERNEL_COST

FAMILIES = ("flora", "flora0", "lora", "dora", "untouched")


def layers(segments: list[tuple[int, int | None]]) -> MixedLayers:
    return mixed_layers(
        seed=1,
        shapes={"layer": (24, 40)},
        adapters=[{"layer": (family, 3 + i)} for i, family in enumerate(FAMILIES)],
        segments=segments,
        dtype=torch.float32,
    )


def looked_up(mixed: MixedLayers) -> HostTables:
    return look_up(mixed.plan, mixed.bank.snapshot.table_of["layer"], KERNEL_COST)


MIXED = layers([])


def columns(tiles: list[list[int]], *names: str) -> list[tuple[int, ...]]:
    return [tuple(tile[TILE_COLUMNS.index(name)] for name in names) for tile in tiles]


@given(
    st.lists(
        st.tuples(st.integers(0, 3) | st.integers(0, 300), st.none() | st.integers(0, 4)),
        max_size=6,
    )
)
def test_every_token_has_one_tile_that_writes_it_and_rows_of_its_own(
    segments: list[tuple[int, int | None]],
) -> None:
    versions = list(MIXED.adapters)
    mixed = MixedLayers(
        MIXED.layers,
        MIXED.bank,
        MIXED.adapters,
        [(count, None if who is None else versions[who]) for count, who in segments],
        MIXED.x,
    )
    host = looked_up(mixed)
    written: list[int] = []
    for first, count in columns(
        host.sum_short + host.sum_long + host.weight, "first_token", "num_tokens"
    ):
        written += range(first, first + count)
    assert sorted(written) == list(range(host.num_tokens))
    for token, count, row, rows in columns(
        host.sum_short + host.sum_long, "first_token", "num_tokens", "first_row", "num_rows"
    ):
        wanted = [one for one in range(token, token + count) for _ in range(rows)]
        assert host.row_token[row : row + count * rows] == wanted
    dots = sorted(columns(host.dot_short + host.dot_long, "first_dot", "num_tokens", "num_add"))
    assert [first for first, _, _ in dots] == [
        sum(count * rank for _, count, rank in dots[:i]) for i in range(len(dots))
    ]
    assert host.num_dots == sum(count * rank for _, count, rank in dots)
    assert host.is_plain == all(who in (None, 4) for count, who in segments if count)


def test_how_a_run_is_computed_does_not_depend_on_its_neighbours() -> None:
    def kinds(segments: list[tuple[int, int | None]], of: int) -> set[str]:
        host = looked_up(layers(segments))
        return {
            kind
            for kind in ("sum_short", "sum_long", "dot_short", "dot_long", "weight")
            for first, count in columns(getattr(host, kind), "first_token", "num_tokens")
            if first <= of < first + count
        }

    for who in range(5):
        for length in (1, 30, 400):
            alone = kinds([(length, who)], 0)
            beside = kinds([(300, 0), (1, 2), (length, who), (40, None), (5, 1)], 301)
            assert alone == beside


def test_room_to_spare_in_the_buffer_changes_no_bit() -> None:
    mixed = layers([(1, 0), (2, None), (1, 2), (40, 1), (300, 0), (9, 3)])
    host, rows = looked_up(mixed), mixed.bank.modules["layer"]

    def output(tables: StepTables) -> torch.Tensor:
        return adapted_product(
            mixed.x["layer"], mixed.layers["layer"], rows.in_rows_NI, rows.out_rows_NO, tables
        )

    table = mixed.bank.snapshot.table_of["layer"]
    exact = output(index_for_kernels(mixed.plan, table, KERNEL_COST))
    assert host.stacks_rows
    assert host.weight
    room = {name: size + 7 for name, size in host.sizes.items()}
    padded = output(host.on(torch.from_numpy(host.packed(room)), room))
    torch.testing.assert_close(padded, exact, rtol=0, atol=0)


def test_a_step_larger_than_its_buffer_is_refused() -> None:
    host = looked_up(layers([(4, 0)]))
    with pytest.raises(ValueError, match="row_token_R"):
        host.packed({**host.sizes, "row_token_R": 3})
