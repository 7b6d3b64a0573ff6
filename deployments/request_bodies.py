"""How bodies are read, whatever they ask for: strictly, and refused before they cost much."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from storage.errors import InvalidRequestError

_MAX_FIELDS = 64


def shown_as(**example: Any) -> ConfigDict:
    """How bodies are read, and what /docs shows of one."""
    return ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_extra={"example": example}
    )


class SmallBody(BaseModel):
    """Unknown fields are refused one by one, but not thousands of them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) > _MAX_FIELDS:
            raise InvalidRequestError(f"an object has more than {_MAX_FIELDS} fields")
        return body
