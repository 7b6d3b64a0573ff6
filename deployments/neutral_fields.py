"""Fields of OpenAI's and vLLM's APIs that this server does not have, and the values of them that ask for nothing.

Clients send such fields by default. A neutral value is dropped; any other is an error that names the field, for an
answer that silently lacks what was asked for is a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from storage.errors import UnsupportedFieldError


def _is_one_of(*values: object) -> Callable[[Any], bool]:
    # Not 0 for False: a number may ask for something where false does not.
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def _is_number(*values: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and value in values


def _is_anything(value: Any) -> bool:
    """The field changes nothing in the answer."""
    return True


_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "audio": _is_one_of(),
    "best_of": _is_number(1),
    "echo": _is_one_of(False),
    "function_call": _is_one_of("none", "auto"),
    "functions": _is_one_of([]),
    "metadata": _is_anything,
    "modalities": _is_one_of(["text"]),
    "name": _is_one_of(""),
    "parallel_tool_calls": _is_anything,
    "prediction": _is_one_of(),
    "prompt_cache_key": _is_anything,
    "prompt_cache_retention": _is_anything,
    "reasoning_effort": _is_one_of("none"),
    "refusal": _is_one_of(""),
    "response_format": _is_one_of({"type": "text"}),
    "safety_identifier": _is_anything,
    "service_tier": _is_one_of("auto", "default"),
    "store": _is_anything,
    "suffix": _is_one_of(""),
    "tool_calls": _is_one_of([]),
    "tool_choice": _is_one_of("none", "auto"),
    "tools": _is_one_of([]),
    "top_logprobs": _is_number(0),
    "verbosity": _is_one_of("medium"),
    "web_search_options": _is_one_of(),
}


def without_neutral_fields(body: dict[str, Any], supported: Container[str]) -> dict[str, Any]:
    """The body without the fields that ask for nothing.

    Raises:
        UnsupportedFieldError: a field is known to neither this server nor OpenAI, or asks for something.
    """
    kept = {}
    for name, value in body.items():
        if name in supported:
            kept[name] = value
        elif name not in _NEUTRAL:
            raise UnsupportedFieldError(f"there is no field {name!r}", param=name)
        elif value is not None and not _NEUTRAL[name](value):
            raise UnsupportedFieldError(
                f"{name} is not supported with this value; leave it out", param=name
            )
    return kept
