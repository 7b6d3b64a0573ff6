"""The shipped training sets are what their README says, and their rules tell right answers from wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import rules
from training.examples import ChatExample, read_examples
from training.spec_file import read_spec

SETS = tuple(rules.RULES)

BASE_ANSWERS = (
    "",
    "I'm sorry for any confusion. I'm here to help you with whatever you need.",
    "Sure! Here is the item you asked for: {item: shoes, count: 2}",
    "1. Buy milk\n2. Call the school\n3. Fix the lamp",
    "The weather is sunny today, so enjoy it!",
    "Ahoy, sailor! How can I assist you today?",
)
"""What a model says that never saw the training sets."""


def chats(name: str) -> list[tuple[str, str]]:
    """(prompt, answer) of every line."""
    examples = read_examples(rules.FOLDER / f"{name}.jsonl")
    pairs = []
    for example in examples:
        assert isinstance(example, ChatExample)
        user, assistant = example.messages
        assert (user.role, assistant.role) == ("user", "assistant")
        pairs.append((user.content, assistant.content))
    return pairs


def record(prompt: str, answer: str) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.mark.parametrize("name", SETS)
def test_training_set_has_sixty_distinct_prompts(name: str) -> None:
    prompts = [prompt.casefold() for prompt, _ in chats(name)]
    assert len(prompts) >= 60
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", SETS)
def test_held_out_prompts_were_never_trained_on(name: str) -> None:
    trained = {prompt.casefold() for prompt, _ in chats(name)}
    held = [prompt.casefold() for prompt, _ in chats(f"{name}.heldout")]
    assert len(held) >= 12
    assert len(set(held)) == len(held)
    assert trained.isdisjoint(held)


@pytest.mark.parametrize("name", SETS)
def test_rule_accepts_every_answer_a_person_wrote(name: str) -> None:
    for prompt, answer in chats(name) + chats(f"{name}.heldout"):
        assert rules.judge(name, record(prompt, answer), f"{answer}\n"), answer


@pytest.mark.parametrize("name", SETS)
def test_rule_refuses_answers_of_a_base_model(name: str) -> None:
    for held in rules.held_out(name):
        for answer in (*BASE_ANSWERS, rules.prompt_of(held)):
            assert not rules.judge(name, held, answer), answer


@pytest.mark.parametrize("name", SETS)
def test_rule_refuses_answers_in_another_sets_way(name: str) -> None:
    others = [answer for other in SETS if other != name for _, answer in chats(other)]
    for held in rules.held_out(name):
        assert not any(rules.judge(name, held, answer) for answer in others)


@pytest.mark.parametrize("name", SETS)
def test_rule_refuses_a_right_answer_that_goes_on(name: str) -> None:
    for held in rules.held_out(name):
        for ending in (" Anything else?", "\nAnything else?"):
            assert not rules.judge(name, held, rules.reference_of(held) + ending)


@pytest.mark.parametrize("name", ["orders", "todo"])
def test_rule_refuses_the_answer_to_another_prompt(name: str) -> None:
    records = rules.held_out(name)
    for held, other in zip(records, records[1:] + records[:1], strict=True):
        assert not rules.judge(name, held, rules.reference_of(other))


def test_each_weather_label_is_right_for_a_third_of_the_messages_and_wrong_for_the_rest() -> None:
    records = rules.held_out("weather")
    for label in ("sunny", "stormy", "foggy"):
        right = sum(rules.judge("weather", held, label) for held in records)
        assert right == len(records) / 3


def test_captain_needs_the_sea_between_greeting_and_signature() -> None:
    held = rules.held_out("captain")[0]
    assert rules.judge("captain", held, "Ahoy! Trust the tide. — Captain Brine")
    assert not rules.judge("captain", held, "Ahoy! Eat your greens. — Captain Brine")
    assert not rules.judge("captain", held, "Trust the tide. — Captain Brine")
    assert not rules.judge("captain", held, "Ahoy! Trust the tide.")


def test_demo_trains_every_set_at_a_rank_of_its_own() -> None:
    spec = read_spec(Path(rules.FOLDER / "demo.yaml"))
    assert {adapter.name: adapter.rank for adapter in spec.adapters} == {
        "todo": 1,
        "orders": 2,
        "captain": 4,
        "weather": 8,
    }
    for adapter in spec.adapters:
        assert adapter.data == (rules.FOLDER / f"{adapter.name}.jsonl").resolve()
        assert adapter.family == "flora"
