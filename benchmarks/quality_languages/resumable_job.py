"""One training job that a kill does not lose: many adapters in one trainer, its state on disk every few steps."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.adapter_rows import AdapterRows
from storage.identity import AdapterVersion, sha256_hex
from training.adapter_run import AdapterRun
from training.completion_loss import completion_nll
from training.events import AdapterEvaluated, AdapterFailed, AdapterStep, TrainingEvent
from training.frozen_base import FrozenBase
from training.packed_attention import PackedAttention
from training.spec import AdapterSpec
from training.tokens import TokenSequence
from training.trainer import MultiAdapterTrainer

HeldOut = dict[str, dict[int, float]]
"""Held-out loss by adapter and step."""

Tell = Callable[[str], None]


class OtherJobError(Exception):
    """The state on disk is of a job with other adapters, data or base."""


class ResumableJob:
    """Trains `runs` together, all of them at once, and keeps what their evaluations said.

    Args:
        path: of the state; written whole or not at all. If there is one, the job goes on from there, and ends with the
            numbers of an undisturbed one.
        save_every: steps.
        max_step_tokens: as the trainer's.

    Raises:
        OtherJobError: the state is not of this job.
    """

    def __init__(
        self,
        base: FrozenBase,
        runs: Sequence[AdapterRun],
        path: Path,
        *,
        save_every: int,
        max_step_tokens: int,
        tell: Tell = print,
    ) -> None:
        self.held_out: HeldOut = {}
        self.failed: dict[str, str] = {}
        self.step = 0
        self._path = path
        self._save_every = save_every
        self._tell = tell
        self._losses: list[float] = []
        self._job = _job_digest(base, runs)
        self._trainer = MultiAdapterTrainer(
            base,
            runs,
            publish=_kept_nowhere,
            on_event=self._note,
            max_step_tokens=max_step_tokens,
        )
        if path.exists():
            self._restore(torch.load(path, weights_only=True))

    @property
    def is_done(self) -> bool:
        return self._trainer.is_done

    def run(self, at_save: Callable[[], None] = lambda: None) -> None:
        """All steps that are left; `at_save` is called after the state was written."""
        while not self.is_done:
            began = time.monotonic()
            self._trainer.step()
            self.step += 1
            mean = sum(self._losses) / max(1, len(self._losses))
            self._tell(
                f"{self._path.stem}: step {self.step}, mean loss {mean:.3f}, {time.monotonic() - began:.0f} s"
            )
            self._losses.clear()
            if self.is_done or self.step % self._save_every == 0:
                self._save()
                at_save()

    def _note(self, event: TrainingEvent) -> None:
        match event:
            case AdapterStep():
                self._losses.append(event.loss)
            case AdapterEvaluated():
                self.held_out.setdefault(event.adapter, {})[event.step] = event.loss
            case AdapterFailed():
                self.failed[event.adapter] = event.reason
                self._tell(f"{event.adapter} failed: {event.reason}")

    def _save(self) -> None:
        state = {
            "job": self._job,
            "step": self.step,
            "held_out": self.held_out,
            "failed": self.failed,
            "adapters": [self._trainer.state_of(n) for n in range(len(self._trainer.runs))],
        }
        part = self._path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)

    def _restore(self, state: dict[str, Any]) -> None:
        if state["job"] != self._job:
            raise OtherJobError(f"{self._path} is of another job: remove it, or give its settings")
        self.step, self.held_out, self.failed = state["step"], state["held_out"], state["failed"]
        for number, adapter in enumerate(state["adapters"]):
            self._trainer.restore(number, adapter)
        self._tell(f"{self._path.stem}: goes on from step {self.step}")


@torch.no_grad()
def base_loss(base: FrozenBase, held_out: Sequence[TokenSequence]) -> float:
    """Mean loss of the base model alone over the learnt tokens, one sequence at a time."""
    total = torch.zeros((), device=base.device)
    base.layers.begin_step(None)
    for one in held_out:
        tokens = torch.tensor(one.tokens, device=base.device)
        learnt = torch.tensor(one.learnt, device=base.device)[1:]
        inputs_T = tokens[:-1]
        hidden_TH: Tensor = base.hidden_states(
            inputs_T,
            torch.arange(len(inputs_T), device=base.device),
            PackedAttention([len(inputs_T)], base.device),
        )
        total = total + completion_nll(hidden_TH[learnt], tokens[1:][learnt], base.head).sum()
    return float(total) / sum(one.num_learnt for one in held_out)


def _kept_nowhere(spec: AdapterSpec, rows: AdapterRows) -> AdapterVersion:
    return AdapterVersion(sha256_hex(spec.name.encode()))


def _job_digest(base: FrozenBase, runs: Sequence[AdapterRun]) -> str:
    digest = hashlib.sha256(f"{base.digest} {base.dtype}".encode())
    for run in runs:
        digest.update(run.spec.model_dump_json().encode())
        for one in (*run.data.training, *run.data.held_out):
            digest.update(repr(one.tokens).encode())
    return digest.hexdigest()
