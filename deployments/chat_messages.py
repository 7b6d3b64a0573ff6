"""A conversation as a client sends it, in OpenAI's names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.neutral_fields import without_neutral_fields
from deployments.request_bodies import SmallBody

_MAX_MESSAGES = 2048
_MAX_PARTS = 32


class ContentPart(SmallBody):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn. `developer` is the newer name of `system`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=_MAX_PARTS)]

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, body: Any) -> Any:
        return without_neutral_fields(body, cls.model_fields) if isinstance(body, dict) else body

    def as_template_input(self) -> dict[str, str]:
        """What chat templates take."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[
    list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=_MAX_MESSAGES)
]
