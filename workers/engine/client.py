"""The seam between a replica and its engine: plain data only, so the engine may run in a thread or another process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from storage.errors import FailedVersion
from storage.figures import Figures
from storage.identity import AdapterVersion
from workers.engine.request import EngineRequest, StepOutputs


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What a replica reports of its engine every heartbeat. `work` is in rank-weighted tokens still to compute."""

    num_waiting: int = 0
    num_running: int = 0
    work: float = 0.0
    kv_slots_used: int = 0
    kv_slots: int = 0
    kv_blocks_used: int = 0  # held by running sequences
    kv_blocks: int = 0
    prefix_tokens_reused: int = 0  # tokens found in the KV cache instead of computed, since start
    preemptions: int = 0  # sequences that gave their KV blocks back for a while, since start
    bank_rows_used: int = 0
    bank_rows: int = 0
    bank_slots: int = 0  # adapters there can be on the device
    device: tuple[AdapterVersion, ...] = ()  # versions whose rows are on the device
    host: tuple[AdapterVersion, ...] = ()
    disk: tuple[AdapterVersion, ...] = ()
    loads: int = 0  # adapters brought to the device since start
    evictions: int = 0
    tokens_out: int = 0
    step_errors: int = 0
    threads: int = 0  # that the model computes on
    load_wait_s: float = (
        0.0  # how long the engine's thread has waited for loads of adapters, in all
    )
    queued_work: float = 0.0  # the part of `work` that belongs to requests not yet started
    first_token_p99_s: float = 0.0  # from arrival here, over the last minute; 0 without any
    misses: int = 0  # requests that found their adapter not on the device, since start
    load_s: float = (
        0.0  # recent seconds from a request for a load to its rows being there; 0: none yet
    )
    load_errors: int = 0  # since start
    failed: tuple[FailedVersion, ...] = ()  # versions that exist and cannot be served here
    is_registry_up: bool = True
    figures: Figures = field(default_factory=Figures)  # of its steps, its loads, its requests

    @property
    def kv_used(self) -> float:
        """The part of the KV cache that running sequences hold, 0 to 1."""
        return self.kv_blocks_used / self.kv_blocks if self.kv_blocks else 0.0


class EngineClient(Protocol):
    """Every method may be called from any thread; all but `stop` return at once."""

    def start(self, on_step: Callable[[StepOutputs], None]) -> None:
        """Begin stepping. `on_step` is called from the engine's own thread, once per step that produced anything."""

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Whatever becomes of it, exactly one output with a finish reason follows.

        Raises:
            ContextLengthError: prompt plus max_tokens can never fit.
            InvalidRequestError: an empty prompt, an unknown token, or a request id that is in use.
            EngineLostError: the engine is stopping or dead.
        """

    def abort(self, request_id: str) -> None:
        """Free the request's KV slot and adapter reference within one step; no error when it is gone."""

    def prefetch(
        self,
        wanted: Sequence[AdapterVersion],
        pinned: frozenset[AdapterVersion],
        near: Sequence[AdapterVersion] = (),
        retired: frozenset[AdapterVersion] = frozenset(),
    ) -> None:
        """Have adapters brought nearer in the background. Replaces what was asked for before; errors are counted, not
        raised.

        Args:
            wanted: to the device, most wanted first.
            pinned: exactly these are kept from eviction there.
            near: at least to this machine's disk or memory, when nothing more urgent is to do; never to the device.
            retired: to be evicted from the device as soon as no request holds them.
        """

    def load(self) -> EngineLoad: ...

    def is_alive(self) -> bool:
        """The engine steps, or waits for work; false once its thread or process is gone or stuck."""

    def stop(self) -> None:
        """End after the current step, and wait for that; unfinished requests end with EngineLostError."""
