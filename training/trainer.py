"""Many adapters trained in one forward and backward over one frozen base model. No Ray, no files.

Everything that decides how an adapter trains is its own: its loss is the mean over its own completion tokens, its
gradient is clipped by its own norm, its AdamW, schedule, data order and end are its own. What they share is the pass
through the base, whose cost hardly grows with another adapter.

Shape legend: S adapters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from storage.adapter_rows import AdapterRows
from storage.errors import AdapterRefusedError
from storage.identity import AdapterVersion
from training.adapter_run import AdapterRun, RunStatus, check_whole, next_waiting
from training.batches import OwnedSequence
from training.events import (
    AdapterEvaluated,
    AdapterFailed,
    AdapterFinished,
    AdapterPublished,
    EventSink,
)
from training.frozen_base import FrozenBase
from training.initial_rows import initial_rows, row_layouts
from training.optimizer import RowAdamW, StepSettings
from training.run_events import started, stepped
from training.spec import AdapterSpec
from training.step_loss import StepLoss
from training.trainable_rows import State, TrainableRows, Weights

Publish = Callable[[AdapterSpec, AdapterRows], AdapterVersion]
"""Stores a finished adapter. Raises AdapterRefusedError when it breaks a rule; any other error ends the job."""


class MultiAdapterTrainer:
    """Trains until every adapter is published or failed.

    At most `max_resident` adapters train at a time. The others wait, without rows or moments; who is published or
    fails gives its place (but see `keeps_broken`) to the next at once, the one with most steps left first, so that no
    long one is left to train alone at the end. How many places there are never changes what an adapter becomes.

    Args:
        base: the frozen model; this trainer is its only user while it lives.
        runs: the adapters, each with its data.
        publish: called once per finished adapter, at once.
        on_event: told everything that happens, in order, from within `start` and `step`.
        max_resident: adapters that train at a time; all of them if None.
        max_step_tokens: longest forward; a step with more tokens runs in several, with the same gradient.
        keeps_broken: who breaks is told as failed, and keeps its place and its sequences, with rows of zero, until
            its last step: so no batch of the others is another one.
        clock: seconds, for speeds only.

    Raises:
        SpecificationError: an adapter targets modules the model does not have.
    """

    def __init__(
        self,
        base: FrozenBase,
        runs: Sequence[AdapterRun],
        *,
        publish: Publish,
        on_event: EventSink,
        max_resident: int | None = None,
        max_step_tokens: int = 8192,
        keeps_broken: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runs = tuple(runs)
        self._base = base
        self._publish = publish
        self._on_event = on_event
        self._keeps_broken = keeps_broken
        self._clock = clock
        self._dtype = torch.promote_types(base.dtype, torch.float32)
        self._projections = base.layers.projections
        self.rows = TrainableRows(
            base.layers,
            [row_layouts(run.spec, self._projections, base.layers.biases) for run in self.runs],
            min(max_resident or len(self.runs), len(self.runs)),
            self._dtype,
            base.device,
        )
        self._loss = StepLoss(
            base,
            self.rows,
            num_adapters=len(self.runs),
            max_step_tokens=max_step_tokens,
            dtype=self._dtype,
        )
        self._optimizer = RowAdamW(tuple(self.rows.blocks.values()), len(self.runs))
        self._kept: dict[
            int, State
        ] = {}  # rows of those that a checkpoint interrupted, until they have a place
        self._best: dict[int, Weights] = {}  # of the adapters that publish their best step

    @property
    def places(self) -> int:
        """How many adapters can train at a time."""
        return self.rows.max_resident

    @property
    def is_done(self) -> bool:
        return all(run.is_over for run in self.runs)

    def start(self) -> None:
        """Give out places, and publish what a checkpoint holds finished but unpublished. `step` would do it too."""
        while self.rows.has_room:
            number = next_waiting(self.runs, self.rows.residents)
            if number is None:
                return
            self._admit(number)

    def step(self) -> None:
        """One optimizer step of every adapter that has a place; no forward when all of those have broken."""
        self.start()
        present = [n for n in sorted(self.rows.residents) if self.runs[n].is_in_steps]
        batch = {number: self._owned(number, self.runs[number].draw()) for number in present}
        if any(self.runs[number].is_training for number in present):
            self._learn(batch)
        for number in present:
            self.runs[number].step += self.runs[number].is_broken
        self._evaluate([number for number in present if self.runs[number].is_in_steps])
        for number in present:
            run = self.runs[number]
            if run.is_in_steps and run.step >= run.num_steps:
                if run.is_training:
                    self._finish(number, "all steps done")
                else:
                    self._leave(number)

    def run(self) -> None:
        """All steps of all adapters."""
        while not self.is_done:
            self.step()

    def stop(self, adapter: str, reason: str) -> None:
        """End one adapter unpublished; nothing when it is over already, or none of these.

        One that has broken was told as failed then, and leaves without a word.
        """
        for number, run in enumerate(self.runs):
            if run.name == adapter and run.is_broken:
                self._leave(number)
            elif run.name == adapter and not run.is_over:
                self._fail(number, reason)

    def leave_broken(self) -> None:
        """Let those that have broken go before their last step: nobody is left whose steps they keep as they are."""
        for number, run in enumerate(self.runs):
            if run.is_broken:
                self._leave(number)

    def _learn(self, batch: Mapping[int, Sequence[OwnedSequence]]) -> None:
        """One forward and backward of a batch, and one update of those in it that are well."""
        began = self._clock()
        rates = [run.learning_rate if run.is_training else 0.0 for run in self.runs]
        self._optimizer.zero_gradients()
        loss_S = self._loss.backward(batch)
        self.rows.pull_gradients()
        norm_S = self._optimizer.gradient_norms()
        healthy_S = loss_S.isfinite() & norm_S.isfinite()
        self._optimizer.step(norm_S, self._settings(rates, healthy_S))
        self.rows.refresh()
        losses, norms, healthy = loss_S.tolist(), norm_S.tolist(), healthy_S.tolist()
        seconds = max(self._clock() - began, 1e-9)
        for number, owned in batch.items():
            run = self.runs[number]
            if not run.is_training:
                continue
            if not healthy[number]:
                what = "loss" if not math.isfinite(losses[number]) else "gradient"
                self._break(number, f"the {what} of step {run.step + 1} is not finite")
                continue
            run.step += 1
            run.loss = losses[number]
            self._on_event(
                stepped(
                    run,
                    gradient_norm=norms[number],
                    learning_rate=rates[number],
                    tokens=sum(one.num_inputs for one in owned),
                    seconds=seconds,
                )
            )

    # Checkpoints.

    def state_of(self, number: int) -> dict[str, Any]:
        """Everything one adapter needs to go on as if undisturbed, in any trainer over the same base.

        A published, failed or broken one needs no rows: the registry has them, or nobody wants them. One that never
        had a place has none yet.
        """
        has_rows = number in self.rows.residents and not self.runs[number].is_broken
        return {
            "run": self.runs[number].state(),
            "rows": self.rows.state_of(number) if has_rows else self._kept.get(number),
            "best": self._best.get(number),
        }

    def restore(self, number: int, state: Mapping[str, Any]) -> None:
        """Take up an adapter where `state_of` left it, also where fewer have a place. Call before `start`.

        Raises AdapterCorruptError: another build wrote it.
        """
        check_whole(self.runs[number].name, state, ("run", "rows", "best"))
        self.runs[number].restore(state["run"])
        for part, of_all in (("rows", self._kept), ("best", self._best)):
            of_all.pop(number, None)
            if state[part] is not None:
                of_all[number] = state[part]

    # What one step is made of.

    def _owned(self, number: int, sequences: Sequence[Any]) -> list[OwnedSequence]:
        slot = self.rows.slot_of(number)
        return [OwnedSequence(number, slot, sequence) for sequence in sequences]

    def _settings(self, rates: Sequence[float], healthy_S: Tensor) -> StepSettings:
        def vector(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=self._base.device)

        training_S = torch.tensor([run.is_training for run in self.runs], device=self._base.device)
        return StepSettings(
            learning_rate_S=vector(list(rates)),
            weight_decay_S=vector([run.spec.weight_decay for run in self.runs]),
            clip_norm_S=vector([run.spec.clip_norm or math.inf for run in self.runs]),
            count_S=vector([run.step + 1.0 for run in self.runs]),
            active_S=training_S & healthy_S,
        )

    # What happens to one adapter.

    def _admit(self, number: int) -> None:
        run = self.runs[number]
        self.rows.admit(number, initial_rows(run.spec, self._projections, self._dtype))
        kept = self._kept.pop(number, None)
        if kept is not None:
            self.rows.restore(number, kept)
        if run.is_broken:
            self.rows.clear(number)
            return
        if run.status is RunStatus.WAITING:
            run.status = RunStatus.TRAINING
        self._on_event(started(run))
        if run.status is RunStatus.FINISHED:
            self._publish_run(number)

    def _evaluate(self, candidates: Sequence[int]) -> None:
        """Held-out loss of those whose turn it is, in mixed batches; stops those that no longer improve."""
        due = [n for n in candidates if self.runs[n].wants_evaluation]
        if not any(self.runs[n].is_training for n in due):
            return
        owned = {n: self._owned(n, self.runs[n].data.held_out) for n in due}
        sizes = {n: self.runs[n].spec.batch_size for n in due}
        losses = self._loss.held_out(owned, sizes).tolist()
        for number in due:
            run = self.runs[number]
            if not run.is_training:
                continue
            self._on_event(AdapterEvaluated(adapter=run.name, step=run.step, loss=losses[number]))
            is_time_to_stop = run.note_held_out(losses[number])
            if run.keeps_best and run.best_step == run.step:
                self._best[number] = self.rows.weights_of(number)
            if is_time_to_stop and run.step < run.num_steps:
                self._finish(number, "early stop: the held-out loss no longer falls")

    def _finish(self, number: int, reason: str) -> None:
        run = self.runs[number]
        run.status = RunStatus.FINISHED
        best = self._best.pop(number, None)
        if best is not None:
            self.rows.put_weights(number, best)
            reason += f"; the rows are those of step {run.best_step}, its best"
        self._on_event(
            AdapterFinished(adapter=run.name, step=run.step, loss=run.loss, reason=reason)
        )
        self._publish_run(number)

    def _publish_run(self, number: int) -> None:
        run = self.runs[number]
        try:
            version = self._publish(run.spec, self.rows.rows_of(number))
        except AdapterRefusedError as error:
            self._fail(number, f"it was refused: {error.message}")
            return
        run.status, run.outcome = RunStatus.PUBLISHED, version
        self.rows.release(number)
        self._on_event(AdapterPublished(adapter=run.name, version=version, alias=run.spec.alias))

    def _break(self, number: int, reason: str) -> None:
        """Its numbers have failed. Where the others' batches must not change by it, it goes on without rows."""
        if not self._keeps_broken:
            self._fail(number, reason)
            return
        self.runs[number].status = RunStatus.BROKEN
        self._best.pop(number, None)
        self.rows.clear(number)
        self._tell_failed(number, reason)

    def _fail(self, number: int, reason: str) -> None:
        self._best.pop(number, None)
        self._leave(number)
        self._tell_failed(number, reason)

    def _leave(self, number: int) -> None:
        self.runs[number].status = RunStatus.FAILED
        self._kept.pop(number, None)
        if number in self.rows.residents:
            self.rows.release(number)

    def _tell_failed(self, number: int, reason: str) -> None:
        run = self.runs[number]
        run.outcome = reason
        self._on_event(AdapterFailed(adapter=run.name, step=run.step, reason=reason))
