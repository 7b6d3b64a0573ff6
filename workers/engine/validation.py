"""Whether a request could ever be answered; asked before it is queued."""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import ContextLengthError, InvalidRequestError
from workers.engine.request import EngineRequest


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What must be known of an engine to judge a request; plain data, so it can be judged away from the engine."""

    vocab_size: int
    max_tokens: int  # prompt and answer together
    eos_token_ids: frozenset[int]


def validate_request(request: EngineRequest, limits: RequestLimits) -> None:
    """Check what the engine cannot recover from in the middle of a step.

    Raises:
        ContextLengthError: prompt plus max_tokens can never fit.
        InvalidRequestError: an empty prompt, a token the model does not have, or no token that may begin the answer.
    """
    prompt, vocab_size = request.prompt_token_ids, limits.vocab_size
    if not prompt:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise InvalidRequestError(
            f"the prompt has token {wrong}; the model's tokens are 0 to {vocab_size - 1}",
            param="prompt",
        )
    sampling = request.sampling
    for name, tokens in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", [token for token, _ in sampling.logit_bias]),
    ):
        unknown = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise InvalidRequestError(
                f"{unknown} is no token of the model: they are 0 to {vocab_size - 1}", param=name
            )
    if sampling.min_tokens and len(sampling.stop_token_ids | limits.eos_token_ids) >= vocab_size:
        raise InvalidRequestError(
            "stop_token_ids leaves no token for the answer to begin with", param="stop_token_ids"
        )
    total = len(prompt) + sampling.max_tokens
    if total > limits.max_tokens:
        raise ContextLengthError(
            f"{len(prompt)} prompt tokens and up to {sampling.max_tokens} new ones are {total}; "
            f"the context is {limits.max_tokens} tokens",
            param="max_tokens",
        )
