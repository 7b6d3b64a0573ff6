"""What one step has to tell, request by request."""

from __future__ import annotations

from collections.abc import Callable

from storage.errors import AdapterRefusedError, FloraError
from storage.identity import AdapterVersion
from workers.engine.request import FinishReason, RequestOutput
from workers.engine.sampling.row import SampledToken
from workers.engine.sequence import Sequence


class Outbox:
    """Collects outputs until they are taken.

    Args:
        clock: what waiting is measured on, in seconds.
        tier: where an adapter was found that had to be loaded.
    """

    def __init__(self, clock: Callable[[], float], tier: Callable[[AdapterVersion], str]) -> None:
        self._clock = clock
        self._loaded_from = tier
        self._outputs: list[RequestOutput] = []

    def __len__(self) -> int:
        return len(self._outputs)

    def put(
        self,
        sequence: Sequence,
        new: SampledToken | None = None,
        reason: FinishReason | None = None,
        error: Exception | None = None,
    ) -> None:
        """Append an output; a sequence's first one also says how it fared until then."""
        is_first = not sequence.has_reported
        sequence.has_reported = True
        admitted_s = sequence.admitted_s if sequence.admitted_s is not None else self._clock()
        self._outputs.append(
            RequestOutput(
                request_id=sequence.request.request_id,
                adapters=sequence.request.adapters,
                new_token_ids=() if new is None else (new.token,),
                finish_reason=reason,
                error=error,
                adapter_tier=self._tier(sequence) if is_first else None,
                queue_time_s=admitted_s - sequence.arrived_s if is_first else None,
                new_logprobs=() if new is None or new.logprobs is None else (new.logprobs,),
                prompt_logprobs=sequence.scored_prompt() if is_first else None,
                num_cached_tokens=sequence.num_reused if is_first else None,
            )
        )

    def take(self) -> tuple[RequestOutput, ...]:
        """All outputs, handed out once."""
        outputs, self._outputs = tuple(self._outputs), []
        return outputs

    def _tier(self, sequence: Sequence) -> str | None:
        """Where the request found its adapter; None for the base model, or when it never got it."""
        if sequence.version is None or sequence.bank_slot is None:
            return None
        return self._loaded_from(sequence.version) if sequence.needed_load else "device"


def not_finite(sequence: Sequence) -> FloraError:
    """What a request is told whose logits are NaN or infinite."""
    if sequence.version is None:
        return FloraError("the base model produced values that are not finite")
    return AdapterRefusedError(
        f"the adapter {sequence.version[:12]}… produces values that are not finite", param="model"
    )
