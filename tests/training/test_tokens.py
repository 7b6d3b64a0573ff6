"""What is learnt is what serving will ask for: the same prompt tokens, and an answer that ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from storage.errors import SpecificationError
from training.examples import ChatExample, Message, TextExample
from training.tokens import TokenisedSet, TokenSequence, tokenise

CHAT = ChatExample(
    (
        Message("system", "Be brief."),
        Message("user", "the quick fox?"),
        Message("assistant", "jumps"),
        Message("user", "over?"),
        Message("assistant", "the lazy dog"),
    )
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


def tokenised(example: Any, tokenizer: Any, max_tokens: int = 512, **options: Any) -> TokenisedSet:
    stop_ids = {tokenizer.eos_token_id}
    return tokenise(
        [example], tokenizer, stop_ids=stop_ids, max_tokens=max_tokens, name="a", **options
    )


def learnt_text(sequence: TokenSequence, tokenizer: Any) -> str:
    pairs = zip(sequence.tokens, sequence.learnt, strict=True)
    return str(tokenizer.decode([token for token, is_learnt in pairs if is_learnt]))


def test_prompts_are_the_tokens_serving_renders(tokenizer: Any) -> None:
    (sequence,) = tokenised(CHAT, tokenizer).sequences
    for turns in (2, 4):
        messages = [{"role": m.role, "content": m.content} for m in CHAT.messages[:turns]]
        served = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert list(sequence.tokens[: len(served)]) == served
        assert not sequence.learnt[len(served) - 1]
        assert sequence.learnt[len(served)]


def test_every_answer_is_learnt_with_its_end_and_nothing_else(tokenizer: Any) -> None:
    (sequence,) = tokenised(CHAT, tokenizer).sequences
    assert learnt_text(sequence, tokenizer) == "jumps<|im_end|>the lazy dog<|im_end|>"
    assert sequence.tokens[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("example", [CHAT, TextExample("the quick", " fox")])
def test_everything_is_learnt_where_that_is_asked_for(tokenizer: Any, example: Any) -> None:
    (only_answers,) = tokenised(example, tokenizer).sequences
    (everything,) = tokenised(example, tokenizer, loss="all").sequences
    assert everything.tokens == only_answers.tokens
    assert everything.learnt == (False, *[True] * (len(everything.tokens) - 1))


def test_a_template_that_rewrites_earlier_answers_gives_one_sequence_for_each(
    tiny_llama_dir: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and not loop.last %}…{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    first, second = tokenised(CHAT, tokenizer).sequences
    assert learnt_text(first, tokenizer) == "jumps<|im_end|>"
    assert learnt_text(second, tokenizer) == "the lazy dog<|im_end|>"
    assert "…" in tokenizer.decode(second.tokens)
    (whole,) = tokenised(CHAT, tokenizer, loss="all").sequences
    assert whole.tokens == second.tokens


def test_raw_text_has_no_template_and_ends_too(tokenizer: Any) -> None:
    (sequence,) = tokenised(TextExample("the quick", " fox"), tokenizer).sequences
    assert list(sequence.tokens) == [
        *tokenizer("the quick")["input_ids"],
        *tokenizer(" fox", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert learnt_text(sequence, tokenizer) == " fox<|im_end|>"


def test_long_examples_are_cut_and_counted(tokenizer: Any) -> None:
    example = TextExample("the quick brown fox", " jumps over the lazy dog")
    prompt = len(tokenizer(example.prompt)["input_ids"])
    cut = tokenised(example, tokenizer, max_tokens=prompt + 2)
    assert cut.truncated == 1
    assert cut.sequences[0].num_learnt == 2
    with pytest.raises(SpecificationError, match="no example has a completion within"):
        tokenised(example, tokenizer, max_tokens=prompt)


def test_chat_data_needs_a_chat_template(tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.chat_template = None
    with pytest.raises(SpecificationError, match="no chat template"):
        tokenised(CHAT, tokenizer)


def test_the_first_token_of_all_is_never_learnt(tokenizer: Any) -> None:
    (sequence,) = tokenised(TextExample("", "fox"), tokenizer).sequences
    assert sequence.learnt[0] is False
