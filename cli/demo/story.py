"""The demo's chapters, in the order they are told. Each shows what really happened, and keeps it for `--json`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cli.client import ApiClient
from cli.console import err
from cli.demo import pages
from cli.demo.lessons import Lesson
from cli.demo.questions import Question, ask_all
from cli.demo.score import Examination, examine
from cli.demo.tour import Visit, tour
from cli.errors import CommandFailedError
from cli.interrupts import shielded
from cli.local_cluster import LocalCluster
from cli.serving import deploy_on
from cli.status import cluster_view, replica_names
from cli.training_job import TrainingResult, cancel, follow, submit
from deployments.settings import Settings
from storage.identity import AdapterName, AdapterVersion
from storage.registry import Registry
from storage.stores import open_store
from training.spec import TrainingSpec

_ANSWER_TOKENS = 48
_HELLO_TOKENS = 8


class Story:
    """One telling, on a Ray that is there already.

    Attributes:
        record: what happened so far, as plain data.
    """

    def __init__(self, ray: LocalCluster, settings: Settings, console: Console) -> None:
        self.record: dict[str, Any] = {}
        self._ray = ray
        self._settings = settings
        self._console = console

    def train(self, spec: TrainingSpec, job_id: str) -> TrainingResult:
        """One job for all adapters. Raises CommandFailedError unless every one of them is published."""
        ranks = ", ".join(str(adapter.rank) for adapter in spec.adapters)
        self._chapter(
            f"Training {len(spec.adapters)} adapters of rank {ranks} together, in one job"
        )
        backend = submit(spec, self._ray, self._settings, job_id)
        try:
            result = follow(backend, self._settings, job_id)
        except KeyboardInterrupt:
            cancel(backend, self._settings, job_id)
            raise
        if result.failed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in result.failed.items())
            raise CommandFailedError(f"not every adapter was trained: {reasons}")
        self._console.print(f"  all published after {result.seconds:.0f} s", soft_wrap=True)
        self.record["training"] = {"seconds": result.seconds, "published": result.published}
        return result

    @contextmanager
    def serve(self, tenant: str, versions: Mapping[str, str]) -> Iterator[Service]:
        """Two replicas, each with room for the largest adapter and not for all of them."""
        rows = self._rows(tenant, versions)
        bank_rows = max(rows.values())
        replicas = self._settings.serve.min_replicas
        self._chapter(
            f"Serving from {replicas} replicas; the adapters need {sum(rows.values())} rows, each bank has {bank_rows}"
        )
        if bank_rows >= sum(rows.values()):
            raise CommandFailedError("the demo needs several adapters: one alone always fits")
        engine = self._settings.engine.model_copy(update={"bank_rows": bank_rows})
        settings = self._settings.model_copy(update={"engine": engine})
        with err.status("starting") as progress:
            url = deploy_on(self._ray, settings, report=progress.update)
        client = ApiClient(url)
        self._console.print(f"  answering at {url}/v1")
        self.record["serving"] = {"replicas": replicas, "bank_rows": bank_rows, "rows": rows}
        try:
            yield Service(client, settings, versions, self._console, self.record)
        finally:
            with shielded():
                client.close()

    def _rows(self, tenant: str, versions: Mapping[str, str]) -> dict[str, int]:
        registry = Registry(open_store(self._settings.storage))
        return {
            name: registry.manifest(
                AdapterName(tenant, name), AdapterVersion(version)
            ).content.max_rank
            for name, version in versions.items()
        }

    def _chapter(self, title: str) -> None:
        self._console.print(f"\n[bold]{title}[/]", soft_wrap=True)


class Service:
    """The chapters that need a cluster that answers."""

    def __init__(
        self,
        client: ApiClient,
        settings: Settings,
        versions: Mapping[str, str],
        console: Console,
        record: dict[str, Any],
    ) -> None:
        self._client = client
        self._base = settings.engine.base_id
        self._heartbeat_s = settings.cluster.heartbeat_s
        self._versions = versions
        self._console = console
        self._record = record
        self._replicas = replica_names(client.get("/v1/cluster")["replicas"])

    def tour(self, lessons: Sequence[Lesson]) -> bool:
        """Ask each adapter alone, the largest first; true when a cold load and an eviction were seen."""
        self._chapter("One request each: adapters come to the device when they are asked for")
        largest_first = sorted(lessons, key=lambda lesson: -lesson.rank)
        questions = [Question(one.adapter, one.prompts[0], _HELLO_TOKENS) for one in largest_first]

        def show(visit: Visit) -> None:
            self._console.print(pages.visit_line(visit, self._replicas), soft_wrap=True)

        visits = tour(self._client, questions, self._versions, self._heartbeat_s, show)
        self._show_placement()
        self._record["tour"] = [asdict(visit) for visit in visits]
        cold, evicted = any(one.is_cold_load for one in visits), any(one.evicted for one in visits)
        if not (cold and evicted):
            self._console.print("[bold red]no cold load or no eviction was seen[/]")
        return cold and evicted

    def compare(self, lessons: Sequence[Lesson]) -> None:
        """The same prompts for the base and every adapter, all requests at once."""
        models = [self._base, *(lesson.adapter for lesson in lessons)]
        questions = [
            Question(model, lesson.prompts[0], _ANSWER_TOKENS)
            for lesson in lessons
            for model in models
        ]
        self._chapter(f"The same prompts for every model, {len(questions)} requests at once")
        with self._counted("asking", len(questions)) as done:
            answers = ask_all(self._client, questions, done).answers
        self._console.print(pages.answers_page(questions, answers, self._replicas))
        self._record["answers"] = [
            {**asdict(question), "answer": answer.text, **answer.served.as_dict()}
            for question, answer in zip(questions, answers, strict=True)
        ]

    def examine(self, lessons: Sequence[Lesson]) -> Examination:
        """Held-out prompts, judged by rule."""
        self._chapter("Held-out prompts, judged by a rule; every batch mixes adapters and the base")
        total = 2 * sum(len(lesson.prompts) for lesson in lessons)
        with self._counted("examining", total) as done:
            examination = examine(self._client, self._base, lessons, _ANSWER_TOKENS, done)
        self._console.print(pages.score_page(examination))
        self._console.print(
            f"  {examination.num_requests} requests in {examination.seconds:.1f} s, "
            f"{examination.tokens_per_s:.0f} tokens/s over HTTP",
            soft_wrap=True,
        )
        self._show_placement()
        self._record["examination"] = asdict(examination)
        return examination

    def _show_placement(self) -> None:
        cluster = self._client.get("/v1/cluster")
        mine = [one for one in cluster["adapters"] if one["id"] in self._versions]
        shown = {**cluster, "adapters": mine, "totals": {**cluster["totals"], "rows": len(mine)}}
        self._console.print(cluster_view(shown, self._console.width))
        self._record["cluster"] = cluster

    def _chapter(self, title: str) -> None:
        self._console.print(f"\n[bold]{title}[/]", soft_wrap=True)

    @contextmanager
    def _counted(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=err, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)
