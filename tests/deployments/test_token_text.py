"""What single tokens are: their bytes joined are the text, whatever the tokenizer writes them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deployments.text import TextCodec
from deployments.token_text import TokenTexts
from workers.config import EngineSettings


@pytest.fixture(scope="module")
def codec(tiny_llama_dir: Path) -> TextCodec:
    return TextCodec.open(EngineSettings(base=str(tiny_llama_dir)))


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    """As Llama 2's and Gemma's: words begin with ▁, and what is not in the vocabulary is written in bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "hi"]
    pieces += ["▁hi"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[("h", "i"), ("▁", "hi")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def joined(texts: TokenTexts, tokens: list[int]) -> bytes:
    return b"".join(texts.bytes_of(token) or b"" for token in tokens)


@given(text=st.text(max_size=40))
def test_the_bytes_of_byte_level_tokens_are_the_texts(codec: TextCodec, text: str) -> None:
    assert joined(codec.tokens, codec.encode(text)) == text.encode()


def test_the_bytes_of_a_real_models_tokens_are_the_texts(smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    texts = TokenTexts(tokenizer)
    text = "A naïve fox 🦊 said:\n\t日本語, \u200bthen left.  "
    tokens = tokenizer.encode(text)
    assert joined(texts, tokens) == text.encode()
    assert any(texts.name(token).startswith("bytes:") for token in tokens)


@given(text=st.text(alphabet="hi é🦊", max_size=20))
def test_the_bytes_of_byte_fallback_tokens_are_the_texts(byte_fallback: Any, text: str) -> None:
    texts = TokenTexts(byte_fallback)
    # This kind of tokenizer begins a text with a space of its own.
    expected = f" {text}".encode() if text else b""
    assert joined(texts, byte_fallback.encode(text)) == expected


def test_a_part_of_a_character_is_named_by_its_bytes_as_openai_does(
    codec: TextCodec, byte_fallback: Any
) -> None:
    assert [codec.tokens.name(token) for token in codec.encode("ü")] == [
        "bytes:\\xc3",
        "bytes:\\xbc",
    ]
    texts = TokenTexts(byte_fallback)
    names = [texts.name(token) for token in byte_fallback.encode("hi ü")]
    assert names == [" hi", " ", "bytes:\\xc3", "bytes:\\xbc"]


def test_special_tokens_have_a_name_and_no_bytes(codec: TextCodec, tiny_llama_dir: Path) -> None:
    (token,) = codec.encode("<|im_end|>")
    assert codec.tokens.name(token) == "<|im_end|>"
    assert codec.tokens.bytes_of(token) is None
    assert codec.tokens.bytes_of(100_000) is None
    assert codec.tokens.name(100_000) == "token_id:100000"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.add_tokens([AddedToken("<thinking é>", special=False)])
    (visible,) = tokenizer.encode("<thinking é>")
    assert TokenTexts(tokenizer).bytes_of(visible) == "<thinking é>".encode()
