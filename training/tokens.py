"""From examples to token sequences, in the exact form serving will see them.

A prompt is what serving renders: the model's own chat template with `add_generation_prompt=True`, or the raw text. A
completion ends with a stop token, so that generation learns to end. Completion tokens are learnt, or all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from storage.errors import SpecificationError
from training.examples import ChatExample, Example, TextExample


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """`learnt[i]` says whether token i is predicted in training, from the tokens before it; the first never is."""

    tokens: tuple[int, ...]
    learnt: tuple[bool, ...]

    def __post_init__(self) -> None:
        if self.learnt and self.learnt[0]:
            object.__setattr__(self, "learnt", (False, *self.learnt[1:]))

    @property
    def num_learnt(self) -> int:
        return sum(self.learnt)


@dataclass(frozen=True, slots=True)
class TokenisedSet:
    """One data set. `dropped` examples had no learnt token left after the cut."""

    sequences: tuple[TokenSequence, ...]
    truncated: int
    dropped: int


def tokenise(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    stop_ids: Collection[int],
    max_tokens: int,
    name: str,
    loss: Literal["completion", "all"] = "completion",
) -> TokenisedSet:
    """Token sequences of at most `max_tokens`, cut at the end.

    Args:
        tokenizer: a transformers tokenizer.
        stop_ids: tokens that end an answer; the tokenizer's own end token is used where the template adds none.
        name: of the adapter, for errors.
        loss: which tokens are learnt: completions, or prompts too.

    Raises:
        SpecificationError: chat data for a model without a chat template, or nothing learnt is left.
    """
    if any(isinstance(example, ChatExample) for example in examples) and not getattr(
        tokenizer, "chat_template", None
    ):
        raise SpecificationError(
            f"{name}: the base model has no chat template; write the data as prompt and completion"
        )
    sequences: list[TokenSequence] = []
    truncated = dropped = 0
    for example in examples:
        if isinstance(example, TextExample):
            whole = [_text_sequence(example, tokenizer, stop_ids)]
        else:
            whole = _chat_sequences(example, tokenizer, stop_ids)
        if loss == "all":
            # The last one has the whole conversation.
            whole = [TokenSequence(whole[-1].tokens, (True,) * len(whole[-1].tokens))]
        for sequence in whole:
            truncated += len(sequence.tokens) > max_tokens
            cut = TokenSequence(sequence.tokens[:max_tokens], sequence.learnt[:max_tokens])
            if cut.num_learnt:
                sequences.append(cut)
            else:
                dropped += 1
    if not sequences:
        raise SpecificationError(
            f"{name}: no example has a completion within sequence_length {max_tokens}",
            param="sequence_length",
        )
    return TokenisedSet(tuple(sequences), truncated, dropped)


def _text_sequence(
    example: TextExample, tokenizer: Any, stop_ids: Collection[int]
) -> TokenSequence:
    prompt = list(tokenizer(example.prompt)["input_ids"])
    return _joined(prompt, _completion(example.completion, tokenizer, stop_ids))


def _chat_sequences(
    example: ChatExample, tokenizer: Any, stop_ids: Collection[int]
) -> list[TokenSequence]:
    """One sequence for the conversation, if each prompt continues the one before; else one for each answer.

    (Some templates render earlier answers differently, for instance without their reasoning.)
    """
    messages = [{"role": m.role, "content": m.content} for m in example.messages]
    done: list[TokenSequence] = []
    tokens: list[int] = []
    learnt: list[bool] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(tokenizer, messages[:index], answer_next=True)
        after = _rendered(tokenizer, messages[: index + 1], answer_next=False)
        prompt = list(tokenizer(before, add_special_tokens=False)["input_ids"])
        answer = after.removeprefix(before) if after.startswith(before) else message["content"]
        completion = _completion(answer, tokenizer, stop_ids)
        if prompt[: len(tokens)] != tokens:
            done.append(TokenSequence(tuple(tokens), tuple(learnt)))
            tokens, learnt = [], []
        learnt += [False] * (len(prompt) - len(tokens)) + [True] * len(completion)
        tokens = prompt + completion
    return [*done, TokenSequence(tuple(tokens), tuple(learnt))]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], *, answer_next: bool) -> str:
    return str(
        tokenizer.apply_chat_template(messages, add_generation_prompt=answer_next, tokenize=False)
    )


def _completion(text: str, tokenizer: Any, stop_ids: Collection[int]) -> list[int]:
    """The tokens of an answer up to its last stop token, with one added if it has none."""
    tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    stops = [index for index, token in enumerate(tokens) if token in stop_ids]
    return tokens[: stops[-1] + 1] if stops else [*tokens, tokenizer.eos_token_id]


def _joined(prompt: list[int], completion: list[int]) -> TokenSequence:
    return TokenSequence((*prompt, *completion), (False,) * len(prompt) + (True,) * len(completion))
