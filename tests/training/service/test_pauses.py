"""What is not taken is left alone for ever longer, to a limit."""

from __future__ import annotations

import pytest

from training.service.pauses import Pauses


@pytest.mark.parametrize(("is_lasting", "longest_s"), [(False, 60.0), (True, 300.0)])
def test_pauses_grow_to_a_limit_and_begin_anew(is_lasting: bool, longest_s: float) -> None:
    pauses, now_s, seconds = Pauses(), 0.0, []
    for _ in range(12):
        assert pauses.is_due("one", now_s)
        pauses.begin("one", now_s, is_lasting=is_lasting)
        began_s = now_s
        while not pauses.is_due("one", now_s):
            assert pauses.is_due("other", now_s), "one holds up no other"
            now_s += 1
        seconds.append(now_s - began_s)
    assert seconds[:4] == [1, 2, 4, 8] and seconds[-1] == longest_s
    pauses.begin("one", now_s, is_lasting=is_lasting)
    pauses.keep({"other"})
    assert pauses.is_due("one", now_s)
    pauses.begin("one", now_s, is_lasting=is_lasting)
    assert pauses.is_due("one", now_s + 1)
