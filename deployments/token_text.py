"""What single tokens are called and which bytes they stand for, for log-probabilities.

A token may be a part of a character, so its text alone is not enough: the bytes of an answer's tokens joined are the
answer's UTF-8.
"""

from __future__ import annotations

import json
import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\u2581"


class TokenTexts:
    """One tokenizer's tokens. Safe for concurrent use.

    Args:
        tokenizer: transformers' tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = dict(tokenizer.added_tokens_decoder)
        self._steps = _decoder_steps(tokenizer)
        self._names: dict[int, str] = {}

    def bytes_of(self, token: int) -> bytes | None:
        """The token's part of the text; None for a special token, which is not in it, and for one without a text."""
        added = self._added.get(token)
        if added is not None:
            return None if added.special else str(added.content).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return None
        if "ByteLevel" in self._steps and _BYTE_OF.keys() >= set(piece):
            return bytes(_BYTE_OF[letter] for letter in piece)
        if "ByteFallback" in self._steps and (byte := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if self._steps & {"Metaspace", "Replace"}:
            return str(piece).replace(_WORD_START, " ").encode()
        return str(self._tokenizer.decode([token])).encode()

    def name(self, token: int) -> str:
        """The token as a string: its text, or `bytes:\\xf0\\x9f` as OpenAI writes a part of a character."""
        if token not in self._names:
            self._names[token] = self._make_name(token)
        return self._names[token]

    def _make_name(self, token: int) -> str:
        part = self.bytes_of(token)
        if part is None:
            added = self._added.get(token)
            return f"token_id:{token}" if added is None else str(added.content)
        try:
            return part.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)


def _decoder_steps(tokenizer: Any) -> frozenset[str]:
    """The kinds of decoders the tokenizer applies; none for one that is not of the tokenizers library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return frozenset()
    decoder = json.loads(backend.decoder.__getstate__())
    return frozenset(step["type"] for step in (decoder, *decoder.get("decoders", ())))


def _letters_of_bytes() -> dict[str, int]:
    """The letters byte-level tokenizers write bytes with: printable ones as they are, others from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF = _letters_of_bytes()
