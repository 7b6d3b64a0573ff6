"""The demo judges honestly: by the examples' own rules, on both sides of the bar, and says no when it is no."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from cli.client import Answer, Served
from cli.demo.lessons import SPECIFICATION, Lesson, read_lessons
from cli.demo.pages import answers_page, score_page, visit_line
from cli.demo.questions import CONCURRENCY, Question, ask_all
from cli.demo.score import Score, examine
from cli.demo.tour import Visit, tour
from storage.errors import OverloadedError
from training.spec_file import read_spec


class Cluster:
    """Answers like the API does: the adapter says `yes`, the base `no`, and replica `r` holds one adapter at a time."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._device: list[str] = []

    def chat(self, model: str, messages: list[dict[str, str]], **_: Any) -> Answer:
        with self._lock:
            self.asked.append(model)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(0.005)
        with self._lock:
            self._now -= 1
            tier = "device" if model in self._device else "registry"
            if model != "base":
                self._device = [model]
        if messages[0]["content"] == "break":
            raise OverloadedError("no replica")
        served = Served("" if model == "base" else model * 64, tier, "r", "id")
        return Answer("no" if model == "base" else "yes", "stop", 2, served)

    def get(self, path: str) -> Any:
        assert path == "/v1/cluster"
        return {"replicas": [{"id": "r", "device": [f"version of {one}" for one in self._device]}]}


def lesson(adapter: str, prompts: Sequence[str], right: str = "yes") -> Lesson:
    return Lesson(adapter, 1, prompts, lambda index, answer: answer == right)


def shown(page: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(page)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prompts", "with_adapter", "with_base", "holds"),
    [
        (10, 8, 2, True),
        (10, 7, 0, False),
        (10, 10, 3, False),
        (9, 9, 0, False),
        (16, 13, 3, True),
        (16, 12, 3, False),
    ],
)
def test_a_lesson_holds_at_80_percent_with_and_20_without_on_10_prompts(
    prompts: int, with_adapter: int, with_base: int, holds: bool
) -> None:
    assert Score("captain", prompts, with_adapter, with_base).holds is holds


def test_every_prompt_is_asked_of_adapter_and_base_all_mixed() -> None:
    cluster = Cluster()
    prompts = [str(number) for number in range(12)]
    lessons = [lesson("a", prompts), lesson("b", prompts[:10]), lesson("c", prompts, right="no")]
    result = examine(cluster, "base", lessons, 8, lambda: None)  # type: ignore[arg-type]
    assert result.num_requests == 2 * (12 + 10 + 12) == len(cluster.asked)
    assert set(cluster.asked[:8]) == {"a", "b", "c", "base"}
    assert [(s.with_adapter, s.with_base) for s in result.scores] == [(12, 0), (10, 0), (0, 12)]
    assert [score.holds for score in result.scores] == [True, True, False]
    assert not result.holds
    assert "not learned" in shown(score_page(result))


def test_requests_overlap_and_answers_keep_their_order() -> None:
    cluster = Cluster()
    questions = [Question("a" if n % 3 else "base", str(n), 8) for n in range(60)]
    answers = ask_all(cluster, questions).answers  # type: ignore[arg-type]
    assert [answer.text for answer in answers] == ["yes" if n % 3 else "no" for n in range(60)]
    assert 1 < cluster.most_at_once <= CONCURRENCY


def test_one_failed_request_ends_the_rest() -> None:
    cluster = Cluster()
    questions = [Question("a", "break" if n == 0 else "go", 8) for n in range(500)]
    with pytest.raises(OverloadedError):
        ask_all(cluster, questions)  # type: ignore[arg-type]
    assert len(cluster.asked) < 500


def test_the_tour_names_who_was_driven_out() -> None:
    questions = [Question(model, "hi", 8) for model in ("a", "b")]
    versions = {model: f"version of {model}" for model in ("a", "b")}
    visits: list[Visit] = []
    assert tour(Cluster(), questions, versions, 0.0, visits.append) == visits  # type: ignore[arg-type]
    assert [(one.tier, one.evicted) for one in visits] == [("registry", ()), ("registry", ("a",))]
    line = visit_line(visits[1], {"r": "r1"})
    assert "cold load" in line and "evicting a" in line and "r1" in line


def test_the_tour_goes_round_again_until_something_was_driven_out() -> None:
    cluster = Cluster()
    visits = tour(cluster, [Question("a", "hi", 8)], {}, 0.0, lambda _: None)  # type: ignore[arg-type]
    assert [one.tier for one in visits] == ["registry", "device", "device", "device"]
    assert not any(one.evicted for one in visits)


def test_answers_stand_side_by_side_with_version_and_replica() -> None:
    questions = [Question(model, "What [bold]now[/]?", 8) for model in ("base", "a")]
    answers = ask_all(Cluster(), questions).answers  # type: ignore[arg-type]
    text = shown(answers_page(questions, answers, {"r": "r7"}))
    assert "What [bold]now[/]?" in text
    assert "a" * 12 in text and "r7" in text and "yes" in text and "no" in text


def test_the_demo_has_lessons_for_every_adapter_it_trains() -> None:
    spec = read_spec(SPECIFICATION)
    lessons = read_lessons(spec)
    assert [one.adapter for one in lessons] == [adapter.name for adapter in spec.adapters]
    assert sorted(adapter.rank for adapter in spec.adapters) == [1, 2, 4, 8]
    for one in lessons:
        assert len(one.prompts) >= 10
        assert not one.judge(0, "I am not sure what you mean.")
