"""The examination: held-out prompts, the same for an adapter and for the base, judged by the lesson's rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cli.client import Answer, ApiClient
from cli.demo.lessons import Lesson
from cli.demo.questions import Question, ask_all

LEAST_WITH_ADAPTER = 0.8
MOST_WITH_BASE = 0.2
LEAST_PROMPTS = 10


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers of `num_prompts`, with the adapter and with the base alone."""

    adapter: str
    num_prompts: int
    with_adapter: int
    with_base: int

    @property
    def holds(self) -> bool:
        """The adapter learned its lesson, and the base did not know it before."""
        return (
            self.num_prompts >= LEAST_PROMPTS
            and self.with_adapter >= LEAST_WITH_ADAPTER * self.num_prompts
            and self.with_base <= MOST_WITH_BASE * self.num_prompts
        )


@dataclass(frozen=True, slots=True)
class Examination:
    """All scores, and how fast the cluster answered meanwhile."""

    scores: tuple[Score, ...]
    num_requests: int
    seconds: float
    tokens_per_s: float

    @property
    def holds(self) -> bool:
        return all(score.holds for score in self.scores)


def examine(
    client: ApiClient,
    base: str,
    lessons: Sequence[Lesson],
    max_tokens: int,
    on_answer: Callable[[], None],
) -> Examination:
    """Ask every prompt of every lesson twice, all mixed: neighbours in a batch use other adapters, or none."""
    asked = [
        (lesson, index, model)
        for index in range(max(len(lesson.prompts) for lesson in lessons))
        for lesson in lessons
        if index < len(lesson.prompts)
        for model in (lesson.adapter, base)
    ]
    questions = [
        Question(model, lesson.prompts[index], max_tokens) for lesson, index, model in asked
    ]
    result = ask_all(client, questions, on_answer)
    answers: list[tuple[Lesson, int, str, Answer]] = [
        (*one, answer) for one, answer in zip(asked, result.answers, strict=True)
    ]

    def right(lesson: Lesson, model: str) -> int:
        return sum(
            lesson.judge(index, answer.text)
            for of, index, by, answer in answers
            if of is lesson and by == model
        )

    scores = tuple(
        Score(
            lesson.adapter, len(lesson.prompts), right(lesson, lesson.adapter), right(lesson, base)
        )
        for lesson in lessons
    )
    return Examination(scores, len(questions), result.seconds, result.tokens_per_s)
