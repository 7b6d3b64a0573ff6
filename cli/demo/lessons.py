"""What the demo's adapters were to learn, and the rule that says whether they did."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cli.errors import CommandFailedError
from training.spec import TrainingSpec

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SPECIFICATION = EXAMPLES / "demo.yaml"


@dataclass(frozen=True, slots=True)
class Lesson:
    """One adapter's held-out prompts. `judge(i, answer)` is whether an answer to prompt i follows the rule."""

    adapter: str
    rank: int
    prompts: Sequence[str]
    judge: Callable[[int, str], bool]


def read_lessons(spec: TrainingSpec) -> list[Lesson]:
    """A lesson for each adapter of the specification; held-out prompts lie beside its training data.

    Raises:
        CommandFailedError: this installation has no examples beside its code.
    """
    rules = _rules()
    return [_lesson(rules, one.name, one.rank, one.data.stem) for one in spec.adapters]


def _lesson(rules: ModuleType, adapter: str, rank: int, example_set: str) -> Lesson:
    records: list[Mapping[str, Any]] = rules.held_out(example_set)

    def judge(index: int, answer: str) -> bool:
        return bool(rules.judge(example_set, records[index], answer))

    return Lesson(adapter, rank, [str(rules.prompt_of(record)) for record in records], judge)


def _rules() -> ModuleType:
    """The examples lie beside the code in a checkout, and are not installed with it."""
    file = EXAMPLES / "rules.py"
    spec = importlib.util.spec_from_file_location("flora_example_rules", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise CommandFailedError(
            f"the demo needs the examples of a checkout; there are none at {EXAMPLES}"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
