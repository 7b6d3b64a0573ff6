from __future__ import annotations

import pytest

from training.example_stream import ExampleStream


@pytest.mark.parametrize("batch", [1, 3, 7, 25])
def test_every_example_is_drawn_once_an_epoch_however_it_is_cut_into_batches(batch: int) -> None:
    stream, whole = ExampleStream(10, seed=4), ExampleStream(10, seed=4)
    drawn = [index for _ in range(12) for index in stream.draw(batch)]
    assert drawn == whole.draw(12 * batch)
    for start in range(0, len(drawn) - 9, 10):
        assert sorted(drawn[start : start + 10]) == list(range(10))
    assert drawn[:10] != drawn[10:20]


def test_a_restored_cursor_goes_on_where_it_was() -> None:
    stream = ExampleStream(10, seed=4)
    stream.draw(13)
    resumed = ExampleStream(10, seed=4)
    resumed.drawn = stream.drawn
    assert resumed.draw(20) == stream.draw(20)


def test_another_seed_is_another_order() -> None:
    assert ExampleStream(50, seed=1).draw(50) != ExampleStream(50, seed=2).draw(50)
