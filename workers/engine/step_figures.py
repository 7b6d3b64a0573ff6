"""What steps do and how long they take, for whoever watches the engine. Some ten microseconds a step."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from storage.figures import COUNTS, FigureBook, Figures
from workers.engine.sequence import Sequence
from workers.engine.step_budget import ScheduledSpan

_ADAPTERS = (0.0, *COUNTS[:11])


class StepFigures:
    """Told by the engine's thread, read by any. Times are on the engine's clock, in seconds."""

    def __init__(self) -> None:
        self._book = FigureBook()

    def read(self) -> Figures:
        return self._book.read()

    def computed(self, spans: Ordered[ScheduledSpan], seconds: float) -> None:
        """A step of these spans took so long. Called before its tokens are appended."""
        work, prefill_tokens = 0.0, 0
        slots = set()
        for span in spans:
            sequence, num_new = span.sequence, span.num_new
            work += num_new * sequence.request.work_per_token
            if num_new > 1 or not sequence.answer:
                prefill_tokens += num_new
            slots.add(sequence.bank_slot)
        slots.discard(None)
        observe = self._book.observe
        observe("flora_step_seconds", seconds)
        observe("flora_step_sequences", len(spans), bounds=COUNTS)
        observe("flora_step_rank_rows", work, bounds=COUNTS)
        observe("flora_step_adapters", len(slots), bounds=_ADAPTERS)
        if prefill_tokens:
            self._book.count("flora_prefill_tokens_total", by=prefill_tokens)

    def answered_first(self, sequence: Sequence, now: float) -> None:
        """A sequence's first token is there."""
        self._book.observe("flora_engine_first_token_seconds", now - sequence.arrived_s)
