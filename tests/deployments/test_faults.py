"""What dies, goes away, is damaged or is moved under load costs no answer. Real Ray, a real S3 API, the real engine."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest
import ray

from cli.local_cluster import LocalCluster
from cluster.actor import connect
from deployments.app import placement_spec
from storage import layout
from storage.identity import AdapterName, AdapterVersion
from tests.deployments.background_load import BackgroundLoad
from tests.deployments.broken_replica import broken_replica
from tests.deployments.metrics.scraping import scrape
from tests.deployments.serving import Served, serve_world, until
from tests.deployments.telling_adapters import TellingAdapters
from tests.deployments.world import BASE_ID, World, settings_for
from tests.storage.s3_server import S3Server, s3_server

BUCKET, PREFIX = "flora", "faults"
PROMPTS = ["the quick brown", "a few small words", "user"]
RANDOM = [f"random-{seed}" for seed in range(6)]
TOKENS = 6
# At least; longer than needed to see that it changes nothing: FLORA_TEST_OUTAGE_S=60.
OUTAGE_S = float(os.environ.get("FLORA_TEST_OUTAGE_S", "5"))


@dataclass
class Faulty:
    """An application on S3, with both of them at hand."""

    served: Served
    s3: S3Server
    telling: TellingAdapters
    _letters: Iterator[str] = field(init=False)

    def __post_init__(self) -> None:
        self._letters = iter(self.telling.letters)

    def letters(self, count: int) -> str:
        """Letters nobody asked for before: equal content is one version, whatever its name."""
        fresh = "".join(itertools.islice(self._letters, count))
        assert len(fresh) == count
        return fresh

    def publish(self, name: str, letter: str, alias: str | None = "latest") -> AdapterVersion:
        return self.served.world.publish_files(name, self.telling.files(letter), alias)

    def move(self, name: str, version: AdapterVersion, alias: str = "latest") -> None:
        self.served.world.registry.move_alias(AdapterName("default", name), alias, version)

    def flip_a_byte(self, version: AdapterVersion) -> None:
        """Of the version's weights, where they lie in the bucket."""
        content = self.served.world.registry.content(version)
        blob = layout.blob(content.files["adapter_model.safetensors"].sha256)
        key = f"{PREFIX}/{blob}"
        client = boto3.client("s3", endpoint_url=self.s3.url)
        data = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        data[-1] ^= 1
        client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))

    def ask_random(self, number: int) -> None:
        """Whole answers of the base and of adapters whose answers nobody could guess, each compared with the oracle."""
        model = [BASE_ID, *RANDOM][number % (1 + len(RANDOM))]
        prompt = PROMPTS[number % len(PROMPTS)]
        response = self.served.complete(model, prompt, max_tokens=TOKENS)
        assert self.served.is_right(response, model, prompt, TOKENS), (model, prompt)

    def learn(self) -> None:
        """Ask the oracle everything `ask_random` will compare with."""
        for model in (BASE_ID, *RANDOM):
            for prompt in PROMPTS:
                self.served.expected(prompt, self.served.versions[model], TOKENS)


@pytest.fixture(scope="module")
def faulty(
    ray_session: LocalCluster, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Faulty]:
    with s3_server() as s3:
        boto3.client("s3", endpoint_url=s3.url).create_bucket(Bucket=BUCKET)
        settings = settings_for(
            tiny_llama_dir, tmp_path_factory.mktemp("faulty"), min_replicas=2, max_replicas=2
        )
        storage = settings.storage.model_copy(
            update={
                "registry": f"s3://{BUCKET}/{PREFIX}",
                "s3_endpoint_url": s3.url,
                # Some of the random adapters, and not all.
                "host_bytes": 100_000,
            }
        )
        cluster = settings.cluster.model_copy(update={"tick_s": 0.5})
        settings = settings.model_copy(update={"storage": storage, "cluster": cluster})
        world = World.create(tiny_llama_dir, settings)
        with serve_world(world, ray_session) as served:
            for seed, name in enumerate(RANDOM):
                served.publish(name, rank=2, seed=seed)
            telling = TellingAdapters(tiny_llama_dir, world.base, served.codec)
            faulty = Faulty(served, s3, telling)
            faulty.learn()
            yield faulty


def test_an_alias_moved_twenty_times_under_load_fails_nobody_and_mixes_nothing(
    faulty: Faulty,
) -> None:
    served, letters = faulty.served, faulty.letters(21)
    versions = [faulty.publish("moving", letter, alias=None) for letter in letters]
    says = dict(zip(versions, letters, strict=True))
    seen: set[str] = set()
    faulty.move("moving", versions[0])

    def ask(number: int) -> None:
        prompt = PROMPTS[number % len(PROMPTS)]
        if number % 2:
            response = served.complete("moving", prompt, max_tokens=TOKENS)
            assert response.status_code == 200, response.text
            version = response.headers["x-adapter-version"]
            text = response.json()["choices"][0]["text"]
        else:
            streamed = served.stream("moving", prompt, max_tokens=TOKENS)
            assert (streamed.status, streamed.end) == (200, "done"), streamed
            assert streamed.version is not None
            version, text = streamed.version, streamed.text
        assert text == says[AdapterVersion(version)] * TOKENS
        seen.add(version)

    ask(0)
    with BackgroundLoad(8, ask) as load:
        for count, version in enumerate(versions[1:], start=1):
            faulty.move("moving", version)
            if count % 3:  # overtaken by the next, perhaps before it serves
                time.sleep(0.2)
                continue

            def is_seen(version: AdapterVersion = version) -> bool:
                load.check()
                return version in seen

            until(is_seen, f"version {count}", within_s=20)
    assert len(seen) > 20 / 3
    assert load.num_answered > 100

    def old_ones() -> list[str]:
        return [
            version
            for replica in served.state()["replicas"]
            for version in replica["device"]
            if version in versions[:-1]
        ]

    until(lambda: not old_ones(), "the rows of the old versions are free", within_s=15)


def test_a_new_version_with_a_flipped_byte_leaves_its_predecessor_serving(faulty: Faulty) -> None:
    served = faulty.served
    letter, other = faulty.letters(2)
    good = faulty.publish("damaged", letter, alias=None)
    bad = faulty.publish("damaged", other, alias=None)
    faulty.flip_a_byte(bad)
    faulty.move("damaged", good)

    def ask(number: int) -> None:
        response = served.complete("damaged", PROMPTS[number % len(PROMPTS)], max_tokens=TOKENS)
        assert response.status_code == 200, response.text
        assert response.headers["x-adapter-version"] == good
        assert response.json()["choices"][0]["text"] == letter * TOKENS

    def is_quarantined() -> bool:
        return bad in served.world.registry.quarantined()

    ask(0)
    with BackgroundLoad(4, ask) as load:
        until(lambda: good in served.state()["holders"], "a holder")
        faulty.move("damaged", bad)
        until(is_quarantined, "the damaged version is quarantined", within_s=15)
        before = load.num_answered
        until(lambda: load.num_answered > before + 20, "traffic after it")
    response = served.complete(f"damaged@{bad}", "the")
    assert response.status_code == 503, response.text
    assert response.json()["error"]["code"] == "adapter_corrupt"


def test_a_first_version_with_a_flipped_byte_is_an_error_and_never_the_base(faulty: Faulty) -> None:
    bad = faulty.publish("stillborn", faulty.letters(1), alias=None)
    faulty.flip_a_byte(bad)
    faulty.move("stillborn", bad)
    for _ in range(3):
        response = faulty.served.complete("stillborn", "the")
        assert response.status_code == 503, response.text
        assert response.json()["error"]["code"] == "adapter_corrupt"
        streamed = faulty.served.stream("stillborn", "the")
        assert (streamed.status, streamed.end) == (503, "adapter_corrupt")
    good = faulty.publish("stillborn", faulty.letters(1))

    def is_mended() -> bool:
        response = faulty.served.complete("stillborn", "the")
        return response.headers.get("x-adapter-version") == good

    until(is_mended, "the next version serves", within_s=15)


def test_without_s3_all_that_is_near_is_served_and_the_rest_says_why_not(faulty: Faulty) -> None:
    served = faulty.served
    for number in range(4 * len(RANDOM)):
        faulty.ask_random(number)
    never_asked = faulty.publish("never-asked", faulty.letters(1))
    until(lambda: _serves(served, "never-asked") == never_asked, "the table knows it")
    assert served.state()["registry_error"] is None
    assert set(_registry_gauges(served)) == {1.0}

    tiers: set[str] = set()
    order = random.Random(0)

    def ask(number: int) -> None:
        model, prompt = order.choice(RANDOM), PROMPTS[number % len(PROMPTS)]
        response = served.complete(model, prompt, max_tokens=TOKENS)
        assert served.is_right(response, model, prompt, TOKENS)
        tiers.add(response.headers["x-adapter-tier"])

    faulty.s3.stop()
    stopped_s = time.monotonic()
    try:
        with BackgroundLoad(2, ask) as load:
            until(lambda: served.state()["registry_error"] is not None, "it is told", within_s=15)
            for model in ("never-asked", "never-heard-of"):
                asked_s = time.monotonic()
                response = served.complete(model, "the")
                assert response.status_code == 503, response.text
                error = response.json()["error"]
                assert error["code"] == "registry_unavailable"
                assert "registry" in error["message"]
                assert time.monotonic() - asked_s < 20, "it did not say so, but let its client wait"

            def are_all_near() -> bool:
                load.check()
                return tiers == {"device", "host", "disk"}

            until(are_all_near, "answers from every tier")
            until(lambda: set(_registry_gauges(served)) == {0.0}, "every gauge is down")
            while time.monotonic() - stopped_s < OUTAGE_S:
                load.check()
                time.sleep(0.2)
            assert served.client.get("/health").status_code == 200
    finally:
        faulty.s3.listen()
    until(lambda: served.state()["registry_error"] is None, "it is back", within_s=15)
    until(lambda: set(_registry_gauges(served)) == {1.0}, "every gauge is up", within_s=15)
    until(lambda: served.complete("never-asked", "the").status_code == 200, "it is served")
    newest = faulty.publish("newest", faulty.letters(1))
    until(lambda: served.complete("newest", "the").status_code == 200, "what came after")
    assert served.complete("newest", "the").headers["x-adapter-version"] == newest
    assert served.complete("never-heard-of", "the").status_code == 404


def _kill_through_ray(served: Served) -> None:
    ray.kill(connect(placement_spec(served.world.settings)), no_restart=False)


def _kill_process(served: Served) -> None:
    (process,) = served.processes("PlacementActor")
    process.kill()


@pytest.mark.parametrize("kill", [_kill_through_ray, _kill_process])
def test_a_dead_placement_manager_costs_no_answer_and_is_rebuilt(
    faulty: Faulty, kill: Callable[[Served], None]
) -> None:
    served = faulty.served
    before = served.state()
    with BackgroundLoad(4, faulty.ask_random) as load:
        kill(served)

        def is_back() -> bool:
            load.check()
            with suppress(KeyError):
                state = served.state()
                return state["epoch"] > before["epoch"] and len(state["replicas"]) == 2
            return False

        until(is_back, "a new manager that knows both replicas", within_s=30)
        name = f"after-{kill.__name__.strip('_').replace('_', '-')}"
        version = faulty.publish(name, faulty.letters(1))
        until(lambda: served.complete(name, "the").status_code == 200, "a publish after it")
        assert served.complete(name, "the").headers["x-adapter-version"] == version
        until(lambda: _serves(served, name) == version, "the new manager serves it")
    assert load.num_answered > 0


def test_a_replica_that_fails_at_once_does_not_draw_the_requests_and_comes_back_when_mended(
    faulty: Faulty,
) -> None:
    served = faulty.served

    def ask(number: int) -> tuple[int, str]:
        response = served.complete(BASE_ID, PROMPTS[number % len(PROMPTS)], max_tokens=TOKENS)
        return response.status_code, response.headers.get("x-replica-id", "")

    broken = min(each["id"] for each in served.state()["replicas"])
    with ThreadPoolExecutor(4) as pool:
        with broken_replica(broken):
            statuses = Counter(status for status, _ in pool.map(ask, range(80)))
        assert set(statuses) == {200, 500}, "it was broken, and the other answered"
        assert statuses[500] <= 12, "those of the first moment, and one after each pause"
        until(lambda: (200, broken) in pool.map(ask, range(4)), "it is asked again")


def test_a_killed_replica_costs_no_wrong_answer_and_its_adapters_are_served_elsewhere(
    faulty: Faulty,
) -> None:
    served, long = faulty.served, 80
    asked = [(model, prompt) for prompt in PROMPTS for model in (BASE_ID, *RANDOM)]
    for model, prompt in asked:
        served.expected(prompt, served.versions[model], long)

    def whole(each: tuple[str, str]) -> bool:
        return served.is_right(served.complete(*each, max_tokens=long), *each, max_tokens=long)

    def streamed(each: tuple[str, str]) -> str:
        """`right`, or `broken` off with an error event after a right beginning."""
        model, prompt = each
        seen = served.stream(model, prompt, max_tokens=long)
        expected = served.expected(prompt, served.versions[model], long)
        assert seen.status == 200, seen
        if seen.end == "done":
            assert seen.text == expected
            return "right"
        assert seen.end == "replica_lost" and seen.text and expected.startswith(seen.text), seen
        return "broken"

    def alive() -> set[str]:
        return {each["id"] for each in served.state()["replicas"]}

    def held() -> set[str]:
        return {replica_id for ids in served.state()["holders"].values() for replica_id in ids}

    before = alive()
    assert len(before) == 2
    with ThreadPoolExecutor(2 * len(asked) + 1) as pool:
        both = [(pool.submit(whole, each), pool.submit(streamed, each)) for each in asked]
        until(lambda: any(each["running"] for each in served.state()["replicas"]), "work")
        until(lambda: held() >= before, "each of the two has something that others must take over")
        processes = served.processes("ServeReplica:flora:Engine")
        max(processes, key=lambda process: process.cpu_times().user).kill()

        def is_rehomed() -> bool:
            """Nothing is expected of the dead one any more."""
            left = alive()
            return not before <= left and bool(held()) and held() <= left

        until(is_rehomed, "its adapters have other holders", within_s=5)
        (died,) = before - alive()
        for model in RANDOM:
            response = served.complete(model, "user", max_tokens=TOKENS)
            assert served.is_right(response, model, "user", TOKENS)
            assert response.headers["x-replica-id"] != died
        assert all(answer.result() for answer, _ in both)
        ends = [stream.result() for _, stream in both]
    assert "right" in ends


def _registry_gauges(served: Served) -> list[float]:
    """Of the placement manager and of both replicas: 1 while they can read the registry."""
    names = ("flora_registry_up", "flora_replica_registry_up")
    found = [up for (name, _), up in scrape(served.url).items() if name in names]
    assert len(found) == 3
    return found


def _serves(served: Served, name: str) -> str | None:
    table = {each["name"]: each["version"] for each in served.state()["serving"]}
    return table.get(name)
