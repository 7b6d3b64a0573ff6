"""An object store behind any S3 API that enforces conditional writes.

What may be sent twice is: reads, deletes and unconditional puts are repeated after a failed connection or a server
error. A conditional write is repeated only when the server said that it did not apply it (409, 429, 503): after a
lost answer a second try could lose against the first one and report a defeat that was a victory. Then the caller
gets `StoreUnavailableError`, and the registry's operations are safe to repeat as a whole.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from storage.config import StorageSettings
from storage.errors import InvalidRequestError, StoreUnavailableError
from storage.object_store import (
    ObjectInfo,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoredObject,
    checked_key,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef, ListObjectsV2RequestTypeDef

_Answer = TypeVar("_Answer")

_ATTEMPTS = 8
_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 1.0
_NOT_APPLIED = frozenset({409, 429, 503})
_MAX_CONNECTIONS = 32
_CONNECTING = threading.Lock()


class S3ObjectStore:
    """An `ObjectStore` in `bucket`, below `prefix` (may be empty). Credentials come from boto3's usual chain.

    One `settings.s3_timeout_s` bounds connecting, reading, and how long a failing call goes on being repeated.
    """

    def __init__(self, bucket: str, prefix: str, settings: StorageSettings) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._timeout_s = settings.s3_timeout_s
        try:
            self._client = _connect(settings)
        except ValueError as error:
            raise InvalidRequestError(
                f"the S3 endpoint cannot be used: {error}", param="s3_endpoint_url"
            ) from error

    def get(self, key: str) -> StoredObject:
        def send() -> StoredObject:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(key))
            return StoredObject(answer["Body"].read(), answer["ETag"])

        return self._call(key, send)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        if stop <= start:
            if not self.exists(key):
                raise ObjectNotFoundError(key)
            return b""

        def send() -> bytes:
            answer = self._client.get_object(
                Bucket=self._bucket, Key=self._key(key), Range=f"bytes={start}-{stop - 1}"
            )
            return answer["Body"].read()

        try:
            return self._call(key, send)
        except _RangeBeyondEndError:
            return b""

    def put(self, key: str, data: bytes) -> None:
        self._call(
            key,
            lambda: self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data),
        )

    def put_if_absent(self, key: str, data: bytes) -> str:
        return self._call(
            key,
            lambda: self._client.put_object(
                Bucket=self._bucket, Key=self._key(key), Body=data, IfNoneMatch="*"
            )["ETag"],
            conditional=True,
        )

    def compare_and_swap(self, key: str, data: bytes, etag: str) -> str:
        try:
            return self._call(
                key,
                lambda: self._client.put_object(
                    Bucket=self._bucket, Key=self._key(key), Body=data, IfMatch=etag
                )["ETag"],
                conditional=True,
            )
        except ObjectNotFoundError:
            raise PreconditionFailedError(key) from None

    def exists(self, key: str) -> bool:
        try:
            self._call(
                key, lambda: self._client.head_object(Bucket=self._bucket, Key=self._key(key))
            )
        except ObjectNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        token: str | None = None
        while True:
            # Page by page, not boto3's paginator: that one ends early when a failed page is asked for again.
            page = self._call(prefix, partial(self._page, prefix, token))
            for entry in page.get("Contents", []):
                yield ObjectInfo(
                    key=entry["Key"].removeprefix(self._prefix),
                    num_bytes=entry["Size"],
                    modified_s=entry["LastModified"].timestamp(),
                    stamp=entry["ETag"],
                )
            if not page["IsTruncated"]:
                return
            token = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        self._call(key, lambda: self._client.delete_object(Bucket=self._bucket, Key=self._key(key)))

    def _page(self, prefix: str, token: str | None) -> ListObjectsV2OutputTypeDef:
        where: ListObjectsV2RequestTypeDef = {
            "Bucket": self._bucket,
            "Prefix": self._prefix + prefix,
        }
        if token is not None:
            where["ContinuationToken"] = token
        return self._client.list_objects_v2(**where)

    def _key(self, key: str) -> str:
        return self._prefix + checked_key(key)

    def _call(self, key: str, send: Callable[[], _Answer], *, conditional: bool = False) -> _Answer:
        deadline = time.monotonic() + self._timeout_s
        for attempt in range(_ATTEMPTS):
            failure: ClientError | BotoCoreError
            try:
                return send()
            except NoCredentialsError as error:
                raise self._unavailable(error) from error
            except ClientError as error:
                status = int(error.response["ResponseMetadata"]["HTTPStatusCode"])
                self._raise_answer(key, status, error)
                if status not in _NOT_APPLIED and (conditional or status < 500):
                    raise self._unavailable(error) from error
                failure = error
            except BotoCoreError as error:
                if conditional:
                    raise self._unavailable(error) from error
                failure = error
            delay_s = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2**attempt) * random.uniform(0.5, 1)
            if attempt == _ATTEMPTS - 1 or time.monotonic() + delay_s > deadline:
                break
            time.sleep(delay_s)
        raise self._unavailable(failure) from failure

    @staticmethod
    def _raise_answer(key: str, status: int, error: ClientError) -> None:
        """Raise what the server's answer means when it is about the object and not about the server."""
        code = error.response["Error"]["Code"]
        if status == 404 and code != "NoSuchBucket":
            raise ObjectNotFoundError(key) from None
        if status == 412:
            raise PreconditionFailedError(key) from None
        if status == 416:
            raise _RangeBeyondEndError(key) from None

    def _unavailable(self, error: ClientError | BotoCoreError) -> StoreUnavailableError:
        where = f"the S3 bucket {self._bucket!r}"
        if isinstance(error, NoCredentialsError):
            return StoreUnavailableError(
                f"{where} needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            )
        if isinstance(error, ClientError):
            code = error.response["Error"]["Code"]
            if code == "NoSuchBucket":
                return StoreUnavailableError(f"{where} does not exist; create it first")
            return StoreUnavailableError(f"{where} answered {code}")
        return StoreUnavailableError(f"{where} cannot be reached: {error}")


def _connect(settings: StorageSettings) -> S3Client:
    config = Config(
        connect_timeout=settings.s3_timeout_s,
        read_timeout=settings.s3_timeout_s,
        max_pool_connections=_MAX_CONNECTIONS,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": settings.s3_addressing},
        # The registry checks digests itself; many S3 servers refuse the newer checksum headers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # Clients may be shared between threads, the session that makes them may not.
    with _CONNECTING:
        return boto3.client(
            "s3",
            endpoint_url=settings.s3_endpoint_url,
            region_name=settings.s3_region,
            config=config,
        )


class _RangeBeyondEndError(Exception):
    """The object ends before the first byte that was asked for."""
