from __future__ import annotations

from pathlib import Path

from benchmarks.levers import BUILDS, CHANGES, LOADS, gains, measure
from benchmarks.workload import Batch


def test_every_build_answers_every_load(tiny_llama_dir: Path) -> None:
    speed = measure(
        tiny_llama_dir, 1, Batch(requests=2, prompt_tokens=4, answer_tokens=2, vocabulary=60)
    )
    assert speed.keys() == {(build, load) for build in BUILDS for load in LOADS}
    assert all(tokens_per_s > 0 for rounds in speed.values() for tokens_per_s in rounds)


def test_a_gain_is_new_speed_over_old() -> None:
    speed = {
        (build, load): [10.0 * (number + 1), 20.0 * (number + 1), 30.0 * (number + 1)]
        for number, build in enumerate(BUILDS)
        for load in LOADS
    }
    rows, levers = gains(speed)
    by_name = {lever.name: lever.measured for lever in levers}
    assert by_name["base weights packed for the matrix unit"] == 2.0
    assert by_name["all of them"] == len(BUILDS)
    assert len(rows) == len(levers) == len(CHANGES)
