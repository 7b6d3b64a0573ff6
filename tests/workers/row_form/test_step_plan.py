"""The plan of a step: segments to tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.row_form.step_plan import NotResidentError, Segment, plan_step

CPU = torch.device("cpu")

segments = st.lists(
    st.builds(
        Segment,
        st.integers(0, 5),
        st.just(()) | st.tuples(st.tuples(st.integers(0, 3), st.just(1.0))),
    )
)


@given(segments)
def test_every_token_names_its_own_segments_adapter(segments: list[Segment]) -> None:
    plan = plan_step(segments, range(4), CPU)
    wanted = [
        (token, segment.parts[0][0])
        for token, segment in enumerate(s for s in segments for _ in range(s.num_tokens))
        if segment.parts
    ]
    parts = plan.parts
    assert list(zip(parts.token_P.tolist(), parts.slot_P.tolist(), strict=True)) == wanted
    assert plan.is_base_only == (not wanted)
    assert plan.num_tokens == sum(segment.num_tokens for segment in segments)


def test_an_adapter_that_is_not_resident_stops_the_step() -> None:
    with pytest.raises(NotResidentError, match="slot 2"):
        plan_step([Segment(1, ((2, 1.0),))], frozenset({0, 1}), CPU)


def test_a_set_of_several_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="one adapter"):
        plan_step([Segment(1, ((0, 0.5), (1, 0.5)))], frozenset({0, 1}), CPU)
