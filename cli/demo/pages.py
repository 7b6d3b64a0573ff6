"""How the demo shows what happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import shorten

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table

from cli.client import Answer
from cli.console import short
from cli.demo.questions import Question
from cli.demo.score import Examination
from cli.demo.tour import Visit

_ANSWER_WIDTH = 120


def visit_line(visit: Visit, replicas: Mapping[str, str]) -> str:
    """One line of the tour."""
    tier = {
        "registry": "[bold cyan]cold load from the registry[/]",
        "disk": "[cyan]load from disk[/]",
    }
    how = tier.get(visit.tier, f"from {visit.tier}")
    line = f"  {visit.model:<12} → {replicas[visit.replica]}  {visit.seconds:5.2f} s  {how}"
    if visit.evicted:
        line += f", [bold magenta]evicting {', '.join(visit.evicted)}[/]"
    return line


def answers_page(
    questions: Sequence[Question], answers: Sequence[Answer], replicas: Mapping[str, str]
) -> RenderableType:
    """The same prompts answered by every model, one table for each prompt."""
    tables: dict[str, Table] = {}
    for question, answer in zip(questions, answers, strict=True):
        if question.prompt not in tables:
            tables[question.prompt] = Table(
                Column("model", no_wrap=True),
                Column("version", no_wrap=True),
                Column("by", no_wrap=True),
                Column("answer", ratio=1),
                title=f"“{escape(question.prompt)}”",
                title_justify="left",
                expand=True,
            )
        served = answer.served
        tables[question.prompt].add_row(
            question.model if served.version else f"[dim]{question.model}[/]",
            short(served.version) or "[dim]base[/]",
            replicas[served.replica],
            escape(shorten(answer.text, _ANSWER_WIDTH, placeholder=" …")),
        )
    return Group(*tables.values())


def score_page(examination: Examination) -> RenderableType:
    """Right answers on held-out prompts."""
    table = Table("adapter", "prompts", "right with it", "right with the base", "")
    for score in examination.scores:
        table.add_row(
            score.adapter,
            str(score.num_prompts),
            f"{score.with_adapter / score.num_prompts:.0%}",
            f"{score.with_base / score.num_prompts:.0%}",
            "[green]learned[/]" if score.holds else "[bold red]not learned[/]",
        )
    return table
