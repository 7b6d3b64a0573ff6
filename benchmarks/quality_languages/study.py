"""The two jobs of the comparison, one after the other, in a directory that a later call goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality_languages.contest import (
    Losses,
    Sizes,
    all_learnt,
    best_rates,
    contest_runs,
    search_losses,
    search_runs,
)
from benchmarks.quality_languages.resumable_job import ResumableJob, Tell, base_loss
from benchmarks.quality_languages.windows import Parts
from training.adapter_run import AdapterRun
from training.frozen_base import FrozenBase


class AdapterStoppedError(Exception):
    """An adapter of the comparison itself failed in training; there is no result without it."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What is known so far. `searched`: mean loss by kind and rate; `seeds`: of those evaluated at least once."""

    searched: Mapping[str, Mapping[float, float]]
    rates: Mapping[str, float]
    seeds: Sequence[Losses]


@dataclass(frozen=True, slots=True)
class Study:
    """A base model, windows of every language, and a `directory` of all state; a kill loses `save_every` steps."""

    base: FrozenBase
    parts: Mapping[str, Parts]
    sizes: Sizes
    directory: Path
    save_every: int = 5
    max_step_tokens: int = 2048
    tell: Tell = print

    def run(self, seeds: int, found: Callable[[Findings], None]) -> None:
        """Train what is left; `found` is called whenever state was written and something is evaluated.

        Raises:
            AdapterStoppedError: names the adapter.
            OtherJobError: the directory is that of another study.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        search = self._job("search", search_runs(self.parts, self.sizes))
        search.run()
        rates = best_rates(search.held_out)
        base = self._base_losses()
        searched = search_losses(search.held_out)
        finished: list[Losses] = []
        for seed in range(seeds):

            def found_part(part: Losses) -> None:
                # Of seeds that are not through only the first is told of: there is nothing better yet.
                if not finished:
                    found(Findings(searched, rates, (part,)))

            finished.append(self._train(seed, rates, base, found_part))
            found(Findings(searched, rates, tuple(finished)))

    def _train(
        self,
        seed: int,
        rates: Mapping[str, float],
        base: Mapping[str, float],
        found_part: Callable[[Losses], None],
    ) -> Losses:
        """All adapters of one seed; `found_part` is called with what was evaluated before the last step."""
        job = self._job(f"seed-{seed}", contest_runs(self.parts, rates, self.sizes, seed))

        def saved() -> None:
            latest = Losses.latest(base, job.held_out, seed)
            if latest is not None and not job.is_done:
                found_part(latest)

        job.run(at_save=saved)
        if job.failed:
            raise AdapterStoppedError("; ".join(f"{n}: {why}" for n, why in job.failed.items()))
        losses = Losses.latest(base, job.held_out, seed)
        assert losses is not None, "a job that is through has evaluated everyone"
        return losses

    def _job(self, name: str, runs: Sequence[AdapterRun]) -> ResumableJob:
        return ResumableJob(
            self.base,
            runs,
            self.directory / f"{name}.pt",
            save_every=self.save_every,
            max_step_tokens=self.max_step_tokens,
            tell=self.tell,
        )

    def _base_losses(self) -> dict[str, float]:
        """By language; worked out once."""
        path = self.directory / "base.json"
        digests = " ".join(part.digest for part in self.parts.values())
        key = f"{self.base.digest} {self.base.dtype} {digests}"
        if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
            return dict(kept["losses"])
        losses = {
            language: base_loss(self.base, [all_learnt(one) for one in part.held_out])
            for language, part in self.parts.items()
        }
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps({"key": key, "losses": losses}), encoding="utf-8")
        whole.replace(path)
        return losses
