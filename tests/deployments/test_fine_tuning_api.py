"""Files and fine-tuning jobs over real HTTP with the stock openai client; the cluster trains when a test says so."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.key_store import KeyStore
from cluster.keys import new_key
from storage.identity import AdapterName
from storage.publishing import publish_adapter
from storage.stores import open_store
from tests.deployments.conftest import LocalServer, served
from tests.deployments.metrics.scraping import scrape, value
from tests.deployments.world import BASE_ID, World, settings_for

LINES = "\n".join(json.dumps({"prompt": f"{n}", "completion": "yes"}) for n in range(8)).encode()


@pytest.fixture(scope="module")
def client(local_server: LocalServer) -> openai.OpenAI:
    return local_server.openai


@pytest.fixture(scope="module")
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=("data.jsonl", LINES), purpose="fine-tune").id


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s, "it never became true"
        time.sleep(0.05)


def batch(client: openai.OpenAI, *ids: str) -> str:
    """The training job that they are in together, once they are in one and it was begun."""

    def found() -> set[Any]:
        jobs = [client.fine_tuning.jobs.retrieve(one) for one in ids]
        return {job.training_job for job in jobs}  # type: ignore[attr-defined]

    until(lambda: None not in found())
    (name,) = found()
    return str(name)


def create(client: openai.OpenAI, file_id: str, suffix: str, **fields: Any) -> Any:
    jobs = client.fine_tuning.jobs
    return jobs.create(model=BASE_ID, training_file=file_id, suffix=suffix, **fields)


def test_a_file_is_kept_listed_read_and_deleted(client: openai.OpenAI) -> None:
    data = (
        b'{"prompt": "1", "completion": "2"}\n' * 100_000
    )  # larger than a body that is read into memory
    sent = client.files.create(file=("big.jsonl", io.BytesIO(data)), purpose="fine-tune")
    assert (sent.filename, sent.bytes, sent.purpose) == ("big.jsonl", len(data), "fine-tune")
    assert client.files.retrieve(sent.id) == sent
    assert sent.id in [file.id for file in client.files.list()]
    assert client.files.content(sent.id).content == data
    assert client.files.delete(sent.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(sent.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(sent.id)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"data": {"purpose": "assistants"}, "files": {"file": ("a", b"x")}}, "purpose"),
        ({"data": {}, "files": {"file": ("a", b"x")}}, "purpose"),
        ({"data": {"purpose": "fine-tune"}, "files": {"other": ("a", b"x")}}, "other"),
        (
            {
                "data": {"purpose": "fine-tune", "expires_after[seconds]": "9"},
                "files": {"file": ("a", b"x")},
            },
            "expires_after[seconds]",
        ),
    ],
)
def test_an_upload_that_asks_for_something_else_is_refused(
    local_server: LocalServer, form: dict[str, Any], param: str
) -> None:
    answer = httpx.post(f"{local_server.url}/v1/files", **form)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_two_jobs_share_a_batch_and_each_tells_its_own_story(
    local_server: LocalServer, client: openai.OpenAI, file_id: str
) -> None:
    cluster, jobs = local_server.cluster, client.fine_tuning.jobs
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}
    one = create(client, file_id, "one", method=method, seed=7, metadata={"who": "me"})
    two = create(client, file_id, "two", extra_body={"adapter": {"family": "lora", "rank": 2}})
    assert (one.object, one.status, one.seed) == ("fine_tuning.job", "validating_files", 7)
    assert (one.hyperparameters.n_epochs, one.hyperparameters.batch_size) == (2, "auto")
    assert one.fine_tuned_model is None and one.metadata == {"who": "me"}
    name = batch(client, one.id, two.id)
    until(lambda: name in cluster.submitted)
    cluster.begin(name)
    until(lambda: jobs.retrieve(one.id).status == "running")
    cluster.train(name, "one")
    until(lambda: jobs.retrieve(one.id).status == "succeeded")
    done = jobs.retrieve(one.id)
    assert (done.fine_tuned_model, done.trained_tokens) == ("one", 20)
    assert done.finished_at is not None and done.error is None

    events = list(jobs.list_events(one.id, limit=2))
    assert len(events) > 5 and len({event.id for event in events}) == len(events), "over pages"
    assert events == list(jobs.list_events(one.id, limit=100))
    steps = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert steps == [2, 1], "newest first"
    assert "created" in events[-1].message
    (checkpoint,) = jobs.checkpoints.list(one.id)
    assert checkpoint.fine_tuned_model_checkpoint.startswith("one@")
    assert (checkpoint.step_number, checkpoint.metrics.train_loss) == (2, 0.5)
    assert list(jobs.checkpoints.list(two.id)) == []

    assert jobs.cancel(two.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="already"):
        jobs.cancel(two.id)
    cluster.finish(name)
    assert [job.id for job in jobs.list(limit=1)][:2] == [two.id, one.id]


def test_whoever_scrapes_sees_jobs_run_and_end(
    local_server: LocalServer, client: openai.OpenAI, file_id: str
) -> None:
    def seen() -> tuple[float, float, float]:
        now = scrape(local_server.url)
        return (
            value(now, "flora_training_jobs", status="running"),
            value(now, "flora_training_jobs_ended_total", status="succeeded"),
            value(now, "flora_training_tokens_total"),
        )

    job = create(client, file_id, "scraped")
    name = batch(client, job.id)
    _, ended, tokens = seen()
    local_server.cluster.begin(name)
    until(lambda: seen() == (1, ended, tokens))
    local_server.cluster.train(name, "scraped")
    local_server.cluster.finish(name)
    until(lambda: seen() == (0, ended + 1, tokens + 20))


def test_a_broken_file_fails_the_job_and_names_the_line(client: openai.OpenAI) -> None:
    lines = LINES + b'\n{"prompt": "without an answer"}'
    broken = client.files.create(file=("mine.jsonl", lines), purpose="fine-tune")
    job = create(client, broken.id, "broken")
    until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "failed")
    error = client.fine_tuning.jobs.retrieve(job.id).error
    assert error is not None and error.param == "training_file"
    assert "mine.jsonl, line 9" in error.message


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"training_file": "file-0"}, 400, "training_file"),
        ({"validation_file": "file-0"}, 400, "validation_file"),
        ({"suffix": "No Name"}, 400, "suffix"),
        ({"suffix": BASE_ID}, 409, "suffix"),
        ({"colour": "red"}, 400, "colour"),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations"),
        ({"method": {"type": "dpo"}}, 400, "method.type"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"learning_rate_multiplier": 500}}, 400, "adapter.learning_rate"),
        ({"hyperparameters": {"depth": 3}}, 400, "hyperparameters.depth"),
        ({"hyperparameters": {"n_epochs": 2}, "adapter": {"steps": 3}}, 400, "adapter.epochs"),
        ({"adapter": {"rank": 0}}, 400, "adapter.rank"),
        ({"adapter": {"ranks": 1}}, 400, "adapter.ranks"),
        ({"adapter": {"name": "x"}}, 400, "adapter.name"),
        ({"adapter": {"may_replace": True}}, 400, "adapter.may_replace"),
        ({"adapter": {"family": "vera"}}, 400, "adapter.family"),
        ({"seed": -1}, 400, "seed"),
    ],
)
def test_a_wrong_field_is_named(
    local_server: LocalServer, file_id: str, fields: dict[str, Any], status: int, param: str
) -> None:
    body = {"model": BASE_ID, "training_file": file_id, **fields}
    answer = httpx.post(f"{local_server.url}/v1/fine_tuning/jobs", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_an_adapter_is_no_base_to_train(local_server: LocalServer, file_id: str) -> None:
    local_server.world.publish("trained", rank=1, seed=3)
    body = {"model": "trained", "training_file": file_id}
    answer = httpx.post(f"{local_server.url}/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 400 and "base model" in answer.json()["error"]["message"]


def test_what_cannot_be_filtered_by_is_not_passed_over(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="metadata"):
        client.fine_tuning.jobs.list(metadata={"who": "me"})
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve("ftjob-0")


def test_a_request_that_is_sent_again_makes_no_second_job(
    client: openai.OpenAI, file_id: str
) -> None:
    key = {"Idempotency-Key": "mine"}
    one = create(client, file_id, "once", extra_headers=key)
    assert create(client, file_id, "once", extra_headers=key).id == one.id
    client.fine_tuning.jobs.cancel(one.id)


def test_files_and_jobs_are_their_tenants_alone(
    local_server: LocalServer, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    values = settings_for(tiny_llama_dir, tmp_path, allow_anonymous=False)
    small = values.training.model_copy(update={"max_file_bytes": 2 << 20})
    world = World.create(tiny_llama_dir, values.model_copy(update={"training": small}))
    keys = KeyStore(open_store(world.settings.storage))
    made = [new_key(tenant, is_admin=False, created_s=1.0) for tenant in ("us", "them")]
    made.append(new_key("us", is_admin=True, created_s=1.0))
    for one in made:
        keys.add(one.key)
    publish_adapter(
        world.registry, AdapterName("us", "served"), world.files(1, 0, "flora"), world.base
    )
    with served(world, local_server.gateway) as (url, _):
        us, them, our_admin = (
            openai.OpenAI(base_url=f"{url}/v1", api_key=one.token, max_retries=0) for one in made
        )
        file = us.files.create(file=("d.jsonl", LINES), purpose="fine-tune").id
        job = create(us, file, "ours")
        assert job.organization_id == "us"
        assert [each.id for each in us.fine_tuning.jobs.list()] == [job.id]
        assert list(them.fine_tuning.jobs.list()) == [] == list(them.files.list())
        for ask in (
            lambda: them.files.retrieve(file),
            lambda: them.files.content(file),
            lambda: them.files.delete(file),
            lambda: them.fine_tuning.jobs.retrieve(job.id),
            lambda: them.fine_tuning.jobs.cancel(job.id),
            lambda: them.fine_tuning.jobs.list_events(job.id),
            lambda: them.fine_tuning.jobs.checkpoints.list(job.id),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
        with pytest.raises(openai.BadRequestError, match="does not exist"):
            create(them, file, "theirs")
        # A user may not put another version where others ask for the one that is served.
        with pytest.raises(openai.PermissionDeniedError, match="admin key"):
            create(us, file, "served")
        # Nor where another job is about to.
        with pytest.raises(openai.ConflictError, match="another job"):
            create(us, file, "ours")
        assert create(our_admin, file, "served").status == "validating_files"
        with pytest.raises(openai.APIStatusError, match="larger than") as caught:
            us.files.create(file=("d.jsonl", b"x" * (4 << 20)), purpose="fine-tune")
        assert caught.value.status_code == 413


def test_a_tenant_has_so_many_jobs_and_bytes_of_files_and_another_its_own(
    local_server: LocalServer, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    values = settings_for(tiny_llama_dir, tmp_path, allow_anonymous=False)
    quotas = {"jobs_per_tenant": 2, "file_bytes_per_tenant": 3 * len(LINES)}
    small = values.training.model_copy(update=quotas)
    world = World.create(tiny_llama_dir, values.model_copy(update={"training": small}))
    keys = KeyStore(open_store(world.settings.storage))
    made = [new_key(tenant, is_admin=False, created_s=1.0) for tenant in ("us", "them")]
    for one in made:
        keys.add(one.key)
    with served(world, local_server.gateway) as (url, _):
        us, them = (
            openai.OpenAI(base_url=f"{url}/v1", api_key=one.token, max_retries=0) for one in made
        )

        def upload(client: openai.OpenAI, name: str) -> str:
            return client.files.create(file=(name, LINES), purpose="fine-tune").id

        kept = [upload(us, f"{number}.jsonl") for number in range(3)]
        with pytest.raises(openai.RateLimitError, match="Delete files") as full:
            upload(us, "3.jsonl")
        assert full.value.code == "quota_exceeded"
        assert "retry-after" not in full.value.response.headers
        assert upload(us, "0.jsonl") == kept[0], "the same file again is no other one"
        us.files.delete(kept[2])
        upload(us, "3.jsonl")
        theirs = upload(them, "0.jsonl")

        key = {"Idempotency-Key": "mine"}
        one = create(us, kept[0], "one", extra_headers=key)
        create(us, kept[0], "two")
        with pytest.raises(openai.RateLimitError, match="may have 2") as busy:
            create(us, kept[0], "three")
        assert int(busy.value.response.headers["retry-after"]) > 0
        assert create(us, kept[0], "one", extra_headers=key).id == one.id
        create(them, theirs, "three")
        us.fine_tuning.jobs.cancel(one.id)
        create(us, kept[0], "three")
