"""An engine that steps when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from storage.errors import EngineLostError
from storage.identity import AdapterSet, AdapterVersion
from workers.engine.client import EngineLoad
from workers.engine.request import EngineRequest, FinishReason, RequestOutput, StepOutputs


class SteppedEngine:
    """An `EngineClient` that steps when told."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.is_up = True
        self._on_step: Callable[[StepOutputs], None] = lambda outputs: None

    def start(self, on_step: Callable[[StepOutputs], None]) -> None:
        self._on_step = on_step

    def submit(self, request: EngineRequest) -> None:
        if not self.is_up:
            raise EngineLostError("gone")

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def prefetch(
        self,
        wanted: Sequence[AdapterVersion],
        pinned: frozenset[AdapterVersion],
        near: Sequence[AdapterVersion] = (),
        retired: frozenset[AdapterVersion] = frozenset(),
    ) -> None: ...

    def load(self) -> EngineLoad:
        return EngineLoad()

    def is_alive(self) -> bool:
        return self.is_up

    def stop(self) -> None: ...

    async def step(self, token: int, *names: str, reason: FinishReason | None = None) -> None:
        await self._hand_out(
            *(RequestOutput(name, AdapterSet(), (token,), reason) for name in names)
        )

    async def fail(self, error: Exception, *names: str) -> None:
        reason = FinishReason.ERROR
        await self._hand_out(
            *(RequestOutput(name, AdapterSet(), (), reason, error) for name in names)
        )

    async def _hand_out(self, *outputs: RequestOutput) -> None:
        self._on_step(StepOutputs(outputs))
        for _ in range(30):  # let every reader read
            await asyncio.sleep(0)
