"""Between text and tokens: the ingress is the only place that has a tokenizer.

Decoding is incremental and never shows half a character: a token may end inside one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from deployments.token_text import TokenTexts
from storage.errors import InvalidRequestError
from workers.config import EngineSettings
from workers.models.loading import load_config, load_tokenizer

_CONTEXT_TOKENS = 5
"""An answer is decoded after so many prompt tokens: some tokenizers drop a leading space at the start of a text."""
_MAX_HELD_TOKENS = 64
"""So many tokens without one whole character are no text; they are shown as the decoder has them."""
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class PromptText:
    """A prompt as it is echoed, and how many characters of it stand before each of its tokens."""

    text: str
    starts: tuple[int, ...]


class TextCodec:
    """One model's tokenizer and chat template. Safe for concurrent use.

    Args:
        tokenizer: transformers' tokenizer.
        context_tokens: prompt and answer together, at most.
    """

    def __init__(self, tokenizer: Any, context_tokens: int) -> None:
        self._tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.tokens = TokenTexts(tokenizer)

    @classmethod
    def open(cls, settings: EngineSettings) -> TextCodec:
        """Raises InvalidRequestError and StoreUnavailableError as `load_config` and `load_tokenizer`."""
        config = load_config(settings.base)
        own_limit = getattr(config, "max_position_embeddings", None)
        context = min(settings.max_sequence_tokens, own_limit or settings.max_sequence_tokens)
        context = min(context, settings.kv_blocks * settings.kv_block_tokens)
        return cls(load_tokenizer(settings.base), context)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._decode(token_ids, skip_special_tokens=True)

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """Text with special tokens. Raises InvalidRequestError for a token the model does not have."""
        size = len(self._tokenizer)
        wrong = next((token for token in token_ids if not 0 <= token < size), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"token {wrong} is not one of the model's (0 to {size - 1})", param="tokens"
            )
        return self._decode(token_ids, skip_special_tokens=False)

    def prompt_text(self, prompt: str | Sequence[int], token_ids: Sequence[int]) -> PromptText:
        """A prompt to be echoed: a string as it is, tokens with special ones written out.

        Args:
            token_ids: what the prompt was encoded to. Special tokens the tokenizer put around a string are not in it.
        """
        written = range(len(token_ids))
        if isinstance(prompt, str):
            written = _find(self.encode(prompt, add_special_tokens=False), token_ids)
        decoder = IncrementalDecoder(lambda ids: self._decode(ids, skip_special_tokens=False))
        text = ""
        starts = []
        for place, token in enumerate(token_ids):
            starts.append(len(text))
            if place in written:
                text += decoder.push(token)
        text += decoder.flush()
        if isinstance(prompt, str):
            text = prompt
        return PromptText(text, tuple(min(start, len(text)) for start in starts))

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation in the model's own template, up to where its answer begins.

        Raises:
            InvalidRequestError: the model has no chat template, or its template refuses these messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "this base model has no chat template; use /v1/completions", param="messages"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False)

    def decoder(self, prompt_token_ids: Sequence[int]) -> IncrementalDecoder:
        """A decoder of the answer to a prompt."""
        return IncrementalDecoder(self.decode, prompt_token_ids[-_CONTEXT_TOKENS:])

    def _decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(
            self._tokenizer.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )


def _find(part: Sequence[int], tokens: Sequence[int]) -> range:
    """Where in `tokens` the part stands; all of them if it does not."""
    for start in range(len(tokens) - len(part) + 1):
        if list(tokens[start : start + len(part)]) == list(part):
            return range(start, start + len(part))
    return range(len(tokens))


class IncrementalDecoder:
    """Turns one answer's tokens into text as they come; the pieces joined are the answer decoded at once."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context)  # tokens shown last, then those not shown yet
        self._num_shown = len(self._window)

    def push(self, token: int) -> str:
        """The text that one more token completes; empty while it ends inside a character."""
        self._window.append(token)
        text = self._new_text()
        is_whole = not text.endswith(_REPLACEMENT)
        if text and (is_whole or len(self._window) - self._num_shown >= _MAX_HELD_TOKENS):
            del self._window[: self._num_shown]
            self._num_shown = len(self._window)
            return text
        return ""

    def flush(self) -> str:
        """The rest, when no more tokens come: what is left of a broken character."""
        return self._new_text()

    def _new_text(self) -> str:
        shown = self._decode(self._window[: self._num_shown])
        return self._decode(self._window)[len(shown) :]
