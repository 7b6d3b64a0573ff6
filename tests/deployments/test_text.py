"""Tokens to text, piece by piece, with a real byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.text import IncrementalDecoder, TextCodec
from storage.errors import InvalidRequestError
from workers.config import EngineSettings


@pytest.fixture(scope="module")
def codec(tiny_llama_dir: Path) -> TextCodec:
    return TextCodec.open(EngineSettings(base=str(tiny_llama_dir)))


def joined(codec: TextCodec, tokens: list[int]) -> list[str]:
    decoder = IncrementalDecoder(codec.decode)
    return [*(decoder.push(token) for token in tokens), decoder.flush()]


@given(text=st.text(max_size=40))
def test_the_pieces_joined_are_the_text(codec: TextCodec, text: str) -> None:
    pieces = joined(codec, codec.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(tokens=st.lists(st.integers(3, 290), max_size=40))
def test_any_tokens_give_what_decoding_them_at_once_gives(codec: TextCodec, tokens) -> None:
    assert "".join(joined(codec, tokens)) == codec.decode(tokens)


def test_a_character_of_several_tokens_appears_whole(codec: TextCodec) -> None:
    tokens = codec.encode("a🦊b")
    assert len(tokens) > 3
    assert [piece for piece in joined(codec, tokens) if piece] == ["a", "🦊", "b"]


def test_endless_broken_bytes_are_shown_in_the_end_and_not_held_for_ever(codec: TextCodec) -> None:
    broken = codec.encode("🦊")[0]
    decoder = IncrementalDecoder(codec.decode)
    assert any(decoder.push(broken) for _ in range(100))


def test_the_context_is_what_model_and_settings_both_allow(tiny_llama_dir: Path) -> None:
    wide = EngineSettings(base=str(tiny_llama_dir), max_sequence_tokens=4096)
    narrow = EngineSettings(base=str(tiny_llama_dir), max_sequence_tokens=100)
    assert TextCodec.open(wide).context_tokens == 512  # the model's own
    assert TextCodec.open(narrow).context_tokens == 100


def test_a_chat_is_written_in_the_models_template(codec: TextCodec) -> None:
    tokens = codec.encode_chat([{"role": "user", "content": "hi"}])
    assert codec.decode_all(tokens) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_model_without_a_template_says_so_and_a_template_may_refuse(
    codec: TextCodec, tiny_llama_dir: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.chat_template = None
    with pytest.raises(InvalidRequestError, match="no chat template"):
        TextCodec(tokenizer, 512).encode_chat([{"role": "user", "content": "hi"}])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        TextCodec(tokenizer, 512).encode_chat([{"role": "user", "content": "hi"}])


def test_a_token_the_model_does_not_have_is_refused(codec: TextCodec) -> None:
    with pytest.raises(InvalidRequestError, match="99999"):
        codec.decode_all([5, 99999])
