"""How the losses of a job's adapters went: from events to curves, to a line of blocks, to a picture.

Knows nothing of where events come from or where a picture is kept. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median
from typing import TYPE_CHECKING

from training.events import (
    AdapterEvaluated,
    AdapterFailed,
    AdapterStarted,
    AdapterStep,
    JobStarted,
    TrainingEvent,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Point = tuple[int, float]
"""(step, loss); steps count from 1."""

PICTURE_PIXELS = (1200, 675)

_DPI = 120
_BLOCKS = "▁▂▃▄▅▆▇█"
_SMOOTHED_PART = 20  # a smoothed loss is the mean of the nearest twentieth of all steps
_LOG_FROM_RATIO = 10  # largest loss / smallest
_MOST_NAMED = 12
_LONGEST_NAME = 24  # characters; a legend of long names would take the picture's room
_NAMED_ENDS = 4  # of more adapters than that, so many of the lowest and of the highest
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which the colour-blind tell apart; without yellow and black."""
_DASHES = ("solid", (0, (5, 2)))


@dataclass(frozen=True, slots=True)
class Curve:
    """One adapter's losses, each step once and in order. What is not finite is left out."""

    adapter: str
    training: tuple[Point, ...] = ()
    held_out: tuple[Point, ...] = ()
    is_failed: bool = False

    @property
    def losses(self) -> tuple[float, ...]:
        """Of the training steps."""
        return tuple(loss for _, loss in self.training)

    @property
    def smoothed(self) -> tuple[Point, ...]:
        """Each training step with the mean loss of the steps around it. The first and the last have those on one side.

        So no single batch decides how an adapter came out.
        """
        sums = [0.0, *accumulate(self.losses)]
        count = len(self.training)
        reach = count // (2 * _SMOOTHED_PART)
        means = []
        for index, (step, _) in enumerate(self.training):
            start, end = max(0, index - reach), min(count, index + reach + 1)
            means.append((step, (sums[end] - sums[start]) / (end - start)))
        return tuple(means)


class CurveBook:
    """Takes in a job's events, one after another, and has the curves so far, in the order adapters were named."""

    def __init__(self) -> None:
        self._training: dict[str, dict[int, float]] = {}
        self._held_out: dict[str, dict[int, float]] = {}
        self._failed: set[str] = set()

    def add(self, event: TrainingEvent) -> None:
        """A step told again after a resume replaces the earlier one; an adapter that goes on from a step forgets
        what came after it."""
        match event:
            case JobStarted():
                for adapter in event.adapters:
                    self._training.setdefault(adapter, {})
            case AdapterStarted():
                self._failed.discard(event.adapter)
                for losses in (self._training, self._held_out):
                    kept = losses.get(event.adapter, {})
                    losses[event.adapter] = {s: x for s, x in kept.items() if s <= event.step}
            case AdapterStep():
                self._training.setdefault(event.adapter, {})[event.step] = event.loss
            case AdapterEvaluated():
                self._held_out.setdefault(event.adapter, {})[event.step] = event.loss
            case AdapterFailed():
                self._training.setdefault(event.adapter, {})
                self._failed.add(event.adapter)

    @property
    def curves(self) -> tuple[Curve, ...]:
        return tuple(
            Curve(
                adapter,
                _points(self._training.get(adapter, {})),
                _points(self._held_out.get(adapter, {})),
                adapter in self._failed,
            )
            for adapter in {**self._training, **self._held_out}
        )


def curves_of(events: Iterable[TrainingEvent]) -> tuple[Curve, ...]:
    """The curves of a job, from all its events."""
    book = CurveBook()
    for event in events:
        book.add(event)
    return book.curves


def sparkline(curve: Curve, width: int = 16) -> str:
    """The training losses as at most `width` blocks, the highest full, the lowest one eighth; empty without steps.

    Where there are more steps than blocks, a block is the mean of as many steps as its neighbours.
    """
    losses = curve.losses
    count = min(width, len(losses))
    edges = [index * len(losses) // count for index in range(count + 1)] if count else []
    means = [sum(losses[start:end]) / (end - start) for start, end in pairwise(edges)]
    if not means:
        return ""
    lowest, height = min(means), max(means) - min(means)
    top = len(_BLOCKS) - 1
    return "".join(
        _BLOCKS[round((mean - lowest) / height * top) if height else 0] for mean in means
    )


def plot(curves: Sequence[Curve], title: str = "") -> bytes:
    """A PNG of `PICTURE_PIXELS`: training losses, smoothed, as lines; held-out losses as dots.

    A few adapters have a colour and a name each. Of many, all are thin grey lines below their median, and those whose
    loss came out lowest and highest are named. Losses are drawn to a logarithmic scale where they differ tenfold.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = (pixels / _DPI for pixels in PICTURE_PIXELS)
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # this picture's own: pyplot would keep it in a global list
    axes = figure.add_subplot()
    drawn = [curve for curve in curves if curve.training or curve.held_out]
    lines = _draw_few(axes, drawn) if len(drawn) <= _MOST_NAMED else _draw_many(axes, drawn)
    _set_scale(axes, drawn)
    axes.set_title(title, loc="left", parse_math=False)
    if lines:
        legend = axes.legend(
            [line for _, line in lines],
            [label for label, _ in lines],
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0.0,
            frameon=False,
            fontsize=9,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    file = io.BytesIO()
    canvas.print_figure(file, format="png")
    return file.getvalue()


def _points(losses: Mapping[int, float]) -> tuple[Point, ...]:
    return tuple((step, loss) for step, loss in sorted(losses.items()) if math.isfinite(loss))


def _draw_few(axes: Axes, curves: Sequence[Curve]) -> list[tuple[str, Line2D]]:
    """Returns what the legend shows, as `_draw_many` does."""
    return [
        (_label(curve), _draw_named(axes, curve, number, shows_steps=len(curves) <= 3))
        for number, curve in enumerate(curves)
    ]


def _draw_many(axes: Axes, curves: Sequence[Curve]) -> list[tuple[str, Line2D]]:
    for curve in curves:
        axes.plot(*_columns(curve.smoothed), color="0.75", linewidth=0.6, zorder=1)
    [anyone] = axes.plot([], [], color="0.75")
    [middle] = axes.plot(*_columns(_median(curves)), color="black", linewidth=2.5, zorder=3)
    ranked = sorted(curves, key=_outcome)
    named = [
        (f"{_label(curve)}  {_outcome(curve):.3g}", _draw_named(axes, curve, number))
        for number, curve in enumerate([*ranked[:_NAMED_ENDS], *ranked[-_NAMED_ENDS:]])
    ]
    return [(f"{len(curves)} adapters", anyone), ("their median", middle), *named]


def _draw_named(axes: Axes, curve: Curve, number: int, *, shows_steps: bool = False) -> Line2D:
    """In a colour and a dash of its number's; returns the line for the legend."""
    color = _COLOURS[number % len(_COLOURS)]
    dashes = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    if shows_steps:
        axes.plot(*_columns(curve.training), color=color, linewidth=0.7, alpha=0.35)
    [line] = axes.plot(
        *_columns(curve.smoothed), color=color, linestyle=dashes, linewidth=1.6, zorder=2
    )
    axes.plot(
        *_columns(curve.held_out),
        color=color,
        linestyle="none",
        marker="o",
        markersize=5,
        markeredgecolor="white",
        zorder=4,
    )
    if curve.is_failed and curve.training:
        axes.plot(*_columns(curve.smoothed[-1:]), color=color, marker="X", markersize=9, zorder=5)
    return line


def _set_scale(axes: Axes, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    losses = [loss for curve in curves for _, loss in (*curve.smoothed, *curve.held_out)]
    if losses and min(losses) > 0 and max(losses) / min(losses) >= _LOG_FROM_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    what = "training loss" if not any(curve.held_out for curve in curves) else "loss (• held out)"
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel(what)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _columns(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]


def _label(curve: Curve) -> str:
    name = curve.adapter
    if len(name) > _LONGEST_NAME:  # a sweep's names differ at the end
        name = f"{name[: _LONGEST_NAME // 2 - 1]}…{name[-_LONGEST_NAME // 2 :]}"
    return f"{name} (failed)" if curve.is_failed else name


def _outcome(curve: Curve) -> float:
    """The last loss: held out if there is one, else of the training."""
    return (curve.held_out or curve.smoothed)[-1][1]


def _median(curves: Sequence[Curve]) -> tuple[Point, ...]:
    """Over the adapters that took a step, for every step that at least half of them took."""
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for step, loss in curve.smoothed:
            by_step.setdefault(step, []).append(loss)
    return tuple(
        (step, median(losses))
        for step, losses in sorted(by_step.items())
        if 2 * len(losses) >= len(curves)
    )
