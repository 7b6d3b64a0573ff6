"""An answer's tokens in, its text out: decoded, ended at stop strings, with each token's place and log-probability.

Knows nothing of replicas, and nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.stop_strings import StopStrings
from deployments.text import PromptText, TextCodec
from workers.engine.request import EngineRequest, FinishReason, RequestOutput, TokenLogprobs

_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a choice's text.

    `offset` counts characters of the choice's text before it; parts of one character all have the character's, and
    in text that is no UTF-8 all of a broken run have the place where it begins.
    `logprobs` is None for the first token of an echoed prompt, which nothing precedes.
    """

    token: int
    offset: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer. The last one alone has a finish reason; `text` may be empty.

    `tokens`, where log-probabilities were asked for, are those whose text begins in what has been shown so far.
    Tokens that lie in a stop string or behind it are left out, as their text is.
    """

    text: str
    finish_reason: str | None = None
    tokens: tuple[ScoredToken, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.finish_reason or self.tokens)


class AnswerText:
    """One answer while it comes.

    Args:
        stops: strings that end the answer and are not part of it.
        echo: what to show before the answer, if anything.
    """

    def __init__(
        self,
        codec: TextCodec,
        request: EngineRequest,
        stops: Sequence[str],
        echo: PromptText | None = None,
    ) -> None:
        self.num_tokens = 0  # of the answer, those of a stop string included
        self._request = request
        self._echo = echo
        self._decoder = codec.decoder(request.prompt_token_ids)
        self._stops = StopStrings(stops)
        # Characters of the choice's text.
        self._num_decoded = self._num_shown = len(echo.text) if echo is not None else 0
        self._held: list[ScoredToken] = []  # tokens whose text is not shown yet

    def push(self, output: RequestOutput) -> Delta:
        """What an output adds to the text. Nothing comes after a finish reason."""
        text = self._take_echo(output)
        asks = self._request.sampling.logprobs is not None
        for place, token in enumerate(output.new_token_ids):
            self.num_tokens += 1
            if asks:
                logprobs = output.new_logprobs[place]
                self._held.append(ScoredToken(token, self._num_decoded, logprobs))
            text += self._show(self._decoder.push(token))
            if self._stops.found:
                return Delta(text, "stop", self._take_shown())
        if output.finish_reason is None:
            return Delta(text, None, self._take_shown())
        text += self._show(self._decoder.flush())
        if self._stops.found:
            return Delta(text, "stop", self._take_shown())
        text += self._stops.flush()
        return Delta(text, _REASONS[output.finish_reason], tuple(self._held))

    def _show(self, piece: str) -> str:
        """The text that may be shown now. Before min_tokens nothing may stop the answer."""
        self._num_decoded += len(piece)
        may_end = self.num_tokens >= self._request.sampling.min_tokens
        shown = self._stops.push(piece, may_end=may_end)
        self._num_shown += len(shown)
        return shown

    def _take_echo(self, output: RequestOutput) -> str:
        echo, self._echo = self._echo, None
        if echo is None:
            return ""
        if self._request.wants_prompt_logprobs:
            logprobs = (None, *(output.prompt_logprobs or ()))
            prompt = self._request.prompt_token_ids
            self._held += [
                ScoredToken(*each) for each in zip(prompt, echo.starts, logprobs, strict=True)
            ]
        return echo.text

    def _take_shown(self) -> tuple[ScoredToken, ...]:
        count = sum(one.offset < self._num_shown for one in self._held)
        shown, self._held = self._held[:count], self._held[count:]
        return tuple(shown)
