"""Many requests at once over HTTP, the way many users would send them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cli.client import Answer, ApiClient

CONCURRENCY = 16


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt for one model."""

    model: str
    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers in the order of the questions, and how long all of them took together."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.completion_tokens for answer in self.answers) / self.seconds


def ask_all(
    client: ApiClient, questions: Sequence[Question], on_answer: Callable[[], None] = lambda: None
) -> Answers:
    """Ask everything, `CONCURRENCY` requests at a time, greedily decoded. The first error ends it."""

    def ask(question: Question) -> Answer:
        answer = ask_one(client, question)
        on_answer()
        return answer

    started_s = time.monotonic()
    pool = ThreadPoolExecutor(CONCURRENCY)
    try:
        waiting = [pool.submit(ask, question) for question in questions]
        answers = tuple(future.result() for future in waiting)
    finally:
        # Requests on their way when one failed, or at Ctrl-C, end with the cluster; nobody waits for them.
        pool.shutdown(wait=False, cancel_futures=True)
    return Answers(answers, time.monotonic() - started_s)


def ask_one(client: ApiClient, question: Question) -> Answer:
    return client.chat(
        question.model,
        [{"role": "user", "content": question.prompt}],
        max_tokens=question.max_tokens,
        temperature=0,
    )
