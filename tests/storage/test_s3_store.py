"""What only S3 does: fail in the middle, and be somewhere else."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from storage.config import StorageSettings
from storage.errors import InvalidRequestError, StoreUnavailableError
from storage.object_store import ObjectStore
from storage.s3_store import S3ObjectStore
from storage.stores import open_store
from tests.storage.s3_server import Failure, S3Server

_CONFLICT = Failure("409 Conflict", "ConditionalRequestConflict")
_SLOW_DOWN = Failure("503 Slow Down", "SlowDown")
_BROKEN = Failure("500 Internal Server Error", "InternalError")


@pytest.fixture
def s3(s3_settings: StorageSettings, s3_api: S3Server) -> Iterator[ObjectStore]:
    store = open_store(s3_settings)
    s3_api.requests.clear()
    yield store
    s3_api.failures.clear()


@pytest.mark.parametrize("failure", [_CONFLICT, _SLOW_DOWN])
def test_a_conditional_write_the_server_did_not_apply_is_sent_again(
    s3: ObjectStore, s3_api: S3Server, failure: Failure
) -> None:
    s3_api.failures.extend([failure, failure])
    etag = s3.put_if_absent("a", b"1")
    s3_api.failures.extend([failure, failure])
    s3.compare_and_swap("a", b"2", etag)
    assert s3_api.requests == ["PUT"] * 6
    assert s3.get("a").data == b"2"


def test_a_conflict_that_does_not_end_is_given_up(s3: ObjectStore, s3_api: S3Server) -> None:
    s3_api.failures.extend([_CONFLICT] * 20)
    with pytest.raises(StoreUnavailableError, match="ConditionalRequestConflict"):
        s3.put_if_absent("a", b"1")
    assert 2 <= len(s3_api.requests) <= 10


@pytest.mark.parametrize(
    "lost",
    [Failure("500 Internal Server Error", "InternalError", applied=True), Failure(applied=True)],
    ids=["error", "hung-up"],
)
def test_a_conditional_write_whose_answer_was_lost_is_not_reported_as_lost_to_another(
    s3: ObjectStore, s3_api: S3Server, lost: Failure
) -> None:
    s3_api.failures.append(lost)
    with pytest.raises(StoreUnavailableError):
        s3.put_if_absent("a", b"1")
    assert s3_api.requests == ["PUT"]
    stored = s3.get("a")
    assert stored.data == b"1"
    s3_api.failures.append(lost)
    with pytest.raises(StoreUnavailableError):
        s3.compare_and_swap("a", b"2", stored.etag)
    assert s3.get("a").data == b"2"


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.get("a").data,
        lambda store: store.get_range("a", 0, 9),
        lambda store: store.exists("a") and b"1",
        lambda store: store.put("a", b"1") or b"1",
        lambda store: store.delete("b") or b"1",
        lambda store: b"".join(b"1" for _ in store.list("")),
    ],
)
def test_what_may_be_repeated_is_repeated_after_a_server_error(
    s3: ObjectStore, s3_api: S3Server, call: Callable[[ObjectStore], bytes]
) -> None:
    s3.put("a", b"1")
    s3_api.failures.extend([_BROKEN, _SLOW_DOWN, Failure()])
    assert call(s3) == b"1"


def test_a_listing_whose_second_page_fails_is_still_complete(
    s3: ObjectStore, s3_api: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    for number in range(8):
        s3.put(f"many/{number}", b"")
    listed = s3.list("many/")
    seen = [next(listed).key for _ in range(3)]
    s3_api.failures.append(_BROKEN)
    seen += [entry.key for entry in listed]
    assert seen == [f"many/{number}" for number in range(8)]
    assert s3_api.requests.count("GET") == 4


def test_a_refusal_is_not_repeated(s3: ObjectStore, s3_api: S3Server) -> None:
    s3_api.failures.append(Failure("403 Forbidden", "AccessDenied"))
    with pytest.raises(StoreUnavailableError, match="answered AccessDenied"):
        s3.get("a")
    assert s3_api.requests == ["GET"]


def test_two_prefixes_of_one_bucket_do_not_see_each_other(s3_settings: StorageSettings) -> None:
    bucket = s3_settings.registry.removeprefix("s3://").partition("/")[0]
    stores = [S3ObjectStore(bucket, prefix, s3_settings) for prefix in ("", "one", "/two/deep/")]
    for number, store in enumerate(stores[1:]):
        store.put("a", b"%d" % number)
    assert [store.get("a").data for store in stores[1:]] == [b"0", b"1"]
    assert [entry.key for entry in stores[1].list("")] == ["a"]
    assert [entry.key for entry in stores[0].list("")] == ["one/a", "two/deep/a"]


def test_a_missing_bucket_is_told_as_such(s3_settings: StorageSettings) -> None:
    settings = s3_settings.model_copy(update={"registry": "s3://no-such-bucket"})
    with pytest.raises(StoreUnavailableError, match="'no-such-bucket' does not exist"):
        open_store(settings)


def test_a_server_that_is_not_there_is_told_within_the_timeout() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    store = S3ObjectStore("bucket", "", StorageSettings(s3_endpoint_url=url, s3_timeout_s=1.0))
    for call in (lambda: store.get("a"), lambda: store.put_if_absent("a", b"")):
        with pytest.raises(StoreUnavailableError, match="cannot be reached"):
            call()


def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = S3ObjectStore("bucket", "", StorageSettings(s3_endpoint_url=url, s3_timeout_s=0.3))
        with pytest.raises(StoreUnavailableError, match="cannot be reached"):
            store.get("a")


def test_missing_credentials_are_told_as_such(
    s3_settings: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreUnavailableError, match="set AWS_ACCESS_KEY_ID"):
        open_store(s3_settings)


def test_an_endpoint_that_is_no_url_is_refused_by_its_field() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        S3ObjectStore("bucket", "", StorageSettings(s3_endpoint_url="not a url"))
    assert refused.value.param == "s3_endpoint_url"


def test_virtual_addressing_puts_the_bucket_into_the_host(
    s3_settings: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    resolve = socket.getaddrinfo

    def resolve_localhost(host: str, *rest: Any, **named: Any) -> Any:
        asked.append(host)
        return resolve("127.0.0.1" if host.endswith(".localhost") else host, *rest, **named)

    # Not every system resolves names below localhost.
    monkeypatch.setattr(socket, "getaddrinfo", resolve_localhost)
    assert s3_settings.s3_endpoint_url is not None
    settings = s3_settings.model_copy(
        update={
            "s3_addressing": "virtual",
            "s3_endpoint_url": s3_settings.s3_endpoint_url.replace("127.0.0.1", "localhost"),
        }
    )
    store = open_store(settings)
    store.put_if_absent("a", b"1")
    bucket = settings.registry.split("/")[2]
    assert asked[-1] == f"{bucket}.localhost"
    # The other way of addressing finds the same object.
    assert open_store(s3_settings).get("a").data == b"1"
