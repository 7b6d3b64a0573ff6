"""Who is compared, over what, and what the losses say: adapters of the two jobs, and rows of the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import fmean

from benchmarks.quality_languages.resumable_job import HeldOut
from benchmarks.quality_languages.windows import Counts, Parts, Window
from benchmarks.results_file import Row
from training.adapter_run import AdapterData, AdapterRun
from training.spec import AdapterSpec, Family
from training.tokens import TokenSequence

SEARCHED_IN = ("Racket", "Tcl")


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to adapt. `rates` are tried; the paper's, or the family's own, is among them."""

    title: str
    family: Family
    rank: int
    rates: tuple[float, ...]


IA3 = Kind("IA3", "ia3", 1, (3e-3, 1e-2, 3e-2, 1e-1))
LORA = Kind("LoRA r4", "lora", 4, (2e-4, 6e-4, 2e-3, 6e-3, 2e-2))
FLORA_1 = Kind("FLoRA r1", "flora", 1, (3e-3, 8e-3, 2e-2, 6e-2, 2e-1))
FLORA_4 = Kind("FLoRA r4", "flora", 4, (3e-3, 8e-3, 2e-2, 6e-2))
KINDS = (IA3, LORA, FLORA_1, FLORA_4)
BARS = (
    (FLORA_4, LORA, 0.95),
    (FLORA_1, LORA, 0.95),
    (FLORA_4, IA3, 1.0),
    (FLORA_1, IA3, 1.0),
)
"""Gain over the base of one / of the other, and what the paper leads to expect of it."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is trained. A step of an adapter is one window; `search_tokens` of it in the search."""

    window: int = 128
    steps: int = 100
    search_tokens: int = 64
    search_steps: int = 30
    counts: Counts = field(default_factory=Counts)


def search_runs(parts: Mapping[str, Parts], sizes: Sizes) -> list[AdapterRun]:
    """Every kind at every rate in the languages of the search, judged by windows that the result never shows."""
    return [
        _run(
            _name(kind, language, number),
            kind,
            rate,
            [_cut(one, sizes.search_tokens) for one in parts[language].training],
            [_cut(one, sizes.search_tokens) for one in parts[language].validation],
            steps=sizes.search_steps,
            evaluate_every=sizes.search_steps,
            seed=0,
        )
        for language in SEARCHED_IN
        for kind in KINDS
        for number, rate in enumerate(kind.rates)
    ]


def search_losses(losses: HeldOut) -> dict[str, dict[float, float]]:
    """Mean loss over the languages of the search, by kind and rate; infinite where an adapter failed."""

    def mean(kind: Kind, number: int) -> float:
        return fmean(
            max(losses.get(_name(kind, language, number), {}).items(), default=(0, inf))[1]
            for language in SEARCHED_IN
        )

    return {
        kind.title: {rate: mean(kind, number) for number, rate in enumerate(kind.rates)}
        for kind in KINDS
    }


def best_rates(losses: HeldOut) -> dict[str, float]:
    """By kind, the rate with the lowest mean loss."""
    return {
        title: min(by_rate, key=lambda rate: by_rate[rate])
        for title, by_rate in search_losses(losses).items()
    }


def contest_runs(
    parts: Mapping[str, Parts], rates: Mapping[str, float], sizes: Sizes, seed: int
) -> list[AdapterRun]:
    """Every kind in every language at its rate. The seed is that of first rows and of the order of windows."""
    return [
        _run(
            _name(kind, language, seed),
            kind,
            rates[kind.title],
            part.training,
            part.held_out,
            steps=sizes.steps,
            evaluate_every=max(1, sizes.steps // 2),
            seed=seed,
        )
        for language, part in parts.items()
        for kind in KINDS
    ]


@dataclass(frozen=True, slots=True)
class Losses:
    """Of one seed at one step, by (language, who): the base model, or a kind's title."""

    step: int
    by_language: Mapping[tuple[str, str], float]

    @classmethod
    def latest(cls, base: Mapping[str, float], held_out: HeldOut, seed: int) -> Losses | None:
        """At the last step at which every adapter was evaluated; None before there was one."""
        named = {
            (language, kind.title): held_out.get(_name(kind, language, seed), {})
            for language in base
            for kind in KINDS
        }
        common = set.intersection(*(set(losses) for losses in named.values()))
        if not common:
            return None
        step = max(common)
        return cls(
            step,
            {(language, "base"): loss for language, loss in base.items()}
            | {who: losses[step] for who, losses in named.items()},
        )

    def mean(self, who: str) -> float:
        """Over languages."""
        return fmean(loss for (_, one), loss in self.by_language.items() if one == who)

    def gain(self, kind: Kind) -> float:
        """How much lower the mean loss is than the base model's."""
        return self.mean("base") - self.mean(kind.title)


def rows_of(seeds: Sequence[Losses], steps: int) -> list[Row]:
    """The result; rounds are seeds. Before all `steps` are done, every row says so, and none has a bar."""
    done = min(one.step for one in seeds)
    is_whole = done == steps
    prefix = "" if is_whole else f"partial, step {done} of {steps}: "
    rows = [
        Row(
            f"{prefix}FLoRA r{one.rank}'s gain over the base / {other.title}'s",
            tuple(losses.gain(one) / losses.gain(other) for losses in seeds),
            bar if is_whole else None,
        )
        for one, other, bar in BARS
    ]
    for who in _everyone():
        rows.append(
            Row(
                f"{prefix}mean over languages: {who}, held-out loss",
                tuple(losses.mean(who) for losses in seeds),
                better="lower",
            )
        )
    for language in dict.fromkeys(language for language, _ in seeds[0].by_language):
        rows += [
            Row(
                f"{prefix}{language}: {who}, held-out loss",
                tuple(losses.by_language[language, who] for losses in seeds),
                better="lower",
            )
            for who in _everyone()
        ]
    return rows


def all_learnt(window: Window) -> TokenSequence:
    """Every token but the first, which nothing comes before."""
    return TokenSequence(window, (True,) * len(window))


def _everyone() -> Iterable[str]:
    return ("base", *(kind.title for kind in KINDS))


def _name(kind: Kind, language: str, number: int) -> str:
    return f"{kind.family}-r{kind.rank}-{language.lower()}-{number}"


def _cut(window: Window, tokens: int) -> Window:
    """With the token that is only ever a target."""
    return window[: tokens + 1]


def _run(
    name: str,
    kind: Kind,
    rate: float,
    training: Sequence[Window],
    held_out: Sequence[Window],
    *,
    steps: int,
    evaluate_every: int,
    seed: int,
) -> AdapterRun:
    spec = AdapterSpec.model_validate(
        {
            "name": name,
            "data": "windows",
            "family": kind.family,
            "rank": kind.rank,
            "learning_rate": rate,
            "schedule": "linear",
            "warmup_steps": max(1, steps // 10),
            "batch_size": 1,
            "sequence_length": max(map(len, training)),
            "steps": steps,
            "evaluation": {"fraction": 0.5, "every_steps": evaluate_every},
            "seed": seed,
        }
    )
    data = AdapterData(tuple(map(all_learnt, training)), tuple(map(all_learnt, held_out)))
    return AdapterRun(spec, data, steps)
